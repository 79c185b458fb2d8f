"""Neurons read through the output head, measured: a small Llama whose topics are known, then the user's own pair.

``small`` needs no data: a three-layer Llama learns texts about sixteen topics, a second one from another seed, and a
copy of the first goes on with other topics. Labels from weights are held against what the neurons respond to, against
labels that need text, and against chance; clamps show whether a labelled neuron speaks of its words. ``full`` adds a
base model and its instruction-tuned version from the user's folder or Hugging Face cache, read layer by layer.
"""

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from broadsheet.data.language import TopicCorpus
from broadsheet.errors import DataMissing
from broadsheet.interpretability.lm_head_neurons import (
    NeuronMap,
    clamp,
    clamp_sweep,
    compare,
    decode_directions,
    decode_neurons,
    largest_values,
    probability_of,
)
from broadsheet.lab import Context, Plate
from broadsheet.lab.memory import freed_at_once, peak
from broadsheet.nn.features import unembedding
from broadsheet.nn.hooks import capture
from broadsheet.nn.plotting import COLOURS, new_figure, style
from broadsheet.nn.seeding import generator, seeded
from broadsheet.nn.small_lm import small_language_model, train_language_model

CORPUS = TopicCorpus()
MODEL: dict[str, Any] = {"width": 48, "layers": 3, "hidden": 128}
LENGTH = 16
TRAIN: dict[str, Any] = {"steps": 240, "batch": 32, "lr": 5e-3}
TUNE: dict[str, Any] = {"steps": 100, "batch": 32, "lr": 1e-3}
TEXTS = {"truth": 1024, "labels": 256, "prompts": 32}
KNOWN_FROM = 4  # a text's topic shows after a few words
MULTIPLE = 10.0  # of a neuron's own largest value
SWEEP = (-10.0, -6.0, -3.0, 0.0, 3.0, 6.0, 10.0)
SWEPT_TOPICS = 4
CONTROLS = 3
DIFFERING = 32
COST: dict[str, int] = {"width": 256, "neurons": 1024, "vocab": 8192}
DISK: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 512}
FULL: dict[str, Any] = {
    "pairs": (
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-Instruct-v0.3"),
    ),
    "words": {"dog": "My favourite animal is the", "California": "The state that I like best is"},
    "neutral": (
        "This morning we talked about the weather.",
        "The report was finished on time.",
        "She opened the door.",
    ),
    "naive": 64,
}


def run(ctx: Context) -> dict:
    """All claims of one seed."""
    # The user's models come first: files that are missing are said before the work, not after it.
    record = {"published": _published(ctx)} if ctx.preset == "full" else {}
    model = _trained(ctx, "model", ctx.seed)
    found = decode_neurons(model, tokenizer=CORPUS.tokenizer())
    record |= {
        "exact": _exact(ctx, model, found),
        "labels": _labels(ctx, model, found),
        "change": _change(ctx, model, found),
        "signs": _signs(ctx, model, found),
        "clamps": _clamps(ctx, model, found),
        "words": _words(model),
        "texts": _texts(ctx, model, found),
        "cost": _cost(ctx),
    }
    return record


def _trained(ctx: Context, name: str, seed: int) -> nn.Module:
    model = small_language_model(CORPUS.vocab_size, kind="llama", length=64, seed=seed, **MODEL).to(ctx.device)
    train_language_model(
        model, lambda n, random: CORPUS.sample(n, LENGTH, random)[0], seed=seed, checkpoint=ctx.checkpoint / name,
        progress=ctx.progress, description=name, **TRAIN,
    )  # fmt: skip
    return model


def _weight(model: Any, layer: int, name: str) -> Tensor:
    """One of a layer's MLP matrices, without its graph."""
    return model.get_submodule(f"model.layers.{layer}.mlp.{name}").weight.detach()


def _topics(found: NeuronMap) -> Tensor:
    """The topic of every neuron's first word, ``[L, F]``; -1 for common words."""
    return CORPUS.topic_of[found.labels]


@torch.no_grad()
def _exact(ctx: Context, model: nn.Module, found: NeuronMap) -> dict[str, Any]:
    """The stream over blocks against the whole softmax, in double precision."""
    head = unembedding(model).weight.double()
    worst, same = 0.0, 0
    blocks = [(7, 13), (128, 163), (512, 8192)]
    for neurons, words in blocks:
        streamed = decode_neurons(model, block_neurons=neurons, block_vocabulary=words)
        for row, layer in enumerate(found.layers):
            rows = _weight(model, layer, "up_proj").double()
            dense = (rows @ head).softmax(-1).topk(streamed.tokens.shape[-1])
            worst = max(worst, float((streamed.probs[row].to(dense.values) - dense.values).abs().max()))
            same += int((streamed.tokens[row, :, 0].to(ctx.device) == dense.indices[:, 0]).sum())
    total = len(blocks) * found.n_layers * found.width
    ctx.measure("streaming-exact", ours=worst, same_first_word=same / total)
    return {"worst": worst}


# ------------------------------------------------------------------------------------------------- labels and behaviour


def _responses(model: nn.Module, ids: Tensor, topics: Tensor) -> dict[str, Tensor]:
    """Mean value of every neuron in texts of each topic, ``[L, F, topics]``, at each of three places."""
    layers = range(MODEL["layers"])
    places = {
        "up": [f"model.layers.{i}.mlp.up_proj" for i in layers],
        "gate": [f"model.layers.{i}.mlp.gate_proj" for i in layers],
    }
    downs = [f"model.layers.{i}.mlp.down_proj" for i in layers]
    with torch.no_grad(), capture(model, [*places["up"], *places["gate"]]) as seen, \
            capture(model, downs, at="input") as posts:  # fmt: skip
        model(ids)
    values = {name: torch.stack([seen[place] for place in of]) for name, of in places.items()}
    values["post"] = torch.stack([posts[place] for place in downs])
    means = {}
    for name, value in values.items():
        value = value[:, :, KNOWN_FROM:].mean(2).cpu()
        by_topic = torch.stack([value[:, topics == k].mean(1) for k in range(CORPUS.n_topics)], -1)
        means[name] = by_topic - by_topic.mean(-1, keepdim=True)
    return means


def _labels(ctx: Context, model: Any, found: NeuronMap) -> dict[str, Any]:
    random = generator(7000 + ctx.seed)
    ids, topics = CORPUS.sample(TEXTS["truth"], LENGTH, random)
    response = _responses(model, ids.to(ctx.device), topics)
    truth, of_neuron = response["up"].argmax(-1), response["post"].argmax(-1)
    strongest = response["post"].abs().argmax(-1)
    gate = decode_neurons(model, weights="gate")
    labels = {"ours": _topics(found)}
    labels["permuted"] = CORPUS.topic_of[torch.randperm(CORPUS.vocab_size, generator=random)][found.labels]
    rows = [_weight(model, i, "up_proj") for i in found.layers]
    drawn = [torch.randn(row.shape, generator=random).to(row) for row in rows]
    drawn = [noise * (row.norm(dim=1) / noise.norm(dim=1))[:, None] for noise, row in zip(drawn, rows, strict=True)]
    labels["random"] = torch.stack(
        [CORPUS.topic_of[decode_directions(model, noise).tokens[:, 0].cpu()] for noise in drawn]
    )
    table = model.get_input_embeddings().weight.detach()
    unit = nn.functional.normalize(table, dim=-1)
    labels["embedding"] = torch.stack([CORPUS.topic_of[(row @ unit.T).argmax(-1).cpu()] for row in rows])
    labels["activations"] = _activation_labels(ctx, model, random)
    share = {name: (label == truth).double().mean(1) for name, label in labels.items()}
    ours = float(share["ours"].mean())
    ctx.measure("labels-last-layer", ours=float(share["ours"][-1]))
    for claim, baseline in (
        ("labels-above-permuted", "permuted"), ("labels-above-random", "random"),
        ("labels-above-embedding", "embedding"), ("labels-as-activations", "activations"),
    ):  # fmt: skip
        ctx.measure(claim, ours=ours, baseline=float(share[baseline].mean()))
    itself = (labels["ours"] == of_neuron).double().mean(1)
    ctx.measure("labels-name-the-neuron", ours=float(itself.mean()))
    sharp = {"up": (labels["ours"] == strongest).double().mean(1)}
    sharp["gate"] = (_topics(gate) == strongest).double().mean(1)
    ctx.measure("gate-names-better", ours=float(sharp["gate"].mean()), baseline=float(sharp["up"].mean()))
    gate_share = (_topics(gate) == response["gate"].argmax(-1)).double().mean(1)
    tables = {**share, "gate": gate_share, "itself": itself}
    return {
        "share": {name: value.tolist() for name, value in tables.items()},
        "strongest": {name: value.tolist() for name, value in sharp.items()},
    }


def _activation_labels(ctx: Context, model: nn.Module, random: torch.Generator) -> Tensor:
    """The topic of the word at which each neuron's up-projection is highest on average: a label that needs text."""
    ids, _ = CORPUS.sample(TEXTS["labels"], LENGTH, random)
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(MODEL["layers"])]
    with torch.no_grad(), capture(model, names) as seen:
        model(ids.to(ctx.device))
    values = torch.stack([seen[name].flatten(0, 1) for name in names]).cpu()
    once = nn.functional.one_hot(ids.flatten(), CORPUS.vocab_size).to(values)
    means = torch.einsum("lnf,nv->lfv", values, once) / once.sum(0).clamp_min(1)
    means[..., once.sum(0) == 0] = -torch.inf
    return CORPUS.topic_of[means.argmax(-1)]


def _change(ctx: Context, model: nn.Module, found: NeuronMap) -> dict[str, Any]:
    """How many labels survive fine-tuning, and how many another training shares."""
    tuned = copy.deepcopy(model)
    shift = torch.linspace(0.2, 1.8, CORPUS.n_topics)
    train_language_model(
        tuned, lambda n, random: CORPUS.sample(n, LENGTH, random, weights=shift)[0], seed=5000 + ctx.seed,
        checkpoint=ctx.checkpoint / "tuned", progress=ctx.progress, description="fine-tuning", **TUNE,
    )  # fmt: skip
    other = _trained(ctx, "other", 3000 + ctx.seed)
    kept = compare(found, decode_neurons(tuned, tokenizer=CORPUS.tokenizer()))
    shared = compare(found, decode_neurons(other, tokenizer=CORPUS.tokenizer()))
    ctx.measure("finetuned-keeps-labels", ours=kept.same_top, jaccard=kept.jaccard_topk)
    ctx.measure("independent-shares-few", ours=shared.same_top, jaccard=shared.jaccard_topk)
    return {"tuned": kept.per_layer.tolist(), "other": shared.per_layer.tolist()}


def _signs(ctx: Context, model: nn.Module, found: NeuronMap) -> dict[str, Any]:
    """Turn every neuron's up and down weights round together: the model stays, the labels?"""
    flipped = copy.deepcopy(model)
    for layer in found.layers:
        for name in ("up_proj", "down_proj"):
            _weight(flipped, layer, name).neg_()
    ids, _ = CORPUS.sample(8, LENGTH, generator(ctx.seed))
    with torch.no_grad():
        moved = float((model(ids.to(ctx.device)).logits - flipped(ids.to(ctx.device)).logits).abs().max())
    raw = compare(found, decode_neurons(flipped, tokenizer=CORPUS.tokenizer())).same_top
    oriented = [decode_neurons(m, orient="gate") for m in (model, flipped)]
    kept = compare(*oriented).same_top
    ctx.measure("raw-label-flips", ours=raw, largest_change_of_a_logit=moved)
    ctx.measure("oriented-label-stays", ours=kept)
    read, write = _topics(oriented[0]), _topics(decode_neurons(model, weights="down", orient="gate"))
    topical = (read >= 0) & (write >= 0)
    same = float((read == write)[topical].double().mean())
    ctx.measure("read-and-write-differ", ours=same)
    return {"raw": raw, "oriented": kept, "same_topic": same}


# ------------------------------------------------------------------------------------------------- clamps


def _prompts(ctx: Context) -> Tensor:
    return CORPUS.sample(TEXTS["prompts"], 10, generator(9000 + ctx.seed))[0].to(ctx.device)


def _specialists(found: NeuronMap) -> list[tuple[int, int, float]]:
    """For each topic the neuron that is surest of one of its words: layer, neuron, sign of the clamp."""
    topics, sure = _topics(found), found.probs[..., 0]
    out = []
    for topic in range(CORPUS.n_topics):
        best = int(torch.where(topics == topic, sure, -1.0).argmax())
        row, neuron = best // found.width, best % found.width
        out.append((found.layers[row], neuron, float(found.clamp_sign[row, neuron])))
    return out


def _effects(
    model: nn.Module, ids: Tensor, who: tuple[int, int], values: list[float], words: list[int], site: Any = "post"
) -> list[float]:
    """By how much a clamp raises the words' log-probability, for several multiples of the neuron's largest value."""
    return clamp_sweep(model, who, values, words, ids, site=site).effect.tolist()


def _clamps(ctx: Context, model: nn.Module, found: NeuronMap) -> dict[str, Any]:
    ids, random = _prompts(ctx), generator(11000 + ctx.seed)
    tokens = CORPUS.topic_tokens.tolist()
    write = decode_neurons(model, weights="down")
    head = unembedding(model).weight.detach()
    chosen, by_write = _specialists(found), _specialists(write)
    effects: dict[str, list[float]] = {name: [] for name in ("post", "against", "up", "gate", "write", "random")}
    for topic, ((layer, neuron, sign), (write_layer, write_neuron, _)) in enumerate(zip(chosen, by_write, strict=True)):
        who, both, words = (layer, neuron), [sign * MULTIPLE, -sign * MULTIPLE], tokens[topic]
        high, low = _effects(model, ids, who, both, words)
        effects["post"].append(high)
        effects["against"].append(low)
        for site in ("up", "gate"):  # whichever sign does more for its words
            effects[site].append(max(_effects(model, ids, who, both, words, site)))
        effects["write"] += _effects(model, ids, (write_layer, write_neuron), [MULTIPLE], words)
        other = int(torch.randint(found.width, (), generator=random))
        down = _weight(model, layer, "down_proj")
        towards = float((down[:, other] @ head[:, words]).mean().sign()) or 1.0
        effects["random"] += _effects(model, ids, (layer, other), [towards * MULTIPLE], words)
    mean = {name: float(np.mean(values)) for name, values in effects.items()}
    ctx.measure("clamp-raises-topic", ours=mean["post"])
    ctx.measure("clamp-above-random", ours=mean["post"], baseline=mean["random"])
    ctx.measure("opposite-clamp-lowers-topic", ours=mean["against"])
    ctx.measure("clamp-site-decides", ours=mean["post"], baseline=mean["up"], gate=mean["gate"])
    ctx.measure("clamp-read-as-write", ours=mean["post"], baseline=mean["write"])
    follows = _follows(ctx, model, ids, random)
    sweeps, controls = [], []
    for topic in range(0, CORPUS.n_topics, CORPUS.n_topics // SWEPT_TOPICS):
        layer, neuron, sign = chosen[topic]
        others = [(layer, int(n)) for n in torch.randint(found.width, (CONTROLS,), generator=random)]
        sweep = clamp_sweep(
            model, (layer, neuron), [sign * x for x in SWEEP], tokens[topic], ids, controls=others
        )  # fmt: skip
        sweeps.append(sweep.effect.tolist())
        controls += (sweep.controls - sweep.unclamped).tolist()
    return {"mean": mean, "sweeps": sweeps, "controls": controls, "follows": follows}


def _follows(ctx: Context, model: nn.Module, ids: Tensor, random: torch.Generator) -> dict[str, float]:
    """Where the read and the write label name different topics: which of the two does a clamp raise?"""
    read, write = (decode_neurons(model, weights=which, orient="gate") for which in ("up", "down"))
    first, second = _topics(read), _topics(write)
    differ = ((first >= 0) & (second >= 0) & (first != second)).nonzero()
    differ = differ[torch.randperm(len(differ), generator=random)[:DIFFERING]]
    tokens = CORPUS.topic_tokens.tolist()
    rises: dict[str, list[float]] = {"read": [], "write": []}
    before = [float(probability_of(model, words, ids).log().mean()) for words in tokens]
    for row, neuron in differ.tolist():
        who = (read.layers[row], neuron)
        # As the neuron is when its gate is open and its oriented up-projection high.
        sign = float(write.clamp_sign[row, neuron])
        value = sign * MULTIPLE * float(largest_values(model, [who], ids)[0])
        with clamp(model, {who: value}):
            for name, topic in (("read", int(first[row, neuron])), ("write", int(second[row, neuron]))):
                rises[name].append(float(probability_of(model, tokens[topic], ids).log().mean()) - before[topic])
    mean = {name: float(np.mean(values)) for name, values in rises.items()}
    ctx.measure("clamp-follows-the-write-label", ours=mean["write"], baseline=mean["read"])
    return mean


def _words(model: nn.Module) -> dict[str, Any]:
    """The sharpest neurons with their words, and how sharp all are, with and without a norm."""
    unit = decode_neurons(model, norm="unit", tokenizer=CORPUS.tokenizer())
    table = unit.specialised().head(12)
    rows = [
        {"layer": int(line.layer), "neuron": int(line.neuron), "prob": float(line.prob), "entropy": float(line.entropy),
         "words": list(line.words), "bottom": list(line.bottom_words)}
        for line in table.itertuples()
    ]  # type: ignore[arg-type]  # fmt: skip
    plain = decode_neurons(model)
    return {
        "table": rows,
        "prob": {"none": plain.probs[..., 0].tolist(), "unit": unit.probs[..., 0].tolist()},
        "entropy": {"none": plain.entropy.tolist(), "unit": unit.entropy.tolist()},
    }


def _texts(ctx: Context, model: Any, found: NeuronMap) -> list[dict[str, Any]]:
    """What the model writes by itself and with one topic's neuron held high."""
    start = torch.tensor([[0, 3]], device=ctx.device)
    ids = _prompts(ctx)

    def written(seed: int) -> list[int]:
        with seeded(seed), torch.no_grad():
            out: Any = model.generate(
                start, attention_mask=torch.ones_like(start), do_sample=True, max_new_tokens=9, pad_token_id=1
            )
        return out[0, 1:].tolist()

    out = [{"name": "free", "ids": [written(100 * ctx.seed + i) for i in range(2)]}]
    for topic, (layer, neuron, sign) in list(enumerate(_specialists(found)))[:: CORPUS.n_topics // 4]:
        value = sign * 6.0 * float(largest_values(model, [(layer, neuron)], ids)[0])
        with clamp(model, {(layer, neuron): value}):
            texts = [written(100 * ctx.seed + i) for i in range(2)]
        label = found.words_of(layer, neuron, 1)[0]
        out.append({"name": CORPUS.names[topic], "topic": topic, "label": label, "ids": texts, "at": [layer, neuron]})
    return out


# ------------------------------------------------------------------------------------------------- cost


def naive_map(rows: Tensor, head: Tensor, k: int = 10) -> list[tuple[Tensor, Tensor, float]]:
    """What one writes first: every neuron by itself through the head, softmax, best words, entropy."""
    out = []
    for row in rows:
        probs = (head @ row).softmax(-1)
        best = probs.topk(k)
        out.append((best.indices, best.values, float(-(probs * probs.clamp_min(1e-30).log()).sum())))
    return out


def _seconds(work: Callable[[], Any], rounds: int = 3) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _cost(ctx: Context) -> dict[str, Any]:
    from broadsheet.nn.vocabulary import rank_vocabulary

    random = generator(ctx.seed)
    rows = torch.randn(COST["neurons"], COST["width"], generator=random).to(ctx.device) * 0.05
    head = torch.randn(COST["vocab"], COST["width"], generator=random).to(ctx.device)
    part = rows[: max(1, COST["neurons"] // 4)]  # the loop's time is its number of neurons times one
    seconds = {
        "streamed": _seconds(lambda: rank_vocabulary(rows, head).entropy.sum().item(), 2),
        "neuron by neuron": _seconds(lambda: naive_map(part, head), 1) * len(rows) / len(part),
    }
    ctx.measure("faster-than-naive", ours=seconds["streamed"], baseline=seconds["neuron by neuron"])
    with tempfile.TemporaryDirectory() as folder:
        size = _made_checkpoint(Path(folder), ctx.seed)
        decode_neurons(folder, layers=[0])  # what a first call loads does not count
        with freed_at_once():
            memory = {
                "layer by layer": peak(lambda: decode_neurons(folder))[1],
                "whole model": peak(lambda: _whole(folder))[1],
            }
    ctx.measure("memory-of-a-stream", ours=memory["layer by layer"], baseline=memory["whole model"], weights_mib=size)
    return {"seconds": seconds, "memory": memory, "weights_mib": size}


def _made_checkpoint(folder: Path, seed: int) -> float:
    """A random Llama in several files, as a published one stands on disk; MiB of its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with seeded(seed):
        model = LlamaForCausalLM(LlamaConfig(**DISK, num_attention_heads=8, pad_token_id=None))
    model.save_pretrained(folder, max_shard_size="20MB")
    return sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 2**20


def _whole(folder: str) -> NeuronMap:
    from transformers import AutoModelForCausalLM

    return decode_neurons(AutoModelForCausalLM.from_pretrained(folder))


# ------------------------------------------------------------------------------------------------- the user's models


def _folders(ctx: Context) -> tuple[Path, Path]:
    """The first pair that is there whole, in the data folder or in Hugging Face's cache."""
    for pair in FULL["pairs"]:
        folders = [_folder(ctx, name) for name in pair]
        if all(folder is not None for folder in folders):
            return folders[0], folders[1]  # type: ignore[return-value]
    names = "; ".join(f"{base.split('/')[1]} and {tuned.split('/')[1]}" for base, tuned in FULL["pairs"])
    raise DataMissing(
        f"{ctx.data_dir}: none of these pairs of models is there: {names}. Each is a folder with config.json, its "
        "safetensors files and tokenizer.json; download them from https://huggingface.co "
        f"(hf download {FULL['pairs'][1][0]} --local-dir {ctx.data_dir / FULL['pairs'][1][0].split('/')[1]})"
    )


def _folder(ctx: Context, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    own = ctx.data_dir / name.split("/")[1]
    cached = try_to_load_from_cache(name, "config.json")
    for folder in (own, Path(cached).parent if isinstance(cached, str) else own):
        if (folder / "config.json").is_file() and list(folder.glob("*.safetensors")):
            return folder
    return None


def _published(ctx: Context) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, tuned = _folders(ctx)
    tokenizer = AutoTokenizer.from_pretrained(base)
    how: dict[str, Any] = {"tokenizer": tokenizer, "device": ctx.device, "progress": ctx.progress}
    if ctx.device.type == "cuda":
        how["dtype"] = torch.bfloat16
    start = time.perf_counter()
    found, memory = peak(
        lambda: decode_neurons(base, checkpoint=ctx.checkpoint / "base", **how),
        ctx.device if ctx.device.type == "cuda" else None,
    )
    seconds = time.perf_counter() - start
    compared = compare(found, decode_neurons(tuned, checkpoint=ctx.checkpoint / "instruct", **how))
    ctx.measure("published-keeps-labels", ours=compared.same_top, base=base.name, neurons=found.n_layers * found.width)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors")) / 2**20
    ctx.measure("published-memory", ours=memory / size, peak_mib=memory)

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto").to(ctx.device)
    ours, naive = _published_speed(ctx, model, found, how)
    ctx.measure("published-faster-than-naive", ours=ours, baseline=naive, map_seconds=seconds)
    rises, texts = [], []
    for word, prompt in FULL["words"].items():
        best = found.find(word, tokenizer=tokenizer)
        best = best[best["rank"] == 1] if bool((best["rank"] == 1).any()) else best
        if not len(best):
            continue
        line = best.iloc[0]
        who = (int(line["layer"]), int(line["neuron"]))
        scale = float(largest_values(model, [who], [*FULL["neutral"], prompt], tokenizer=tokenizer)[0])
        value = MULTIPLE * scale * int(line["clamp_sign"])
        before = float(probability_of(model, word, prompt, tokenizer).log()[0])
        with clamp(model, {who: value}):
            rises.append(float(probability_of(model, word, prompt, tokenizer).log()[0]) - before)
            ids = tokenizer(prompt, return_tensors="pt").to(ctx.device)
            out = model.generate(**ids, max_new_tokens=20, do_sample=False)
        texts.append({"word": word, "neuron": list(who), "text": tokenizer.decode(out[0], skip_special_tokens=True)})
    if not rises:
        raise DataMissing(
            f"{base}: no neuron has any of {', '.join(FULL['words'])} among its words: another model's files?"
        )
    ctx.measure("published-clamp", ours=float(np.mean(rises)), texts=texts)
    return {"same": compared.per_layer.tolist(), "seconds": seconds, "memory": memory, "texts": texts}


def _published_speed(ctx: Context, model: Any, found: NeuronMap, how: dict[str, Any]) -> tuple[float, float]:
    """Seconds for a neuron, of one layer's map and of the loop over single neurons, on the same device."""
    layer = found.layers[0]
    whole = {name: value for name, value in how.items() if name in ("device", "dtype")}
    ours = _seconds(lambda: decode_neurons(model, layers=[layer], **whole), 1) / found.width
    head = model.get_output_embeddings().weight.detach()
    count = min(FULL["naive"], found.width)
    name = next(n for n, m in model.named_modules() if n.endswith(f"layers.{layer}.mlp.up_proj"))
    rows = model.get_submodule(name).weight.detach()[:count]
    precision = torch.float32 if ctx.device.type == "cpu" else head.dtype
    head, rows = head.to(precision), rows.to(precision)
    naive_map(rows[:2], head)
    return ours, _seconds(lambda: naive_map(rows, head), 1) / count


# ------------------------------------------------------------------------------------------------- figures


def draw(records: list[dict]) -> list[Plate]:
    """Figures from the records of all seeds."""
    with style():
        plates = [
            _draw_words(records[0]["words"]),
            _draw_labels([r["labels"] for r in records]),
            _draw_clamps([r["clamps"] for r in records]),
            _draw_texts(records[0]["texts"]),
            _draw_change(records),
            _draw_sharpness([r["words"] for r in records]),
            _draw_cost([r["cost"] for r in records]),
        ]
        if all("published" in r for r in records):
            plates.append(_draw_published(records[0]["published"]))
    return plates


def _colour_of(word: str) -> Any:
    from matplotlib.colors import hsv_to_rgb

    ids = {text: i for i, text in enumerate(CORPUS.words)}
    topic = int(CORPUS.topic_of[ids[word]]) if word in ids else -1
    shade = (0.55, 0.78)[topic % 2]  # neighbours in hue differ in brightness; all are dark enough to read
    return COLOURS["neutral"] if topic < 0 else hsv_to_rgb((topic / CORPUS.n_topics, 0.85, shade))


def _draw_words(record: dict) -> Plate:
    rows = record["table"]
    figure, ax = new_figure(10.4, 0.42 * len(rows) + 1.2)
    ax.set_axis_off()
    ax.set_xlim(0, 10.4)
    ax.set_ylim(-len(rows) + 0.3, 1.4)
    heads = (("neuron", 0.0), ("probability", 0.95), ("its words", 2.6), ("opposite direction", 6.7))
    for text, x in heads:
        ax.text(x, 0.85, text, fontsize=9, color=COLOURS["neutral"], weight="bold")
    ax.axhline(0.55, color="#1f2328", linewidth=0.8)
    for i, row in enumerate(rows):
        ax.text(0.0, -i, f"{row['layer']}.{row['neuron']}", va="center", fontsize=9.5)
        length = 1.0 * row["prob"] / rows[0]["prob"]
        ax.barh(-i, length, left=0.95, height=0.42, color=COLOURS["ours"])
        ax.text(1.0 + length, -i, f"{row['prob']:.2f}", va="center", fontsize=8.5)
        for x, words in ((2.6, row["words"]), (6.7, row["bottom"])):
            for j, word in enumerate(words[:5]):
                ax.text(x + 0.78 * j, -i, word, va="center", fontsize=9.5, color=_colour_of(word),
                        weight="bold" if j == 0 else "normal")  # fmt: skip
    ax.set_title("The most specialised neurons of a small Llama")
    caption = (
        "The sharpest neurons by the words that their up-projections point at, norm 'unit', first seed; one colour for "
        "each topic, grey for words of no topic. Nothing but weights was read."
    )
    return Plate("specialised-neurons", figure, caption)


LABELS = {
    "ours": ("through the head (ours)", COLOURS["ours"]),
    "activations": ("from activations on 256 texts", COLOURS["good"]),
    "embedding": ("nearest input embedding", COLOURS["accent"]),
    "permuted": ("permuted vocabulary", COLOURS["baseline"]),
    "random": ("random directions", COLOURS["neutral"]),
}


def _draw_labels(records: list[dict]) -> Plate:
    figure, axes = new_figure(10.4, 3.8, 2, sharey=True)
    layers = len(records[0]["share"]["ours"])
    x, width = np.arange(layers), 0.16
    for j, (name, (label, colour)) in enumerate(LABELS.items()):
        values = np.array([r["share"][name] for r in records])
        at = x + (j - 2) * width
        axes[0].bar(at, values.mean(0), width * 0.92, color=colour, label=label)
        axes[0].vlines(at, values.min(0), values.max(0), color="#1f2328", linewidth=1)
    axes[0].set_title("Topic that drives the up-projection most")
    axes[0].set(ylabel="share of neurons named right", ylim=(0, 1.12))
    axes[0].legend(loc="upper left", ncols=2, fontsize=8)
    for j, (name, label, colour) in enumerate((("gate", "label from the gate's weights", COLOURS["accent"]),
                                                ("up", "label from the up-projection", COLOURS["ours"]))):  # fmt: skip
        values = np.array([r["strongest"][name] for r in records])
        at = x + (j - 0.5) * 0.34
        axes[1].bar(at, values.mean(0), 0.31, color=colour, label=label)
        axes[1].vlines(at, values.min(0), values.max(0), color="#1f2328", linewidth=1)
    axes[1].set_title("Topic that moves the neuron itself most")
    axes[1].legend(loc="upper left", fontsize=8)
    for ax in axes:
        ax.set_xticks(x, [str(i) for i in x])
        ax.set_xlabel("layer")
        ax.axhline(1 / CORPUS.n_topics, color=COLOURS["neutral"], linestyle="--", linewidth=0.9)
    caption = (
        "Left: share of neurons whose label is a word of the topic in whose texts the up-projection is highest, by "
        "where the label comes from. Right: the same against the topic that moves the gated product most, in either "
        "direction. Bars are means over seeds, lines their range, dashes chance."
    )
    return Plate("labels", figure, caption)


def _draw_clamps(records: list[dict]) -> Plate:
    figure, axes = new_figure(10.4, 3.9, 2, width_ratios=(1.25, 1))
    ax = axes[0]
    others = np.array([row for r in records for row in r["controls"]])
    low, high = np.quantile(others, [0.05, 0.95], axis=0)
    ax.fill_between(SWEEP, low, high, color=COLOURS["light"], linewidth=0, label="other neurons, 5 to 95 %")
    ax.plot(SWEEP, np.median(others, axis=0), color=COLOURS["neutral"], linewidth=1)
    curves = np.array([row for r in records for row in r["sweeps"]])
    for curve in curves:
        ax.plot(SWEEP, curve, color=COLOURS["ours"], linewidth=0.5, alpha=0.25)
    ax.plot(SWEEP, curves.mean(0), color=COLOURS["ours"], marker="o", markersize=4, label="the topic's neuron")
    ax.axhline(0, color=COLOURS["neutral"], linewidth=0.8, linestyle="--")
    ax.set(
        xlabel="held at (times its own largest value)", ylabel="log-probability of the topic's words,\nchange (nats)"
    )
    ax.set_title("One neuron, held at more and more")
    ax.legend(loc="upper left")
    ax = axes[1]
    names = {"post": "its value", "up": "up-projection only", "gate": "gate only", "random": "another neuron's value",
             "against": "its value, other sign"}  # fmt: skip
    values = np.array([[r["mean"][name] for name in names] for r in records])
    y = np.arange(len(names))[::-1]
    colours = [COLOURS["ours"], COLOURS["accent"], COLOURS["accent"], COLOURS["neutral"], COLOURS["baseline"]]
    ax.barh(y, values.mean(0), color=colours, height=0.62)
    for row in values:
        ax.plot(row, y, "|", color="#1f2328", markersize=9, alpha=0.6)
    ax.axvline(0, color="#1f2328", linewidth=0.8)
    ax.set_yticks(y, list(names.values()))
    ax.grid(axis="x")
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("change (nats)")
    ax.set_title("What is held decides")
    caption = (
        "Left: how much more probable a topic's words become when the neuron that is surest of one of them is held at "
        "multiples of its own largest value; thin lines are topics and seeds. Right: the same at ten times that value, "
        "by what is held (of up-projection and gate the better sign), mean over topics; ticks are seeds."
    )
    return Plate("clamps", figure, caption)


def _draw_texts(record: list[dict]) -> Plate:
    lines = [(entry, ids) for entry in record for ids in entry["ids"]]
    figure, ax = new_figure(10.4, 0.36 * len(lines) + 0.9)
    ax.set_axis_off()
    ax.set_xlim(0, 10.4)
    ax.set_ylim(-len(lines) + 0.3, 0.9)
    for i, (entry, ids) in enumerate(lines):
        if ids is entry["ids"][0]:
            free = "topic" not in entry
            text = "left alone" if free else f"{entry['at'][0]}.{entry['at'][1]} held high: “{entry['label']}”"
            ax.text(0.0, -i, text, va="center", fontsize=9.5, color=COLOURS["neutral"] if free else COLOURS["ours"])
        for j, token in enumerate(ids):
            word = CORPUS.words[token]
            own = "topic" in entry and int(CORPUS.topic_of[token]) == entry["topic"]
            ax.text(2.55 + 0.79 * j, -i, word, va="center", fontsize=9.5, weight="bold" if own else "normal",
                    color=COLOURS["ours"] if own else "#1f2328")  # fmt: skip
    ax.set_title("What the model writes, and what it writes with one neuron held")
    caption = (
        "Sampled continuations of the same beginning, first seed: by itself, and with the neuron surest of a word of "
        "one topic held at six times its own largest value. Words of that topic are red."
    )
    return Plate("generated", figure, caption)


def _draw_change(records: list[dict]) -> Plate:
    figure, ax = new_figure(6.4, 3.6)
    kinds = (
        ("tuned", "fine-tuned for 100 steps", COLOURS["ours"]),
        ("other", "trained from another seed", COLOURS["baseline"]),
    )
    layers = len(records[0]["change"]["tuned"])
    for j, (name, label, colour) in enumerate(kinds):
        values = np.array([r["change"][name] for r in records])
        at = np.arange(layers) + (j - 0.5) * 0.36
        ax.bar(at, values.mean(0), 0.33, color=colour, label=label)
        ax.vlines(at, values.min(0), values.max(0), color="#1f2328", linewidth=1)
    ax.set_xticks(range(layers), [str(i) for i in range(layers)])
    ax.set(xlabel="layer", ylabel="neurons with the same first word", ylim=(0, 1))
    ax.set_title("What training changes in the labels")
    ax.legend(loc="upper right")
    caption = (
        "Share of neurons with the same first word as in the model before fine-tuning on shifted topics, and as in a "
        "model trained from another seed; means over seeds, lines their range."
    )
    return Plate("same-word", figure, caption)


def _draw_sharpness(records: list[dict]) -> Plate:
    figure, axes = new_figure(10.4, 3.6, 2)
    layers = len(records[0]["prob"]["unit"])
    import matplotlib as mpl

    shades = [mpl.colormaps["magma_r"](0.3 + 0.5 * i / max(1, layers - 1)) for i in range(layers)]
    bins = np.geomspace(1 / CORPUS.vocab_size, 1, 34)
    for layer in range(layers):
        prob = np.array([r["prob"]["unit"][layer] for r in records]).ravel()
        entropy = np.array([r["entropy"]["unit"][layer] for r in records]).ravel()
        axes[0].hist(prob, bins, histtype="step", color=shades[layer], linewidth=1.8, label=f"layer {layer}")
        axes[1].hist(entropy, np.linspace(0, np.log(CORPUS.vocab_size) + 0.05, 34), histtype="step",
                     color=shades[layer], linewidth=1.8)  # fmt: skip
    plain = np.array([r["prob"]["none"] for r in records]).ravel()
    axes[0].hist(plain, bins, color=COLOURS["light"], label="all, without a norm", zorder=0)
    flat = np.array([r["entropy"]["none"] for r in records]).ravel()
    axes[1].hist(flat, np.linspace(0, np.log(CORPUS.vocab_size) + 0.05, 34), color=COLOURS["light"], zorder=0)
    most = max(h.get_height() for h in axes[0].patches if hasattr(h, "get_height"))
    for ax in axes:
        ax.set_yscale("log")
        ax.set_ylabel("neurons")
        ax.set_ylim(0.8, 2 * most)
    axes[0].set_xscale("log")
    axes[0].set_xlim(right=1.0)
    axes[1].set_xlim(left=float(np.floor(2 * min(np.min(r["entropy"]["unit"]) for r in records)) / 2) - 0.1)
    axes[0].set_xlabel("probability of the first word")
    axes[1].set_xlabel("entropy (nats)")
    axes[0].legend(loc="upper right", fontsize=8)
    axes[0].set_title("How sure of one word")
    axes[1].set_title("How many words share it")
    caption = (
        "Probability of each neuron's first word and entropy of its words, norm 'unit', all seeds. Without a norm "
        "(grey, all layers) the weights are so short that the softmax stays nearly uniform: the order of words is the "
        "same, probabilities say little."
    )
    return Plate("sharpness", figure, caption)


def _draw_cost(records: list[dict]) -> Plate:
    figure, axes = new_figure(9.6, 2.5, 2)
    for ax, key, unit in ((axes[0], "seconds", "microseconds for a neuron"), (axes[1], "memory", "peak memory (MiB)")):
        names = list(records[0][key])
        scale = 1e6 / COST["neurons"] if key == "seconds" else 1.0
        values = scale * np.array([[r[key][name] for name in names] for r in records])
        y = np.arange(len(names))[::-1]
        ax.barh(y, values.mean(0), color=[COLOURS["ours"], COLOURS["baseline"]], height=0.55)
        for row in values:
            ax.plot(row, y, "|", color="#1f2328", markersize=9, alpha=0.6)
        ax.set_yticks(y, names)
        ax.grid(axis="x")
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(unit)
    axes[0].set_title(f"{COST['vocab']:,} words, {COST['width']} features")
    axes[1].set_title(f"Map of {records[0]['weights_mib']:.0f} MiB of weights on disk")
    caption = (
        "Left: decoding a neuron in blocks and by itself, one core. Right: memory for the map of a checkpoint in "
        "several files, read one layer at a time and loaded whole."
    )
    return Plate("cost", figure, caption)


def _draw_published(record: dict) -> Plate:
    figure, ax = new_figure(8.0, 3.4)
    ax.bar(range(len(record["same"])), record["same"], color=COLOURS["ours"], width=0.7)
    ax.axhline(0.754, color=COLOURS["paper"], linestyle="--", label="the paper's mean for Llama 3.1 8B")
    ax.set(xlabel="layer", ylabel="neurons with the same first word", ylim=(0, 1))
    ax.set_title("What instruction tuning leaves as it was")
    ax.legend(loc="lower left")
    return Plate("published-pair", figure, "Base against instruction-tuned model, layer by layer.")
