"""Attention autoencoders, measured: planted features, and a small transformer whose jobs are known.

``small`` needs no data: activations made of planted features, and a two-layer Llama trained on the spot on a mixture of
four tasks (induction, doubling, brackets, copying), so that it is known at every token what the attention has to do.
``full`` (:mod:`broadsheet.experiments.attention_sae_full`) adds GPT-2 small and the user's text.
"""

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from broadsheet.data.mixture import BRACKETS, TASKS, LabelledText, TaskMixture
from broadsheet.interpretability.attention_sae import (
    AttentionSAE,
    ablate_features,
    capture_z,
    dfa,
    evaluate_sae,
    head_weights,
    latent_cards,
    natural_prefixes,
    prefix_induction_scores,
    recursive_dfa,
)
from broadsheet.interpretability.attention_sae.direct import head_inputs
from broadsheet.lab import Context, Plate
from broadsheet.nn.activations import RowBatches, collect_activations
from broadsheet.nn.attribution import norm_scale
from broadsheet.nn.blocks import block_map
from broadsheet.nn.cards import Decile, Excerpt, FeatureCard
from broadsheet.nn.hooks import capture, replace
from broadsheet.nn.matching import match_directions
from broadsheet.nn.padding import right_padded
from broadsheet.nn.plotting import COLOURS, SEQUENTIAL, style
from broadsheet.nn.seeding import generator
from broadsheet.nn.small_lm import small_language_model, train_language_model

PLANTED: dict[str, Any] = {"heads": 4, "d_head": 16, "features": 96, "rows": 20_000, "chance": 0.02}
PLANTED_FIT: dict[str, Any] = {"steps": 1000, "batch": 256, "l1": 2.0, "lr": 3e-3}
MODEL: dict[str, Any] = {"width": 48, "hidden": 32, "heads": 4, "steps": 500, "batch": 32, "lr": 8e-3, "texts": 3000}
WORDS = 24
LAYER = 1
SAE: dict[str, Any] = {"steps": 1000, "batch": 256, "lr": 3e-2, "texts": 800}
L1 = (2.0, 1.0, 4.0)  # the first is the one that is analysed
TEST = 300
BINS = 8
CLEAR = 0.25  # share of a role's entropy from which on a feature counts as the role's
PLACES = 300
TREES = 24
PREFIX: dict[str, Any] = {"lengths": (1, 2, 3, 4, 5, 6), "samples": 60, "length": 22}


def run(ctx: Context) -> dict:
    """All claims of one seed."""
    record: dict[str, Any] = {}
    if ctx.preset == "full":  # files that are missing are said before the work, not after it
        from broadsheet.experiments import attention_sae_full

        record["full"] = attention_sae_full.measure(ctx)
    return {**record, "planted": _planted(ctx), **_trained(ctx)}


# ------------------------------------------------------------------------------------------------- planted features


def planted_activations(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows made of few planted directions, the directions, and each one's strongest head."""
    heads, d, k = PLANTED["heads"], PLANTED["d_head"], PLANTED["features"]
    draw = generator(seed)
    directions = torch.zeros(k, heads, d)
    for i in range(k):
        first = int(torch.randint(heads, (1,), generator=draw))
        directions[i, first] = torch.randn(d, generator=draw)
        if float(torch.rand(1, generator=draw)) < 0.2:
            second = (first + 1 + int(torch.randint(heads - 1, (1,), generator=draw))) % heads
            directions[i, second] = 0.7 * torch.randn(d, generator=draw)
    home = directions.norm(dim=2).argmax(1)
    directions = directions.flatten(1)
    directions = directions / directions.norm(dim=1, keepdim=True)
    shape = (PLANTED["rows"], k)
    amounts = (torch.rand(shape, generator=draw) < PLANTED["chance"]) * (0.5 + torch.rand(shape, generator=draw))
    return amounts @ directions + 0.1 * torch.randn(heads * d, generator=draw), directions, home


def _planted(ctx: Context) -> dict[str, Any]:
    from sklearn.decomposition import PCA, FastICA

    x, directions, home = planted_activations(1000 + ctx.seed)
    heads, d = PLANTED["heads"], PLANTED["d_head"]
    sae = AttentionSAE(heads, d, 4 * heads * d, seed=ctx.seed).to(ctx.device)
    how = PLANTED_FIT
    rows = RowBatches(x.to(ctx.device), how["batch"], generator(ctx.seed))
    sae.fit(
        rows, steps=how["steps"], l1=how["l1"], lr=how["lr"], warmup=50, seed=ctx.seed, progress=ctx.progress,
        checkpoint=ctx.checkpoint / "planted",
    )  # fmt: skip
    ours = match_directions(directions, sae.W_dec.detach().cpu())
    rivals = {
        "ICA": torch.from_numpy(
            FastICA(heads * d, whiten="unit-variance", random_state=ctx.seed, max_iter=100, tol=1e-3)
            .fit(x.numpy()[:5_000])
            .mixing_.T.copy()
        ),
        "PCA": torch.from_numpy(PCA(heads * d).fit(x.numpy()).components_),
        "coordinates": torch.eye(heads * d),
        "random directions": torch.randn(4 * heads * d, heads * d, generator=generator(ctx.seed)),
    }
    found = {
        name: match_directions(directions, rows.to(directions), signed=False).mean for name, rows in rivals.items()
    }
    named = head_weights(sae).cpu()[ours.index].argmax(1) == home
    figures = sae.statistics([x.to(ctx.device)])
    ctx.measure("planted-features-found", ours=ours.mean, l0=figures["l0"], fve=figures["fve"])
    ctx.measure("planted-above-ica", ours=ours.mean, baseline=found["ICA"])
    ctx.measure("planted-home-heads", ours=float(named.double().mean()))
    return {"cosine": {"autoencoder": ours.mean, **found}, "l0": figures["l0"], "fve": figures["fve"]}


# ------------------------------------------------------------------------------------------------ the trained model


def trained_model(ctx: Context, mixture: TaskMixture) -> nn.Module:
    """A small Llama that has learned the four tasks."""
    model = small_language_model(
        mixture.vocab_size, kind="llama", width=MODEL["width"], heads=MODEL["heads"], hidden=MODEL["hidden"],
        length=mixture.length + 16, layers=2, seed=ctx.seed,
    ).to(ctx.device)  # fmt: skip
    data = mixture.sample(MODEL["texts"], generator(10_000 + ctx.seed)).input_ids
    train_language_model(
        model, lambda n, draw: data[torch.randint(len(data), (n,), generator=draw)], steps=MODEL["steps"],
        batch=MODEL["batch"], lr=MODEL["lr"], seed=ctx.seed, progress=ctx.progress, checkpoint=ctx.checkpoint / "model",
    )  # fmt: skip
    return model


def _trained(ctx: Context) -> dict[str, Any]:
    mixture = TaskMixture(WORDS)
    model = trained_model(ctx, mixture)
    test = mixture.sample(TEST, generator(20_000 + ctx.seed))
    test = LabelledText(*(x.to(ctx.device) for x in (test.input_ids, test.task, test.bracket, test.source)))
    ids = test.input_ids
    with torch.no_grad():
        right = model(ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
    accuracy = {name: float(right[test.task[:, :-1] == k].double().mean()) for k, name in enumerate(TASKS)}

    site = f"layers.{LAYER}.attn.z"
    texts = mixture.sample(SAE["texts"], generator(30_000 + ctx.seed)).input_ids
    rows = collect_activations(model, site, texts.to(ctx.device).split(100), skip_first=True).values
    saes, frontier = [], []
    for i, l1 in enumerate(L1):
        sae = AttentionSAE.for_layer(model, LAYER, 4 * rows.shape[1], seed=ctx.seed, bos_token_id=0)
        sae.fit(
            RowBatches(rows, SAE["batch"], generator(ctx.seed)), steps=SAE["steps"], l1=l1, lr=SAE["lr"], warmup=50,
            resample_every=SAE["steps"] // 4, resamplings=2, seed=ctx.seed, progress=ctx.progress,
            checkpoint=ctx.checkpoint / f"sae-{i}",
        )  # fmt: skip
        quality = evaluate_sae(model, sae, ids.split(100))
        saes.append(sae)
        frontier.append(
            {
                "l1": l1, "l0": quality.l0, "loss_recovered": quality.loss_recovered, "fve": quality.fve,
                "dead": quality.dead_fraction, "density": quality.density.tolist(), "ce_clean": quality.ce_clean,
                "ce_zero": quality.ce_zero,
            }
        )  # fmt: skip
    sae, quality = saes[0], frontier[0]
    about = {name: quality[name] for name in ("fve", "dead")}
    ctx.measure("loss-recovered", ours=quality["loss_recovered"], l0=quality["l0"], **about)
    ctx.measure("sparse", ours=quality["l0"] / sae.d_in)

    known = predicted(model, test)
    names, truth = roles(mixture, test, known)
    best, scores = _roles(ctx, model, sae, test, names, truth)
    words = list(range(mixture.n_words))
    ablation = _ablation(ctx, model, sae, test, known, mixture, [best[w] for w in words])
    attribution = _attribution(ctx, model, sae, test, known, mixture, [best[w] for w in words])
    _one_position(ctx, model, ids)
    prefix = prefix_induction_scores(
        model, tokens=range(mixture.first_word, mixture.vocab_size), bos_token_id=0, generator=generator(ctx.seed),
        **PREFIX,
    )  # fmt: skip
    natural = natural_prefixes(model, ids[:100].split(50), generator=generator(ctx.seed))
    shown = max(words, key=lambda w: scores["features"]["information"][w])
    cards = latent_cards(
        model, sae, [best[shown], best[mixture.n_words]], ids.split(100), tokenizer=mixture.tokenizer(), k=8,
        per_decile=0, skip_first=True, generator=generator(ctx.seed),
    )  # fmt: skip
    return {
        "accuracy": accuracy,
        "frontier": frontier,
        "roles": {"names": names, **scores, "shares": head_weights(sae)[best].tolist(), "features_of": best},
        "ablation": ablation,
        "attribution": attribution,
        "prefix": {"lengths": list(prefix.lengths), "attention": prefix.attention.tolist()},
        "natural": natural.to_frame().to_dict("list"),
        "cards": [_plain(card.described(names[r])) for card, r in zip(cards, (shown, mixture.n_words), strict=True)],
    }


def predicted(model: nn.Module, text: LabelledText) -> Tensor:
    """Where a word comes next because it did before, and the model says so: ``[text, position]``."""
    ids = text.input_ids
    with torch.no_grad():
        chance = model(ids).logits[:, :-1].softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return (text.source[:, :-1] >= 0) & (chance > 0.5)


def roles(mixture: TaskMixture, text: LabelledText, known: Tensor) -> tuple[list[str], Tensor]:
    """What the layer may be needed for, ``[role, text, position]``, and what each is called."""
    ids, words = text.input_ids[:, 1:], mixture.words
    table, names = [], []
    for w in range(mixture.first_word, mixture.vocab_size):
        table.append(known & (ids == w))
        names.append(f"“{words[w]}” is next")
    for b, (left, right) in enumerate(BRACKETS):
        table.append(text.bracket[:, :-1] == b)
        names.append(f"inside {left} {right}")
    for task in ("induction", "double", "copy"):
        table.append(text.task[:, :-1] == TASKS.index(task))
        names.append(task)
    return names, torch.stack(table)


def auc(values: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Of every unit for every role: values ``[n, units]``, truth ``[n, roles]``, result ``[units, roles]``."""
    ranks = rankdata(values, axis=0)
    positive = truth.sum(0)
    return (ranks.T @ truth - positive * (positive + 1) / 2) / (positive * (len(truth) - positive))


def information(bins: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Share of every role's entropy that a unit's bin tells.

    Args:
        bins: ``[n, units]``, whole numbers below :data:`BINS`.
        truth: ``[n, roles]``, 0 or 1.

    Returns:
        ``[units, roles]``.
    """
    n = len(truth)
    joint = np.stack([(bins == k).T.astype(np.float64) @ truth for k in range(BINS)])  # [bin, unit, role], role on
    size = np.stack([(bins == k).sum(0) for k in range(BINS)])[..., None]

    def entropy(p: np.ndarray) -> np.ndarray:
        p = np.clip(p, 1e-12, 1 - 1e-12)
        return -p * np.log(p) - (1 - p) * np.log(1 - p)

    left = (size / n * entropy(joint / np.maximum(size, 1))).sum(0)
    return 1 - left / entropy(truth.mean(0))


def binned(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Values in eighths of ``by [n, units]``; of a unit that is often off, off is one bin and the rest are sevenths."""
    out = np.empty(values.shape, dtype=np.int64)
    for unit in range(values.shape[1]):
        column = by[:, unit]
        if (column == 0).mean() > 1 / BINS and column.min() >= 0:
            on = column[column > 0]
            edges = np.quantile(on, np.arange(1, BINS - 1) / (BINS - 1)) if len(on) else np.array([np.inf])
            out[:, unit] = np.where(values[:, unit] > 0, 1 + np.searchsorted(edges, values[:, unit]), 0)
        else:
            out[:, unit] = np.searchsorted(np.quantile(column, np.arange(1, BINS) / BINS), values[:, unit])
    return out


def _roles(
    ctx: Context, model: nn.Module, sae: AttentionSAE, text: LabelledText, names: list[str], truth: Tensor
) -> tuple[list[int], dict[str, Any]]:
    """Which unit tells each role: chosen on the first half of the texts, scored on the second."""
    z = capture_z(model, text.input_ids, LAYER)[:, 1:-1]
    half = len(z) // 2
    units = {"features": sae.encode(z).detach(), "coordinates": z.flatten(2), "heads": z.norm(dim=-1)}
    both = truth[:, :, 1:].permute(1, 2, 0).double().cpu().numpy()
    wanted = [both[:half].reshape(-1, len(names)), both[half:].reshape(-1, len(names))]
    scores: dict[str, Any] = {}
    best: list[int] = []
    for kind, values in units.items():
        first, second = (part.flatten(0, 1).cpu().numpy() for part in (values[:half], values[half:]))
        told = [information(binned(part, first), table) for part, table in zip((first, second), wanted, strict=True)]
        chosen = told[0].argmax(0)
        area = [auc(part, table) for part, table in zip((first, second), wanted, strict=True)]
        if kind != "features":  # a coordinate or a length may tell a role by being small
            area = [np.concatenate([table, 1 - table]) for table in area]
        at = np.arange(len(names))
        scores[kind] = {"information": told[1][chosen, at].tolist(), "auc": area[1][area[0].argmax(0), at].tolist()}
        if kind == "features":
            best = chosen.tolist()
    for claim, what in (("information", "information"), ("roles", "auc")):
        mean = {kind: float(np.mean(score[what])) for kind, score in scores.items()}
        ctx.measure(f"{claim}-above-heads", ours=mean["features"], baseline=mean["heads"])
        ctx.measure(f"{claim}-above-neurons", ours=mean["features"], baseline=mean["coordinates"])
    home = head_weights(sae)[best].argmax(1).tolist()
    clear = np.array(scores["features"]["information"]) >= CLEAR
    jobs = [int(sum(clear[i] for i, h in enumerate(home) if h == head)) for head in range(sae.n_heads)]
    ctx.measure("heads-have-several-roles", ours=float(np.mean([count >= 2 for count in jobs])), roles=jobs)
    return best, scores


def _losses(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


def _ablation(
    ctx: Context, model: nn.Module, sae: AttentionSAE, text: LabelledText, known: Tensor, mixture: TaskMixture,
    features: list[int],
) -> dict[str, Any]:  # fmt: skip
    """Each word's feature left out: what it costs that word, and the others that come next in the same way."""
    half = len(text) // 2
    ids, known = text.input_ids[half:], known[half:]

    def measured() -> dict[str, Tensor]:
        with torch.no_grad():
            logits = model(ids).logits[:, :-1]
        right = logits.gather(2, ids[:, 1:, None])[..., 0]
        return {"loss": logits.logsumexp(-1) - right, "logit": logits.mean(-1) - right}

    clean = measured()
    rise: dict[str, dict[str, list[float]]] = {name: {"own": [], "other": []} for name in clean}
    for w, feature in enumerate(features):
        mine = ids[:, 1:] == w + mixture.first_word
        if not bool((known & mine).any()):
            continue
        with ablate_features(model, sae, feature):
            for name, value in measured().items():
                rise[name]["own"].append(float((value - clean[name])[known & mine].mean()))
                rise[name]["other"].append(float((value - clean[name])[known & ~mine].mean()))
    for claim, name in (("ablation-hurts-its-own-word", "loss"), ("ablation-lowers-its-own-logit", "logit")):
        ctx.measure(claim, **{k: float(np.mean(rise[name][v])) for k, v in (("ours", "own"), ("baseline", "other"))})
    return rise


def _attribution(
    ctx: Context, model: nn.Module, sae: AttentionSAE, text: LabelledText, known: Tensor, mixture: TaskMixture,
    features: list[int],
) -> dict[str, Any]:  # fmt: skip
    """Where a word comes next because it did before: does attribution name that earlier place?"""
    ids, the_map = text.input_ids, block_map(model)
    rows, at = known.nonzero(as_tuple=True)
    order = torch.randperm(len(rows), generator=generator(ctx.seed)).to(rows.device)
    rows, at = rows[order], at[order]
    feature = torch.tensor(features, device=rows.device)[ids[rows, at + 1] - mixture.first_word]
    active = sae.encode(capture_z(model, ids, LAYER))[rows, at, feature] > 0
    rows, at, feature = rows[active][:PLACES], at[active][:PLACES], feature[active][:PLACES]
    found = dfa(model, sae, ids[rows], feature, at)
    pattern = head_inputs(the_map, right_padded(ids[rows]), LAYER)[0]
    attention = pattern[torch.arange(len(rows), device=rows.device), :, at].mean(1)
    source = text.source[rows, at]
    named = {"attribution": found.by_source.argmax(1) == source, "attention": attention.argmax(1) == source}
    right = {name: float(hit.double().mean()) for name, hit in named.items()}
    ctx.measure("attribution-names-the-source", ours=right["attribution"], baseline=right["attention"])
    off = (found.total - found.pre_activation).abs().max() / found.pre_activation.abs().max()
    ctx.measure("attribution-adds-up", ours=float(off))

    kept, dropped, tree = [], [], None
    for b, t, i in list(zip(rows.tolist(), at.tolist(), feature.tolist(), strict=True))[:TREES]:
        whole = recursive_dfa(model, sae, ids[b : b + 1], i, t, depth=1, top=100_000, threshold=0.0)
        with capture(model, the_map.resolve(f"layers.{LAYER}.resid_pre")) as seen, torch.no_grad():
            model(ids[b : b + 1])
        norm = the_map.blocks[LAYER].norm1
        assert norm is not None
        scale = norm_scale(norm, seen[f"layers.{LAYER}.resid_pre"][0])
        children = whole.root.children
        exact = sum(n.value for n in children)
        without = sum(n.value / float(scale[n.position]) if n.position >= 0 else n.value for n in children)
        kept.append(abs(exact / whole.root.value - 1))
        dropped.append(abs(without / whole.root.value - 1))
        if tree is None:
            shown = recursive_dfa(model, sae, ids[b : b + 1], i, t, depth=2, top=4, threshold=0.03)
            tree = {"root": asdict(shown.root), "ids": list(shown.token_ids), "next": int(ids[b, t + 1])}
    ctx.measure("norm-scale-kept", ours=float(np.median(kept)), baseline=float(np.median(dropped)))
    return {"right": right, "places": len(rows), "tree": tree}


def _one_position(ctx: Context, model: nn.Module, ids: Tensor) -> None:
    site = block_map(model).resolve(f"layers.{LAYER}.attn.z")
    clean, rise = _losses(model, ids), {}
    for name, positions in {"one": [ids.shape[1] - 2], "all": None}.items():
        with replace(model, {site: 0.0}, positions=positions):
            rise[name] = float((_losses(model, ids) - clean)[:, :-1].mean())
    ctx.measure("one-position-is-not-all", ours=rise["one"], baseline=rise["all"])


def _plain(card: FeatureCard) -> dict[str, Any]:
    return {**asdict(card), "counts": card.counts.tolist(), "edges": card.edges.tolist()}


def _card(plain: dict[str, Any]) -> FeatureCard:
    def excerpts(rows: list[dict]) -> tuple[Excerpt, ...]:
        fixed = ({k: tuple(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
        return tuple(Excerpt(**row) for row in fixed)  # type: ignore[arg-type]

    pairs = {name: tuple((w, float(v)) for w, v in plain[name]) for name in ("promoted", "suppressed", "parts")}
    deciles = tuple(Decile(d["low"], d["high"], excerpts(d["examples"])) for d in plain["deciles"])
    arrays = {"counts": np.array(plain["counts"]), "edges": np.array(plain["edges"])}
    return FeatureCard(**{**plain, **pairs, **arrays, "top": excerpts(plain["top"]), "deciles": deciles})


# --------------------------------------------------------------------------------------------------------- figures


def draw(records: list[dict]) -> list[Plate]:
    """The records of all seeds, as figures."""
    with style():
        plates = [
            _draw_planted(records), _draw_quality(records), _draw_roles(records), _draw_heads(records[0]),
            _draw_ablation(records), _draw_tree(records[0]), _draw_prefix(records), *_draw_cards(records[0]),
        ]  # fmt: skip
        if "full" in records[0]:
            from broadsheet.experiments import attention_sae_full

            plates += attention_sae_full.draw([record["full"] for record in records])
    return plates


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _draw_planted(records: list[dict]) -> Plate:
    figure = _figure(6.4, 3.0)
    ax = figure.subplots()
    names = list(records[0]["planted"]["cosine"])
    for place, name in enumerate(names):
        values = [record["planted"]["cosine"][name] for record in records]
        ax.barh(place, np.mean(values), color=COLOURS["ours" if place == 0 else "baseline"], height=0.62)
        ax.plot(values, [place] * len(values), "o", color="white", mec="#1f2328", ms=4, mew=0.8)
        ax.text(np.mean(values) + 0.025, place, f"{np.mean(values):.2f}", va="center", fontsize=9)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.1)
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x")
    ax.set_xlabel("cosine with the planted features, mean")
    return Plate(
        "planted", figure,
        "How well each method finds 96 planted features in 4 heads of 16 dimensions. Bars: mean; points: seeds.",
    )  # fmt: skip


def _draw_quality(records: list[dict]) -> Plate:
    figure = _figure(9.2, 3.6)
    left, right = figure.subplots(1, 2)
    weights = [row["l1"] for row in records[0]["frontier"]]
    colours = dict(zip(weights, ("ours", "accent", "baseline", "neutral"), strict=False))
    for record in records:
        rows = sorted(record["frontier"], key=lambda row: row["l0"])
        left.plot([r["l0"] for r in rows], [r["loss_recovered"] for r in rows], color=COLOURS["light"], lw=1, zorder=1)
        for row in rows:
            left.plot(row["l0"], row["loss_recovered"], "o", ms=6, color=COLOURS[colours[row["l1"]]])
    for l1 in sorted(weights):
        left.plot([], [], "o", ms=6, color=COLOURS[colours[l1]], label=f"l1 = {l1:g}")
    left.legend(loc="lower right")
    left.axhline(1, color="#1f2328", lw=0.8, ls=":")
    left.set_xlabel("active features for each token (L0)")
    left.set_ylabel("loss recovered")
    density = np.concatenate([record["frontier"][0]["density"] for record in records])
    right.hist(np.log10(density[density > 0]), bins=36, color=COLOURS["ours"])
    right.set_xlabel("share of tokens on which a feature is active, log10")
    right.set_ylabel("features, all seeds")
    right.set_title(f"{(density == 0).mean():.0%} never active", fontsize=9, fontweight="normal")
    return Plate(
        "quality", figure,
        "Left: sparsity against what is left of the layer's work, for three weights of the sparsity term (one line for "
        "each seed; red is analysed). Right: how often its features are active.",
    )  # fmt: skip


def _draw_roles(records: list[dict]) -> Plate:
    names = records[0]["roles"]["names"]
    figure = _figure(9.0, 6.4)
    kinds = {"heads": "neutral", "coordinates": "baseline", "features": "ours"}
    labels = {"heads": "best head", "coordinates": "best coordinate", "features": "best feature"}
    axes = figure.subplots(1, 2, sharey=True)
    told = np.mean([record["roles"]["features"]["information"] for record in records], 0)
    order = [*np.argsort(-told[:-6]), *range(len(names) - 6, len(names))]
    for ax, what, label in zip(
        axes, ("information", "auc"), ("share of the role's entropy that it tells", "AUC"), strict=True
    ):
        mean = {kind: np.mean([record["roles"][kind][what] for record in records], 0)[order] for kind in kinds}
        low, high = np.min(list(mean.values()), 0), np.max(list(mean.values()), 0)
        ax.hlines(range(len(order)), low, high, color=COLOURS["light"], lw=1, zorder=1)
        for kind, colour in kinds.items():
            ax.plot(mean[kind], range(len(order)), "o", color=COLOURS[colour], ms=5.5, label=labels[kind])
        ax.set_xlabel(label)
        ax.grid(axis="y", visible=False)
        ax.grid(axis="x")
    axes[0].set_yticks(range(len(order)), [names[i] for i in order], fontsize=8)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return Plate(
        "roles", figure,
        "How well one unit tells each role of the layer from everything else, on texts not used to choose it: mean "
        "over seeds of the best head, the best single coordinate of the head outputs, and the best feature.",
    )  # fmt: skip


def _draw_heads(record: dict) -> Plate:
    names, shares = record["roles"]["names"], np.array(record["roles"]["shares"])
    figure = _figure(5.2, 6.2)
    ax = figure.subplots()
    image = ax.imshow(shares, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
    for (i, h), share in np.ndenumerate(shares):
        if share >= 0.1:
            ax.text(
                h, i, f"{share:.2f}", ha="center", va="center", fontsize=7, color="white" if share > 0.45 else "#1f2328"
            )
    ax.set_xticks(range(shares.shape[1]), [f"head {h}" for h in range(shares.shape[1])])
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.grid(visible=False)
    figure.colorbar(image, ax=ax, label="share of the feature", fraction=0.05, pad=0.03)
    return Plate(
        "heads",
        figure,
        "In which heads the feature of each role lives (share of its decoder row's length), first seed.",
    )


def _draw_ablation(records: list[dict]) -> Plate:
    words = [name.split("”")[0][1:] for name in records[0]["roles"]["names"] if name.endswith("is next")]
    own, other = (np.mean([record["ablation"]["logit"][kind] for record in records], 0) for kind in ("own", "other"))
    order = np.argsort(-own)
    figure = _figure(8.2, 3.4)
    ax = figure.subplots()
    places = np.arange(len(words))
    ax.bar(places - 0.2, own[order], 0.4, color=COLOURS["ours"], label="where the word itself comes next")
    ax.bar(places + 0.2, other[order], 0.4, color=COLOURS["baseline"], label="where another word does")
    ax.axhline(0, color="#1f2328", lw=0.8)
    ax.set_xticks(places, [words[i] for i in order], rotation=45, ha="right")
    ax.set_ylabel("fall of the right word's logit")
    ax.legend()
    return Plate(
        "ablation", figure, "What it costs to leave one word's feature out, everything else kept: mean over seeds."
    )


def _draw_tree(record: dict) -> Plate:
    from broadsheet.interpretability.attention_sae import AttributionNode, AttributionTree

    def node(plain: dict) -> AttributionNode:
        children = tuple(node(child) for child in plain["children"])
        return AttributionNode(plain["name"], plain["position"], plain["value"], children)

    tree = record["attribution"]["tree"]
    words = TaskMixture(WORDS).words
    figure = _figure(9.5, 3.6)
    ax = figure.subplots()
    root = node(tree["root"])
    last = root.position + 1
    first = max(0, min(n.position for _, n in root.walk() if n.position >= 0) - 4)
    AttributionTree(root, tuple(tree["ids"][: last + 1])).plot([words[i] for i in tree["ids"][: last + 1]], ax)
    ax.set_xlim(first - 0.6, last + 0.6)
    for position, colour in ((root.position, "ours"), (last, "neutral")):
        ax.get_xticklabels()[position].set_color(COLOURS[colour])
        ax.get_xticklabels()[position].set_fontweight("bold")
    return Plate(
        "recursion", figure,
        f"One activation followed back through both layers: the feature is active at the token in red, where “"
        f"{words[tree['next']]}” comes next. Rows: the parts it is made of; red adds to it, blue "
        "takes away, size and width are the share.",
    )  # fmt: skip


def _draw_prefix(records: list[dict]) -> Plate:
    figure = _figure(6.4, 3.8)
    ax = figure.subplots()
    lengths = records[0]["prefix"]["lengths"]
    for i, record in enumerate(records):
        table = np.array(record["prefix"]["attention"])
        best = tuple(np.unravel_index(table.max(-1).argmax(), table.shape[:2]))
        for layer, head in np.ndindex(*table.shape[:2]):
            if (layer, head) == best:
                ax.plot(lengths, table[layer, head], "o-", ms=4, label=f"model {i + 1}: head {layer}.{head}", zorder=3)
            else:
                ax.plot(lengths, table[layer, head], color=COLOURS["light"], lw=0.7, zorder=1)
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel("tokens that match before")
    ax.set_ylabel("attention to what followed the first run")
    ax.legend(fontsize=8)
    return Plate(
        "prefixes", figure,
        "Attention of every head to the token after an earlier run of the same words, by the length of the run; the "
        "strongest head of each seed in colour.",
    )  # fmt: skip


def _draw_cards(record: dict) -> list[Plate]:
    plates = []
    for place, plain in enumerate(record["cards"]):
        card = _card(plain)
        caption = (
            f"The feature that tells best where {card.description}: activation behind each token, and under it what "
            "the one in bold was read from (direct feature attribution)."
        )
        plates.append(Plate(f"card-{place + 1}", card.plot(), caption))
    return plates
