"""Neural circuit diagrams, measured: is the drawing the program, and are its cost and backward those of the program?
``small`` draws a zoo of nine small models (perceptron, attentions, transformer layer, convolutions, residual block,
U-Net, visual attention, GPT-2), strips the drawings of everything but geometry and text, rebuilds programs from them
and runs both. The baseline has the same weights and inputs, and the graph of operators that graph drawers show:
operators, edges, shapes and whose weights. ``full`` does the same with a Hugging Face model from the user's folder.
"""

import re
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from broadsheet.diagrams.neural_circuit_diagrams import diagram, opaque_share, read_svg
from broadsheet.diagrams.neural_circuit_diagrams.diagram import Diagram
from broadsheet.diagrams.neural_circuit_diagrams.drawing import scene
from broadsheet.diagrams.neural_circuit_diagrams.export import figure
from broadsheet.diagrams.neural_circuit_diagrams.language import causal, elementwise, linear, reduce, softmax, wires
from broadsheet.diagrams.neural_circuit_diagrams.laws import IllegalRewrite, difference
from broadsheet.diagrams.neural_circuit_diagrams.layout import plan, tidied
from broadsheet.diagrams.neural_circuit_diagrams.operator_graph import rebuild, recorded
from broadsheet.diagrams.neural_circuit_diagrams.trace import traced
from broadsheet.diagrams.neural_circuit_diagrams.zoo import CausalLogits, VisionTransformer, zoo
from broadsheet.errors import DataMissing
from broadsheet.lab import Context, Plate
from broadsheet.nn.plotting import COLOURS, new_figure, style
from broadsheet.nn.score_networks import ScoreMLP
from broadsheet.nn.seeding import seeded
from broadsheet.nn.sparse_autoencoder import SparseAutoencoder
from broadsheet.recordings.rbtransformer import RBTransformer

CLOSE = 1e-5
DRAWN = ("multi-head-attention", "encoder-layer", "unet", "convolutions", "identity-resnet", "visual-attention", "gpt2")
WIDTH = 900.0


def run(ctx: Context) -> dict:
    """All claims of one seed."""
    if ctx.preset == "full":
        return _full(ctx)
    models = zoo(ctx.seed)
    diagrams = {name: diagram(*models[name]) for name in models}
    record: dict[str, Any] = {"names": list(models)}
    record["drawing"] = {n: _from_drawing(diagrams[n], *models[n]) for n in models}
    record["graph"] = {n: _from_graph(*models[n]) for n in models}
    runs = {n: _error(diagrams[n], *models[n]) for n in models}
    ctx.measure("diagram-runs", ours=_share(e < CLOSE for e in runs.values()), worst=max(runs.values()))
    ctx.measure(
        "rebuilt-from-drawing",
        ours=_share(record["drawing"].values()),
        baseline=_share(record["graph"].values()),
        ours_failed=[n for n, ok in record["drawing"].items() if not ok],
        graph_failed=[n for n, ok in record["graph"].items() if not ok],
    )
    counts = {n: _counted(diagrams[n], *models[n]) for n in models}
    record["multiply_adds"] = counts
    ctx.measure("cost-is-counted-cost", ours=max(abs(2 * ours / flops - 1) for ours, flops in counts.values()))
    record["backward"] = _backward(ctx.seed)
    saved = record["backward"]["saved"].values()
    ctx.measure("backward-is-autograd", ours=max(record["backward"]["errors"].values()))
    ctx.measure("saves-no-more", ours=float(sum(a for a, _ in saved)), baseline=float(sum(b for _, b in saved)))
    ctx.measure("illegal-rewrites-refused", ours=_refused(ctx.seed))
    swaps = {n: (tidied(d)[1].swaps, plan(d).swaps) for n, d in diagrams.items()}
    record["swaps"] = swaps
    ctx.measure(
        "fewer-swaps", ours=float(sum(a for a, _ in swaps.values())), baseline=float(sum(b for _, b in swaps.values()))
    )
    return record


def _share(found: Any) -> float:
    found = list(found)
    return sum(found) / len(found)


def _error(made: Diagram, model: nn.Module, inputs: tuple) -> float:
    with torch.no_grad():
        return float((made.run(*inputs) - model(*inputs)).abs().max())


def _from_drawing(made: Diagram, model: nn.Module, inputs: tuple) -> bool:
    """Whether the program rebuilt from the drawing alone has the module's output."""
    svg = re.sub(r' data-\w+="[^"]*"', "", made.svg(width=WIDTH))
    return _error(read_svg(svg, made.weights), model, inputs) < CLOSE


def _from_graph(model: nn.Module, inputs: tuple) -> bool:
    """Whether the program rebuilt from the operator graph has the module's output."""
    with torch.no_grad():
        made, want = rebuild(recorded(model, inputs), inputs), model(*inputs)
    return made is not None and made.shape == want.shape and float((made - want).abs().max()) < CLOSE


def _counted(made: Diagram, model: nn.Module, inputs: tuple) -> tuple[int, int]:
    """Multiply-adds of contractions by the diagram, and operations counted by torch while it runs."""
    total = 0
    for count, step in zip(made.cost().per_step, made.steps, strict=True):
        kind = type(step.op).__name__
        contracted = {c for row in step.at.ins for c in row} - {c for row in step.at.outs for c in row}
        if kind in ("Linear", "Conv") or (kind == "Einsum" and len(step.ins) > 1 and contracted):
            total += int(count)
    # Fused attention kernels of some devices are not in torch's counter: written out, all is counted.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(*inputs)
    return total, counter.get_total_flops()


def _backward(seed: int) -> dict[str, Any]:
    """Largest error of gradients against autograd in float64, and elements saved by both, by model."""
    errors, saved = {}, {}
    for name, (model, inputs) in zoo(seed, False, torch.float64).items():
        made = diagram(model, inputs)
        pair = made.backward()
        weights = dict(model.named_parameters())
        leaves = [x.clone().requires_grad_() for x in inputs]
        held: dict[int, int] = {}
        learned = {w.untyped_storage().data_ptr() for w in (*weights.values(), *model.buffers())}

        def pack(x, held=held, learned=learned):
            if x.untyped_storage().data_ptr() not in learned and x.is_floating_point():
                held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = model(*leaves)
        with seeded(seed):
            g = torch.randn(y.shape, dtype=y.dtype)
        want = torch.autograd.grad(y, [*leaves, *weights.values()], g)
        _, gx, by_name = pair.run([x.detach() for x in inputs], [g])
        found = [*gx, *(by_name[_short(n, by_name)] for n in weights)]
        scale = max(float(w.abs().max()) for w in want)
        errors[name] = max(float((a - b).abs().max()) for a, b in zip(found, want, strict=True)) / scale
        saved[name] = (int(pair.saved_elements), sum(held.values()))
    return {"errors": errors, "saved": saved}


def _short(name: str, known: Any) -> str:
    parts = name.split(".")
    return next(n for i in range(len(parts)) if (n := ".".join(parts[i:])) in known)


def _refused(seed: int) -> float:
    """The share of rewrites that are wrong (by numbers) and are refused, among rewrites that are not laws."""
    start = wires("a b", {"a": 3, "b": 4})
    f = linear("a -> c", f"F{seed}", bias=False, sizes={"a": 3, "c": 2})
    others = [
        softmax("b"), reduce("b", "max"), linear("b -> d", "B", sizes={"b": 4, "d": 5}), elementwise("ReLU"),
        elementwise("GELU"), elementwise("^ 2.0"),
    ]  # fmt: skip
    refused = []
    for other in others:
        wrong = difference(start >> f >> other, start >> other >> f, seed) > 1e-6
        try:
            (start >> f >> other).rewrite("commute", step=0, check=False)
            refused.append(False)
        except IllegalRewrite:
            refused.append(wrong)
    square = wires("a b", {"a": 3, "b": 3}) >> causal("a", "b")
    try:
        (square >> softmax("b")).rewrite("commute", step=0, check=False)
        refused.append(False)
    except IllegalRewrite:
        refused.append(True)
    return _share(refused)


# ----------------------------------------------------------------------------------------------------------------- full


def _full(ctx: Context) -> dict:
    folder = ctx.data_dir / "model"
    if not (folder / "config.json").is_file():
        raise DataMissing(
            f"{folder}: a causal language model in Hugging Face's format (config.json, model.safetensors), such as"
            " https://huggingface.co/openai-community/gpt2"
        )
    from transformers import AutoModelForCausalLM

    model = CausalLogits(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")).eval().to(ctx.device)
    vocabulary: Any = model.model.config.vocab_size
    with seeded(ctx.seed):
        ids = torch.randint(int(vocabulary), (1, 16)).to(ctx.device)
    flat = traced(model, ids)
    with torch.no_grad():
        want = model(ids)
        error = float((flat.run(ids) - want).abs().max() / want.abs().max())
    ctx.measure("published-model-runs", ours=error)
    ctx.measure("published-opaque-share", ours=opaque_share(flat))
    ours, flops = _counted(flat, model, (ids,))
    return {
        "published": {"error": error, "opaque": opaque_share(flat), "cost": (ours, flops), "steps": len(flat.steps)}
    }


# ------------------------------------------------------------------------- architectures of other papers of the edition


class Reconstruction(nn.Module):
    """A sparse autoencoder from activations to what it makes of them."""

    def __init__(self, width: int, latents: int) -> None:
        super().__init__()
        self.sae = SparseAutoencoder(width, latents)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sae(x)[0]


class RelativeClassifier(nn.Module):
    """An encoder, cosines to anchors that it embeds itself, and a head that reads them."""

    def __init__(self, features: int, latents: int, anchors: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.norm = nn.Linear(features, latents), nn.LayerNorm(anchors)
        self.head = nn.Linear(anchors, classes)

    def forward(self, x: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        z, a = (nn.functional.normalize(self.encoder(part), dim=-1) for part in (x, anchors))
        return self.head(self.norm(z @ a.T))


def architectures() -> dict[str, tuple[nn.Module, tuple, str]]:
    """Small networks of other papers of the edition: module, inputs, caption. Their entries name the drawing."""
    with seeded(0):
        return {
            "rbtransformer": (
                RBTransformer(5, d_model=12, depth=1, n_heads=2, head_dim=6, d_hidden=12).eval(),
                (torch.zeros(2, 5, 4),),
                "The architecture as a neural circuit diagram, with one block: electrodes e attend to each other.",
            ),
            "sparse-autoencoder": (
                Reconstruction(8, 24).eval(),
                (torch.zeros(3, 8),),
                "The sparse autoencoder as a neural circuit diagram: the decoder's bias is taken away, 24 latents are"
                " read from 8 numbers and cut off below zero, and what they write is added up.",
            ),
            "score-network": (
                ScoreMLP(2, hidden=32, embedding=8).eval(),
                (torch.zeros(5, 2), torch.ones(5)),
                "The net that estimates the noise, as a neural circuit diagram: waves of the point and of the logarithm"
                " of time are put side by side, then come dense layers.",
            ),
            "relative-classifier": (
                RelativeClassifier(6, 5, 9, 3).eval(),
                (torch.ones(4, 6), torch.ones(9, 6)),
                "A classifier on relative representations, as a neural circuit diagram: samples b and anchors b' pass"
                " through the same encoder, both are divided by their lengths, and one contraction gives all cosines.",
            ),
        }


# -------------------------------------------------------------------------------------------------------------- figures


def draw(records: list[dict]) -> list[Plate]:
    """Drawings of the zoo, and what was rebuilt."""
    if "published" in records[0]:
        return []
    models = zoo(0)
    plates: list[Plate] = []
    captions = {
        "multi-head-attention": "Multi-head attention, traced from a torch module. Wires are axes: L are maps"
        " to heads h and k, half-circles contract, dots join axes that run in step, the triangle is the softmax.",
        "encoder-layer": "A pre-norm transformer layer: dots on wires copy the stream, a ringed plus adds the branch.",
        "unet": "A small U-Net: stars are convolutions and pooling with strides (T: transposed), bars concatenate the"
        " skip connections, which run along below.",
        "convolutions": "Convolutions with stride 2, with dilation 2, and transposed; squares mark the channels.",
        "identity-resnet": "An identity residual block: norm (circle), activation and convolution, twice, on a branch.",
        "visual-attention": "Attention among the places of a picture: y and x are merged at bars, contracted, split.",
        "gpt2": "A GPT-2 of two layers as transformers writes it, down to the last slice of a fused projection.",
    }
    models["vision-transformer"] = (VisionTransformer().eval(), (torch.zeros(2, 3, 8, 8),))
    captions["vision-transformer"] = (
        "A vision transformer of one layer, from patches to the class token's entry at the end."
    )
    own = architectures()
    models |= {name: (model, inputs) for name, (model, inputs, _) in own.items()}
    captions |= {name: caption for name, (*_, caption) in own.items()}
    models = {name: models[name] for name in (*DRAWN, "vision-transformer", *own) if name in models}
    plates += [Plate(n, figure(scene(diagram(*m), width=WIDTH)), captions[n]) for n, m in models.items()]
    pair = diagram(*zoo(0, False)["scaled-attention"], axis_names=["y k", "x k", "x k"]).backward()
    for side, made in (("forward", pair.forward), ("backward", pair.backward)):
        text = (
            f"Scaled attention, {side}, with the elements held under every column of data and the multiply-adds under"
            f" every column of steps; s marks what is saved {'for' if side == 'forward' else 'by'} the other pass."
        )
        plates.append(Plate(f"attention-{side}", figure(scene(made, width=WIDTH, cost=True)), text))
    return [*plates, _draw_rebuilt(records)]


def _draw_rebuilt(records: list[dict]) -> Plate:
    names = records[0]["names"]
    with style():
        chart, ax = new_figure(6.4, 3.4)
        for row, (key, title) in enumerate((("graph", "operator graph"), ("drawing", "circuit diagram"))):
            for x, name in enumerate(names):
                share = _share(record[key][name] for record in records)
                colour = COLOURS["ours"] if key == "drawing" else COLOURS["baseline"]
                ax.scatter(x, row, s=230, facecolor=colour if share == 1 else "white", edgecolor=colour, linewidth=1.6)
                if 0 < share < 1:
                    ax.text(x, row, f"{share:.0%}", ha="center", va="center", fontsize=7)
            ax.text(-0.7, row, title, ha="right", va="center")
        ax.set(xlim=(-0.6, len(names) - 0.4), ylim=(-0.6, 1.6), yticks=[])
        ax.set_xticks(range(len(names)), names, rotation=35, ha="right")
        for spine in ax.spines.values():
            spine.set_visible(False)
        ax.tick_params(length=0)
    text = (
        "Which models run to the same output when rebuilt from the picture alone (filled). Operator graphs have"
        " names, shapes and edges; axes that an operator works on and numbers such as a scale are left to guessing."
    )
    return Plate("rebuilt", chart, text)
