"""G-ACT, measured: a small model with a habit, steered to the language that it hardly ever uses.

``small`` trains a small Llama (four layers of 64 features, so that a seed takes seconds) on requests for programs in
four toy languages, whose grammar says exactly which language an answer is in, and steers it to the rarest one. In three
kinds of task a language shows by different first words, so that one direction for all is wrong by construction; in two
further kinds it shows by the same ones, so that nothing is to be chosen. All methods are compared at equal side effect:
the KL divergence from the unsteered model on prose. Where each acts (which layers, which tokens) and how strongly is
chosen on validation prompts, from the same grid for all.
``full`` does the same on the user's own code model and pairs of prompts.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from broadsheet.data.code_language import code_language
from broadsheet.data.toy_programs import KINDS, LANGUAGES, Request, ToyPrograms
from broadsheet.errors import DataMissing, InvalidInput
from broadsheet.interpretability.g_act import (
    ACT,
    GACT,
    ACTModel,
    PairActivations,
    SteeringModel,
    at_all_positions,
    bias_profile,
    collect_pairs,
    mean_difference,
    neuron_attribution,
    prompt_hint,
    refine,
    scale_neuron,
    score_probes,
    steering_overhead,
    train_probes,
)
from broadsheet.interpretability.g_act.act import LEAST_VALIDATION
from broadsheet.interpretability.g_act.gact import stacked
from broadsheet.interpretability.g_act.probes import split_prompts
from broadsheet.lab import Context, Plate
from broadsheet.nn.generation import encode, generate_tokens, texts_of
from broadsheet.nn.plotting import COLOURS, CYCLE, band, new_figure, style
from broadsheet.nn.seeding import generator
from broadsheet.nn.small_lm import small_language_model, train_language_model
from broadsheet.nn.steering import (
    StrengthOutOfReach,
    base_log_probs,
    perplexity,
    steered,
    steering_kl,
    strength_at,
)

TARGET, FAVOURITE = "cedar", "alder"
MODEL: dict[str, Any] = {"width": 64, "layers": 4, "heads": 4, "hidden": 128}
TRAIN: dict[str, Any] = {"texts": 5000, "length": 19, "steps": 320, "batch": 32, "lr": 6e-3}
SIZES: dict[str, int] = {"fit": 120, "validation": 30, "test": 60, "neutral": 48, "profile": 36, "samples": 4}
BUDGET = 0.1  # nats for each token of neutral text
SHARES = (0.4, 0.55, 0.7, 0.85, 1.0)  # of the strength at which the budget is used up
WHERE = ((1,), (3,), (0, 1, 2, 3))  # layers steered
POSITIONS = ("last", "prompt")
COUNTS = (1, 2, 4)  # steered layers whose cost is measured
HEADS = 6  # of ACT, for each cluster: 24 of a model with 32 times 32 heads would be all of ours
DIFFERENT = ("solver", "sorter", "filter")  # each kind has headers of its own
ALIKE, STRANGE = (
    ("parser",),
    ("checker",),
)  # shown by no pair: with the headers of one that is, and of none
SAME = ("parser", "plotter")
KNOWN_WORDINGS, NEW_WORDINGS = (0, 1, 2, 3), (4, 5)
FULL: dict[str, Any] = {
    "samples": 25, "temperature": 1.0, "max_new_tokens": 256, "batch": 25, "layers": None, "target": "C++",
    "n_heads": 24, "validation": 24, "shares": (0.5, 0.75, 1.0),
}  # fmt: skip


@dataclass(frozen=True)
class Option:
    """One way for a method to act; the strength is left open.

    Attributes:
        label: what it is called in the record.
        how: ``(model, alpha, positions) -> context``; alpha may be one number for each row.
        positions: at which tokens prompts are steered.
        first: strength from which the search starts.
    """

    label: str
    how: Callable[[nn.Module, Any, str], Any]
    positions: str
    first: float = 0.1

    def answering(self, model: nn.Module, alpha: Any) -> Any:
        return self.how(model, alpha, self.positions)

    def everywhere(self, model: nn.Module, alpha: Any) -> Any:
        return self.how(model, alpha, "all")


def run(ctx: Context) -> dict:
    """All claims of one seed."""
    return _full(ctx) if ctx.preset == "full" else _small(ctx)


# ------------------------------------------------------------------------------------------------- the small model


def train_model(ctx: Context, corpus: ToyPrograms) -> nn.Module:
    """A small Llama that writes programs, in its own favourite language unless told otherwise."""
    pool = corpus.sample(TRAIN["texts"], TRAIN["length"], generator(1000 + ctx.seed))
    pad = corpus.words.index("<pad>")

    def batch(n: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = pool[torch.randint(len(pool), (n,), generator=random)]
        return rows, rows.masked_fill(rows == pad, -100)

    model: Any = small_language_model(len(corpus.words), kind="llama", length=40, seed=ctx.seed, **MODEL)
    train_language_model(
        model.to(ctx.device), batch, steps=TRAIN["steps"], batch=TRAIN["batch"], lr=TRAIN["lr"], seed=ctx.seed,
        checkpoint=ctx.checkpoint / "model", progress=ctx.progress, description="training a small Llama",
    )  # fmt: skip
    model.generation_config.eos_token_id = corpus.words.index("<end>")
    return model


class Bench:
    """A model, its neutral text, and the measure of every method: best answers within the side effect allowed."""

    def __init__(self, ctx: Context, model: nn.Module, corpus: ToyPrograms) -> None:
        self.model, self.corpus, self.tokenizer = model, corpus, corpus.tokenizer()
        self.eos, self.pad = (corpus.words.index(word) for word in ("<end>", "<pad>"))
        texts = corpus.prose_texts(SIZES["neutral"], generator(2000 + ctx.seed))
        self.neutral = [encode(texts, self.tokenizer, ctx.device)]
        self.base = base_log_probs(model, self.neutral)

    def answers(self, prompts: Sequence[str], context: Callable[[nn.Module], Any], repeats: int = 1) -> list[str]:
        ids, mask = encode(
            [text for _ in range(repeats) for text in prompts], self.tokenizer, self.neutral[0][0].device
        )
        with context(self.model):
            tokens = generate_tokens(self.model, ids, mask, max_new_tokens=10, eos=self.eos, pad=self.pad)
        return texts_of(tokens, self.tokenizer, self.eos)

    def score(self, requests: Sequence[Request], answers: Sequence[str]) -> dict[str, float]:
        """Shares of right programs in the target language, of right programs, and of answers in its keywords."""
        pairs = list(zip(requests, answers, strict=True))
        languages = [self.corpus.language_of(request, answer) for request, answer in pairs]
        words = [self.corpus.keywords_of(answer) for answer in answers]
        return {
            "target": float(np.mean([x == TARGET for x in languages])),
            "valid": float(np.mean([x is not None for x in languages])),
            "keywords": float(np.mean([x == TARGET for x in words])),
        }

    def kl(self, option: Option, alpha: float) -> float:
        return steering_kl(self.model, option.everywhere, alpha, self.neutral, self.base)

    def tuned(self, options: Sequence[Option], validation: Sequence[Request]) -> dict[str, Any]:
        """The option and strength with the best validation answers, at no more side effect than the budget."""
        best: dict[str, Any] = {"key": (-1.0,)}
        limits: dict[Any, float] = {}
        for option in options:
            key = option.label.split(",")[0]
            if key not in limits:  # the side effect is measured on every token, wherever prompts are steered
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", StrengthOutOfReach)
                    limits[key] = strength_at(lambda alpha, o=option: self.kl(o, alpha), BUDGET, first=option.first)
            limit = limits[key]
            if not np.isfinite(limit):
                continue
            alphas = [share * limit for share in SHARES]
            rows = torch.tensor(alphas).repeat_interleave(len(validation))
            prompts = [str(request) for request in validation]
            found = self.answers(prompts, lambda m, o=option, a=rows: o.answering(m, a), len(alphas))
            n = len(validation)
            curve = [self.score(validation, found[i * n : (i + 1) * n]) for i in range(len(alphas))]
            for alpha, score in zip(alphas, curve, strict=True):
                rank = (score["target"], score["valid"], -abs(alpha / limit))
                if rank > best["key"]:
                    best = {"key": rank, "option": option, "alpha": alpha, "limit": limit, "curve": curve}
        if "option" not in best:
            raise InvalidInput(f"no option of {options[0].label} reaches a side effect of {BUDGET} nats")
        return best

    def measured(self, best: dict[str, Any], tests: dict[str, list[Request]]) -> dict[str, Any]:
        option, alpha = best["option"], best["alpha"]
        found: dict[str, Any] = {
            "option": option.label, "alpha": alpha, "kl": self.kl(option, alpha),
            "validation": best["key"][0], "curve": best["curve"],
        }  # fmt: skip
        for name, requests in tests.items():
            answers = self.answers([str(r) for r in requests], lambda m: option.answering(m, alpha))
            found[name] = self.score(requests, answers)
        return found


def layer_options(fitted: SteeringModel, where: Sequence[tuple[int, ...]]) -> list[Option]:
    """Every choice of layers and tokens for directions in the residual stream."""
    return [
        Option(
            f"layers {'+'.join(map(str, layers))}, {positions}",
            lambda model, alpha, at, layers=layers: fitted.steered(model, alpha, layers=layers, positions=at),
            positions,
        )
        for layers in where
        for positions in POSITIONS
    ]


def act_options(fitted: ACTModel) -> list[Option]:
    """ACT chooses its heads itself; tokens as for the others."""
    return [
        Option(f"its heads, {at}", lambda model, alpha, where: fitted.steered(model, alpha, positions=where), at, 0.3)
        for at in POSITIONS
    ]


def neuron_options(units: Sequence[tuple[int, int]]) -> list[Option]:
    """The units of the highest scores, one at a time, at every token (the weights are what is scaled)."""
    return [
        Option(
            f"unit {layer}.{unit}",
            lambda model, alpha, at, layer=layer, unit=unit: scale_neuron(model, layer, unit, 1 + alpha),
            "all",
            4.0,
        )
        for layer, unit in units
    ]


def _small(ctx: Context) -> dict[str, Any]:
    corpus = ToyPrograms()
    model = train_model(ctx, corpus)
    bench = Bench(ctx, model, corpus)
    tests = {
        "new_wordings": corpus.requests(SIZES["test"], generator(3000 + ctx.seed), DIFFERENT, NEW_WORDINGS),
        "alike": corpus.requests(SIZES["test"], generator(4000 + ctx.seed), ALIKE),
        "strange": corpus.requests(SIZES["test"], generator(4500 + ctx.seed), STRANGE),
    }
    fit_on = corpus.requests(SIZES["fit"], generator(5000 + ctx.seed), DIFFERENT, KNOWN_WORDINGS)
    validation = corpus.requests(SIZES["validation"], generator(6000 + ctx.seed), DIFFERENT, KNOWN_WORDINGS)
    pairs, heads = _pairs(bench, fit_on), _pairs(bench, fit_on, "head_out")
    settings = GACT(margin=0.1)
    plain = settings.fit(pairs)
    refined = refine(
        plain, model, bench.tokenizer, [str(r) for r in fit_on], pairs, alpha=0.3, fitted=settings, batch_size=128,
        progress=ctx.progress,
    )  # fmt: skip
    act = ACT(n_heads=HEADS).fit(heads)
    units = neuron_attribution(model, bench.tokenizer, [TARGET]).top(3)
    average = mean_difference(pairs)
    methods = {
        "g_act": layer_options(refined, WHERE), "without_refinement": layer_options(plain, WHERE),
        "mean_difference": layer_options(average, WHERE), "act": act_options(act), "neuron": neuron_options(units),
    }  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    with ctx.progress.task("steering", total=len(methods)) as task:
        for name, options in methods.items():
            found[name] = bench.measured(bench.tuned(options, validation), tests)
            task.advance()
    found["none"] = {
        name: bench.score(requests, bench.answers([str(r) for r in requests], lambda m: average(m, 0.0)))
        for name, requests in tests.items()
    }
    found["hint"] = {
        name: bench.score(requests, bench.answers(_hinted(requests), lambda m: average(m, 0.0)))
        for name, requests in tests.items()
    }
    _claims(ctx, found)
    probes = _probes(ctx, settings, plain, act, pairs, heads)
    same = _same(ctx, bench)
    speed = steering_overhead(
        model, plain, *encode([str(r) for r in validation], bench.tokenizer, ctx.device), alpha=0.1, counts=COUNTS,
        repeats=5,
        max_new_tokens=10,
    )  # fmt: skip
    ctx.measure("overhead", ours=speed.ratio[-1])
    return {
        "methods": found, "same": same, "probes": probes, "profile": _profile(ctx, bench),
        "clusters": _cluster_map(pairs, plain, fit_on), "strength": _strengths(bench, refined, average, validation),
        "overhead": {"layers": list(speed.n_layers), "ratio": list(speed.ratio)},
    }  # fmt: skip


def _hinted(requests: Sequence[Request]) -> list[str]:
    bare = [str(request).removesuffix(" :") for request in requests]
    return prompt_hint(bare, f"in {TARGET} :")


def _pairs(bench: Bench, requests: Sequence[Request], site: str = "resid_post") -> PairActivations:
    texts = [(str(r), str(r.asking(TARGET)), str(r.asking(FAVOURITE))) for r in requests]
    return collect_pairs(bench.model, bench.tokenizer, texts, site=site, batch_size=64)


def _claims(ctx: Context, found: dict[str, dict[str, Any]]) -> None:
    def share(method: str, test: str = "new_wordings", what: str = "target") -> float:
        return found[method][test][what]

    ours = share("g_act")
    ctx.measure("above-mean-difference", ours=ours, baseline=share("mean_difference"), option=found["g_act"]["option"])
    ctx.measure("above-neuron-scaling", ours=ours, baseline=share("neuron"))
    ctx.measure("above-act", ours=ours, baseline=share("act"))
    ctx.measure("refinement-helps", ours=ours, baseline=share("without_refinement"))
    ctx.measure("as-good-as-asking", ours=ours, baseline=share("hint"))
    ctx.measure("programs-stay-right", ours=share("g_act", what="valid"), baseline=share("none", what="valid"))
    for claim, test in {"new-kinds": "alike", "new-first-words": "strange"}.items():
        ctx.measure(claim, ours=share("g_act", test), baseline=share("mean_difference", test))


def _probes(
    ctx: Context, settings: GACT, plain: SteeringModel, act: ACTModel, pairs: PairActivations, heads: PairActivations
) -> dict[str, Any]:
    """Probes of layers against those of heads: as published, and on the same question."""
    n_layers = len(plain.layers)
    # Probes that could not be judged count as 0 when ACT chooses heads; here they are left out.
    judged = act.questions >= LEAST_VALIDATION
    ours, theirs = plain.val_accuracy.double(), _mean_of(act.accuracy, judged)
    ctx.measure("probes-above-act", ours=float(ours.mean()), baseline=float(theirs.mean()))
    gap = (ours - theirs).tolist()
    half = n_layers // 2
    ctx.measure("largest-gap-early", ours=float(np.mean(gap[:half])), baseline=float(np.mean(gap[half:])))
    # The same question, which cluster a prompt belongs to, asked of single heads with the same probe.
    train, held = split_prompts(len(pairs), settings.validation, settings.seed)
    labels = plain.labels.expand(-1, n_layers)
    accuracy = []
    for head in range(heads.n_heads):
        size = heads.h_plus.shape[-1] // heads.n_heads
        parts = slice(head * size, (head + 1) * size)
        one = PairActivations(heads.h_plus[..., parts], heads.h_minus[..., parts], None if heads.h_prompt is None else
                              heads.h_prompt[..., parts], heads.layers)  # fmt: skip
        probe = train_probes(*stacked(one, labels, train), plain.n_clusters)
        accuracy.append(score_probes(probe, *stacked(one, labels, held)).accuracy)
    single = torch.stack(accuracy).double().mean(0)
    ctx.measure("layers-above-heads", ours=float(ours.mean()), baseline=float(single.mean()))
    return {
        "g_act": ours.tolist(), "g_act_f1": plain.macro_f1.tolist(), "act": theirs.tolist(),
        "act_f1": _mean_of(act.macro_f1, judged).tolist(), "act_judged": float(judged.double().mean()),
        "heads": single.tolist(),
    }  # fmt: skip


def _mean_of(scores: Tensor, counted: Tensor) -> Tensor:
    """Mean over heads and clusters that count, layer by layer; 0.5 (chance) where none does."""
    counted = counted.double().flatten(1)
    total = (scores.double().flatten(1) * counted).sum(1)
    return torch.where(counted.sum(1) > 0, total / counted.sum(1).clamp_min(1), 0.5)


def _same(ctx: Context, bench: Bench) -> dict[str, Any]:
    """Kinds of task in which a language shows in the same way: nothing is to be chosen."""
    corpus = bench.corpus
    fit_on = corpus.requests(SIZES["fit"], generator(7000 + ctx.seed), SAME, KNOWN_WORDINGS)
    validation = corpus.requests(SIZES["validation"], generator(8000 + ctx.seed), SAME, KNOWN_WORDINGS)
    tests = {"new_wordings": corpus.requests(SIZES["test"], generator(9000 + ctx.seed), SAME, NEW_WORDINGS)}
    pairs = _pairs(bench, fit_on)
    fitted = {"g_act": GACT().fit(pairs), "mean_difference": mean_difference(pairs)}
    where = WHERE[-2:]
    found = {
        name: bench.measured(bench.tuned(layer_options(one, where), validation), tests) for name, one in fitted.items()
    }
    ours, theirs = (found[name]["new_wordings"]["target"] for name in ("g_act", "mean_difference"))
    ctx.measure("also-where-headers-agree", ours=ours, baseline=theirs)
    return found


def _profile(ctx: Context, bench: Bench) -> dict[str, Any]:
    requests = bench.corpus.requests(SIZES["profile"], generator(11_000 + ctx.seed), list(KINDS))
    profile = bias_profile(
        bench.model, bench.tokenizer, [str(r) for r in requests],
        lambda answer, i: bench.corpus.language_of(requests[i], answer) or "no program", SIZES["samples"],
        max_new_tokens=10, eos=bench.eos, batch_size=512, seed=ctx.seed, categories=LANGUAGES,
    )  # fmt: skip
    kinds = [r.kind for r in requests]
    shares = {kind: profile.shares[[k == kind for k in kinds]].mean(0).tolist() for kind in KINDS if kind in kinds}
    return {"categories": list(profile.categories), "shares": shares}


def _cluster_map(pairs: PairActivations, plain: SteeringModel, requests: Sequence[Request]) -> dict[str, Any]:
    from broadsheet.interpretability.g_act.pairs import flattened

    points = flattened(pairs.differences)
    points = points - points.mean(0)
    _, _, rows = torch.linalg.svd(points, full_matrices=False)
    at = points @ rows[:2].T
    return {"points": at.tolist(), "kinds": [r.kind for r in requests], "clusters": plain.clusters.tolist()}


def _strengths(
    bench: Bench, refined: SteeringModel, average: SteeringModel, validation: Sequence[Request]
) -> dict[str, Any]:
    """Target share over strength, with what neutral text suffers, at the last layer and the prompt's last token."""
    layer = [refined.layers[-1]]
    alphas = np.linspace(0, 2.4, 7).tolist()
    rows = torch.tensor(alphas).repeat_interleave(len(validation))
    found: dict[str, Any] = {"alphas": alphas}
    prompts, n = [str(r) for r in validation], len(validation)
    for name, fitted in {"g_act": refined, "mean_difference": average}.items():
        answers = bench.answers(
            prompts, lambda m, f=fitted: f.steered(m, rows, layers=layer, positions="prompt"), len(alphas)
        )
        shares = [bench.score(validation, answers[i * n : (i + 1) * n])["target"] for i in range(len(alphas))]
        surprise = []
        for alpha in alphas:
            with fitted.steered(bench.model, alpha, layers=layer, positions="all"):
                surprise.append(perplexity(bench.model, bench.neutral))
        found[name] = {"target": shares, "perplexity": surprise}
    return found


# --------------------------------------------------------------------------------------------- the user's own model

NEEDED = {
    "g-act-model": "a folder with a causal language model and its tokenizer, for example "
    "`hf download meta-llama/Llama-3.2-3B-Instruct --local-dir {}`",
    "g-act-pairs.jsonl": 'one line for each prompt, {{"prompt": ..., "plus": ..., "minus": ...}}: as it is, asking for '
    "C++, asking for Python; chat template included",
    "g-act-neutral.txt": "one text a line that has nothing to do with code",
}


def _files(ctx: Context) -> dict[str, Any]:
    absent = [
        f"{ctx.data_dir / name} ({text.format(ctx.data_dir / name)})"
        for name, text in NEEDED.items()
        if not (ctx.data_dir / name).exists()
    ]
    if absent:
        raise DataMissing("not found: " + "; ".join(absent))
    lines = (ctx.data_dir / "g-act-pairs.jsonl").read_text().splitlines()
    pairs = [json.loads(line) for line in lines if line.strip()]
    wrong = [i for i, pair in enumerate(pairs) if not {"prompt", "plus", "minus"} <= set(pair)]
    if wrong or len(pairs) < 16:
        what = f"line {wrong[0] + 1} lacks a key" if wrong else f"{len(pairs)} pairs"
        raise InvalidInput(f"g-act-pairs.jsonl: {what}; at least 16 lines with prompt, plus and minus are expected")
    neutral = [line for line in (ctx.data_dir / "g-act-neutral.txt").read_text().splitlines() if line.strip()]
    return {"pairs": pairs, "neutral": neutral}


def _full(ctx: Context) -> dict[str, Any]:
    """The same comparison on the user's model, answers sampled and told apart by their code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files, folder = _files(ctx), ctx.data_dir / "g-act-model"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto")
    model = model.to(ctx.device).eval()
    order = torch.randperm(len(files["pairs"]), generator=generator(ctx.seed)).tolist()
    half, n = len(order) // 2, min(FULL["validation"], len(order) // 4)
    fit_on, validation, test = (
        [files["pairs"][i] for i in part] for part in (order[:half], order[half : half + n], order[half + n :])
    )
    pairs = collect_pairs(model, tokenizer, fit_on, FULL["layers"], progress=ctx.progress)
    heads = collect_pairs(model, tokenizer, fit_on, FULL["layers"], "head_out", progress=ctx.progress)
    settings = GACT()
    plain = settings.fit(pairs)
    if not plain.steered_layers:
        plain.steered_layers = plain.layers
    refined = refine(
        plain, model, tokenizer, [pair["prompt"] for pair in fit_on], pairs, fitted=settings, progress=ctx.progress
    )
    act, average = ACT(n_heads=FULL["n_heads"]).fit(heads), mean_difference(pairs, layers=plain.steered_layers)
    probes = _probes(ctx, settings, plain, act, pairs, heads)
    methods: dict[str, Any] = {
        "g_act": refined.steered, "without_refinement": plain.steered, "mean_difference": average.steered,
        "act": act.steered,
    }  # fmt: skip
    firsts = {"act": 0.5}
    try:
        (layer, unit), *_ = neuron_attribution(model, tokenizer, ["C++", "CPP", "cpp"]).top(1)
        methods["neuron"] = lambda m, alpha, positions="all": scale_neuron(m, layer, unit, 1 + alpha)
        firsts["neuron"] = 4.0
    except InvalidInput:  # no variant of the name is one token: nothing to point at
        methods["neuron"] = lambda m, alpha, positions="all": average.steered(m, 0.0)
    neutral = [encode(files["neutral"][i : i + 8], tokenizer, ctx.device) for i in range(0, len(files["neutral"]), 8)]
    found: dict[str, dict[str, Any]] = {}
    for name, how in methods.items():
        found[name] = _tuned_full(ctx, model, tokenizer, how, firsts.get(name, 0.05), validation, test, neutral)
    found["none"] = {"new_wordings": _shares(ctx, model, tokenizer, [p["prompt"] for p in test])}
    found["hint"] = {"new_wordings": _shares(ctx, model, tokenizer, [p["plus"] for p in test])}
    ours = found["g_act"]["new_wordings"]["target"]
    for claim, other in {
        "above-mean-difference": "mean_difference", "above-neuron-scaling": "neuron", "above-act": "act",
        "refinement-helps": "without_refinement", "as-good-as-asking": "hint",
    }.items():  # fmt: skip
        ctx.measure(claim, ours=ours, baseline=found[other]["new_wordings"]["target"])
    ids, mask = encode([p["prompt"] for p in test[:4]], tokenizer, ctx.device)
    speed = steering_overhead(model, plain, ids, mask, max_new_tokens=32, counts=(len(plain.layers),))
    ctx.measure("overhead", ours=speed.ratio[-1])
    return {
        "methods": found,
        "probes": probes,
        "overhead": {"layers": list(speed.n_layers), "ratio": list(speed.ratio)},
    }


def _shares(ctx: Context, model: nn.Module, tokenizer: Any, prompts: Sequence[str]) -> dict[str, float]:
    profile = bias_profile(
        model, tokenizer, list(prompts), code_language, FULL["samples"], FULL["temperature"],
        max_new_tokens=FULL["max_new_tokens"], batch_size=FULL["batch"], seed=ctx.seed, categories=[FULL["target"]],
        progress=ctx.progress,
    )  # fmt: skip
    return {"target": profile.share(FULL["target"]), "valid": 1 - profile.share("other")}


def _tuned_full(
    ctx: Context, model: nn.Module, tokenizer: Any, how: Any, first: float, validation: Sequence[Any],
    test: Sequence[Any], neutral: Sequence[Any],
) -> dict[str, Any]:  # fmt: skip
    everywhere = at_all_positions(_Steers(how))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StrengthOutOfReach)
        limit = strength_at(lambda a: steering_kl(model, everywhere, a, neutral), BUDGET, first=first)
    limit = limit if np.isfinite(limit) else first  # no strength does much harm: the first one stands for all
    best: tuple[float, float] = (-1.0, 0.0)
    for share in FULL["shares"]:
        with steered(model, how, share * limit):
            score = _shares(ctx, model, tokenizer, [p["prompt"] for p in validation])["target"]
        best = max(best, (score, -share * limit))
    alpha = -best[1]
    with steered(model, how, alpha):
        found = _shares(ctx, model, tokenizer, [p["prompt"] for p in test])
    return {"option": "its layers", "alpha": alpha, "validation": best[0], "new_wordings": found}


class _Steers:
    """A bound ``steered`` as an object that has it."""

    def __init__(self, how: Any) -> None:
        self.steered = how


# ------------------------------------------------------------------------------------------------- figures

NAMES = {
    "none": ("not steered", COLOURS["light"]),
    "neuron": ("one neuron turned up", COLOURS["neutral"]),
    "act": ("ACT", COLOURS["accent"]),
    "mean_difference": ("mean difference", COLOURS["baseline"]),
    "without_refinement": ("G-ACT, not refined", "#d98880"),
    "g_act": ("G-ACT", COLOURS["ours"]),
    "hint": ("asked for in the prompt", COLOURS["good"]),
}


def draw(records: list[dict]) -> list[Plate]:
    """Figures from the records of all seeds."""
    with style():
        plates = [_draw_shares(records), _draw_probes(records), _draw_overhead(records)]
        if all("strength" in r for r in records):
            plates = [
                plates[0], _draw_strength(records), plates[1], _draw_clusters(records[0]), _draw_profile(records),
                plates[2],
            ]  # fmt: skip
    return plates


def _dots(ax: Any, y: int, values: Sequence[float], colour: str) -> None:
    mean = float(np.mean(values))
    ax.barh(y, mean, color=colour, height=0.62, zorder=2)
    ax.scatter(
        values, y + np.linspace(-0.16, 0.16, len(values)), s=11, color="white", edgecolor="#333", lw=0.7, zorder=3
    )
    ax.text(max(mean, *values) + 0.025, y, f"{mean:.0%}", va="center", fontsize=9)


def _draw_shares(records: list[dict]) -> Plate:
    same = all("same" in r for r in records)
    figure, axes = new_figure(9.6 if same else 6.4, 3.6, 2 if same else 1, width_ratios=[1.15, 1] if same else None)
    left = axes[0] if same else axes
    for y, (name, (_, colour)) in enumerate(NAMES.items()):
        _dots(left, y, [r["methods"][name]["new_wordings"]["target"] for r in records], colour)
    left.set_yticks(range(len(NAMES)), [label for label, _ in NAMES.values()])
    left.set_title("each kind of task has its own first words" if same else "prompts that nothing was fitted to")
    if same:
        right = axes[1]
        for y, name in enumerate(("mean_difference", "g_act")):
            _dots(right, y, [r["same"][name]["new_wordings"]["target"] for r in records], NAMES[name][1])
        right.set_yticks(range(2), ["mean difference", "G-ACT"])
        right.set_ylim(-2.5, 3.5)
        right.set_title("all kinds share their first words")
    for ax in axes if same else [axes]:
        ax.set(xlim=(0, 1.14), xlabel="answers that are right programs in the target language")
        ax.set_xticks(np.linspace(0, 1, 6), [f"{x:.0%}" for x in np.linspace(0, 1, 6)])
        ax.grid(axis="x")
        ax.grid(visible=False, axis="y")
    return Plate(
        "target-share", figure,
        "Share of answers in the rarest language on new wordings, each method at its best within the same side effect "
        f"({BUDGET} nats for each token of neutral text); a dot is a seed. Left, one direction "
        "cannot serve all prompts, right it can. Asking in the prompt needs no steering at all.",
    )  # fmt: skip


def _draw_strength(records: list[dict]) -> Plate:
    figure, axes = new_figure(9.4, 3.6, 2)
    alphas = records[0]["strength"]["alphas"]
    for name in ("mean_difference", "g_act"):
        label, colour = NAMES[name]
        for ax, what in zip(axes, ("target", "perplexity"), strict=True):
            band(ax, alphas, [r["strength"][name][what] for r in records], colour, label, marker="o")
    axes[0].set(ylim=(-0.02, 1.02), ylabel="answers in the target language", title="what is won")
    axes[1].set(ylabel="perplexity of neutral text", title="what it costs")
    for ax in axes:
        ax.set_xlabel("strength, in mean norms of the last layer")
    axes[0].set_ylim(-0.02, 1.25)
    axes[0].set_yticks(np.linspace(0, 1, 6))
    axes[0].legend(loc="upper left", ncols=2)
    axes[1].set_ylim(bottom=0)
    return Plate(
        "strength", figure,
        "Steering the last layer at the prompt's last token, by strength (mean over seeds, range shaded). Left: "
        "validation prompts. Right: neutral text steered at every token.",
    )  # fmt: skip


def _draw_probes(records: list[dict]) -> Plate:
    figure, axes = new_figure(9.4, 3.5, 2, sharey=True)
    layers = range(len(records[0]["probes"]["g_act"]))
    series = {
        0: (("g_act", "G-ACT: which cluster, from the layer", "ours", "o"), ("act", "ACT: which version, from one head",
             "accent", "s"), ("heads", "which cluster, from one head", "baseline", "^")),
        1: (("g_act_f1", "G-ACT", "ours", "o"), ("act_f1", "ACT", "accent", "s")),
    }  # fmt: skip
    for i, lines in series.items():
        for key, label, colour, marker in lines:
            band(axes[i], layers, [r["probes"][key] for r in records], COLOURS[colour], label, marker=marker)
        axes[i].set(xlabel="layer", xticks=list(layers), ylim=(0.4, 1.02))
        axes[i].legend(loc="lower left")
    axes[0].set(ylabel="on held-out prompts", title="accuracy")
    axes[1].set_title("macro-F1")
    return Plate(
        "probes", figure,
        "Validation scores of the probes by layer, mean over heads for ACT (range over seeds shaded). The two methods "
        "ask different questions; the third line asks G-ACT's question of single heads.",
    )  # fmt: skip


def _draw_clusters(record: dict) -> Plate:
    figure, ax = new_figure(5.6, 4.0)
    data = record["clusters"]
    points, kinds, clusters = np.array(data["points"]), np.array(data["kinds"]), np.array(data["clusters"])
    for i, kind in enumerate(dict.fromkeys(sorted(kinds))):
        for cluster in sorted(set(clusters)):
            chosen = points[(kinds == kind) & (clusters == cluster)]
            if len(chosen):
                ax.scatter(*chosen.T, s=34, marker="os^Dv"[cluster % 5], color=CYCLE[i], alpha=0.75, lw=0)
        middle = points[kinds == kind].mean(0)
        ax.annotate(
            kind, middle, xytext=(0, 16), textcoords="offset points", ha="center", color=CYCLE[i], weight="bold"
        )
    ax.set(xlabel="first principal component", ylabel="second principal component")
    ax.grid(visible=True, axis="both")
    ax.margins(0.15)
    return Plate(
        "clusters", figure,
        "Differences between asking for the target language and for the usual one, all layers together (first seed): "
        "colour is the kind of task, shape the cluster that was found without knowing it.",
    )  # fmt: skip


def _draw_profile(records: list[dict]) -> Plate:
    figure, ax = new_figure(7.4, 3.2)
    names = list(dict.fromkeys(name for r in records for name in r["profile"]["categories"]))
    kinds = [kind for kind in KINDS if all(kind in r["profile"]["shares"] for r in records)]
    left = np.zeros(len(kinds))
    for i, name in enumerate(names):
        width = np.array([np.mean([_at(r["profile"], kind, name) for r in records]) for kind in kinds])
        ax.barh(kinds, width, left=left, height=0.66, label=name, color=CYCLE[i % len(CYCLE)])
        left += width
    ax.set(xlim=(0, 1), xlabel="share of answers when no language is asked for")
    ax.set_xticks(np.linspace(0, 1, 6), [f"{x:.0%}" for x in np.linspace(0, 1, 6)])
    ax.grid(visible=False, axis="y")
    ax.invert_yaxis()
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title="language")
    return Plate(
        "bias",
        figure,
        f"What the model answers unprompted, by kind of task (mean over seeds): {TARGET}, the target, hardly ever.",
    )


def _at(profile: dict, kind: str, name: str) -> float:
    return profile["shares"][kind][profile["categories"].index(name)] if name in profile["categories"] else 0.0


def _draw_overhead(records: list[dict]) -> Plate:
    figure, ax = new_figure(5.4, 3.4)
    layers = records[0]["overhead"]["layers"]
    band(ax, layers, [r["overhead"]["ratio"] for r in records], COLOURS["ours"], marker="o")
    ax.axhline(1.3, color=COLOURS["paper"], linestyle=":")
    ax.text(layers[0], 1.305, "as reported: 1.3", color=COLOURS["paper"], va="bottom", fontsize=9)
    ax.set(xlabel="steered layers", ylabel="time per token, unsteered = 1", xticks=layers)
    return Plate(
        "overhead", figure,
        "Time of a generated token by the number of steered layers, of a model of four small ones: nearly all of what "
        "is added is the call of the hooks, which does not grow with the model.",
    )  # fmt: skip
