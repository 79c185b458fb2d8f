"""The part of MILAN's experiment that needs published data: a describer trained on MILANNOTATIONS, tested on a network
that it has not seen.

Needed in the data folder: ``milannotations/`` with the sources below (from the authors' page), and ``resnet-50/``, a
classifier of ImageNet in Hugging Face's format (``microsoft/resnet-50``).
"""

from typing import Any

import numpy as np
import torch

from broadsheet.data.milannotations import SOURCE, load_milannotations
from broadsheet.errors import DataMissing
from broadsheet.interpretability.milan import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Describer,
    PyramidEncoder,
    VectorExemplars,
    bleu,
    constant_description,
    encode_pictures,
)
from broadsheet.lab import Context, Plate
from broadsheet.nn.plotting import COLOURS

TRAIN = ("resnet152-imagenet", "alexnet-places365", "resnet152-places365", "biggan-imagenet", "biggan-places365")
TEST = "alexnet-imagenet"
BACKBONE = "resnet-50"
LAYERS = ("embedder", "encoder.stages.0", "encoder.stages.1", "encoder.stages.2", "encoder.stages.3")
BEAM = 50
FIT: dict[str, Any] = {}


def measure(ctx: Context) -> dict[str, Any]:
    """Train on all sources but one, describe the one."""
    root = ctx.data_dir / "milannotations"
    missing = [str(root / name) for name in (*TRAIN, TEST) if not (root / name / "annotations.csv").is_file()]
    backbone = ctx.data_dir / BACKBONE
    if not (backbone / "config.json").is_file():
        missing.append(f"{backbone} (Hugging Face: microsoft/{BACKBONE})")
    if missing:
        raise DataMissing(f"missing: {', '.join(missing)}. The annotations come from {SOURCE}")
    from transformers import AutoModel

    resnet = AutoModel.from_pretrained(backbone).to(ctx.device)
    encoder = PyramidEncoder(resnet, LAYERS, IMAGENET_MEAN, IMAGENET_STD).to(ctx.device)
    seen, sentences = _encoded(ctx, encoder, TRAIN)
    new, wanted = _encoded(ctx, encoder, (TEST,))
    describer = Describer.fit(
        seen, sentences, seed=ctx.seed, device=ctx.device, progress=ctx.progress,
        checkpoint=ctx.checkpoint / "annotations", **FIT,
    )  # fmt: skip
    found = describer.describe(new, beam_size=BEAM, progress=ctx.progress)
    result = {
        "MILAN": bleu(found.texts, wanted),
        "likelihood alone": bleu(found.reranked(0).texts, wanted),
        "one constant sentence": bleu([constant_description(sentences)] * len(wanted), wanted),
    }
    ctx.measure("annotations-above-likelihood", ours=result["MILAN"], baseline=result["likelihood alone"])
    ctx.measure("annotations-above-constant", ours=result["MILAN"], baseline=result["one constant sentence"])
    return result


def _encoded(ctx: Context, encoder: Any, sources: tuple[str, ...]) -> tuple[VectorExemplars, list[tuple[str, ...]]]:
    vectors, names, sentences = [], [], []
    for source in sources:
        for layer in load_milannotations(ctx.data_dir / "milannotations", source):
            for start in range(0, len(layer.units), 16):
                units = list(layer.units[start : start + 16])
                images = torch.from_numpy(np.asarray(layer.images[units], dtype=np.uint8))
                masks = torch.from_numpy(np.asarray(layer.masks[units], dtype=np.float32))
                vectors.append(encode_pictures(encoder, images, masks).cpu())
                names += [f"{source}, {layer.layer}, unit {unit}" for unit in units]
            sentences += list(layer.sentences)
    return VectorExemplars(torch.cat(vectors), tuple(names)), sentences


def draw(records: list[dict]) -> Plate:
    """Agreement with what people wrote about a network that the describer has not seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6, 2.2), layout="constrained")
    ax = figure.subplots()
    names = list(records[0]["annotations"])[::-1]
    values = np.array([[r["annotations"][name] for name in names] for r in records])
    y = np.arange(len(names))
    colours = [COLOURS["ours"] if name == "MILAN" else COLOURS["baseline"] for name in names]
    ax.barh(y, values.mean(0), color=colours, height=0.6)
    ax.set_yticks(y, names)
    ax.set(xlabel="BLEU against three annotations", title="Units of an unseen network")
    ax.grid(axis="x")
    ax.grid(axis="y", visible=False)
    return Plate("annotations", figure, f"Trained on the other sources of MILANNOTATIONS, tested on {TEST}.")
