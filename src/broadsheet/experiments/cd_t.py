"""Contextual decomposition for transformers, measured: a planted circuit, a trained one, words of a real encoder.

``small`` needs no data: the hand-built induction model over its softmax saturation, a two-layer GPT-2 trained on the
spot to find the indirect object, and MiniLM with a sentiment probe. ``full`` adds GPT-2 small (indirect object,
greater-than) and the four-layer attention-only model (docstrings) from the user's folder or Hugging Face cache, against
the circuits that people found in them by hand.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from broadsheet.data.planted import PlantedInduction
from broadsheet.data.tasks import (
    IOI_TEMPLATES,
    TaskBatch,
    WordVocabulary,
    docstring,
    greater_than,
    ioi,
    repeated_sequence,
)
from broadsheet.errors import DataMissing
from broadsheet.interpretability.cd_t import (
    Circuit,
    FaithfulnessCurve,
    LogitDifference,
    Node,
    TokenImportance,
    all_nodes,
    contributions_to_output,
    contributions_to_targets,
    decompose_tokens,
    discover_circuit,
    edge_auc,
    edge_scores,
    faithfulness_curve,
    head_means,
    node_auc,
    random_circuit_test,
)
from broadsheet.interpretability.token_attribution import (
    integrated_gradients,
    lime_weights,
    occlusion,
    shap_values,
)
from broadsheet.lab import Context, Plate
from broadsheet.nn.attention_only import AttentionOnly
from broadsheet.nn.edges import EdgeTable, ablate_edges, prune_edges
from broadsheet.nn.minilm import load_minilm
from broadsheet.nn.patching import (
    activation_patching,
    attribution_patching,
    edge_attribution_patching,
    path_patching,
    replacement,
)
from broadsheet.nn.plotting import COLOURS, band, new_figure, style
from broadsheet.nn.seeding import generator, seeded
from broadsheet.nn.training import fit

BETAS = (2.0, 4.0, 8.0, 16.0, 32.0)
SATURATED = 16.0
PLANTED: dict[str, Any] = {"vocab": 16, "length": 24, "n_noise": 5, "noise": 0.05}
PROMPTS = 32
TRAIN: dict[str, Any] = {"width": 32, "steps": 550, "prompts": 6000, "batch": 64, "lr": 3e-3}
RANDOM_DRAWS = 10
ACDC = (0.01, 0.1, 0.3)  # thresholds, as shares of the full metric
TEXTS = 6
SAMPLES = 128
FULL: dict[str, Any] = {"prompts": 32, "reference": 128, "k_per_step": 6, "random_draws": 10}

# The manual circuits, (layer, head): arXiv:2211.00593, figure 2, and arXiv:2305.00586, section 3.
IOI_CIRCUIT = {
    "name mover": ((9, 9), (10, 0), (9, 6)),
    "backup name mover": ((9, 0), (9, 7), (10, 1), (10, 2), (10, 6), (10, 10), (11, 2), (11, 9)),
    "negative name mover": ((10, 7), (11, 10)),
    "S-inhibition": ((7, 3), (7, 9), (8, 6), (8, 10)),
    "induction": ((5, 5), (5, 8), (5, 9), (6, 9)),
    "duplicate token": ((0, 1), (0, 10), (3, 0)),
    "previous token": ((2, 2), (4, 11)),
}
# Docstrings: Heimersheim and Janiak (2023), and the graph of their circuit that came with ACDC (arXiv:2304.14997).
DOCSTRING_CIRCUIT = ((0, 5), (1, 2), (1, 4), (2, 0), (3, 0), (3, 6))
DOCSTRING_EDGES = (
    ((0, 5), (1, 4), "value"), ((0, 5), (2, 0), "query"), ((0, 5), (2, 0), "key"), ((1, 4), (2, 0), "value"),
    ((0, 5), (1, 2), "query"), ((0, 5), (1, 2), "key"),
    *(edge for mover in ((3, 0), (3, 6)) for edge in (
        (mover, None, "output"), ((1, 4), mover, "query"), ((0, 5), mover, "value"), ((2, 0), mover, "key"),
        ((1, 2), mover, "key"),
    )),
)  # fmt: skip
GREATER_THAN_CIRCUIT = ((5, 1), (5, 5), (6, 1), (6, 9), (7, 10), (8, 11), (9, 1))


def run(ctx: Context) -> dict:
    """All claims of one seed."""
    # The published models come first: files that are missing are said before the work, not after it.
    record = {"manual": _manual(ctx)} if ctx.preset == "full" else {}
    return {**record, "planted": _planted(ctx), "trained": _trained(ctx), "words": _words(ctx)}


# ------------------------------------------------------------------------------------------------- the planted model


def _planted(ctx: Context) -> dict[str, Any]:
    auc: dict[str, list[float]] = {"cd_t": [], "one_pass": [], "attribution": [], "patching": []}
    truth = [Node(layer, None, head) for layer, head in PlantedInduction.true_nodes]
    copying: dict[str, list[float]] = {"exact": [], "gradient": []}
    edge: dict[str, list[float]] = {"cd_t": [], "attribution": [], "acdc": []}
    paths = [(truth[0], truth[1], "key"), (truth[1], None, "output")]
    with ctx.progress.task("planted circuit", total=len(BETAS)) as task:
        for i, beta in enumerate(BETAS):
            model = PlantedInduction(beta, seed=1000 * ctx.seed + i, **PLANTED).to(ctx.device)
            size = (PLANTED["vocab"], PLANTED["length"])
            batch = _to(repeated_sequence(PROMPTS, *size, seed=2 * ctx.seed), ctx.device)
            reference = repeated_sequence(256, *size, seed=2 * ctx.seed + 1).input_ids.to(ctx.device)
            metric = LogitDifference(batch.answers, batch.distractors)
            means = head_means(model, reference)
            circuit = discover_circuit(model, batch.input_ids, metric, means, k_per_step=1)
            direct = contributions_to_output(model, batch.input_ids, all_nodes(model), metric, means)
            removed = means.z[:, None]
            gradient = attribution_patching(model, batch.input_ids, metric, removed)
            exact = activation_patching(model, batch.input_ids, metric, removed)
            auc["cd_t"].append(node_auc(circuit.node_scores, truth))
            auc["one_pass"].append(node_auc(direct.reshape(gradient.shape).abs(), truth))
            auc["attribution"].append(node_auc(gradient.abs(), truth))
            auc["patching"].append(node_auc(exact.abs(), truth))
            copying["exact"].append(float(exact[0, 0]))
            copying["gradient"].append(float(gradient[0, 0]))
            ours = edge_scores(model, batch.input_ids, metric, means, circuit.node_scores)
            pruned, _ = _acdc(model, batch.input_ids, metric, removed)
            edge["cd_t"].append(edge_auc(ours, paths))
            edge["attribution"].append(edge_auc(_gradient_edges(model, batch.input_ids, metric, removed), paths))
            edge["acdc"].append(edge_auc(pruned, paths))
            task.advance()
    high = [i for i, beta in enumerate(BETAS) if beta >= SATURATED]
    ctx.measure("planted-every-saturation", ours=min(auc["cd_t"]))
    ctx.measure(
        "planted-above-gradients",
        ours=float(np.mean([auc["cd_t"][i] for i in high])),
        baseline=float(np.mean([auc["attribution"][i] for i in high])),
    )
    ctx.measure("planted-needs-second-step", ours=float(np.mean(auc["cd_t"])), baseline=float(np.mean(auc["one_pass"])))
    ctx.measure("planted-edges-found", ours=min(edge["cd_t"]))
    ctx.measure(
        "planted-edges-above-gradients",
        ours=float(np.mean([edge["cd_t"][i] for i in high])),
        baseline=float(np.mean([edge["attribution"][i] for i in high])),
    )
    ctx.measure("planted-edges-as-acdc", ours=float(np.mean(edge["cd_t"])), baseline=float(np.mean(edge["acdc"])))
    ctx.measure("gradient-of-a-saturated-head", ours=abs(copying["gradient"][-1]), baseline=abs(copying["exact"][-1]))
    return {"betas": list(BETAS), "auc": auc, "copying_head": copying, "edge_auc": edge}


def _gradient_edges(model: nn.Module, ids: Tensor, metric: Any, removed: Tensor) -> EdgeTable:
    """Edge attribution patching (EAP), query, key and value apart."""
    parts = [edge_attribution_patching(model, ids, metric, removed, at=(place,)) for place in "qkv"]
    return EdgeTable(torch.stack([to_heads for to_heads, _ in parts]), parts[0][1]).abs()


def _acdc(model: nn.Module, ids: Tensor, metric: Any, removed: Tensor) -> tuple[EdgeTable, int]:
    """How many thresholds each edge survives (ties by the effect measured at the least), and the fewest runs."""
    with torch.no_grad():
        out = model(ids)
        full = float(metric(getattr(out, "logits", out)))
    found = [prune_edges(model, ids, metric, removed, threshold=share * full) for share in ACDC]
    effects = found[0].effects
    largest = 2 * effects.flat().abs().max().clamp_min(1e-30)

    def ranked(part: str) -> Tensor:
        survived = torch.stack([getattr(f.keep, part) for f in found]).sum(0)
        return survived + getattr(effects, part) / largest

    return EdgeTable(ranked("to_heads"), ranked("to_output")), min(f.runs for f in found)


# ------------------------------------------------------------------------------------------------- the trained model


def train_ioi_model(ctx: Context, words: WordVocabulary) -> nn.Module:
    """A small GPT-2 that has learned, from templates, which name comes next."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(words), n_embd=TRAIN["width"], n_layer=2, n_head=4, n_positions=24, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with seeded(ctx.seed):
        model = GPT2LMHeadModel(config).to(ctx.device)
    data = ioi(TRAIN["prompts"], words, seed=10_000 + ctx.seed)
    order = torch.randint(len(data), (TRAIN["steps"], TRAIN["batch"]), generator=generator(ctx.seed))
    batches = [(data.input_ids[rows], data.answers[rows]) for rows in order]

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        ids, answers = (x.to(ctx.device) for x in batch)
        return nn.functional.cross_entropy(model(ids, logits_to_keep=1).logits[:, -1], answers)

    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAIN["lr"], weight_decay=0.01)
    fit(
        model, loss, batches, steps=TRAIN["steps"], optimizer=optimizer, checkpoint=ctx.checkpoint / "ioi",
        progress=ctx.progress, description="training a small GPT-2",
    )  # fmt: skip
    return model.eval()


def _trained(ctx: Context) -> dict[str, Any]:
    words = WordVocabulary.for_ioi()
    model = train_ioi_model(ctx, words)
    found = _to(ioi(PROMPTS, words, seed=20_000 + ctx.seed), ctx.device)
    tested = _to(ioi(2 * PROMPTS, words, seed=30_000 + ctx.seed), ctx.device)
    reference = ioi(256, words, seed=40_000 + ctx.seed).input_ids.to(ctx.device)
    with torch.no_grad():
        logits = model(tested.input_ids).logits
    accuracy = float((logits[:, -1].argmax(-1) == tested.answers).double().mean())
    metric, test_metric = (LogitDifference(b.answers, b.distractors) for b in (found, tested))
    means = head_means(model, reference)
    removed = means.z[:, None]
    ids = found.input_ids

    circuit = discover_circuit(model, ids, metric, means, k_per_step=4, positions="all")
    gradient = attribution_patching(model, ids, metric, removed, by_position=True).abs()
    exact = activation_patching(model, ids, metric, removed, by_position=True).abs()
    scores = {"cd_t": circuit.node_scores.double().cpu(), "attribution": gradient.cpu(), "patching": exact.cpu()}
    sizes = sorted({round(x) for x in np.geomspace(1, exact.numel(), 24)} | {0})
    curves = {
        name: faithfulness_curve(model, tested.input_ids, test_metric, means, table, sizes)
        for name, table in scores.items()
    }
    rng = generator(ctx.seed)
    chance = [
        faithfulness_curve(model, tested.input_ids, test_metric, means, torch.rand(exact.shape, generator=rng), sizes)
        for _ in range(RANDOM_DRAWS)
    ]
    area = {name: curve.area() for name, curve in curves.items()}
    random_area = float(np.mean([curve.area() for curve in chance]))
    ctx.measure("faithful-above-random", ours=area["cd_t"], baseline=random_area)
    ctx.measure("faithful-above-gradients", ours=area["cd_t"], baseline=area["attribution"])
    ctx.measure("faithful-as-exact", ours=area["cd_t"], baseline=area["patching"])
    beaten = random_circuit_test(
        circuit.attach(model, tested.input_ids, test_metric, means),
        sizes=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6), draws=RANDOM_DRAWS, seed=ctx.seed,
    )  # fmt: skip
    ctx.measure("beats-random-circuits", ours=float(beaten.share_beaten.mean()))
    rank = {
        name: float(np.asarray(spearmanr(table.flatten(), scores["patching"].flatten()))[0])
        for name, table in scores.items()
    }
    ctx.measure("agrees-with-patching", ours=rank["cd_t"], baseline=rank["attribution"])
    cost = _cost(ctx, model, found, metric, means)

    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-8
    with torch.no_grad():
        moved = other(tested.input_ids).logits
    ctx.measure("hard-wired-epsilon", ours=float((moved - logits).abs().max() / logits.abs().max()))
    heads = discover_circuit(model, ids, metric, means, k_per_step=2)
    edges = _edges(ctx, model, ids, metric, tested.input_ids, test_metric, means)
    return {
        "accuracy": accuracy,
        "sizes": sizes,
        "curves": {name: curve.values.tolist() for name, curve in curves.items()},
        "random": [curve.values.tolist() for curve in chance],
        "rank_correlation": rank,
        "area": area | {"random": random_area},
        "share_beaten": beaten.share_beaten.tolist(),
        "node_scores": circuit.node_scores.tolist(),
        "exact": exact.tolist(),
        "template": [words.words[i] for i in ids[0].tolist()],
        "roles": found.roles,
        "circuit": heads.to_dict(),
        "edges": edges,
        "cost": cost,
    }


def _edges(
    ctx: Context, model: nn.Module, ids: Tensor, metric: Any, test_ids: Tensor, test_metric: Any, means: Any
) -> dict[str, Any]:
    """Which few edges between heads do the task: rankings on some prompts, tested on others."""
    removed = means.z[:, None]
    circuit = discover_circuit(model, ids, metric, means, k_per_step=2)
    pruned, runs = _acdc(model, ids, metric, removed)
    n_heads = circuit.node_scores.numel()
    # One pass for each candidate in each step of the search, then each head to the output and to all later heads.
    passes = sum(len(step.ranking) for step in circuit.steps) + 2 * n_heads + 1
    ctx.measure("edges-fewer-passes-than-acdc", ours=passes, baseline=runs)
    tables = {
        "cd_t": edge_scores(model, ids, metric, means, circuit.node_scores),
        "attribution": _gradient_edges(model, ids, metric, removed),
        "acdc": pruned,
    }
    count = len(tables["cd_t"].flat())
    sizes = sorted({0, *(round(x) for x in np.geomspace(1, count, 14))})
    curves = {}
    for name, table in tables.items():
        values = np.array(ablate_edges(model, test_ids, test_metric, removed, [table.best(n) for n in sizes]))
        curves[name] = ((values - values[0]) / (values[-1] - values[0])).tolist()
    area = {name: _area(sizes, curve) for name, curve in curves.items()}
    ctx.measure("edges-faithful-above-gradients", ours=area["cd_t"], baseline=area["attribution"])
    ctx.measure("edges-faithful-as-acdc", ours=area["cd_t"], baseline=area["acdc"])
    return {"sizes": sizes, "curves": curves, "area": area, "passes": passes, "acdc_runs": runs}


def _area(sizes: list[int], values: list[float]) -> float:
    """Mean faithfulness over the sizes, each value capped to 0..1."""
    return FaithfulnessCurve(tuple(sizes), torch.tensor(values)).area()


def _seconds(work: dict[str, Callable[[], Any]], rounds: int = 4) -> dict[str, float]:
    """The fastest of some rounds after a first one that does not count; all contenders take turns in each round."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, run_once in work.items():
            start = time.perf_counter()
            run_once()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: min(found[1:]) for name, found in times.items()}


class _Positive:
    """A metric lifted above zero: that of an untrained model may have any sign, and only the time counts."""

    def __init__(self, metric: Any) -> None:
        self.metric, self.positions = metric, metric.positions

    def __call__(self, logits: Tensor) -> Tensor:
        return self.metric(logits).abs() + 1.0


def _cost(ctx: Context, model: nn.Module, batch: TaskBatch, metric: Any, means: Any) -> dict[str, Any]:
    """A deeper untrained model of the same kind, so that pairs matter: cost does not depend on the weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = copy.deepcopy(model.config)
    assert isinstance(config, GPT2Config)
    config.n_layer = 4
    with seeded(ctx.seed):
        deep = GPT2LMHeadModel(config).to(ctx.device).eval()
    ids = batch.input_ids
    means = head_means(deep, ids)
    removed = means.z[:, None]
    nodes = all_nodes(deep)
    targets = [node for node in nodes if node.layer > 0]
    runs = path_patching(deep, ids, metric, removed).runs
    positive = _Positive(metric)
    seconds = _seconds(
        {
            "CD-T, matrix": lambda: contributions_to_targets(deep, ids, nodes, targets, "z", means),
            "path patching, matrix": lambda: path_patching(deep, ids, metric, removed),
            "path patching, first stage": lambda: path_patching(deep, ids, metric, removed, pairs=False),
            "CD-T, single heads": lambda: contributions_to_output(deep, ids, nodes, positive, means),
            "patching, single heads": lambda: activation_patching(deep, ids, metric, removed),
        }
    )
    ours, paths, first, single, patching = seconds.values()
    passes = len(nodes) + 1
    ctx.measure("fewer-passes", ours=passes, baseline=runs)
    ctx.measure("faster-matrix", ours=ours, baseline=paths)
    ctx.measure("faster-than-first-stage", ours=ours, baseline=first)
    ctx.measure("faster-single-nodes", ours=single, baseline=patching)
    return {"nodes": len(nodes), "passes": passes, "runs": runs, "seconds": seconds}


# ------------------------------------------------------------------------------------------------- words of an encoder

GOOD = {
    "probe": [
        "wonderful",
        "excellent",
        "great",
        "amazing",
        "beautiful",
        "perfect",
        "lovely",
        "superb",
        "fantastic",
        "pleasant",
    ],
    "test": ["delicious", "brilliant", "charming", "delightful", "impressive", "friendly"],
}
BAD = {
    "probe": [
        "terrible",
        "awful",
        "horrible",
        "bad",
        "disgusting",
        "dreadful",
        "ugly",
        "boring",
        "poor",
        "disappointing",
    ],
    "test": ["rude", "broken", "annoying", "filthy", "dull", "nasty"],
}
PROBE_FRAMES = (
    "the {0} was {1} and we told our friends",
    "what a {1} {0} in this town",
    "my sister said that the {0} is {1}",
    "yesterday they showed us a {1} {0}",
)
TEST_FRAMES = (
    "the {0} on the corner was {1} but the {2} looked {3} to us",
    "i found the {0} {1} while the {2} of the house was {3}",
    "a {1} {0} and a {3} {2} in one evening",
)
THINGS = [
    "hotel",
    "film",
    "book",
    "waiter",
    "dinner",
    "room",
    "concert",
    "garden",
    "museum",
    "teacher",
    "story",
    "phone",
]


def _words(ctx: Context) -> dict[str, Any]:
    """Find the words that speak for and against in sentences that hold one of each."""
    model, tokenizer = load_minilm()
    model = model.to(ctx.device)
    rng = np.random.default_rng(ctx.seed)
    probe_texts, labels = [], []
    for frame in PROBE_FRAMES:
        for label, list_ in ((1, GOOD["probe"]), (0, BAD["probe"])):
            for word in list_:
                probe_texts.append(frame.format(rng.choice(THINGS), word))
                labels.append(label)
    direction, intercept = _probe(model, tokenizer, probe_texts, labels)

    def score(ids: Tensor) -> Tensor:
        hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        return hidden.mean(1) @ direction + intercept

    names = ("cd_t", "shap", "lime", "integrated_gradients", "occlusion")
    auc: dict[str, list[float]] = {name: [] for name in names}
    fall: dict[str, list[float]] = {name: [] for name in (*names, "chance")}
    shown: dict[str, Any] = {}
    mask: Any = tokenizer.mask_token_id
    with ctx.progress.task("words", total=TEXTS) as task:
        for i in range(TEXTS):
            first, second = rng.choice(THINGS, 2, replace=False)
            good, bad = str(rng.choice(GOOD["test"])), str(rng.choice(BAD["test"]))
            one, two = (good, bad) if rng.integers(2) else (bad, good)
            text = TEST_FRAMES[i % len(TEST_FRAMES)].format(first, one, second, two)
            words = text.split()
            ids, spans = _word_spans(tokenizer, words)
            ids = ids.to(ctx.device)
            results: dict[str, TokenImportance] = {
                "cd_t": decompose_tokens(model, ids, [list(s) for s in spans], direction=direction),
                "shap": shap_values(score, ids, spans, mask, SAMPLES, ctx.seed),
                "lime": lime_weights(score, ids, spans, mask, SAMPLES, ctx.seed),
                "integrated_gradients": integrated_gradients(
                    model, model.embeddings.word_embeddings, score, ids, spans, mask, n_steps=32
                ),
                "occlusion": occlusion(score, ids, spans, mask),
            }
            truth = np.array([word == good for word in words]), np.array([word == bad for word in words])
            for name, result in results.items():
                values = result.scores.detach().cpu().double().numpy()
                auc[name].append((roc_auc_score(truth[0], values) + roc_auc_score(truth[1], -values)) / 2)
                fall[name].append(_deletion(score, ids, spans, mask, values))
            fall["chance"].append(
                float(np.mean([_deletion(score, ids, spans, mask, rng.random(len(words))) for _ in range(8)]))
            )
            if i < 2:
                shown[text] = {name: result.scores.tolist() for name, result in results.items()}
            task.advance()
    mean = {name: float(np.mean(values)) for name, values in auc.items()}
    for name in ("shap", "lime", "integrated_gradients", "occlusion"):
        ctx.measure(f"words-above-{name.replace('_', '-')}", ours=mean["cd_t"], baseline=mean[name])
    ctx.measure("words-found", ours=mean["cd_t"])
    falls = {name: float(np.mean(values)) for name, values in fall.items()}
    ctx.measure("deletion-above-chance", ours=falls["cd_t"], baseline=falls["chance"])
    ctx.measure("deletion-above-shap", ours=falls["cd_t"], baseline=falls["shap"])
    return {"auc": mean, "deletion": falls, "texts": shown}


def _probe(model: Any, tokenizer: Any, texts: list[str], labels: list[int]) -> tuple[Tensor, float]:
    """A linear sentiment score of the mean of the last hidden states."""
    inputs = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    weight = inputs["attention_mask"][..., None].to(hidden)
    pooled = ((hidden * weight).sum(1) / weight.sum(1)).cpu().double().numpy()
    spread = pooled.std()
    fitted = LogisticRegression(C=1.0, max_iter=2000).fit(pooled / spread, labels)
    direction = torch.from_numpy(fitted.coef_[0] / spread).to(hidden)
    return direction, float(fitted.intercept_[0])


def _word_spans(tokenizer: Any, words: list[str]) -> tuple[Tensor, list[tuple[int, ...]]]:
    coded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
    owner = coded.word_ids(0)
    spans = [tuple(p for p, w in enumerate(owner) if w == i) for i in range(len(words))]
    return coded["input_ids"], spans


def _deletion(
    score: Callable[[Tensor], Tensor], ids: Tensor, spans: list[tuple[int, ...]], mask: Any, values: np.ndarray
) -> float:
    """Mean fall of the score over masking the best 1, 2, 3 words."""
    rows = ids.repeat(4, 1)
    for n, i in enumerate(np.argsort(-values)[:3]):
        rows[n + 1 :, list(spans[i])] = mask
    with torch.no_grad():
        found = score(rows)
    return float((found[0] - found[1:]).mean())


# ------------------------------------------------------------------------------- published models, circuits by hand

PUBLISHED = {
    "gpt2": ("openai-community/gpt2", ("config.json", "model.safetensors", "tokenizer.json")),
    "attn-only-4l": ("NeelNanda/Attn_Only_4L512W_C4_Code", ("model_final.pth",)),
    "gpt-neox-tokenizer-digits": ("NeelNanda/gpt-neox-tokenizer-digits", ("tokenizer.json", "tokenizer_config.json")),
}


def _manual(ctx: Context) -> dict[str, Any]:
    folders = _published(ctx)
    record = {**_gpt2(ctx, folders["gpt2"]), **_docstring(ctx, folders)}
    for task, found in record.items():
        ctx.measure(f"{task}-auc", ours=found["auc"]["cd_t"], baseline=found["auc"]["attribution"])
    ctx.measure("manual-circuits-auc", ours=float(np.mean([found["auc"]["cd_t"] for found in record.values()])))
    ctx.measure(
        "published-beats-random-circuits", ours=float(np.mean([np.mean(r["share_beaten"]) for r in record.values()]))
    )
    return record


def _published(ctx: Context) -> dict[str, Path]:
    """Where the files of each published model lie: the user's data folder, else the Hugging Face cache."""
    from huggingface_hub import try_to_load_from_cache

    folders, absent = {}, []
    for name, (repository, files) in PUBLISHED.items():
        folder = ctx.data_dir / name
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            cached = [try_to_load_from_cache(repository, file) for file in files]
            if all(isinstance(path, str) for path in cached):
                folder, missing = Path(str(cached[0])).parent, []
        if missing:
            absent.append(f"{', '.join(missing)} (hf download {repository} {' '.join(files)} --local-dir {folder})")
        folders[name] = folder
    if absent:
        raise DataMissing("not found, neither in the data folder nor in the Hugging Face cache: " + "; ".join(absent))
    return folders


def _encoder(folder: Path) -> tuple[Callable[[str], list[int]], int | None]:
    """A function from text to ids, and the token that begins a text."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.bos_token_id


def _gpt2(ctx: Context, folder: Path) -> dict[str, Any]:
    from transformers import GPT2LMHeadModel

    model: Any = GPT2LMHeadModel.from_pretrained(folder, local_files_only=True)
    model = model.to(ctx.device).eval()
    encode, _ = _encoder(folder)
    shape = (model.config.n_layer, model.config.n_head)
    n, m = FULL["prompts"], FULL["reference"]
    template = IOI_TEMPLATES[ctx.seed % len(IOI_TEMPLATES)]
    prompts = ioi(n, encode, seed=ctx.seed, template=template)
    reference = ioi(m, encode, seed=500 + ctx.seed, template=template).corrupted_ids
    heads = [head for group in IOI_CIRCUIT.values() for head in group]
    metric = LogitDifference(prompts.answers, prompts.distractors)
    years, later = greater_than(n, encode, seed=ctx.seed)
    years_reference = greater_than(m, encode, seed=500 + ctx.seed)[0].corrupted_ids
    return {
        "ioi": _benchmark(ctx, model, prompts, metric, reference, _nodes(heads, shape)),
        "greater-than": _benchmark(ctx, model, years, later, years_reference, _nodes(GREATER_THAN_CIRCUIT, shape)),
    }


def _docstring(ctx: Context, folders: dict[str, Path]) -> dict[str, Any]:
    model = AttentionOnly.from_folder(folders["attn-only-4l"]).to(ctx.device)
    encode, bos = _encoder(folders["gpt-neox-tokenizer-digits"])
    prompts = docstring(FULL["prompts"], encode, seed=ctx.seed, bos=bos)
    reference = docstring(FULL["reference"], encode, seed=500 + ctx.seed, bos=bos).corrupted_ids
    metric = LogitDifference(prompts.answers, prompts.distractors)
    shape = (len(model.blocks), model.heads)
    record = _benchmark(ctx, model, prompts, metric, reference, _nodes(DOCSTRING_CIRCUIT, shape))
    means = head_means(model, reference.to(ctx.device))
    ids = prompts.input_ids.to(ctx.device)
    tables = {
        "cd_t": edge_scores(model, ids, metric, means, torch.tensor(record["node_scores"])),
        "attribution": _gradient_edges(model, ids, metric, means.z[:, None]),
    }
    known = [
        (Node(source[0], None, source[1]), None if target is None else Node(target[0], None, target[1]), at)
        for source, target, at in DOCSTRING_EDGES
        if max(source[0], 0 if target is None else target[0]) < shape[0]
    ]
    record["edge_auc"] = {name: edge_auc(table, known) for name, table in tables.items()}
    auc = record["edge_auc"]
    ctx.measure("docstring-edges-auc", ours=auc["cd_t"], baseline=auc["attribution"])
    return {"docstring": record}


def _nodes(heads: Any, shape: tuple[int, int]) -> list[Node]:
    """The manual circuit, as far as the model has these heads."""
    return [Node(layer, None, head) for layer, head in heads if layer < shape[0] and head < shape[1]]


def _benchmark(
    ctx: Context, model: nn.Module, batch: TaskBatch, metric: Any, reference: Tensor, truth: list[Node]
) -> dict[str, Any]:
    batch, reference = _to(batch, ctx.device), reference.to(ctx.device)
    means = head_means(model, reference)
    start = time.perf_counter()
    circuit: Circuit = discover_circuit(
        model, batch.input_ids, metric, means, k_per_step=FULL["k_per_step"], progress=ctx.progress
    )
    seconds = time.perf_counter() - start
    gradient = attribution_patching(model, batch.input_ids, metric, replacement(model, "mean", reference)).abs().cpu()
    scores = {"cd_t": circuit.node_scores.cpu(), "attribution": gradient}
    sizes = sorted({round(x) for x in np.linspace(0, gradient.numel(), 25)})
    curves = {
        name: faithfulness_curve(model, batch.input_ids, metric, means, table, sizes).values.tolist()
        for name, table in scores.items()
    }
    test = random_circuit_test(circuit, sizes=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6), draws=FULL["random_draws"], seed=ctx.seed)
    return {
        "auc": {name: node_auc(table, truth) for name, table in scores.items()}, "seconds": seconds, "sizes": sizes,
        "curves": curves, "share_beaten": test.share_beaten.tolist(), "node_scores": circuit.node_scores.tolist(),
        "circuit": circuit.to_dict(),
    }  # fmt: skip


def _to(batch: TaskBatch, device: torch.device) -> TaskBatch:
    moved = {name: getattr(batch, name).to(device) for name in ("input_ids", "answers", "distractors", "corrupted_ids")}
    return replace(batch, **moved)


# ------------------------------------------------------------------------------------------------- figures

LABELS = {
    "cd_t": ("CD-T, iterated", COLOURS["ours"]),
    "one_pass": ("CD-T, one pass to the output", COLOURS["accent"]),
    "attribution": ("attribution patching", COLOURS["baseline"]),
    "patching": ("exact patching", COLOURS["good"]),
    "acdc": ("ACDC", COLOURS["good"]),
}


def draw(records: list[dict]) -> list[Plate]:
    """Figures from the records of all seeds."""
    with style():
        plates = [
            _draw_planted([r["planted"] for r in records]),
            _draw_edges(records),
            _draw_faithfulness([r["trained"] for r in records]),
            _draw_heatmap(records[0]["trained"]),
            _draw_graph(records[0]["trained"]),
            _draw_words(records[0]["words"]),
            _draw_cost([r["trained"]["cost"] for r in records]),
        ]
        if all("manual" in r for r in records):
            plates += [_draw_manual(records[0]["manual"])]
    return plates


def _draw_planted(records: list[dict]) -> Plate:
    figure, axes = new_figure(9.2, 3.7, 2)
    betas = records[0]["betas"]
    for name in ("patching", "one_pass", "attribution", "cd_t"):
        _over_scales(axes[0], records, "auc", name, (0, (2, 2)) if name == "patching" else "-")
    axes[0].set(xlabel="scale of the planted scores (β)", ylabel="node AUC", ylim=(0.12, 1.03))
    axes[0].set_title("Finding the planted heads")
    axes[0].legend(loc="lower left")
    ax = axes[1]
    for name, key in (("patching", "exact"), ("attribution", "gradient")):
        label, colour = LABELS[name]
        values = np.array([np.abs(r["copying_head"][key]) for r in records]).mean(0)
        ax.plot(betas, values, color=colour, marker="o", markersize=4, label=label)
    ax.set(xlabel="scale of the planted scores (β)", ylabel="effect on the logit difference")
    ax.set_title("The copying head (0, 0)")
    ax.legend(loc="best")
    _scales(axes[1], betas)
    caption = (
        "Left: how well each method ranks the two planted heads above ten that do nothing, as the softmax saturates; "
        "bands span the seeds. Right: the effect of the copying head, which gradients lose."
    )
    return Plate("planted-circuit", figure, caption)


def _over_scales(ax: Any, records: list[dict], key: str, name: str, line: Any = "-") -> None:
    """One method's AUC against the scale of the planted scores: mean and range over the seeds."""
    label, colour = LABELS[name]
    betas = records[0]["betas"]
    band(ax, betas, [r[key][name] for r in records], colour, label, marker="o", markersize=4, linestyle=line)
    ax.axhline(0.5, color=COLOURS["neutral"], linewidth=0.8, linestyle=":")
    _scales(ax, betas)


def _scales(ax: Any, betas: list[float]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(betas, [f"{b:g}" for b in betas])
    ax.minorticks_off()


def _draw_edges(records: list[dict]) -> Plate:
    figure, axes = new_figure(9.2, 3.7, 2)
    for name, line in (("attribution", "-"), ("cd_t", "-"), ("acdc", (0, (2, 2)))):
        _over_scales(axes[0], [r["planted"] for r in records], "edge_auc", name, line)
    axes[0].set(xlabel="scale of the planted scores (β)", ylabel="edge AUC", ylim=(0.12, 1.03))
    axes[0].set_title("Finding the planted edges")
    axes[0].legend(loc="lower left")
    found = [r["trained"]["edges"] for r in records]
    sizes = found[0]["sizes"][1:]
    for name in ("acdc", "attribution", "cd_t"):
        label, colour = LABELS[name]
        values = np.array([f["curves"][name][1:] for f in found])
        line = (0, (2, 2)) if name == "acdc" else "-"
        axes[1].plot(sizes, values.mean(0), color=colour, marker="o", markersize=3, label=label, linestyle=line)
    axes[1].axhline(1, color=COLOURS["neutral"], linewidth=0.8, linestyle="--")
    axes[1].set_xscale("log")
    ticks = [n for n in (1, 3, 10, 30) if n <= sizes[-1]]
    axes[1].set_xticks(ticks, [str(t) for t in ticks])
    axes[1].minorticks_off()
    axes[1].set(xlabel="edges kept", ylabel="faithfulness")
    axes[1].set_title("How few edges do the task")
    axes[1].legend(loc="best")
    caption = (
        "Left: how well each method ranks the two planted edges (into the second head's key, and from there to the "
        "output) among all; bands span the seeds. Right: the trained model with only the best edges of a ranking kept, "
        "means over the seeds; above 1 where edges that work against the answer are gone."
    )
    return Plate("edges", figure, caption)


def _draw_faithfulness(records: list[dict]) -> Plate:
    figure, ax = new_figure(6.4, 4.0)
    sizes = records[0]["sizes"][1:]  # without any head every ranking is the same
    chance = np.array([row[1:] for r in records for row in r["random"]])
    low, middle, high = np.quantile(chance, [0.05, 0.5, 0.95], axis=0)
    ax.fill_between(sizes, low, high, color=COLOURS["light"], linewidth=0, label="random circuits, 5 to 95 %")
    ax.plot(sizes, middle, color=COLOURS["neutral"], linewidth=1)
    for name in ("patching", "attribution", "cd_t"):
        label, colour = LABELS[name]
        values = np.array([r["curves"][name][1:] for r in records]).mean(0)
        ax.plot(sizes, values, color=colour, label=label, marker="o", markersize=3)
    ax.axhline(1, color=COLOURS["neutral"], linewidth=0.8, linestyle="--")
    ax.set_xscale("log")
    ticks = [1, 3, 10, 30, 100]
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    ax.set_ylim(-0.35, 1.3)
    ax.set(xlabel="heads kept, each at one position", ylabel="faithfulness")
    ax.set_title("How few heads do the task")
    ax.legend(loc="center left", bbox_to_anchor=(0.0, 0.66))
    caption = (
        "A two-layer GPT-2 that has learned the indirect object: share of its logit difference that remains when only "
        "the best heads of each ranking keep their output (prompts not used for the ranking, mean over seeds)."
    )
    return Plate("faithfulness", figure, caption)


def _draw_heatmap(record: dict) -> Plate:
    figure, axes = new_figure(9.6, 4.4, 2, sharey=True)
    tables = {"CD-T": np.array(record["node_scores"]), "Exact patching": np.array(record["exact"])}
    words = list(record["template"])
    for name, place in record["roles"].items():
        if name in ("A", "B", "S", "place", "object"):
            words[place] = {"A": "name 1", "B": "name 2", "S": "name again"}.get(name, name)
    for ax, (title, table) in zip(axes, tables.items(), strict=True):
        n_layers, length, n_heads = table.shape
        flat = table.transpose(1, 0, 2).reshape(length, n_layers * n_heads) / table.max()
        image = ax.imshow(flat**0.5, aspect="auto", cmap="Reds", vmin=0, vmax=1)
        ax.set_xticks(range(n_layers * n_heads), [f"{x}.{h}" for x in range(n_layers) for h in range(n_heads)])
        for layer in range(1, n_layers):
            ax.axvline(layer * n_heads - 0.5, color=COLOURS["neutral"], linewidth=1)
        ax.set_yticks(range(length), words)
        ax.grid(False)
        ax.set_xlabel("layer.head")
        ax.set_title(title)
    figure.colorbar(image, ax=axes, label="square root of the score (largest = 1)", shrink=0.9)
    caption = (
        "Which head matters at which word: scores of the search (left) and the exact effect of replacing one head at "
        "one position by its mean (right), first seed."
    )
    return Plate("node-scores", figure, caption)


def _draw_graph(record: dict) -> Plate:
    circuit = Circuit.from_dict(record["circuit"])
    figure, ax = new_figure(7.0, 4.0)
    circuit.plot(ax)
    ax.set_title("The circuit of the indirect object")
    caption = (
        "What the search finds in the trained model, first seed: heads (layer and head), and through which input of a "
        "later head each acts; wider arrows for larger shares, those below 0.05 left out."
    )
    return Plate("circuit", figure, caption)


def _draw_words(record: dict) -> Plate:
    import matplotlib as mpl

    names = {"cd_t": "CD-T", "shap": "SHAP", "lime": "LIME", "integrated_gradients": "integrated gradients",
             "occlusion": "occlusion"}  # fmt: skip
    texts = list(record["texts"].items())
    figure, axes = new_figure(11.0, 0.6 + 1.9 * len(texts), 1)
    ax, y, right = axes, 0.0, 0.0
    for text, table in texts:
        words = text.split()
        for name, label in names.items():
            scores = np.array(table[name])
            scores = scores / np.abs(scores).max()
            x = 2.35
            ax.text(2.15, y, label, ha="right", va="center", fontsize=9, color=COLOURS["neutral"])
            for word, value in zip(words, scores, strict=True):
                width = 0.15 * len(word) + 0.2
                colour = mpl.colormaps["RdBu_r"](0.5 + 0.42 * value)
                ax.add_patch(mpl.patches.Rectangle((x, y - 0.36), width, 0.72, facecolor=colour, edgecolor="none"))
                ax.text(x + width / 2, y, word, ha="center", va="center", fontsize=9.5,
                        color="white" if abs(value) > 0.7 else "#1f2328")  # fmt: skip
                x += width + 0.06
            right = max(right, x)
            y -= 0.9
        y -= 0.5
    ax.set_xlim(0, right)
    ax.set_ylim(y + 0.6, 0.8)
    ax.set_axis_off()
    ax.set_title("Which words make the encoder's sentiment probe say what it says")
    caption = (
        "Word scores of MiniLM with a linear sentiment probe: red speaks for praise, blue against; each row scaled to "
        "its largest score."
    )
    return Plate("words", figure, caption)


def _draw_cost(records: list[dict]) -> Plate:
    figure, ax = new_figure(6.6, 2.8)
    names = list(records[0]["seconds"])
    values = np.array([[1000 * r["seconds"][name] for name in names] for r in records])
    y = np.arange(len(names))[::-1]
    colours = [COLOURS["ours"] if name.startswith("CD-T") else COLOURS["baseline"] for name in names]
    ax.barh(y, values.mean(0), color=colours, height=0.62)
    for row in values:
        ax.plot(row, y, "|", color="#1f2328", markersize=9, alpha=0.6)
    ax.set_yticks(y, names)
    ax.set_xlim(0, 1.08 * float(values.max()))
    ax.grid(axis="x")
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("milliseconds")
    r = records[0]
    ax.set_title(f"{r['nodes']} heads: {r['passes']} passes against {r['runs']}")
    caption = (
        "Time to fill the matrix of every head's effect on every later one, and to score single heads, four layers of "
        "four heads. Path patching carries every pair to the output; its first stage stops at the target heads."
    )
    return Plate("cost", figure, caption)


def _draw_manual(record: dict) -> Plate:
    titles = {"ioi": "Indirect object", "greater-than": "Greater-than", "docstring": "Docstring"}
    figure, axes = new_figure(12.0, 3.7, 3, sharey=True)
    for ax, (task, title) in zip(axes, titles.items(), strict=True):
        for name in ("attribution", "cd_t"):
            label, colour = LABELS[name]
            auc = record[task]["auc"][name]
            ax.plot(record[task]["sizes"], record[task]["curves"][name], color=colour, marker="o", markersize=3,
                    label=f"{label} (AUC {auc:.2f})")  # fmt: skip
        ax.axhline(1, color=COLOURS["neutral"], linewidth=0.8, linestyle="--")
        ax.set(xlabel="heads kept", title=title)
        ax.legend(loc="lower right")
    axes[0].set_ylabel("faithfulness")
    caption = (
        "GPT-2 small (indirect object, greater-than) and the four-layer attention-only model (docstring): faithfulness "
        "against the number of heads kept, and AUC against the circuits found by hand."
    )
    return Plate("manual-circuits", figure, caption)
