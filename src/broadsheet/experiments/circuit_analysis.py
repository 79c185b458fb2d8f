"""Circuit analysis of multiple choice, measured: hand-built circuits, a model trained on the spot, and the user's own.

``small`` needs no data: sums on tiny models of five architectures, two hand-built models whose letter head and its
feature are known, and a three-layer model that learns in seconds which label a word of a list has. ``full`` adds the
user's Hugging Face model with MMLU's questions, or with made-up ones.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from broadsheet.data.choices import ChoiceBatch, LabelledLists
from broadsheet.data.planted_choice import PlantedChoice
from broadsheet.data.questions import TEMPLATES, MultipleChoiceSet, load_mmlu, synthetic_questions
from broadsheet.errors import DataMissing, InvalidInput
from broadsheet.interpretability.circuit_analysis.attention import (
    KINDS,
    AttentionTable,
    HeadCategories,
    attention_table,
    categorise_heads,
)
from broadsheet.interpretability.circuit_analysis.compression import (
    Compression,
    RankCurve,
    compress_heads,
    rank_curve,
)
from broadsheet.interpretability.circuit_analysis.effects import logit_attribution, patch_effects
from broadsheet.interpretability.circuit_analysis.features import FeatureTest, feature_test
from broadsheet.interpretability.circuit_analysis.figures import (
    KIND_COLOURS,
    attribution_bars,
    direct_total,
    scatter,
    short,
)
from broadsheet.interpretability.circuit_analysis.outputs import output_nodes
from broadsheet.interpretability.circuit_analysis.skill import answered
from broadsheet.interpretability.circuit_analysis.substitution import collect
from broadsheet.lab import Context, Plate
from broadsheet.nn.attribution import direct_parts, parse_node
from broadsheet.nn.plotting import COLOURS, CYCLE, band, new_figure, style
from broadsheet.nn.small_lm import small_language_model, train_language_model
from broadsheet.nn.tiny_models import VOCAB, tiny_inputs, tiny_model

FAMILIES = ("gpt2", "neox-parallel", "llama", "qwen3", "gemma2")
TRAIN: dict[str, Any] = {"words": 6, "width": 64, "hidden": 64, "layers": 3, "heads": 4, "steps": 320, "rounds": 4,
                         "batch": 64, "lr": 4e-3}  # fmt: skip
SKILLED = 0.99
ORDERS = ("ordered", "rotated", "shuffled", "random")
TEST, FIT, PLANTED = 200, 500, 96
RANKS = (0, 1, 2, 3, 4, 6)
RECOVER = 0.95
FULL: dict[str, Any] = {"questions": 256, "batch": 32, "templates": ("brackets", "dots", "square")}
FEATURES = ("nth_item", "token")


def run(ctx: Context) -> dict:
    """All claims of one seed."""
    # The user's model comes first: files that are missing are said before the work, not after it.
    record = {"own": _own(ctx)} if ctx.preset == "full" else {}
    return {**record, "sums": _sums(ctx), "planted": _planted(ctx), "trained": _trained(ctx)}


# ------------------------------------------------------------------------------------------------- known answers


def _sums(ctx: Context) -> dict[str, float]:
    errors = {}
    for family in FAMILIES:
        model: Any = tiny_model(family, seed=ctx.seed).to(ctx.device)
        ids = tiny_inputs(family, batch=8, seed=ctx.seed).to(ctx.device)
        shares = direct_parts(model, ids).attribute(torch.arange(VOCAB))
        with torch.no_grad():
            logits = model(ids).logits[:, -1]
        cap = getattr(model.config, "final_logit_softcapping", None)
        logits = logits if cap is None else torch.atanh(logits / cap) * cap
        errors[family] = float((shares.total - shares.rounding - logits).abs().max())
    ctx.measure("shares-add-up", ours=max(errors.values()), **errors)
    return errors


def _auc(scores: Tensor, names: list[str], true: tuple[str, ...]) -> float:
    return float(roc_auc_score([name in true for name in names], scores.double().cpu().numpy()))


def _planted(ctx: Context) -> dict[str, Any]:
    lists = LabelledLists(n_words=TRAIN["words"])
    letter, total, direct, told = [], [], [], {}
    for feature in FEATURES:
        model = PlantedChoice(lists, feature, seed=ctx.seed).to(ctx.device)
        shuffled, fit = (
            lists.sample(n, "shuffled", seed=10 * ctx.seed + i).to(ctx.device)
            for i, n in enumerate((PLANTED, 3 * PLANTED))
        )
        # Shuffled: where labels never move, their mean is as good as the label itself.
        effects = patch_effects(model, shuffled, ablation="mean", positions="all")
        excess = categorise_heads(attention_table(model, shuffled)).excess.flatten()
        names = list(effects.nodes)
        letter += [_auc(score, names, (model.letter_head,)) for score in (excess, effects.direct)]
        total.append(_auc(effects.total, names, model.true_nodes))
        direct.append(_auc(effects.direct, names, model.true_nodes))
        told[feature] = {
            other: feature_test(model, [model.letter_head], other, shuffled, fit).recovered for other in FEATURES
        }
    ctx.measure("planted-letter-head", ours=min(letter))
    ctx.measure("planted-circuit-needs-total", ours=float(np.mean(total)), baseline=float(np.mean(direct)))
    margins = [told[a][a] - told[a][b] for a, b in (FEATURES, FEATURES[::-1])]
    ctx.measure("planted-feature-told", ours=min(margins))
    return {"recovered": told, "auc": {"letter": letter, "total": total, "direct": direct}}


# ------------------------------------------------------------------------------------------------- the trained model


def train_letter_model(ctx: Context, lists: LabelledLists) -> nn.Module:
    """A small GPT-2 that has learned which label a word of a list has; half of the lists ordered, half random.

    Most seeds learn it in one round of training. Some wait on a plateau, where they name labels by place alone: they
    get further rounds, so that what is analysed is a model that can do the task.
    """
    model = small_language_model(
        lists.vocab_size, kind="gpt2", width=TRAIN["width"], layers=TRAIN["layers"], heads=TRAIN["heads"],
        hidden=TRAIN["hidden"], length=lists.length + 1, seed=ctx.seed,
        initializer_range=TRAIN["width"] ** -0.5,  # GPT-2's own 0.02 is for much wider models: five times the steps
    ).to(ctx.device)  # fmt: skip
    checks = [lists.sample(200, order, seed=7 * ctx.seed + 5).to(ctx.device) for order in ORDERS]
    for turn in range(TRAIN["rounds"]):
        train_language_model(
            model, lists.training, steps=TRAIN["steps"], batch=TRAIN["batch"], lr=TRAIN["lr"],
            seed=ctx.seed + 1000 * turn, checkpoint=ctx.checkpoint / f"letters-{turn}", progress=ctx.progress,
            description="training a small GPT-2 on lists",
        )  # fmt: skip
        if min(float(answered(model, batch).double().mean()) for batch in checks) >= SKILLED:
            break
    return model


def letter_heads(table: AttentionTable, kinds: HeadCategories) -> list[str]:
    """The correct-letter heads; where a model has none, the head that comes closest to one."""
    found = kinds.named("correct_letter")
    if found:
        return found
    best = int(kinds.excess.argmax())
    heads = kinds.excess.shape[1]
    return [f"layers.{best // heads}.attn.head.{best % heads}"]


def _trained(ctx: Context) -> dict[str, Any]:
    lists = LabelledLists(n_words=TRAIN["words"])
    model = train_letter_model(ctx, lists)
    base = 1000 * (ctx.seed + 1)
    tests = {o: lists.sample(TEST, o, seed=base + i).to(ctx.device) for i, o in enumerate(ORDERS)}
    fits = {o: lists.sample(FIT, o, seed=base + 10 + i).to(ctx.device) for i, o in enumerate(ORDERS)}
    corrupt = {o: lists.corrupted(tests[o], seed=base) for o in ("ordered", "shuffled")}
    accuracy = {o: float(answered(model, b).double().mean()) for o, b in tests.items()}

    table = attention_table(model, tests["ordered"])
    shares = logit_attribution(model, tests["ordered"])
    kinds = categorise_heads(table, shares)
    heads = letter_heads(table, kinds)
    curve = rank_curve(
        model, heads, fits["ordered"], tests, RANKS, bases=("class_means", "random"), seed=ctx.seed,
        progress=ctx.progress,
    )  # fmt: skip
    at = {basis: {o: _accuracies(curve, o, basis) for o in ORDERS} for basis in ("class_means", "random")}
    three, none = RANKS.index(3), RANKS.index(0)
    full = {o: curve.full[o].accuracy for o in ORDERS}
    means, random = at["class_means"], at["random"]
    ctx.measure("three-dimensions-enough", ours=means["ordered"][three], baseline=full["ordered"])
    ctx.measure("three-dimensions-needed", ours=means["shuffled"][three], baseline=means["shuffled"][none])
    ctx.measure("random-subspace-fails", ours=means["shuffled"][three], baseline=random["shuffled"][three])
    lost = {o: full[o] - means[o][three] for o in ("ordered", "random")}
    ctx.measure("random-labels-lose-more", ours=lost["random"], baseline=lost["ordered"])

    recovered = {
        source: {
            o: {f: _recovered(feature_test(model, heads, f, tests[o], fits[o if source == "own" else source]))
                for f in FEATURES}
            for o in ORDERS[1:]
        }
        for source in ("own", "ordered")
    }  # fmt: skip
    ctx.measure(
        "item-not-letter", ours=recovered["own"]["shuffled"]["nth_item"], baseline=recovered["own"]["shuffled"]["token"]
    )
    ctx.measure("item-story-is-partial", ours=recovered["ordered"]["random"]["nth_item"])

    effects = {o: patch_effects(model, tests[o], corrupt[o]) for o in corrupt}
    outputs = _outputs(ctx, model, tests["shuffled"], corrupt["shuffled"], effects["shuffled"])
    rows = effects["ordered"]
    direct, total = rows.direct.double(), rows.total.double()
    is_mlp = torch.tensor([name.endswith("mlp") for name in rows.nodes], device=direct.device)
    chosen = is_mlp & (direct > 0) if bool((is_mlp & (direct > 0)).any()) else is_mlp
    ctx.measure("self-repair", ours=float(total[chosen].mean()), baseline=float(direct[chosen].mean()))
    shuffled = effects["shuffled"].to_frame().set_index("node")
    strongest = str(shuffled.loc[heads, "direct"].idxmax())
    one = compress_heads(model, [strongest], fits["ordered"], rank=0).evaluate(tests["shuffled"]).accuracy
    ctx.measure("one-head-is-masked", ours=means["shuffled"][none], baseline=one)
    return {
        "accuracy": accuracy,
        "heads": heads,
        "kinds": [[KINDS[i] for i in row] for row in kinds.kind.tolist()],
        "excess": kinds.excess.tolist(),
        "maps": _maps(table, lists, heads, shares.direct_effect),
        "curve": {basis: {o: _accuracies(curve, o, basis) for o in ORDERS} for basis in ("class_means", "random")},
        "attention": {o: [s.attention for s in curve.scores[o]["class_means"]] for o in ORDERS},
        "explained": curve.scores["ordered"]["class_means"][three].explained,
        "full": full,
        "recovered": recovered,
        "outputs": outputs,
        "effects": {o: e.to_frame().to_dict("list") for o, e in effects.items()},
        "points": _points(model, strongest, fits["ordered"], tests),
        "strongest": strongest,
        "one_head": one,
    }


def _recovered(test: FeatureTest) -> float:
    """Share of the loss recovered; 0 where the heads do not matter, so that there is nothing to recover."""
    return 0.0 if math.isnan(test.recovered) else test.recovered


def _accuracies(curve: RankCurve, order: str, basis: str) -> list[float]:
    return [score.accuracy for score in curve.scores[order][basis]]


def _outputs(ctx: Context, model: nn.Module, clean: ChoiceBatch, corrupt: ChoiceBatch, effects: Any) -> dict[str, Any]:
    table = effects.to_frame()
    by_total = table.sort_values("total", ascending=False)["node"].tolist()
    found = {
        "direct": output_nodes(model, clean, corrupt, RECOVER),
        "iterated": output_nodes(model, clean, corrupt, RECOVER, search="iterated"),
        "total": output_nodes(model, clean, corrupt, RECOVER, order=by_total),
    }
    counts = {name: max(1, f.n) for name, f in found.items()}
    ctx.measure("few-output-nodes", ours=counts["direct"] / len(table))
    ctx.measure("direct-ranks-outputs", ours=counts["direct"], baseline=counts["total"])
    ctx.measure("search-beats-ranking", ours=counts["iterated"], baseline=counts["direct"])
    return {
        "counts": counts,
        "curves": {name: f.accuracy.tolist() for name, f in found.items()},
        "chosen": list(found["direct"].chosen),
    }


def _maps(table: AttentionTable, lists: LabelledLists, heads: list[str], direct: Tensor) -> dict[str, Any]:
    """Attention of one prompt by some heads of every kind, and each head's mean on the labels by right item."""
    prompt = int((table.batch.answer == 2).nonzero()[0]) if bool((table.batch.answer == 2).any()) else 0
    rows = table.rows[prompt].flatten(0, 1)
    return {
        "tokens": lists.text(table.batch.input_ids[prompt]).split(),
        "labels": table.batch.label_pos[prompt].tolist(),
        "answer": int(table.batch.answer[prompt]),
        "rows": rows.tolist(),
        "direct": direct.flatten().tolist(),
        "letter": heads,
    }


def _points(model: nn.Module, head: str, fit: ChoiceBatch, tests: dict[str, ChoiceBatch]) -> dict[str, Any]:
    """Queries and keys of one head in three dimensions, for the scatter."""
    space: Compression = compress_heads(model, [head], fit, rank=3)
    layer, number = parse_node(head)
    key = (layer, number or 0)
    found = {}
    for order in ("ordered", "random"):
        batch = tests[order].select(slice(0, 100))
        samples = collect(model, [head], batch, warn=False)
        found[order] = {
            "q": space.spaces[(*key, "q")].coordinates(samples.q[key]).tolist(),
            "k": space.spaces[(*key, "k")].coordinates(samples.k[key]).tolist(),
            "answer": batch.answer.tolist(),
        }
    return found


# ------------------------------------------------------------------------------------------------- the user's model


def _own(ctx: Context) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(ctx.data_dir) / "circuit-analysis"
    if not (folder / "model" / "config.json").is_file():
        raise DataMissing(
            f"{folder / 'model'}: no Hugging Face model with its tokenizer (hf download Qwen/Qwen2.5-1.5B-Instruct "
            f"--local-dir {folder / 'model'}, or a link to one that you have). Questions of MMLU go to "
            f"{folder / 'mmlu'} as .csv or .json (people.eecs.berkeley.edu/~hendrycks/data.tar, its folder test); "
            "without them made-up questions are asked"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", local_files_only=True, dtype="auto")
    model = model.to(ctx.device).eval()
    mmlu = folder / "mmlu"
    questions = load_mmlu(mmlu) if mmlu.is_dir() else synthetic_questions(4 * FULL["questions"], seed=ctx.seed)
    questions = [question for question in questions if len(question.options) == 4]
    order = np.random.default_rng(ctx.seed).permutation(len(questions))[: 4 * FULL["questions"]]
    chosen = [questions[i] for i in order]
    prompts = _first_template(chosen, tokenizer)
    right: list[bool] = []
    with ctx.progress.task("questions answered", len(prompts)) as task:
        for start in range(0, len(prompts), FULL["batch"]):
            part = prompts.select(range(start, min(start + FULL["batch"], len(prompts))))
            right += answered(model, part.batch.to(ctx.device)).tolist()
            task.advance(len(part))
    known = _even(prompts, [i for i, good in enumerate(right) if good])
    # A model that knows nothing, or says one letter only, is measured all the same: the method warns of it.
    known = known if len(known) >= 16 else _even(prompts, range(len(prompts)))
    kept = _alike(prompts.select(known[: FULL["questions"]]))
    half = len(kept) // 2
    fit, test = kept.select(range(half)), kept.select(range(half, len(kept)))
    one, other = (s.batch.to(ctx.device) for s in (test, test.corrupted(seed=ctx.seed)))
    table = attention_table(model, one)
    shares = logit_attribution(model, one)
    kinds = categorise_heads(table, shares)
    heads = letter_heads(table, kinds)
    compression = compress_heads(model, heads, fit.batch.to(ctx.device), rank=3)
    plain = compression.evaluate(one, compressed=False).accuracy
    ctx.measure("own-model-three-dimensions", ours=compression.evaluate(one).accuracy, baseline=plain)
    outputs = output_nodes(model, one, other, RECOVER, progress=ctx.progress)
    ctx.measure("own-model-output-nodes", ours=outputs.n / len(outputs.nodes))
    mutated = {}
    for kind in ("shuffled", "rotated", "random_letters", "digits"):
        try:
            batch = test.mutate(kind, seed=ctx.seed).batch.to(ctx.device)
        except InvalidInput:
            continue  # labels of more than one token in this tokenizer
        mutated[kind] = [compression.evaluate(batch, compressed=c).accuracy for c in (False, True)]
    return {
        "accuracy": float(np.mean(right)), "heads": heads, "curve": outputs.accuracy.tolist(), "n": outputs.n,
        "nodes": shares.names, "direct": shares.effects().mean(0).tolist(), "mutated": mutated,
        "ordered": [plain, compression.evaluate(one).accuracy],
    }  # fmt: skip


def _even(prompts: MultipleChoiceSet, numbers: Iterable[int]) -> list[int]:
    """Numbers of questions, those of every right item as often, item after item."""
    by_item: list[list[int]] = [[] for _ in range(prompts.batch.n_items)]
    for i in numbers:
        by_item[prompts.questions[i].answer].append(i)
    return [i for row in zip(*by_item, strict=False) for i in row]


def _first_template(questions: list, tokenizer: Any) -> MultipleChoiceSet:
    error: InvalidInput | None = None
    for name in (*FULL["templates"], *TEMPLATES):
        try:
            return MultipleChoiceSet(questions, tokenizer, template=name)
        except InvalidInput as found:
            error = found
    raise error or InvalidInput("no template")


def _alike(prompts: MultipleChoiceSet) -> MultipleChoiceSet:
    """The questions whose options can be moved around without changing their length."""
    keep = []
    for i in range(len(prompts)):
        try:
            prompts.select([i]).corrupted()
        except InvalidInput:
            continue
        keep.append(i)
    return prompts.select(keep)


# ------------------------------------------------------------------------------------------------- figures

NAMES = {"ordered": "A B C D", "rotated": "rotated", "shuffled": "shuffled", "random": "random letters"}
LINES = {"ordered": CYCLE[1], "rotated": CYCLE[5], "shuffled": CYCLE[2], "random": CYCLE[0]}


def draw(records: list[dict]) -> list[Plate]:
    """Figures from the records of all seeds."""
    trained = [r["trained"] for r in records]
    with style():
        plates = [
            _draw_outputs(trained),
            _draw_direct(trained[0]),
            _draw_attention(trained[0]),
            _draw_ranks(trained),
            _draw_points(trained[0]),
            _draw_features(records),
        ]
        if all("own" in r for r in records):
            plates.append(_draw_own(records[0]["own"]))
    return plates


def _draw_outputs(records: list[dict]) -> Plate:
    figure, ax = new_figure(6.4, 3.9)
    kinds = {
        "total": ("ranked by total effect", COLOURS["baseline"], "-"),
        "direct": ("ranked by direct effect", COLOURS["ours"], "-"),
        "iterated": ("taken one by one", COLOURS["accent"], (0, (2, 2))),
    }
    for name, (label, colour, line) in kinds.items():
        rows = [r["outputs"]["curves"][name] for r in records]
        band(ax, range(len(rows[0])), rows, colour, label, marker="o", markersize=3.5, linestyle=line)
    ax.axhline(RECOVER, color=COLOURS["neutral"], linewidth=0.8, linestyle=":")
    ax.set(xlabel="parts that act directly, of 12 heads and 3 MLPs", ylabel="accuracy", ylim=(-0.03, 1.05))
    ax.set_title("How few parts write the letter")
    ax.legend(loc="lower right")
    caption = (
        "Accuracy on shuffled labels when only the first parts of a ranking contribute to the answer as they "
        "should, and all others as for another question; means over the seeds, bands span them."
    )
    return Plate("output-nodes", figure, caption)


def _draw_direct(record: dict) -> Plate:
    figure, axes = new_figure(9.6, 4.2, 2)
    table = record["effects"]["shuffled"]
    attribution_bars(table["node"], table["direct"], axes[0], k=12)
    axes[0].set_title("Who writes the letter")
    direct_total(table["node"], table["direct"], table["total"], axes[1], named=6)
    axes[1].set_title("Direct and total effects")
    caption = (
        "The trained model, first seed, shuffled labels. Left: the parts (layer.head, or MLP) with the largest direct "
        "effect on the right answer's logit. Right: the same against what replacing the part costs; below the dotted "
        "line later parts make up for it, far above it a part acts through others."
    )
    return Plate("direct-effects", figure, caption)


def _draw_attention(record: dict) -> Plate:
    from matplotlib.patches import Patch, Rectangle

    maps = record["maps"]
    rows = np.array(maps["rows"])
    kinds = [kind for row in record["kinds"] for kind in row]
    per = len(record["kinds"][0])
    order = sorted(range(len(kinds)), key=lambda i: (KINDS.index(kinds[i]), -maps["direct"][i]))
    figure, ax = new_figure(8.4, 0.33 * len(order) + 1.6)
    image = ax.imshow(rows[order], cmap="Reds", vmin=0, vmax=1, aspect="auto")
    ax.set_xticks(range(rows.shape[1]), maps["tokens"])
    ax.set_yticks(range(len(order)), [f"{i // per}.{i % per}" for i in order])
    for tick, i in zip(ax.get_yticklabels(), order, strict=True):
        tick.set_color(KIND_COLOURS[kinds[i]] if kinds[i] != "other" else COLOURS["neutral"])
        tick.set_fontweight("bold" if kinds[i] != "other" else "normal")
    right = maps["labels"][maps["answer"]] - 0.5
    ax.add_patch(Rectangle((right, -0.5), 1, len(order), fill=False, edgecolor=COLOURS["ours"], linewidth=2, zorder=3))
    breaks = [j for j in range(1, len(order)) if kinds[order[j]] != kinds[order[j - 1]]]
    for j in breaks:
        ax.axhline(j - 0.5, color=COLOURS["neutral"], linewidth=1)
    ax.grid(visible=False)
    ax.set(xlabel="token", ylabel="layer.head")
    ax.set_title("What each head reads when the answer is due")
    present = [kind for kind in KINDS if kind in kinds]
    colours = {kind: KIND_COLOURS[kind] if kind != "other" else COLOURS["neutral"] for kind in present}
    figure.colorbar(image, ax=ax, label="attention", shrink=0.9, pad=0.01)
    figure.legend(
        handles=[Patch(color=colours[kind], label=kind.replace("_", " ")) for kind in present],
        loc="outside lower center", ncols=len(present),
    )  # fmt: skip
    caption = (
        "Attention of the last token in one ordinary prompt, heads sorted by kind (first seed). The red frame is the "
        "label of the right item: letter heads look straight at it."
    )
    return Plate("attention", figure, caption)


def _draw_ranks(records: list[dict]) -> Plate:
    figure, axes = new_figure(9.6, 3.9, 2, sharey=True)
    for ax, basis, title in zip(
        axes, ("class_means", "random"), ("Directions of the class means", "Random directions"), strict=True
    ):
        for order, colour in LINES.items():
            rows = [r["curve"][basis][order] for r in records]
            band(ax, RANKS, rows, colour, NAMES[order], marker="o", markersize=4)
        ax.axvline(3, color=COLOURS["neutral"], linewidth=0.8, linestyle=":")
        ax.set_xticks(RANKS)
        ax.set(xlabel="dimensions of queries and keys", ylim=(-0.03, 1.05))
        ax.set_title(title)
    axes[0].set_ylabel("accuracy")
    axes[1].legend(loc="lower right", title="labels")
    caption = (
        "All letter heads squeezed at once, subspaces fitted on ordered labels only; means over the seeds, bands span "
        "them. With ordered labels the model gets along without these heads; where labels are moved it fails, and "
        "three dimensions, one fewer than items, bring everything back."
    )
    return Plate("ranks", figure, caption)


def _draw_points(record: dict) -> Plate:
    figure, axes = new_figure(10.0, 4.8, 2, subplot_kw={"projection": "3d"})
    for i, (ax, (order, points)) in enumerate(zip(axes, record["points"].items(), strict=True)):
        q, k, answer = (torch.tensor(points[name]) for name in ("q", "k", "answer"))
        n, items = k.shape[:2]
        batch = ChoiceBatch(torch.arange(items).expand(n, -1), torch.arange(items).expand(n, -1), answer,
                            torch.arange(items).expand(n, -1))  # fmt: skip
        scatter(q, k, batch, ax)
        ax.set_title(NAMES[order])
        if i:
            ax.get_legend().remove()
        else:
            ax.get_legend().set_bbox_to_anchor((-0.02, 1.0))
    caption = (
        f"Head {short(record['strongest'])} (first seed): queries of the last token (crosses) and keys of the labels "
        "(dots) in the three dimensions fitted on ordered labels, each in units of its own mean length. Colours are "
        "the item's place in the list: under random letters the clusters stay where they were."
    )
    return Plate("queries-and-keys", figure, caption)


def _draw_features(records: list[dict]) -> Plate:
    figure, axes = new_figure(9.6, 3.8, 2, sharey=True)
    colours = {"nth_item": COLOURS["ours"], "token": COLOURS["baseline"]}
    labels = {"nth_item": "Nth item", "token": "letter"}
    groups = [
        ("Hand-built models", [r["planted"]["recovered"] for r in records],
         {"nth_item": "goes by place", "token": "goes by letter"}),
        ("Trained model", [r["trained"]["recovered"]["own"] for r in records],
         {o: NAMES[o] for o in ORDERS[1:]}),
    ]  # fmt: skip
    for ax, (title, found, names) in zip(axes, groups, strict=True):
        for j, (feature, colour) in enumerate(colours.items()):
            values = np.array([[f[name][feature] for name in names] for f in found], dtype=float)
            x = np.arange(len(names)) + (j - 0.5) * 0.36
            ax.bar(x, np.nanmean(values, 0), 0.34, color=colour, label=labels[feature])
            for row in values:
                ax.plot(
                    x, row, linestyle="", marker="o", markersize=3, color="white", markeredgecolor=COLOURS["neutral"]
                )
        ax.axhline(0, color=COLOURS["neutral"], linewidth=0.8)
        ax.axhline(1, color=COLOURS["neutral"], linewidth=0.8, linestyle=":")
        ax.set_xticks(range(len(names)), list(names.values()))
        ax.set_title(title)
    axes[0].set_ylabel("share of the loss recovered")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, title="queries and keys replaced by"
    )
    caption = (
        "Queries and keys of the letter heads replaced by the mean of their class, the place in the list or the "
        "letter: share of the loss won back over no information at all. Bars are means, dots seeds. Left: shuffled "
        "labels, models whose feature is known."
    )
    return Plate("features", figure, caption)


def _draw_own(record: dict) -> Plate:
    figure, axes = new_figure(10.4, 3.9, 2)
    axes[0].plot(record["curve"], color=COLOURS["ours"])
    axes[0].axvline(record["n"], color=COLOURS["neutral"], linewidth=0.8, linestyle=":")
    axes[0].set(xlabel="parts that act directly", ylabel="accuracy")
    axes[0].set_title("Your model: how few parts write the letter")
    table = {"ordered": record["ordered"], **record["mutated"]}
    for j, (label, colour) in enumerate((("as it is", COLOURS["baseline"]), ("three dimensions", COLOURS["ours"]))):
        axes[1].bar(
            np.arange(len(table)) + (j - 0.5) * 0.36, [v[j] for v in table.values()], 0.34, color=colour, label=label
        )
    axes[1].set_xticks(range(len(table)), [name.replace("_", " ") for name in table], fontsize=8)
    axes[1].set_ylim(0, 1.2)
    axes[1].set_title("Letter heads in three dimensions")
    axes[1].legend(loc="upper right", ncols=2)
    caption = (
        f"The user's model ({record['accuracy']:.0%} of the questions right): accuracy against the number of parts "
        "that act directly, and with its correct-letter heads squeezed to three dimensions."
    )
    return Plate("own-model", figure, caption)
