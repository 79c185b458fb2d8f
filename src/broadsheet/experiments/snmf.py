"""Sparse semi-NMF, measured: planted features, a small language model's topics, trees, steering at equal divergence.

``small`` needs no data: features planted in noise, and two-layer Llamas trained on the spot on texts about topics.
``full`` takes the user's language model and her own concepts, sentences under labels, from her folder.
"""

import itertools
import json
import math
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

from broadsheet.data.language import TopicCorpus
from broadsheet.errors import DataMissing, TrainingDiverged
from broadsheet.interpretability.snmf import (
    KL_TARGETS,
    PROMPT,
    ConceptTree,
    Detection,
    HierarchicalSemiNMF,
    SemiNMF,
    alpha_for_kl,
    collect_mlp_activations,
    concept_detection,
    difference_of_means,
    find_concepts,
    judge_prompts,
    logit_shift,
    neuron_overlap,
    next_token_kl,
    steered_texts,
    steering_curve,
)
from broadsheet.lab import Context, Plate
from broadsheet.nn.cards import token_texts
from broadsheet.nn.features import Feature
from broadsheet.nn.matching import match_directions
from broadsheet.nn.plotting import COLOURS, band, new_figure, style
from broadsheet.nn.seeding import generator
from broadsheet.nn.small_lm import small_language_model, train_language_model
from broadsheet.nn.sparse_autoencoder import SparseAutoencoder
from broadsheet.nn.steering import StrengthOutOfReach

PLANTED: dict[str, Any] = {"n": 2000, "d": 256, "k": 20, "few": 13, "iterations": 200}
CELLS = ((0.05, 0.0), (0.05, 0.1), (0.2, 0.0), (0.2, 0.1))  # share of tokens, noise as a share of the spread
FEW_TOKENS = 200
SAE_GRID = ((2.0, 0.01), (0.5, 0.03), (2.0, 0.03))  # L1, learning rate
SAE_STEPS = 200
SAE_STEPS_FEW = 400  # batches are small where tokens are few
DICTIONARY_PENALTIES = (0.1, 0.5)
LM: dict[str, Any] = {"width": 32, "hidden": 128, "steps": 120, "batch": 32, "lr": 1e-2, "length": 16, "layer": 0}
CORPUS: dict[str, Any] = {"n_topics": 8, "words_per_topic": 6, "n_common": 16, "topical": 0.5}
RELATED = 0.5  # in the texts of the tree: how often a topic's word comes from any topic of its group
TEXTS = 160
HELD_OUT = 20
FACTORS = 16
SPARSITY = 0.1
ITERATIONS = 200
TARGETS = (0.1, 0.25, 0.5)
SEARCHED = 3  # features whose strengths both searches look for
FAMILIES: dict[str, Any] = {"n": 1200, "d": 128, "families": 4, "children": 3, "core": 6, "own": 3}
SPARE = 4
TUNING_STEPS = 60
FULL: dict[str, Any] = {
    "layer": None, "n_components": 100, "sparsity": 0.01, "max_iter": 2000, "patience": 200, "samples": 8,
    "new_tokens": 50, "words": 10,
}  # fmt: skip


def run(ctx: Context) -> dict:
    """All claims of one seed."""
    if ctx.preset == "full":
        return {"full": _full(ctx)}
    return {"planted": _planted(ctx), "families": _families(ctx), "topics": _topics(ctx)}


# ------------------------------------------------------------------------------------------------- planted features


def plant(
    n: int, d: int, k: int, few: int, share: float, noise: float, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Activations ``[n, d]`` of ``k`` features ``[k, d]`` of ``few`` neurons each, active at a share of the tokens."""
    features = torch.zeros(k, d)
    for row in features:
        row[torch.randperm(d, generator=random)[:few]] = torch.randn(few, generator=random)
    codes = torch.rand(n, k, generator=random) * (torch.rand(n, k, generator=random) < share)
    data = codes @ features
    return data + noise * data.std() * torch.randn(n, d, generator=random), features


def _planted(ctx: Context) -> dict[str, Any]:
    size = {name: PLANTED[name] for name in ("n", "d", "k", "few")}
    methods = ("svd", "random", "dense", "sae", "sae_mean", "kmeans", "pca")
    cosine: dict[str, list[float]] = {name: [] for name in methods}
    curves: dict[str, list[float]] = {}
    data = truth = torch.empty(0)
    found: list[float] = []
    with ctx.progress.task("planted features", total=len(CELLS)) as task:
        for i, (share, noise) in enumerate(CELLS):
            data, truth = plant(**size, share=share, noise=noise, random=generator(100 * ctx.seed + i))
            data, truth = data.to(ctx.device), truth.to(ctx.device)
            for name, init, sparsity in (
                ("svd", "svd", size["few"] / size["d"]), ("random", "random", size["few"] / size["d"]),
                ("dense", "svd", 1.0),
            ):  # fmt: skip
                fitted = _fit(data, size["k"], sparsity, init, ctx.seed, PLANTED["iterations"])
                cosine[name].append(match_directions(truth, fitted.features_).mean)
                curves[name] = (fitted.loss_curve_ / float(data.square().sum())).tolist()
            found = [match_directions(truth, sae.W_dec.detach()).mean for sae in _autoencoders(ctx, data, size["k"])]
            cosine["sae"].append(max(found))
            cosine["sae_mean"].append(float(np.mean(found)))
            cosine["kmeans"].append(match_directions(truth, _clusters(data, size["k"], ctx.seed)).mean)
            cosine["pca"].append(match_directions(truth, _components(data, size["k"]), signed=False).mean)
            task.advance()
    mean = {name: float(np.mean(values)) for name, values in cosine.items()}
    ctx.measure("planted-found", ours=min(cosine["svd"]))
    for claim, rival in (("planted-above-sae", "sae"), ("planted-above-kmeans", "kmeans")):
        lead = np.array(cosine["svd"]) - np.array(cosine[rival])
        tight = int(lead.argmin())
        ctx.measure(claim, ours=cosine["svd"][tight], baseline=cosine[rival][tight])
    ctx.measure("planted-above-untuned-sae", ours=mean["svd"], baseline=mean["sae_mean"])
    ctx.measure("planted-needs-winner-take-all", ours=mean["svd"], baseline=mean["dense"])
    ctx.measure("start-does-not-matter", ours=mean["random"], baseline=mean["svd"])
    learned = [
        match_directions(truth, _dictionary(data, size["k"], penalty, ctx.seed)).mean
        for penalty in DICTIONARY_PENALTIES
    ]
    ctx.measure("planted-above-dictionary-learning", ours=cosine["svd"][-1], baseline=max(learned))
    share, noise = CELLS[-1]
    few, truth = plant(
        **size | {"n": FEW_TOKENS}, share=share, noise=noise, random=generator(100 * ctx.seed + len(CELLS))
    )
    few, truth = few.to(ctx.device), truth.to(ctx.device)
    ours = _fit(few, size["k"], size["few"] / size["d"], "svd", ctx.seed, PLANTED["iterations"])
    (rival,) = _autoencoders(ctx, few, size["k"], grid=(SAE_GRID[int(np.argmax(found))],), steps=SAE_STEPS_FEW)
    scarce = {
        "svd": match_directions(truth, ours.features_).mean,
        "sae": match_directions(truth, rival.W_dec.detach()).mean,
    }
    ctx.measure("few-tokens", ours=scarce["svd"], baseline=scarce["sae"])
    return {
        "cells": [list(cell) for cell in CELLS],
        "cosine": cosine,
        "curves": curves,
        "dictionary": max(learned),
        "few": scarce,
    }


def _fit(data: Tensor, k: int, sparsity: float, init: str, seed: int, iterations: int, **how: Any) -> SemiNMF:
    settings: dict[str, Any] = {"max_iter": iterations, "patience": iterations, "random_state": seed}
    return SemiNMF(k, sparsity, init=init, **settings, **how).fit(data)


def _autoencoders(
    ctx: Context, data: Tensor, k: int, site: str = "", grid: Any = None, steps: int | None = None
) -> list[SparseAutoencoder]:
    """One for each point of the grid; a point at which all features die counts as its untrained start."""
    found, steps = [], steps or SAE_STEPS
    batches = list(data.split(max(50, min(len(data) // 4, 400))))
    for l1, lr in grid or SAE_GRID:
        sae = SparseAutoencoder(data.shape[1], k, site=site, seed=ctx.seed).to(ctx.device)
        try:
            sae.fit(
                batches, steps=steps, l1=l1, lr=lr, betas=(0.9, 0.999), warmup=15, resample_every=steps // 3,
                resamplings=2, seed=ctx.seed,
            )  # fmt: skip
        except TrainingDiverged:
            sae = SparseAutoencoder(data.shape[1], k, scale=1, site=site, seed=ctx.seed).to(ctx.device)
        found.append(sae)
    return found


def _clusters(data: Tensor, k: int, seed: int) -> Tensor:
    from sklearn.cluster import KMeans

    fitted: Any = KMeans(k, random_state=seed).set_params(n_init=3).fit(data.cpu().numpy())
    return torch.from_numpy(fitted.cluster_centers_).to(data)


def _components(data: Tensor, k: int) -> Tensor:
    return torch.linalg.svd(data - data.mean(0), full_matrices=False)[2][:k]


def _dictionary(data: Tensor, k: int, penalty: float, seed: int) -> Tensor:
    from sklearn.decomposition import MiniBatchDictionaryLearning

    how: dict[str, Any] = {"alpha": penalty, "max_iter": 2, "batch_size": 256, "random_state": seed}
    how |= {"positive_code": True, "fit_algorithm": "cd", "transform_algorithm": "lasso_cd"}
    fitted = MiniBatchDictionaryLearning(k, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(fitted.fit(data.cpu().numpy()).components_).to(data)


# ------------------------------------------------------------------------------------------------- planted families


def plant_families(
    n: int, d: int, families: int, children: int, core: int, own: int, random: torch.Generator, noise: float = 0.1
) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, features and the family of each: siblings share a core of neurons and have some of their own."""
    free = torch.randperm(d, generator=random)
    features, at = torch.zeros(families * children, d), 0
    for family in range(families):
        shared = free[at : at + core]
        at += core
        sign = torch.randn(core, generator=random).sign()
        for child in range(children):
            row = features[family * children + child]
            row[shared] = sign * (0.75 + 0.5 * torch.rand(core, generator=random))
            row[free[at : at + own]] = torch.randn(own, generator=random).sign()
            at += own
    codes = torch.zeros(n, len(features))
    about = torch.randint(len(features), (n,), generator=random)
    codes[torch.arange(n), about] = 0.5 + torch.rand(n, generator=random)
    data = codes @ features
    labels = torch.arange(families).repeat_interleave(children)
    return data + noise * data.std() * torch.randn(n, d, generator=random), features, labels


def _families(ctx: Context) -> dict[str, Any]:
    data, truth, labels = plant_families(**FAMILIES, random=generator(7000 + ctx.seed))
    data, truth = data.to(ctx.device), truth.to(ctx.device)
    k, families = len(truth), FAMILIES["families"]
    sparsity = (FAMILIES["core"] + FAMILIES["own"]) / FAMILIES["d"]
    deep = HierarchicalSemiNMF(  # a few factors more than features: a start from clusters may split one and miss one
        ranks=(k + SPARE, families), sparsity=sparsity, init="kmeans", n_init=4, max_iter=ITERATIONS // 2,
        patience=ITERATIONS, random_state=ctx.seed,
    ).fit(data)  # fmt: skip
    match = match_directions(truth, torch.as_tensor(deep.features(0)))
    parents = deep.parents(1).cpu()[match.index.cpu()]
    ctx.measure("tree-of-planted-families", ours=float(adjusted_rand_score(labels, parents)), cosine=match.mean)
    tuned = {
        name: deep.fine_tune(data, steps=TUNING_STEPS, nonnegative=kept, progress=ctx.progress)
        for name, kept in (("ours", True), ("loose", False))
    }
    ctx.measure(
        "tuned-stays-non-negative", ours=tuned["ours"].negative_share, baseline=tuned["loose"].negative_share,
        error=tuned["ours"].losses[-1], loose_error=tuned["loose"].losses[-1], untuned_error=tuned["ours"].losses[0],
    )  # fmt: skip
    family = {str(int(found)): int(label) for found, label in zip(match.index, labels, strict=True)}
    largest = Counter(parents.tolist()).most_common(1)[0][0]
    members = [int(i) for i in match.index]
    overlap = neuron_overlap(torch.as_tensor(deep.features(0))[members].cpu())
    return {
        "trees": [_tree(deep.concept_tree(1, i, top_children=4, threshold=0.2)) for i in range(families)],
        "family": family,
        "largest": largest,
        "overlap": {"member": overlap.member.int().tolist(), "jaccard": overlap.jaccard.tolist()},
        "labels": labels.tolist(),
    }


def _tree(tree: ConceptTree) -> dict[str, Any]:
    children = [_tree(child) for child in tree.children]
    return {"level": tree.level, "index": tree.index, "weight": tree.weight, "children": children}


def _grown(tree: dict[str, Any]) -> ConceptTree:
    return ConceptTree(tree["level"], tree["index"], tree["weight"], tuple(_grown(c) for c in tree["children"]))


# ------------------------------------------------------------------------------------------------- a language model


def train_topic_model(ctx: Context, corpus: TopicCorpus, name: str = "lm") -> nn.Module:
    """A two-layer Llama that has read texts about eight topics."""
    model = small_language_model(
        corpus.vocab_size, kind="llama", width=LM["width"], layers=2, heads=2, hidden=LM["hidden"],
        length=LM["length"] + 8, seed=ctx.seed,
    ).to(ctx.device)  # fmt: skip
    train_language_model(
        model, lambda n, random: corpus.sample(n, LM["length"], random)[0], steps=LM["steps"], batch=LM["batch"],
        lr=LM["lr"], seed=ctx.seed, checkpoint=ctx.checkpoint / name, progress=ctx.progress,
        description="training a small Llama",
    )  # fmt: skip
    return model


def _topics(ctx: Context) -> dict[str, Any]:
    corpus = TopicCorpus(**CORPUS)
    model = train_topic_model(ctx, corpus)
    ids, about = corpus.sample(TEXTS, LM["length"], generator(50_000 + ctx.seed))
    ids = ids.to(ctx.device)
    concepts = find_concepts(
        model, [ids], LM["layer"],
        snmf=SemiNMF(FACTORS, SPARSITY, init="svd", max_iter=ITERATIONS, patience=ITERATIONS, random_state=ctx.seed),
    )  # fmt: skip
    data, site = concepts.activations.values, concepts.site
    word_topic = corpus.topic_of.to(ctx.device)[concepts.activations.token_ids].cpu().numpy()
    saes = _autoencoders(ctx, data, FACTORS, site)
    tables = [_auc(sae.encode(data).detach(), word_topic, 8) for sae in saes]
    best = int(np.argmax([table.max(1).mean() for table in tables]))
    table = _auc(concepts.coefficients, word_topic, 8)
    noise = torch.randn(8, data.shape[1], generator=generator(60_000 + ctx.seed)).to(data)
    features: dict[str, list[Feature]] = {
        "snmf": [concepts.feature(int(k)) for k in table.argmax(1)],
        "sae": [saes[best].feature(int(k)) for k in tables[best].argmax(1)],
        "means": [difference_of_means(model, site, [ids[about == t]], [ids[about != t]]) for t in range(8)],
        "random": [Feature(site, row, name="random") for row in noise],
    }
    steering = _steering(ctx, model, corpus, features)
    detection = _detection(ctx, model, corpus, features)
    tree = _topic_tree(ctx)
    updates = _updates(ctx, data)
    _strengths(ctx, model, features["snmf"][:SEARCHED])
    _rankings(ctx, model, corpus, features["sae"])
    cards = [_card(model, corpus, concepts, int(table.argmax(1)[t]), t) for t in (0, 2, 5, 7)]
    return {
        "steering": steering, "detection": detection, "tree": tree, "updates": updates, "cards": cards,
        "auc": {"snmf": table.max(1).tolist(), "sae": tables[best].max(1).tolist()},
    }  # fmt: skip


def _auc(activity: Tensor, labels: np.ndarray, n: int) -> np.ndarray:
    """How well each feature tells each label's tokens from all others, ``[n, K]``."""
    ranks = rankdata(activity.float().cpu().numpy(), axis=0)
    found = []
    for t in range(n):
        own = labels == t
        n_own, n_other = own.sum(), (~own).sum()
        found.append((ranks[own].sum(0) - n_own * (n_own + 1) / 2) / (n_own * n_other))
    return np.array(found)


def _prompt(ctx: Context) -> Tensor:
    return torch.tensor([[0, 3, 4, 5]], device=ctx.device)  # BOS and three words that all texts share


def _steering(
    ctx: Context, model: nn.Module, corpus: TopicCorpus, features: dict[str, list[Feature]]
) -> dict[str, Any]:
    mass: dict[str, list[list[float]]] = {}
    base = []
    with warnings.catch_warnings(), ctx.progress.task("steering", total=len(features)) as task:
        warnings.simplefilter("ignore", StrengthOutOfReach)
        for name, chosen in features.items():
            curves = [
                steering_curve(model, feature, _prompt(ctx), corpus.topic_tokens[t], targets=TARGETS)
                for t, feature in enumerate(chosen)
            ]
            mass[name] = [list(curve.mass) for curve in curves]
            base = [curve.base_mass for curve in curves]
            task.advance()
    # A divergence out of reach is no steering: the feature stands where the model stands without it.
    filled = {name: [_or(row[-1], base[t]) for t, row in enumerate(rows)] for name, rows in mass.items()}
    last = {name: float(np.mean(values)) for name, values in filled.items()}
    missed = {name: int(np.isnan([row[-1] for row in rows]).sum()) for name, rows in mass.items()}
    for claim, rival in (
        ("steer-above-random", "random"), ("steer-above-sae", "sae"), ("steer-above-difference-of-means", "means"),
    ):  # fmt: skip
        ctx.measure(claim, ours=last["snmf"], baseline=last[rival], unsteered=float(np.mean(base)), out_of_reach=missed)
    shown = {name: [[_or(x, base[t]) for x in row] for t, row in enumerate(rows)] for name, rows in mass.items()}
    return {"targets": list(TARGETS), "mass": shown, "base": base, "missed": missed}


def _or(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else value


def _detection(
    ctx: Context, model: nn.Module, corpus: TopicCorpus, features: dict[str, list[Feature]]
) -> dict[str, Any]:
    random = generator(70_000 + ctx.seed)
    auc: dict[str, list[float]] = {name: [] for name in ("snmf", "sae", "means")}
    ratio: dict[str, list[float]] = {name: [] for name in auc}
    clamped = dict.fromkeys(auc, 0)
    for t in range(8):
        topic = torch.full((HELD_OUT,), t)
        activating = corpus.sample(HELD_OUT, LM["length"], random, topics=topic)[0].to(ctx.device)
        other = (topic + 1 + torch.randint(7, (HELD_OUT,), generator=random)) % 8
        neutral = corpus.sample(HELD_OUT, LM["length"], random, topics=other)[0].to(ctx.device)
        for name in auc:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = concept_detection(model, features[name][t], [activating], [neutral])
            auc[name].append(found.auc)
            ratio[name].append(found.score)
            clamped[name] += found.clamped
    mean = {name: float(np.mean(values)) for name, values in auc.items()}
    ctx.measure(
        "detect-above-sae", ours=mean["snmf"], baseline=mean["sae"], difference_of_means=mean["means"],
        log_ratio={name: float(np.mean(values)) for name, values in ratio.items()}, clamped=clamped,
    )  # fmt: skip
    return {"auc": auc, "log_ratio": ratio, "clamped": clamped}


def _topic_tree(ctx: Context) -> dict[str, Any]:
    """A second model, whose texts go back and forth between the topics of a group."""
    corpus = TopicCorpus(**CORPUS, related=RELATED)
    model = train_topic_model(ctx, corpus, "lm-groups")
    ids, _ = corpus.sample(TEXTS, LM["length"], generator(55_000 + ctx.seed))
    rows, _ = collect_mlp_activations(model, [ids.to(ctx.device)], LM["layer"])
    word_topic = corpus.topic_of.to(ctx.device)[rows.token_ids].cpu()
    deep = HierarchicalSemiNMF(
        ranks=(FACTORS, 2), sparsity=SPARSITY, init="svd", max_iter=ITERATIONS, random_state=ctx.seed
    ).fit(rows.values)
    broad = torch.as_tensor(deep.coefficients(1)).cpu()
    broad = broad / broad.mean(0).clamp_min(1e-12)
    strength = torch.stack([broad[word_topic == t].mean(0) for t in range(8)])
    ctx.measure("tree-of-topics", ours=float(adjusted_rand_score(corpus.groups, strength.argmax(1))))
    return {"strength": strength.tolist(), "names": list(corpus.names)}


def _updates(ctx: Context, data: Tensor) -> dict[str, Any]:
    """Loss curves of starts and solvers on the model's own activations."""
    total, curves = float(data.square().sum()), {}
    fits = {}
    for init, solver in (
        ("svd", "multiplicative"), ("random", "multiplicative"), ("kmeans", "multiplicative"),
        ("random", "projected"),
    ):  # fmt: skip
        fits[init, solver] = _fit(data, FACTORS, SPARSITY, init, ctx.seed, ITERATIONS, solver=solver, tol=0.0)
        curves[f"{init}, {solver}"] = (fits[init, solver].loss_curve_ / total).tolist()
    aim = min(curves["random, multiplicative"]) + 0.005
    reached = {
        solver: next((i + 1 for i, x in enumerate(curves[f"random, {solver}"]) if x <= aim), ITERATIONS)
        for solver in ("multiplicative", "projected")
    }
    ctx.measure("projected-needs-fewer-iterations", ours=reached["projected"], baseline=reached["multiplicative"])
    again = _fit(data, FACTORS, SPARSITY, "random", 1000 + ctx.seed, ITERATIONS)
    stable = match_directions(fits["random", "multiplicative"].features_, again.features_).mean
    ctx.measure("stable-across-starts", ours=stable)
    return {"curves": curves}


def _strengths(ctx: Context, model: nn.Module, features: list[Feature]) -> None:
    """Targets met by doubling and bisection, and by a search of a fixed range with an absolute tolerance."""
    hits: dict[str, list[bool]] = {"ours": [], "fixed": []}
    prompt = _prompt(ctx)
    for feature, target in itertools.product(features, (KL_TARGETS[0], KL_TARGETS[2], KL_TARGETS[-1])):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = alpha_for_kl(model, feature, prompt, target)
        told = any(issubclass(w.category, StrengthOutOfReach) for w in said)
        hits["ours"].append(told or abs(next_token_kl(model, feature, found, prompt) - target) <= 0.05 * target)
        low, high, kept = 1.0, 2000.0, None
        for _ in range(20):
            middle = (low + high) / 2
            kl = next_token_kl(model, feature, middle, prompt)
            kept = kl if abs(kl - target) < 0.01 else kept
            low, high = (middle, high) if kl < target else (low, middle)
        hits["fixed"].append(kept is not None and abs(kept - target) <= 0.05 * target)
    ctx.measure("targets-hit", ours=float(np.mean(hits["ours"])), baseline=float(np.mean(hits["fixed"])))


def _rankings(ctx: Context, model: nn.Module, corpus: TopicCorpus, features: list[Feature]) -> None:
    shares: dict[bool, list[float]] = {False: [], True: []}
    for t, feature in enumerate(features):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StrengthOutOfReach)
            alpha = alpha_for_kl(model, feature, _prompt(ctx), TARGETS[-1])
        for by_size in shares:
            strength = 1.0 if math.isnan(alpha) else alpha
            words = logit_shift(model, feature, strength, _prompt(ctx), top=6, by_size=by_size)["token_id"]
            shares[by_size].append(float(np.isin(words, corpus.topic_tokens[t]).mean()))
    ctx.measure("signed-ranking", ours=float(np.mean(shares[False])), baseline=float(np.mean(shares[True])))


def _card(model: nn.Module, corpus: TopicCorpus, concepts: Any, k: int, topic: int) -> dict[str, Any]:
    tokenizer = corpus.tokenizer()
    examples = concepts.top_contexts(k, n=40, window=4)
    contexts, seen = [], set()
    for text, ids, values in zip(examples.text, examples.token_ids, examples.values, strict=True):
        if text not in seen and len(contexts) < 5:  # one excerpt of a text says enough
            seen.add(text)
            contexts.append({"tokens": token_texts(ids, tokenizer), "values": list(values)})
    words = concepts.vocab_projection(model, k, top=6, tokenizer=tokenizer)["token"].tolist()
    neurons = int((torch.as_tensor(concepts.snmf.features_[k]) != 0).sum())
    return {"factor": k, "topic": corpus.names[topic], "contexts": contexts, "words": words, "neurons": neurons,
            "own": [corpus.words[int(i)] for i in corpus.topic_tokens[topic]]}  # fmt: skip


# ------------------------------------------------------------------------------------------------- the user's model


def _full(ctx: Context) -> dict[str, Any]:
    model, tokenizer, table = _own_model(ctx)
    n_layers = int(getattr(model.config, "num_hidden_layers", 2))
    layer = n_layers // 2 if FULL["layer"] is None else FULL["layer"]
    halves = {label: _halves(entry, ctx.seed) for label, entry in table.items()}
    texts = [text for first, _ in halves.values() for text in first]
    labels = [i for i, (first, _) in enumerate(halves.values()) for _ in first]
    snmf = SemiNMF(
        FULL["n_components"], FULL["sparsity"], init="svd", max_iter=FULL["max_iter"], patience=FULL["patience"],
        random_state=ctx.seed,
    )  # fmt: skip
    concepts = find_concepts(
        model, texts, layer, tokenizer, snmf=snmf, checkpoint=ctx.checkpoint / "snmf", progress=ctx.progress
    )
    of_token = np.array(labels)[concepts.activations.text.cpu().numpy()]
    auc = _auc(concepts.coefficients, of_token, len(halves))
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids.to(ctx.device)
    rows, questions = [], []
    with ctx.progress.task("concepts", total=len(halves)) as task:
        for i, (label, (first, second)) in enumerate(halves.items()):
            others = [text for other, (_, rest) in halves.items() if other != label for text in rest]
            fitted_on = [text for other, (own, _) in halves.items() if other != label for text in own]
            pair = {
                "snmf": concepts.feature(int(auc[i].argmax())),
                "means": difference_of_means(model, concepts.site, first, fitted_on, tokenizer),
            }
            words = _word_ids(table[label], first, fitted_on, tokenizer)
            row: dict[str, Any] = {"label": label, "auc": float(auc[i].max())}
            for name, feature in pair.items():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found: Detection = concept_detection(model, feature, second, others, tokenizer)
                    curve = steering_curve(model, feature, prompt, words, targets=KL_TARGETS)
                row[name] = {
                    "detection": found.score, "mass": [_or(x, curve.base_mass) for x in curve.mass],
                    "base": curve.base_mass,
                }  # fmt: skip
                alpha = curve.alpha[-1]
                if not math.isnan(alpha) and hasattr(model, "generate"):
                    made = steered_texts(
                        model, feature, alpha, prompt, samples=FULL["samples"], new_tokens=FULL["new_tokens"],
                        seed=ctx.seed,
                    )  # fmt: skip
                    questions += judge_prompts(label, tokenizer.batch_decode(made, skip_special_tokens=True))
            rows.append(row)
            task.advance()
    for claim, read in (
        ("full-detects", lambda row, name: row[name]["detection"]),
        ("full-steers", lambda row, name: row[name]["mass"][-1]),
    ):
        mean = {name: float(np.mean([read(row, name) for row in rows])) for name in ("snmf", "means")}
        ctx.measure(claim, ours=mean["snmf"], baseline=mean["means"])
    total = float(concepts.activations.values.square().sum())
    return {
        "layer": layer, "rows": rows, "judge_prompts": questions, "explained": float(snmf.explained_),
        "loss": (snmf.loss_curve_ / total).tolist(),
    }  # fmt: skip


def _own_model(ctx: Context) -> tuple[Any, Any, dict[str, Any]]:
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, missing = ctx.data_dir / "snmf" / "model", []
    if not (folder / "config.json").is_file():
        cached = try_to_load_from_cache("openai-community/gpt2", "config.json")
        weights = try_to_load_from_cache("openai-community/gpt2", "model.safetensors")
        if isinstance(cached, str) and isinstance(weights, str):
            folder = Path(cached).parent
        else:
            missing.append(
                f"{folder}/config.json, model.safetensors, tokenizer.json (any causal language model: hf download "
                f"openai-community/gpt2 --local-dir {folder})"
            )
    file = ctx.data_dir / "snmf" / "concepts.json"
    if not file.is_file():
        missing.append(
            f'{file} (yours: {{"weekdays": ["We met on Monday.", ...], "rivers": {{"sentences": [...], "words": '
            '["river", ...]}, ...}, at least two concepts of four sentences)'
        )
    if missing:
        raise DataMissing("not found: " + "; ".join(missing))
    table = json.loads(file.read_text())
    short = [label for label, entry in table.items() if len(_sentences(entry)) < 4]
    if short or len(table) < 2:
        raise DataMissing(
            f"{file}: at least two concepts of four sentences each are needed ({', '.join(short)} has less)"
        )
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).to(ctx.device).eval()
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True), table


def _sentences(entry: Any) -> list[str]:
    return list(entry["sentences"] if isinstance(entry, dict) else entry)


def _halves(entry: Any, seed: int) -> tuple[list[str], list[str]]:
    texts = _sentences(entry)
    order = torch.randperm(len(texts), generator=generator(seed)).tolist()
    half = len(texts) // 2
    return [texts[i] for i in order[:half]], [texts[i] for i in order[half:]]


def _word_ids(entry: Any, own: list[str], others: list[str], tokenizer: Any) -> Tensor:
    """First tokens of the concept's words: given, or those that come oftener in its sentences than elsewhere."""
    words = entry.get("words") if isinstance(entry, dict) else None
    if not words:
        counts = [Counter(re.findall(r"[^\W\d_]{3,}", " ".join(texts))) for texts in (own, others)]
        total = [max(1, sum(c.values())) for c in counts]
        lead = {w: (n + 0.5) / total[0] / ((counts[1][w] + 0.5) / total[1]) for w, n in counts[0].items()}
        words = sorted(lead, key=lambda w: (-lead[w] * counts[0][w] ** 0.5, w))[: FULL["words"]]
    ids = {tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in words}
    return torch.tensor(sorted(ids))


# ------------------------------------------------------------------------------------------------- figures

LABELS = {
    "svd": ("SNMF, singular vectors", COLOURS["ours"]),
    "random": ("SNMF, random start", "#d98880"),
    "dense": ("without winner-take-all", COLOURS["accent"]),
    "sae": ("SAE, best setting", COLOURS["baseline"]),
    "sae_mean": ("SAE, mean of 3 settings", "#8fb0cf"),
    "kmeans": ("k-means", COLOURS["good"]),
    "pca": ("PCA", COLOURS["paper"]),
}
STEERED = {
    "means": ("difference of means (labels)", COLOURS["good"]),
    "sae": ("SAE", COLOURS["baseline"]),
    "snmf": ("SNMF", COLOURS["ours"]),
    "random": ("random direction", COLOURS["neutral"]),
}


def draw(records: list[dict]) -> list[Plate]:
    """Figures from the records of all seeds."""
    with style():
        if all("full" in r for r in records):
            return [_draw_full([r["full"] for r in records])]
        return [
            _draw_recovery([r["planted"] for r in records]),
            _draw_losses([r["topics"]["updates"] for r in records]),
            _draw_cards(records[0]["topics"]["cards"]),
            _draw_steering([r["topics"]["steering"] for r in records]),
            _draw_tree(records[0]["families"]),
            _draw_overlap(records[0]["families"]),
        ]


def _draw_recovery(records: list[dict]) -> Plate:
    figure, ax = new_figure(9.4, 4.2)
    cells, width = records[0]["cells"], 0.8 / len(LABELS)
    for j, (name, (label, colour)) in enumerate(LABELS.items()):
        values = np.array([r["cosine"][name] for r in records])
        x = np.arange(len(cells)) - 0.4 + (j + 0.5) * width
        ax.bar(x, values.mean(0), width * 0.92, color=colour, label=label)
        for row in values:
            ax.plot(x, row, ".", color="#1f2328", markersize=3, alpha=0.55)
    names = [f"at {share:.0%} of tokens\n" + (f"noise {noise:g}" if noise else "no noise") for share, noise in cells]
    ax.set_xticks(range(len(cells)), names)
    ax.set_ylim(0, 1.04)
    ax.set_ylabel("mean matched cosine")
    ax.set_title("How much of 20 planted features each method finds")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    caption = (
        "Features of 13 among 256 neurons, matched one to one with what each method found (dots: seeds). With "
        "winner-take-all nearly all are found; so they are by an autoencoder at the best of three settings."
    )
    return Plate("planted-features", figure, caption)


def _draw_losses(records: list[dict]) -> Plate:
    figure, ax = new_figure(6.8, 4.0)
    colours = dict(zip(records[0]["curves"], (COLOURS["ours"], COLOURS["accent"], COLOURS["good"], COLOURS["baseline"]),
                       strict=True))  # fmt: skip
    names = {"svd": "singular vectors", "random": "random", "kmeans": "clusters"}
    for key, colour in colours.items():
        init, solver = key.split(", ")
        rows = [r["curves"][key] for r in records]
        band(ax, range(1, len(rows[0]) + 1), rows, colour, f"{names[init]}, {solver}")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ticks = (0.01, 0.03, 0.1, 0.3)
    ax.set_yticks(ticks, [f"{tick:.0%}" for tick in ticks])
    ax.set_xticks((1, 10, 100), ("1", "10", "100"))
    ax.minorticks_off()
    ax.set_xlabel("iteration")
    ax.set_ylabel("share of the activations not explained")
    ax.set_title("Starts and updates")
    ax.legend(loc="upper right")
    caption = (
        "Loss on the MLP activations of a small language model, 16 features of 13 neurons; bands span the seeds. The "
        "loss may rise, for the winner-take-all step does not lower it; the best pair is kept."
    )
    return Plate("loss-curves", figure, caption)


def _draw_cards(cards: list[dict]) -> Plate:
    import matplotlib as mpl

    figure, axes = new_figure(10.6, 5.2, 1)
    figure.clear()
    axes = figure.subplots(2, 2).flat
    for ax, card in zip(axes, cards, strict=True):
        ax.set_axis_off()
        ax.set_xlim(0, 10)
        ax.set_ylim(-6.1, 1.1)
        ax.set_title(f"Factor {card['factor']}, {card['neurons']} neurons: {card['topic']}")
        ax.text(0, 0.35, "promotes", fontsize=8.5, color=COLOURS["neutral"], va="center")
        x = 1.45
        for word in card["words"]:
            own = word in card["own"]
            ax.text(x, 0.35, word, fontsize=9, va="center", color=COLOURS["ours"] if own else COLOURS["neutral"],
                    fontweight="bold" if own else "normal")  # fmt: skip
            x += 0.165 * len(word) + 0.32
        largest = max(max(c["values"]) for c in card["contexts"])
        for row, context in enumerate(card["contexts"]):
            x, y = 0.0, -0.85 - row * 1.08
            for token, value in zip(context["tokens"], context["values"], strict=True):
                word = token.strip()
                width = 0.155 * len(word) + 0.22
                strength = max(0.0, value / largest)
                ax.add_patch(mpl.patches.FancyBboxPatch(
                    (x + 0.05, y - 0.33), width - 0.1, 0.66, boxstyle="round,pad=0.04", linewidth=0,
                    facecolor=mpl.colormaps["Reds"](0.75 * strength) if strength > 0.02 else "#f7f5f1",
                ))  # fmt: skip
                ax.text(x + width / 2, y, word, ha="center", va="center", fontsize=8.5,
                        color="white" if strength > 0.75 else "#1f2328")  # fmt: skip
                x += width + 0.03
    caption = (
        "Four factors of the small language model, first seed: the words whose logits they raise (red: of the topic) "
        "and the texts in which they are most active, shaded by the coefficient."
    )
    return Plate("feature-cards", figure, caption)


def _draw_steering(records: list[dict]) -> Plate:
    figure, axes = new_figure(9.6, 4.0, 2, width_ratios=(1.25, 1))
    ax, targets = axes[0], records[0]["targets"]
    base = float(np.mean([r["base"] for r in records]))
    for name, (label, colour) in STEERED.items():
        rows = [[float(np.mean(r["base"])), *np.mean(r["mass"][name], axis=0)] for r in records]
        band(ax, [0, *targets], rows, colour, label, marker="o", markersize=4)
    ax.set_xlabel("KL divergence from the unsteered model, nats")
    ax.set_ylabel("probability of the topic's words")
    ax.set_ylim(0, None)
    ax.set_title("Steering towards a topic")
    ax.legend(loc="upper left")
    ax = axes[1]
    for j, (_name, (label, colour)) in enumerate(STEERED.items()):
        values = np.array([[row[-1] for row in r["mass"][_name]] for r in records]).flatten()
        rng = np.random.default_rng(0)
        ax.plot(j + rng.uniform(-0.18, 0.18, len(values)), values, ".", color=colour, markersize=6, alpha=0.6)
        ax.plot([j - 0.3, j + 0.3], [values.mean()] * 2, color=colour, linewidth=2.4)
        del label
    ax.axhline(base, color=COLOURS["neutral"], linewidth=0.8, linestyle=":")
    ax.set_xticks(range(len(STEERED)), ["difference\nof means", "SAE", "SNMF", "random"])
    ax.set_ylim(0, None)
    ax.set_title(f"Topic by topic at KL {targets[-1]:g}")
    caption = (
        "A small language model steered after a neutral prompt, each method at the strength at which the next "
        "token moves by the same divergence. Left: mean over eight topics, bands span the seeds. Right: each topic of "
        "each seed."
    )
    return Plate("steering", figure, caption)


def _draw_tree(record: dict) -> Plate:
    family = {int(k): v for k, v in record["family"].items()}
    names, count = {}, Counter()
    for index in sorted(family, key=lambda i: (family[i], i)):
        count[family[index]] += 1
        names[index] = f"family {'ABCDEFGH'[family[index]]}, child {count[family[index]]}"
    trees = [_grown(tree) for tree in record["trees"]]
    leaves = [len(tree.leaves) for tree in trees]
    figure, axes = new_figure(7.4, 0.7 + 0.36 * sum(leaves), 1)
    figure.clear()
    axes = figure.subplots(len(trees), 1, gridspec_kw={"height_ratios": leaves}, squeeze=False)[:, 0]
    for ax, tree in zip(axes, trees, strict=True):
        tree.plot(ax, lambda level, i: names.get(i, f"factor {i}") if level == 0 else f"broad factor {i}")
        ax.set_xlim(-0.05, 1.3)
    axes[0].set_title("A tree of planted families")
    caption = (
        "Features of features, first seed: every broad factor with the narrow ones it is made of, which were matched "
        "with the planted children; thicker lines for larger coefficients."
    )
    return Plate("concept-tree", figure, caption)


def _draw_overlap(record: dict) -> Plate:
    from matplotlib.colors import ListedColormap

    member, labels = np.array(record["overlap"]["member"]), np.array(record["labels"])
    figure, axes = new_figure(10.4, 4.0, 2, width_ratios=(1.9, 1))
    shared = member.sum(0)
    first = np.array([np.flatnonzero(column)[0] for column in member.T])
    order = np.lexsort((-shared, first, labels[first]))
    shade = (member * np.where(shared > 1, 2, 1))[:, order]
    ax = axes[0]
    ax.imshow(shade, aspect="auto", interpolation="nearest", vmin=0, vmax=2,
              cmap=ListedColormap(["#f5f3ee", COLOURS["baseline"], COLOURS["ours"]]))  # fmt: skip
    count: Counter = Counter()
    names = []
    for label in labels:
        count[label] += 1
        names.append(f"{'ABCDEFGH'[label]}{count[label]}")
    ax.set_yticks(range(len(labels)), names)
    ax.set_xticks([])
    ax.set_xlabel(f"{member.shape[1]} neurons that factors are made of")
    ax.set_title("Shared neurons (red) and a factor's own (blue)")
    ax.grid(False)
    ax = axes[1]
    image = ax.imshow(record["overlap"]["jaccard"], cmap="magma_r", vmin=0, vmax=1)
    ax.set_xticks(range(len(labels)), names, fontsize=8)
    ax.set_yticks(range(len(labels)), names, fontsize=8)
    ax.grid(False)
    ax.set_title("Overlap of neurons")
    figure.colorbar(image, ax=ax, shrink=0.85, label="shared / either")
    caption = (
        "Which neurons the recovered factors have, first seed: children of a planted family share its core and keep "
        "neurons of their own."
    )
    return Plate("neuron-overlap", figure, caption)


def _draw_full(records: list[dict]) -> Plate:
    rows = records[0]["rows"]
    figure, axes = new_figure(10.4, 1.4 + 0.34 * max(4, len(rows)), 2)
    y = np.arange(len(rows))[::-1]
    names = {"snmf": ("SNMF", COLOURS["ours"]), "means": ("difference of means", COLOURS["good"])}
    for ax, read, title in (
        (axes[0], lambda row, name: row[name]["detection"], "Concept detection, log ratio"),
        (axes[1], lambda row, name: row[name]["mass"][-1], f"Probability of its words at KL {KL_TARGETS[-1]:g}"),
    ):
        for offset, (name, (label, colour)) in zip((0.19, -0.19), names.items(), strict=True):
            ax.barh(y + offset, [read(row, name) for row in rows], 0.36, color=colour, label=label)
        ax.set_yticks(y, [row["label"] for row in rows])
        ax.set_title(title)
        ax.grid(axis="x")
        ax.grid(axis="y", visible=False)
    axes[0].legend(loc="best")
    caption = (
        f"Layer {records[0]['layer']} of your model: each concept's factor against the difference of means, on "
        "sentences that neither has seen, first seed."
    )
    return Plate("your-concepts", figure, caption)
