"""Codebook features on a finite-state language, on made texts about topics, and on the user's own model and text."""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from broadsheet.data.finite_state import TokFSM
from broadsheet.data.language import TopicCorpus
from broadsheet.errors import DataMissing
from broadsheet.interpretability.codebook_features.analysis import merged_inputs
from broadsheet.interpretability.codebook_features.index import CodeIndex, codes, index_codes
from broadsheet.interpretability.codebook_features.interventions import intervene, patch_codes
from broadsheet.interpretability.codebook_features.model import CodebookModel, wrap_codebooks
from broadsheet.interpretability.codebook_features.neurons import compare_with_neurons, neuron_outputs, neuron_scores
from broadsheet.interpretability.codebook_features.search import LabelScores, code_label_scores
from broadsheet.interpretability.codebook_features.training import fit
from broadsheet.lab import Context, Plate
from broadsheet.nn.activations import token_batches
from broadsheet.nn.divergence import js_divergence
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.quantization import Quantizer
from broadsheet.nn.seeding import generator, seeded
from broadsheet.nn.small_lm import small_language_model, train_language_model


@dataclass(frozen=True)
class Machine:
    """A finite-state language, the model that learns it, and how.

    Attributes:
        states, successors, base: of the machine.
        model: of ``small_language_model``.
        length, batch: of the texts.
        before, steps: optimizer steps without codebooks, then with them (or, for the rival, without).
        lr_before, lr: learning rates of the two.
        codes: in each codebook.
        kmeans: whether codes start from the activations, else at random.
        start_steps: of the comparison of the two starts.
        layer: the first whose MLP can know a whole state.
        texts: on which everything is measured.
    """

    states: int
    successors: int
    base: int
    model: dict[str, Any]
    length: int
    batch: int
    before: int
    steps: int
    lr_before: float
    lr: float
    codes: int
    kmeans: bool
    start_steps: int
    layer: int
    texts: int


# The smallest setting found at which the claims can be decided: more states (36) than output neurons (24) of an MLP.
SMALL = Machine(
    36, 6, 6, {"kind": "llama", "width": 24, "layers": 2, "heads": 4, "hidden": 96}, length=9, batch=48, before=450,
    steps=300, lr_before=8e-3, lr=5e-3, codes=96, kmeans=True, start_steps=50, layer=0, texts=300,
)  # fmt: skip
# The paper's. Attention and MLP stand side by side there, so that the second MLP is the first to see the digit before.
PAPER = Machine(
    100, 10, 10, {"kind": "gpt_neox", "width": 128, "layers": 4, "heads": 4, "hidden": 512}, length=128, batch=512,
    before=0, steps=20_000, lr_before=1e-3, lr=1e-3, codes=1000, kmeans=False, start_steps=2000, layer=1, texts=200,
)  # fmt: skip
TOPICS: dict[str, Any] = {
    "corpus": {"n_topics": 6, "words_per_topic": 4, "n_common": 12},
    "model": {"kind": "llama", "width": 32, "layers": 2, "heads": 4, "hidden": 64},
    "length": 14, "batch": 32, "before": 150, "steps": 80, "codes": 64, "lr": 5e-3, "texts": 200, "samples": 30,
    "write": 12,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "codes": 10_000, "k": 8, "at": ("attn_heads",), "steps": 15_000, "batch": 24, "lr": 5e-4, "length": 128,
    "held_out": 200, "patterns": 10, "samples": 20, "write": 200, "index": 2000,
}  # fmt: skip
PAIRS = 400
PARTS: dict[str, Callable[[str, int], bool]] = {
    "first attention": lambda site, _: site.startswith("layers.0.attn"),
    "last MLP": lambda site, last: site == f"layers.{last}.mlp",
    "all attention": lambda site, _: ".attn." in site,
    "all MLPs": lambda site, _: site.endswith(".mlp"),
    "everything": lambda site, _: True,
}


def run(ctx: Context) -> dict[str, Any]:
    """One seed: the finite-state language and the topics; in ``full`` the paper's size and the user's model too."""
    full = ctx.preset == "full"
    files = _files(ctx.data_dir) if full else None
    record = {"machine": _machine(ctx, PAPER if full else SMALL), "topics": _topics(ctx)}
    if files is not None:
        record["text"] = _text(ctx, *files)
    return record


# ----------------------------------------------------------------------------------------- the finite-state language


def _machine(ctx: Context, size: Machine) -> dict[str, Any]:
    fsm = TokFSM(size.states, size.successors, size.base, ctx.seed)
    random = generator(10_000 + ctx.seed)
    held = fsm.sample(size.texts, size.length, random)

    def sample(n: int, draw: torch.Generator) -> Tensor:
        return fsm.sample(n, size.length, draw)

    base = small_language_model(fsm.vocab_size, length=size.length, seed=ctx.seed, **size.model).to(ctx.device)
    how = {"batch": size.batch, "progress": ctx.progress}
    folders = {name: ctx.checkpoint / name for name in ("base", "plain", "codebooks")} if size.before == 0 else {}
    if size.before:
        train_language_model(
            base, sample, steps=size.before, lr=size.lr_before, seed=ctx.seed, **how, description="model"
        )
    plain = copy.deepcopy(base)
    train_language_model(
        plain, sample, steps=size.steps, lr=size.lr, seed=ctx.seed + 1, warmup=20, **how,
        description="without codebooks", checkpoint=folders.get("plain"),
    )  # fmt: skip

    def wrapped(kmeans: bool, at: tuple[str, ...] = ("attn_heads", "mlp")) -> CodebookModel:
        data = [fsm.sample(256, size.length, generator(20_000 + ctx.seed))] if kmeans else None
        init = "kmeans" if kmeans else "normal"
        return wrap_codebooks(copy.deepcopy(base), at, size.codes, init=init, batches=data, seed=ctx.seed)

    def tuned(cb: CodebookModel, steps: int, checkpoint: Path | None = None) -> Any:
        return fit(
            cb, sample, steps=steps, lr=size.lr, betas=(0.9, 0.98), schedule="cosine", warmup=20,
            seed=ctx.seed + 1, log_every=max(1, steps // 12), checkpoint=checkpoint, **how,
        )  # fmt: skip

    perplexity = {}
    place = f"layers.{size.layer}.mlp"
    for name, kmeans in (("k-means", True), ("random", False)):
        short = wrapped(kmeans, ("mlp",))
        tuned(short, size.start_steps)
        used = index_codes(short, held.split(100)).usage().set_index("site")
        perplexity[name] = float(used["perplexity"].to_dict()[place])
    cb = wrapped(size.kmeans)
    report = tuned(cb, size.steps, folders.get("codebooks"))

    contexts = fsm.contexts(held).flatten()
    states = torch.where(contexts < size.states, contexts, -1)  # tokens that complete a state
    batches = list(held.split(100))
    index = index_codes(cb, batches)
    scores = index.label_scores(states)
    hidden = f"layers.{size.layer}.mlp.act"
    outside = neuron_outputs(plain, batches)
    inner = neuron_outputs(plain, batches, [hidden])
    neurons = neuron_scores(outside, states)
    own = neuron_scores(neuron_outputs(cb, batches), states)
    clusters = _clusters(outside[place], states, size.codes, ctx.seed)
    inner_f1 = neuron_scores(inner, states).mean(hidden)
    ctx.measure("codes-above-neurons", ours=scores.mean(place), baseline=neurons.mean(place), own=own.mean(place))
    ctx.measure(
        "codes-above-all-neurons", ours=float(scores.best.mean()), baseline=float(neurons.best.mean()),
        own=float(own.best.mean()),
    )  # fmt: skip
    ctx.measure("codes-above-hidden-neurons", ours=scores.mean(place), baseline=inner_f1)
    ctx.measure("codes-above-clusters", ours=scores.mean(place), baseline=clusters.mean(place))

    mass = {}
    for name, model in (("codebooks", cb), ("plain", plain)):
        with evaluating(model), torch.no_grad():
            logits = torch.cat([model(part.to(ctx.device)).logits.cpu() for part in batches])
        mass[name] = fsm.valid_mass(logits, held).tolist()
    first = {name: fsm.first_transition_accuracy(model) for name, model in (("codebooks", cb), ("plain", plain))}
    ctx.measure(
        "little-is-lost", ours=float(np.mean(mass["codebooks"])), baseline=float(np.mean(mass["plain"])),
        by_digit=mass, first_transition=first,
    )  # fmt: skip
    if ctx.preset == "full":
        ctx.measure("first-transition", ours=first["codebooks"], plain=first["plain"])

    left = _patched(cb, fsm, size, ctx)
    ctx.measure("state-is-in-the-codes", ours=1 - left["everything"])
    ctx.measure("mlp-codes-above-first-attention", ours=left["all MLPs"], baseline=left["first attention"])
    pure = index.code_purity(states).set_index("site")["pure"].to_dict()
    last = f"layers.{size.model['layers'] - 1}.mlp"
    ctx.measure("purity-falls", ours=pure[place], baseline=pure[last])
    ctx.measure("random-start-collapses", ours=perplexity["random"], baseline=perplexity["k-means"])
    ends = fsm.sample(600, 1 + 2 * fsm.digits, random).unique(dim=0).to(ctx.device)
    merged = merged_inputs(cb, ends, [place, last], seed=ctx.seed)
    one = merged[place]
    ctx.measure("one-code-one-prediction", ours=float(one.within.mean()), baseline=float(one.random.mean()))
    return {
        "log": report.log.to_dict("list"),
        "place": place,
        "f1": {
            "codes": {site: scores.mean(site) for site in index.sites},
            "neurons": {site: neurons.mean(site) for site in outside},
            "own neurons": {site: own.mean(site) for site in outside},
            "hidden": inner_f1,
            "clusters": clusters.mean(place),
        },
        "scatter": {name: _points(found, place) for name, found in (("codes", scores), ("neurons", neurons))},
        "purity": index.code_purity(states).to_dict("list"),
        "left": left,
        "within": one.within.numpy(),
        "random": one.random.numpy(),
        "mass": mass,
        "perplexity": perplexity,
        "states": _chosen(index, scores, place, states, size),
    }


def _points(scores: LabelScores, site: str) -> np.ndarray:
    """Precision, recall and F1 of every state's best unit, ``[states, 3]``."""
    return torch.stack([scores.precision[site], scores.recall[site], scores.f1[site]], 1).cpu().numpy()


def _chosen(index: CodeIndex, scores: LabelScores, site: str, states: Tensor, size: Machine) -> np.ndarray:
    """How often each state's tokens take each state's best code, ``[states, states]``, rows summing to at most 1."""
    ids = index.of(site)[:, 0]
    best = scores.unit[site]
    table = torch.zeros(size.states, size.states)
    for state in range(size.states):
        mine = ids[states == state]
        if len(mine):
            table[state] = (mine[:, None] == best).double().mean(0)
    return table.numpy()


def _clusters(values: Tensor, labels: Tensor, n: int, seed: int) -> LabelScores:
    """The rival that trains nothing: k-means of normalised activations, half of them for finding the centres."""
    site = "clusters"
    quantizer = Quantizer(values.shape[1], n, similarity="euclidean").to(values.device)
    quantizer.init_kmeans(values[: len(values) // 2], seed)
    with torch.no_grad():
        ids = quantizer(values).codes.cpu()
    found = code_label_scores({site: ids}, {site: n}, labels)
    return LabelScores(*(_Any(part[site]) for part in (found.f1, found.precision, found.recall, found.unit)))


class _Any(dict[str, Tensor]):
    """One site's scores under whatever name they are asked for."""

    def __init__(self, value: Tensor) -> None:
        super().__init__({"clusters": value})

    def __missing__(self, _: str) -> Tensor:
        return self["clusters"]


@torch.no_grad()
def _patched(cb: CodebookModel, fsm: TokFSM, size: Machine, ctx: Context) -> dict[str, float]:
    """Share of the divergence to another text's prediction that is left when its codes are put in."""
    random = generator(30_000 + ctx.seed)
    here, there = (fsm.sample(PAIRS, 1 + 2 * fsm.digits, random).to(ctx.device) for _ in range(2))
    target = cb.run(there).logits[:, -1]
    whole = js_divergence(cb.run(here).logits[:, -1], target).mean()
    found = codes(cb, there)
    left = {}
    for name, chosen in PARTS.items():
        put = {site: ids for site, ids in found.items() if chosen(site, size.model["layers"] - 1)}
        with patch_codes(cb, put, positions=-1):
            left[name] = float(js_divergence(cb.run(here).logits[:, -1], target).mean() / whole)
    return left


# ------------------------------------------------------------------------------------------------ texts about topics


def _topics(ctx: Context) -> dict[str, Any]:
    corpus, random = TopicCorpus(**TOPICS["corpus"]), generator(40_000 + ctx.seed)
    held, about = corpus.sample(TOPICS["texts"], TOPICS["length"], random)

    def sample(n: int, draw: torch.Generator) -> Tensor:
        return corpus.sample(n, TOPICS["length"], draw)[0]

    length = TOPICS["length"] + TOPICS["write"]
    plain = small_language_model(corpus.vocab_size, length=length, seed=ctx.seed, **TOPICS["model"]).to(ctx.device)
    how = {"batch": TOPICS["batch"], "lr": TOPICS["lr"], "progress": ctx.progress}
    train_language_model(plain, sample, steps=TOPICS["before"], seed=ctx.seed, **how, description="topics")
    start = [corpus.sample(200, TOPICS["length"], generator(50_000 + ctx.seed))[0]]
    cb = wrap_codebooks(copy.deepcopy(plain), num_codes=TOPICS["codes"], init="kmeans", batches=start, seed=ctx.seed)
    more = {"steps": TOPICS["steps"], "seed": ctx.seed + 1, "warmup": 20}
    train_language_model(plain, sample, **more, **how, description="topics, without codebooks")
    fit(cb, sample, betas=(0.9, 0.98), schedule="cosine", **more, **how, log_every=TOPICS["steps"])
    batches = list(held.split(120))
    index = index_codes(cb, batches, corpus.tokenizer())
    words = corpus.words
    patterns = {
        name: r"\b(" + "|".join(words[int(i)] for i in ids) + r")\b"
        for name, ids in zip(corpus.names, corpus.topic_tokens, strict=True)
    }
    compared = compare_with_neurons(index, patterns, neuron_outputs(plain, batches), min_precision=0.0)
    ctx.measure("search-above-neurons", ours=compared.code_precision, baseline=compared.neuron_precision)

    topic, rng = about[index.text], np.random.default_rng(ctx.seed)
    untouched = _written(cb, {}, corpus, ctx.seed * 100 + 99)
    rows: dict[str, list[float]] = {"codes": [], "random codes": [], "nothing": []}
    shown: dict[str, Any] = {}
    for number, name in enumerate(corpus.names):
        # Codes that are chosen in texts about the topic, whatever the word.
        found = index.search_codes((topic == number) & (index.position > 2), min_precision=0.5).table
        best = found.drop_duplicates("site")
        on = _codes_of(best)
        drawn = {}
        for site, _ in on:
            used = index.counts(site).nonzero().flatten().numpy()
            drawn[site, int(rng.choice(used))] = None
        nothing: dict[tuple[str, int], None] = {}
        for kind, put in (("codes", on), ("random codes", drawn), ("nothing", nothing)):
            written = _written(cb, put, corpus, ctx.seed * 100 + number) if put else untouched
            rows[kind].append(_share(written, corpus, number))
            if kind != "random codes" and number == 0:
                shown[kind] = corpus.text(written[0, 1:])
        shown.setdefault("searched", name)
    mean = {name: float(np.mean(values)) for name, values in rows.items()}
    ctx.measure("steering-raises-topic", ours=mean["codes"], baseline=mean["nothing"])
    ctx.measure("steering-above-random-codes", ours=mean["codes"], baseline=mean["random codes"])
    # One text in which the code found for a topic's words is shown word by word.
    row = compared.table.iloc[0]
    chosen = (index.of(row["site"]) == int(row["code"])).any(-1)
    text = int((about == 0).nonzero()[0])
    mine = index.text == text
    return {
        "compared": compared.table.to_dict("list"),
        "steering": rows,
        "names": list(corpus.names),
        "written": shown,
        "example": ([words[int(i)] for i in index.token_ids[mine]], chosen[mine].numpy(), str(row["pattern"])),
    }


def _written(cb: CodebookModel, on: dict[tuple[str, int], None], corpus: TopicCorpus, seed: int) -> Tensor:
    prompt = torch.zeros(TOPICS["samples"], 1, dtype=torch.long, device=next(cb.parameters()).device)
    how = {"max_new_tokens": TOPICS["write"], "do_sample": True, "top_k": 0, "pad_token_id": 1}
    mask = torch.ones_like(prompt)
    with seeded(seed):
        if not on:
            return cb.generate(prompt, attention_mask=mask, **how).cpu()
        with intervene(cb, on):
            return cb.generate(prompt, attention_mask=mask, **how).cpu()


def _codes_of(table: Any) -> dict[tuple[str, int], None]:
    """Rows of a search, to be switched on at every position."""
    return dict.fromkeys(zip(table["site"].astype(str).tolist(), table["code"].astype(int).tolist(), strict=True))


def _share(written: Tensor, corpus: TopicCorpus, topic: int) -> float:
    about = corpus.topic_of[written[:, 1:]]
    return float((about == topic).sum() / (about >= 0).sum().clamp_min(1))


# ------------------------------------------------------------------------------------------------ the user's own text


def _files(folder: Path) -> tuple[Path, Path]:
    home = folder / "codebook-features"
    model, text = home / "model", home / "text.txt"
    missing = [str(p) for p in (model / "config.json", text) if not p.exists()]
    if missing:
        raise DataMissing(
            f"missing: {', '.join(missing)}. Save a causal language model and its tokenizer with save_pretrained() in "
            f"{model} (the paper takes roneneldan/TinyStories-1Layer-21M and EleutherAI/pythia-410m from "
            f"huggingface.co) and a text, one document a line, as {text} (TinyStories or WikiText-103, both among "
            f"the datasets there). {home / 'topics.txt'}, a regular expression a line, is optional"
        )
    return model, text


def _text(ctx: Context, folder: Path, file: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(ctx.device)
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    n = max(1, min(TEXT["held_out"], len(lines) // 5))
    held, known = lines[:n], lines[n:]
    order = np.random.default_rng(ctx.seed).permutation(len(known))

    def batches(texts: Iterable[str]) -> list[Any]:
        return list(token_batches(texts, tokenizer, batch_size=TEXT["batch"], max_length=TEXT["length"]))

    train, test = batches(known[i] for i in order), batches(held)
    how = {"steps": TEXT["steps"], "lr": TEXT["lr"], "seed": ctx.seed, "progress": ctx.progress}
    cb = wrap_codebooks(
        copy.deepcopy(base), TEXT["at"], TEXT["codes"], TEXT["k"], init="kmeans", batches=train[:50], seed=ctx.seed
    )
    report = fit(cb, train, checkpoint=ctx.checkpoint / "text-codebooks", **how)
    # The rival is trained by the same loop: a model whose bottlenecks are all off has nothing but its own loss.
    plain = wrap_codebooks(base, TEXT["at"], 1)
    plain.snap = False
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fit(plain, train, checkpoint=ctx.checkpoint / "text-plain", description="without codebooks", **how)
    scores = {name: _quality(model, test, ctx.device) for name, model in (("codebooks", cb), ("plain", plain))}
    ctx.measure("text-loss", ours=scores["codebooks"][0], baseline=scores["plain"][0])
    ctx.measure("text-accuracy", ours=scores["codebooks"][1], baseline=scores["plain"][1])

    index = index_codes(cb, batches(known[: TEXT["index"]]), tokenizer, progress=ctx.progress)
    own = file.parent / "topics.txt"
    patterns = own.read_text(encoding="utf-8").split("\n") if own.exists() else _frequent(known, TEXT["patterns"])
    rows = []
    for number, pattern in enumerate(p for p in patterns if p.strip()):
        found = index.search_codes(pattern, min_precision=0.0).table
        best = found.drop_duplicates("site").head(20)
        on = _codes_of(best)
        rates = []
        for put in (on, {}):
            texts = _sampled(cb, put, tokenizer, ctx.seed * 1000 + number)
            rates.append(float(np.mean([bool(re.search(pattern, text)) for text in texts])))
        top = found.iloc[0]
        rows.append((pattern, *rates, str(top["site"]), int(top["code"]), float(top["f1"])))
    ctx.measure(
        "text-steering",
        ours=float(np.mean([row[1] for row in rows])),
        baseline=float(np.mean([row[2] for row in rows])),
    )
    return {"log": report.log.to_dict("list"), "scores": scores, "steering": rows}


@torch.no_grad()
def _quality(model: CodebookModel, batches: list[Any], device: Any) -> tuple[float, float]:
    """Loss (nats) and accuracy of the next token."""
    loss, right, n = 0.0, 0, 0
    for ids, mask in batches:
        logits = model.run((ids, mask)).logits[:, :-1].float().cpu()
        kept = mask[:, 1:].bool()
        wanted = ids[:, 1:][kept]
        loss += float(nn.functional.cross_entropy(logits[kept], wanted, reduction="sum"))
        right += int((logits[kept].argmax(-1) == wanted).sum())
        n += len(wanted)
    return loss / n, right / n


def _frequent(lines: list[str], n: int) -> list[str]:
    """Longer words that stand in many lines, but not in most."""
    counts = Counter(word for line in lines for word in set(re.findall(r"[A-Za-z]{5,}", line)))
    chosen = [word for word, count in counts.most_common() if count < len(lines) / 4]
    return [rf"\b{word}\b" for word in (chosen or list(counts))[:n]]


def _sampled(cb: CodebookModel, on: dict[tuple[str, int], None], tokenizer: Any, seed: int) -> list[str]:
    device = next(cb.parameters()).device
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else (tokenizer.eos_token_id or 0)
    prompt = torch.full((TEXT["samples"], 1), begin, device=device)
    how = {"max_new_tokens": TEXT["write"], "do_sample": True, "top_k": 0, "pad_token_id": begin}
    with seeded(seed):
        if not on:
            out = cb.generate(prompt, attention_mask=torch.ones_like(prompt), **how)
        else:
            with intervene(cb, on):
                out = cb.generate(prompt, attention_mask=torch.ones_like(prompt), **how)
    return tokenizer.batch_decode(out[:, 1:], skip_special_tokens=True)


# ------------------------------------------------------------------------------------------------------------ figures


def draw(records: list[dict[str, Any]]) -> list[Plate]:
    """The records of all seeds, as figures with captions."""
    from broadsheet.nn.plotting import style

    with style():
        plates = [
            _draw_states(records), _draw_intervention(records), _draw_merged(records), _draw_training(records),
            _draw_topics(records),
        ]  # fmt: skip
        if "text" in records[0]:
            plates.append(_draw_text(records))
    return plates


def _draw_states(records: list[dict[str, Any]]) -> Plate:
    from matplotlib.figure import Figure

    from broadsheet.nn.plotting import COLOURS

    figure = Figure(figsize=(10.4, 4.3))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    for name, colour, label in (("neurons", "baseline", "best neuron"), ("codes", "ours", "best code")):
        points = np.concatenate([record["machine"]["scatter"][name] for record in records])
        left.scatter(
            points[:, 1], points[:, 0], s=18, color=COLOURS[colour], alpha=0.45, lw=0, label=f"{label} for a state"
        )
    for value in (0.2, 0.4, 0.6, 0.8):
        recall = np.linspace(value / (2 - value) + 1e-3, 1, 200)
        left.plot(recall, value * recall / (2 * recall - value), color=COLOURS["light"], lw=0.8, zorder=0)
        left.text(1.01, value / (2 - value), f"{value:g}", fontsize=7.5, color=COLOURS["neutral"], va="center")
    left.set(xlim=(0, 1.06), ylim=(0, 1.26), xlabel="recall", ylabel="precision", title="A state and its best unit")
    left.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    left.legend(loc="upper left", handletextpad=0.2)
    found = [record["machine"]["f1"] for record in records]
    place = records[0]["machine"]["place"]
    rows = [
        ("codes of this MLP", [f["codes"][place] for f in found], "ours"),
        ("clusters of its outputs", [f["clusters"] for f in found], "accent"),
        ("hidden neurons", [f["hidden"] for f in found], "baseline"),
        ("output neurons", [f["neurons"][place] for f in found], "baseline"),
        ("output neurons, with codebooks", [f["own neurons"][place] for f in found], "baseline"),
    ]
    for i, (_, values, colour) in enumerate(rows):
        right.barh(i, np.mean(values), 0.62, color=COLOURS[colour])
        right.scatter(values, np.full(len(values), i), s=11, color="white", ec="#1f2328", lw=0.7, zorder=3)
        right.text(max(values) + 0.02, i, f"{np.mean(values):.2f}", va="center", fontsize=9)
    right.set(
        xlim=(0, 1), xlabel="best F1, mean over states",
        title=f"Who knows single states, layer {int(place.split('.')[1])}",
    )  # fmt: skip
    right.set_yticks(range(len(rows)), [row[0] for row in rows])
    right.tick_params(axis="y", length=0)
    right.invert_yaxis()
    right.grid(axis="x")
    right.grid(axis="y", visible=False)
    text = (
        "Left: for each state the code and the output neuron that find its tokens best; grey lines have the F1 at "
        "their end. Right: the mean, dots are seeds. Neurons may be high or low, with the best threshold; there are "
        "fewer output neurons and more hidden neurons than states."
    )
    return Plate("states", figure, text)


def _draw_intervention(records: list[dict[str, Any]]) -> Plate:
    from matplotlib.figure import Figure

    from broadsheet.nn.plotting import COLOURS

    figure = Figure(figsize=(10.4, 3.9))
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    names = ["nothing", *PARTS]
    for i, name in enumerate(names):
        values = [1.0 if name == "nothing" else record["machine"]["left"][name] for record in records]
        left.bar(i, np.mean(values), 0.66, color=COLOURS["light" if name == "nothing" else "ours"])
        if name != "nothing":
            left.scatter(np.full(len(values), i), values, s=11, color="white", ec="#1f2328", lw=0.7, zorder=3)
        left.text(i, max(values) + 0.03, f"{np.mean(values):.2f}", ha="center", fontsize=9)
    left.set_xticks(range(len(names)), [name.replace(" ", "\n", 1) for name in names])
    left.tick_params(axis="x", length=0)
    left.set(ylim=(0, 1.14), ylabel="divergence that is left", title="Codes of another text are put in")
    purity = [pd.DataFrame(record["machine"]["purity"]) for record in records]
    layers = sorted({int(site.split(".")[1]) for site in purity[0]["site"]})
    for shift, (part, colour) in zip((-0.19, 0.19), (("attn", "baseline"), ("mlp", "ours")), strict=True):
        for layer in layers:
            values = [
                float(np.mean(table["pure"][table["site"].str.startswith(f"layers.{layer}.{part}")]))
                for table in purity
            ]
            right.bar(layer + shift, np.mean(values), 0.36, color=COLOURS[colour])
            right.scatter(
                np.full(len(values), layer + shift), values, s=11, color="white", ec="#1f2328", lw=0.7, zorder=3
            )
    right.bar(0, 0, color=COLOURS["baseline"], label="attention heads")
    right.bar(0, 0, color=COLOURS["ours"], label="MLP")
    right.set_xticks(layers, [f"layer {layer}" for layer in layers])
    right.tick_params(axis="x", length=0)
    right.set(ylabel="share of codes in use", title="Codes that stand for one state only")
    right.margins(y=0.25)
    right.legend(loc="upper right", ncols=2)
    text = (
        "Left: Jensen-Shannon divergence to another text's prediction after its codes were put in at the last "
        "position, as a share of what it was before. Right: purity of codes by layer. Dots are seeds."
    )
    return Plate("intervention", figure, text)


def _draw_merged(records: list[dict[str, Any]]) -> Plate:
    from matplotlib.figure import Figure

    from broadsheet.nn.plotting import COLOURS, SEQUENTIAL

    figure = Figure(figsize=(10.4, 4.2))
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    within = np.concatenate([record["machine"]["within"] for record in records])
    random = np.concatenate([record["machine"]["random"] for record in records])
    bins = np.linspace(0, float(max(within.max(), random.max())) * 1.01, 45)
    for values, colour, label in (
        (random, "baseline", "random pairs of texts"),
        (within, "ours", "pairs that share a code"),
    ):
        left.hist(
            values, bins, weights=np.full(len(values), 1 / len(values)), color=COLOURS[colour], alpha=0.6, label=label
        )
        left.axvline(values.mean(), color=COLOURS[colour], lw=1.2, ls=(0, (4, 2)))
    left.set(
        xlabel="divergence of the next token's distribution, nats", ylabel="share of pairs",
        title="Texts that share a code predict alike",
    )  # fmt: skip
    left.legend()
    table = records[0]["machine"]["states"]
    image = right.imshow(table, vmin=0, vmax=1, cmap=SEQUENTIAL, aspect="equal", interpolation="nearest")
    right.set(xlabel="best code of state", ylabel="state of the text", title="Which code a state takes")
    right.grid(False)
    figure.colorbar(image, ax=right, label="share of the state's tokens", shrink=0.9)
    text = (
        f"Left: {records[0]['machine']['place']}, all seeds; dashed lines are means. Right: the first seed, each "
        "state's tokens by the code that finds a state best; a dark diagonal is one code for one state."
    )
    return Plate("merged-inputs", figure, text)


def _draw_training(records: list[dict[str, Any]]) -> Plate:
    from matplotlib.figure import Figure

    from broadsheet.nn.plotting import COLOURS

    figure = Figure(figsize=(10.4, 3.8))
    axes = figure.subplots(1, 3)
    for record in records:
        log = pd.DataFrame(record["machine"]["log"])
        task = log.groupby("step")["task"].first()
        axes[0].plot(task.index, task, color=COLOURS["neutral"], lw=1.2, alpha=0.8)
        for part, colour in ((".attn.", "baseline"), (".mlp", "ours")):
            mine = log[log["site"].str.contains(part, regex=False)]
            dead = mine.groupby("step")["dead_fraction"].mean()
            axes[1].plot(dead.index, dead, color=COLOURS[colour], lw=1.2, alpha=0.8)
            off = mine.assign(share=mine["mse"] / mine["input_norm"] ** 2).groupby("step")["share"].mean()
            axes[2].plot(off.index, off, color=COLOURS[colour], lw=1.2, alpha=0.8)
    axes[0].set(title="Loss of the task", ylabel="nats a token", xlabel="step")
    axes[1].set(title="Codes not in use", ylabel="share", xlabel="step", ylim=(0, None))
    axes[2].set(title="What codes leave out", ylabel="squared error, share", xlabel="step", ylim=(0, None))
    axes[1].plot([], [], color=COLOURS["baseline"], label="attention heads")
    axes[1].plot([], [], color=COLOURS["ours"], label="MLPs")
    figure.legend(loc="outside upper right", ncols=2)
    text = (
        "Training with codebooks in place, one line a seed: the next token's loss, the share of codes that no token "
        "chose since the mark before, and the squared distance between normalised activations and their codes."
    )
    return Plate("training", figure, text)


def _draw_topics(records: list[dict[str, Any]]) -> Plate:
    from matplotlib.figure import Figure

    from broadsheet.nn.plotting import COLOURS

    figure = Figure(figsize=(10.4, 5.0))
    grid = figure.add_gridspec(2, 2, height_ratios=(3.2, 1), width_ratios=(1, 1.2))
    left, right, below = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, :])
    names = records[0]["topics"]["names"]
    tables = [pd.DataFrame(record["topics"]["compared"]).set_index("pattern").reindex(names) for record in records]
    for column, colour, label in (
        ("neuron_precision", "baseline", "best neuron at the same recall"),
        ("precision", "ours", "best code"),
    ):
        values = np.array([table[column] for table in tables], dtype=float)
        left.plot(np.nanmean(values, 0), range(len(names)), "o", ms=8, color=COLOURS[colour], label=label, zorder=2)
        for row in values:
            left.plot(row, range(len(names)), "o", ms=3, color=COLOURS[colour], alpha=0.45, zorder=1)
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) + 0.7, -0.6)  # room for the legend
    left.set(xlim=(0, 1.04), xlabel="precision for the topic's words", title="Codes found by search")
    left.grid(axis="x")
    left.grid(axis="y", visible=False)
    left.legend(loc="lower left", fontsize=8.5)
    kinds = (
        ("nothing", "light", "no intervention"),
        ("random codes", "baseline", "random codes"),
        ("codes", "ours", "its codes"),
    )
    for k, (kind, colour, label) in enumerate(kinds):
        values = np.array([record["topics"]["steering"][kind] for record in records])
        at = np.arange(len(names)) + 0.27 * (k - 1)
        right.bar(at, values.mean(0), 0.25, color=COLOURS[colour], label=label)
        for row in values:
            right.scatter(at, row, s=7, color="white", ec="#1f2328", lw=0.5, zorder=3)
    right.set_xticks(range(len(names)), names)
    right.tick_params(axis="x", length=0)
    right.set(ylim=(0, 1.2), ylabel="share of topical words", title="Codes of a topic switched on")
    right.legend(loc="upper center", ncols=3, fontsize=8.5, columnspacing=1.0)
    words, chosen, _ = records[0]["topics"]["example"]
    below.set_axis_off()
    below.set(xlim=(0, 1), ylim=(0, 1))
    below.text(
        0,
        0.88,
        f"A held-out text; marked where the code found for “{names[0]}” is chosen",
        fontsize=9,
        color=COLOURS["neutral"],
    )
    _write_words(below, words, chosen, 0.52)
    below.text(
        0, 0.12, f"Written with the codes of “{names[0]}” on:  {records[0]['topics']['written']['codes']}", fontsize=9,
        style="italic",
    )  # fmt: skip
    text = (
        "Made texts about six topics. Left: a regular expression for a topic's words, the code with the best "
        "F1, and the neuron most precise at the same recall; large dots are means. Right: share of a topic among the "
        "topical words that the model writes from an empty prompt. Dots are seeds."
    )
    return Plate("topics", figure, text)


def _write_words(ax: Any, words: list[str], chosen: np.ndarray, y: float) -> None:
    from broadsheet.nn.plotting import COLOURS

    x = 0.0
    for word, on in zip(words, chosen, strict=True):
        box = {"facecolor": COLOURS["ours"] if on else "#f3f1ec", "edgecolor": "none", "pad": 2.5}
        ax.text(x + 0.004, y, word, fontsize=9, va="center", color="white" if on else "black", bbox=box)
        x += 0.0092 * len(word) + 0.018


def _draw_text(records: list[dict[str, Any]]) -> Plate:
    from matplotlib.figure import Figure

    from broadsheet.nn.plotting import COLOURS

    figure = Figure(figsize=(10.4, 4.2))
    left, right = figure.subplots(1, 2)
    for record in records:
        task = pd.DataFrame(record["text"]["log"]).groupby("step")["task"].first()
        left.plot(task.index, task, color=COLOURS["ours"], lw=1.2)
        left.axhline(record["text"]["scores"]["plain"][0], color=COLOURS["baseline"], lw=1, ls=(0, (4, 3)))
    left.set(xlabel="step", ylabel="next-token loss, nats", title="Fine-tuning with codebooks")
    rows = records[0]["text"]["steering"]
    at = np.arange(len(rows))
    on = np.mean([[row[1] for row in record["text"]["steering"]] for record in records], axis=0)
    off = np.mean([[row[2] for row in record["text"]["steering"]] for record in records], axis=0)
    right.barh(at - 0.2, on, 0.38, color=COLOURS["ours"], label="its codes on")
    right.barh(at + 0.2, off, 0.38, color=COLOURS["light"], label="no intervention")
    right.set_yticks(at, [row[0].replace(r"\b", "") for row in rows])
    right.invert_yaxis()
    right.set(xlim=(0, 1), xlabel="share of written texts with the word", title="Steering")
    right.legend(loc="lower right")
    text = "Your model and text: loss while training (dashed: without codebooks, held out), and words switched on."
    return Plate("own-text", figure, text)
