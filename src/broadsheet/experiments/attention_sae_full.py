"""The part of the attention autoencoders' experiment that needs GPT-2 small and the user's own text.

Needed in the data folder: ``gpt2/`` (or the Hugging Face cache) and ``attention-sae/texts.txt``, one text a line, or
``attention-sae/tokens.npy``, ids ``[texts, time]``. Where ``attention-sae/sae/`` holds an autoencoder of heads in
SAELens's format, or a ``.pt`` of the paper's with its ``_cfg.json``, it is measured in the place of one trained here.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from broadsheet.data.tasks import IOI_TEMPLATES, TaskBatch, ioi
from broadsheet.errors import DataMissing
from broadsheet.interpretability.attention_sae import (
    AttentionSAE,
    capture_z,
    evaluate_sae,
    feature_effects,
    head_weights,
    prefix_induction_scores,
)
from broadsheet.lab import Context, Plate
from broadsheet.nn.activations import ActivationBuffer, token_batches
from broadsheet.nn.blocks import block_map
from broadsheet.nn.hooks import replace
from broadsheet.nn.plotting import COLOURS
from broadsheet.nn.seeding import generator

FILES = ("config.json", "model.safetensors", "tokenizer.json")
LAYER = 5
IOI_LAYERS = (5, 6)
HEADS = {"long": (5, 1), "short": (5, 5)}
FIT: dict[str, Any] = {
    "expansion": 32, "steps": 25_000, "l1": 1.0, "lr": 1.2e-3, "warmup": 1000, "resample_every": 5_000, "batch": 4096,
    "buffer": 64, "texts": 16, "context": 128,
}  # fmt: skip
HELD_OUT = 64  # texts
PREFIX: dict[str, Any] = {"lengths": (1, 2, 3, 4, 5), "samples": 400, "length": 128}
PROMPTS = 64
FILLER = "Well, as people say, "


def measure(ctx: Context) -> dict[str, Any]:
    """GPT-2 small: quality, prefixes, and the two names."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    folder, batches = _files(ctx)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = GPT2LMHeadModel.from_pretrained(folder, local_files_only=True)
    model = model.to(ctx.device).eval()
    texts = batches(tokenizer)
    held, training = texts[:HELD_OUT], texts[HELD_OUT:] or texts
    sae = _autoencoder(ctx, model, tokenizer, training)
    quality = evaluate_sae(model, sae, _batches(tokenizer, held), progress=ctx.progress)
    ctx.measure("gpt2-loss-recovered", ours=quality.loss_recovered, l0=quality.l0, dead=quality.dead_fraction)

    prefix = prefix_induction_scores(
        model, bos_token_id=tokenizer.bos_token_id, generator=generator(ctx.seed), progress=ctx.progress, **PREFIX
    )
    rise = {
        name: float(prefix.attention[layer, head, -1] - prefix.attention[layer, head, 0])
        for name, (layer, head) in HEADS.items()
    }
    ctx.measure("gpt2-long-prefix", ours=rise["long"], baseline=rise["short"])

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    prompts = ioi(PROMPTS, encode, seed=ctx.seed)
    fall = {
        "alongside": _exchanged(ctx, model, prompts, ioi(PROMPTS, encode, seed=ctx.seed, template=_alongside())),
        "filler": _exchanged(ctx, model, prompts, ioi(PROMPTS, encode, seed=ctx.seed, template=FILLER + _lower())),
    }
    ctx.measure("gpt2-and-is-the-position", ours=fall["alongside"], baseline=fall["filler"])
    effects = feature_effects(
        model, sae, prompts.input_ids.to(ctx.device), _metric(prompts, ctx.device), prompts.roles["S"], max_features=60
    )
    order = effects.effects.mean(1).abs().argsort(descending=True)[:12]
    return {
        "quality": quality.to_frame().to_dict("records")[0],
        "density": quality.density.tolist(),
        "prefix": {"lengths": list(prefix.lengths), "attention": prefix.attention[LAYER].tolist()},
        "fall": fall,
        "effects": {
            "feature": effects.features[order].tolist(), "effect": effects.effects[order].mean(1).tolist(),
            "error": float(effects.error.mean()), "head": head_weights(sae)[effects.features[order]].argmax(1).tolist(),
        },
    }  # fmt: skip


def _files(ctx: Context) -> tuple[Path, Any]:
    """The model's folder, and a function from the tokenizer to lists of ids that begin with BOS."""
    from huggingface_hub import try_to_load_from_cache

    folder, own, missing = ctx.data_dir / "gpt2", ctx.data_dir / "attention-sae", []
    if not all((folder / file).is_file() for file in FILES):
        cached = [try_to_load_from_cache("openai-community/gpt2", file) for file in FILES]
        if all(isinstance(path, str) for path in cached):
            folder = Path(str(cached[0])).parent
        else:
            missing.append(f"{', '.join(FILES)} (hf download openai-community/gpt2 --local-dir {folder})")
    lines, tokens = own / "texts.txt", own / "tokens.npy"
    if not lines.is_file() and not tokens.is_file():
        missing.append(f"{lines} (your own text, one a line) or {tokens} (ids [texts, time])")
    if missing:
        raise DataMissing("not found: " + "; ".join(missing))

    def read(tokenizer: Any) -> list[list[int]]:
        bos = tokenizer.bos_token_id
        size = FIT["context"] - 1
        if tokens.is_file():
            rows = [row.tolist() for row in np.load(tokens, mmap_mode="r")]
            return [row[: size + 1] if row[0] == bos else [bos, *row[:size]] for row in rows]
        texts = [line for line in lines.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [[bos, *tokenizer.encode(text, add_special_tokens=False)[:size]] for text in texts]

    return folder, read


def _batches(tokenizer: Any, texts: list[list[int]]) -> Any:
    return token_batches(texts, tokenizer, batch_size=FIT["texts"], max_length=FIT["context"])


def _autoencoder(ctx: Context, model: Any, tokenizer: Any, texts: list[list[int]]) -> AttentionSAE:
    """The user's own autoencoder, or one trained here."""
    folder, bos = ctx.data_dir / "attention-sae" / "sae", tokenizer.bos_token_id
    heads = model.config.n_head
    if (folder / "cfg.json").is_file():
        return AttentionSAE.from_saelens(folder, n_heads=heads, bos_token_id=bos).to(ctx.device)
    released = sorted(folder.glob("*.pt"))
    if released:
        return AttentionSAE.from_official(released[0], n_heads=heads, bos_token_id=bos).to(ctx.device)
    sae = AttentionSAE.for_layer(model, LAYER, FIT["expansion"] * model.config.n_embd, seed=ctx.seed, bos_token_id=bos)
    draw = generator(ctx.seed)
    buffer = ActivationBuffer(
        model, sae.site, lambda: _batches(tokenizer, texts), batch_size=FIT["batch"], buffer_batches=FIT["buffer"],
        generator=draw,
    )  # fmt: skip
    sae.fit(
        buffer, steps=FIT["steps"], l1=FIT["l1"], lr=FIT["lr"], warmup=FIT["warmup"], seed=ctx.seed,
        resample_every=FIT["resample_every"], progress=ctx.progress, checkpoint=ctx.checkpoint / "gpt2",
    )  # fmt: skip
    return sae


def _alongside() -> str:
    return IOI_TEMPLATES[0].replace("{A} and {B}", "{A} alongside {B}")


def _lower() -> str:
    return IOI_TEMPLATES[0][0].lower() + IOI_TEMPLATES[0][1:]


def _metric(prompts: TaskBatch, device: Any) -> Any:
    answers, distractors = prompts.answers.to(device), prompts.distractors.to(device)

    def metric(logits: Tensor) -> Tensor:
        last = logits[:, -1]
        return last.gather(1, answers[:, None])[:, 0] - last.gather(1, distractors).mean(1)

    return metric


@torch.no_grad()
def _exchanged(ctx: Context, model: Any, prompts: TaskBatch, other: TaskBatch) -> float:
    """By which share the logit difference falls when head outputs at the second subject come from other prompts."""
    the_map, ids = block_map(model), prompts.input_ids.to(ctx.device)
    at, there, metric = prompts.roles["S"], other.roles["S"], _metric(prompts, ctx.device)
    values = {
        the_map.resolve(f"layers.{layer}.attn.z"): capture_z(model, other.input_ids.to(ctx.device), layer)[
            :, there : there + 1
        ].flatten(2)
        for layer in IOI_LAYERS
    }
    clean = metric(model(ids).logits).mean()
    with replace(model, values, positions=[at]):
        changed = metric(model(ids).logits).mean()
    return float((clean - changed) / clean.abs().clamp_min(1e-6))


def draw(records: list[dict[str, Any]]) -> list[Plate]:
    """Prefix curves of the layer, what the two exchanges cost, and the features that matter most."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 3.8))
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.3, 0.8, 1.1))
    lengths = records[0]["prefix"]["lengths"]
    mean = np.mean([record["prefix"]["attention"] for record in records], 0)
    named = {head: name for name, (_, head) in HEADS.items()}
    for head, row in enumerate(mean):
        label = f"{LAYER}.{head} ({named[head]})" if head in named else None
        colour = COLOURS["light"] if label is None else COLOURS["ours" if named[head] == "long" else "baseline"]
        left.plot(lengths, row, color=colour, lw=0.8 if label is None else 2, label=label)
    left.set_xlabel("tokens that match before")
    left.set_ylabel("attention to what followed")
    left.legend()
    for place, name in enumerate(("alongside", "filler")):
        values = [record["fall"][name] for record in records]
        middle.bar(place, np.mean(values), 0.6, color=COLOURS["ours" if place == 0 else "baseline"])
        middle.plot([place] * len(values), values, "o", color="white", mec="#1f2328", ms=4)
    middle.set_xticks([0, 1], ["“alongside”\nfor “and”", "moved by\na filler"])
    middle.set_ylabel("fall of the logit difference")
    effects = records[0]["effects"]
    rows = [*zip(effects["feature"], effects["effect"], strict=True), ("error", effects["error"])]
    right.barh(range(len(rows)), [value for _, value in rows], color=COLOURS["ours"], height=0.7)
    right.set_yticks(range(len(rows)), [str(name) for name, _ in rows], fontsize=8)
    right.invert_yaxis()
    right.set_xlabel("change of the logit difference")
    caption = (
        "GPT-2 small. Left: attention of layer 5's heads after a repeated run, by length. Middle: what the indirect-"
        "object task loses when head outputs of layers 5 and 6 at the second subject come from other prompts. Right: "
        "features of layer 5 left out there, one by one, and the error term."
    )
    return [Plate("gpt2", figure, caption)]
