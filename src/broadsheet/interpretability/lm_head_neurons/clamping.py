"""Hold neurons at a value while the model runs or generates, to see whether it then speaks of their words.

A gated MLP computes ``down(act(gate(x)) * up(x))``. ``post`` is the product, the value that the neuron writes; ``up``
and ``gate`` are its factors, ``add`` leaves the neuron alone and adds what it would write at that value. A clamp at
``up`` does next to nothing where the gate is closed, hence ``post`` by default.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from broadsheet.errors import InvalidInput, UnsupportedModel
from broadsheet.interpretability.lm_head_neurons.layout import Layout, Matrix
from broadsheet.interpretability.lm_head_neurons.weights import ModelWeights
from broadsheet.interpretability.lm_head_neurons.words import target_ids
from broadsheet.nn.hooks import Site, capture, evaluating, replace
from broadsheet.nn.padding import right_padded
from broadsheet.nn.plotting import COLOURS, new_axes

SITES = ("post", "up", "gate", "add")


@contextmanager
def clamp(
    model: nn.Module,
    neurons: Mapping[tuple[int, int], Any],
    site: str = "post",
    positions: Any = "all",
    *,
    mlp_map: Mapping[str, str] | None = None,
) -> Iterator[nn.Module]:
    """Hold neurons at values inside the block: logits, ``generate``, :func:`probability_of` are then the clamped ones.

    Args:
        model: a causal language model in memory; its hooks are removed on every way out.
        neurons: ``(layer, neuron) -> value``: a number, or a tensor that broadcasts to ``[batch, time]``.
        site: ``"post"`` (what enters the down projection), ``"up"``, ``"gate"`` (before its activation) or ``"add"``
            (the residual stream gets value times the neuron's down vector on top of everything else).
        positions: ``"all"``, or a slice of columns counted from the first of the prompt; columns that ``generate`` adds
            count on, with or without a cache of keys and values. Negative ends count back from the end of the prompt:
            ``slice(-1, None)`` is its last token and everything after (without a cache, which hands in the whole text
            again, from the end of the text so far).
        mlp_map: as in :func:`decode_neurons`.

    Raises:
        InvalidInput: no such neuron or site, or a value that is not finite.
        UnsupportedModel: experts, a compiled model, or a forward pass that went around the place (fused kernels).

    Example:
        >>> import torch
        >>> from broadsheet.nn.tiny_models import tiny_model
        >>> model, ids = tiny_model("llama"), torch.tensor([[3, 4, 5]])
        >>> with clamp(model, {(1, 7): 30.0}):
        ...     clamped = model(ids).logits
        >>> bool((clamped - model(ids).logits).abs().max() > 0.1)
        True
    """
    places = _Places(model, mlp_map)
    if positions != "all" and not isinstance(positions, slice):
        raise InvalidInput(f"positions={positions!r}: expected 'all' or a slice")
    chosen = None if isinstance(positions, str) else positions
    if chosen is not None and (chosen.step or 1) < 1:
        raise InvalidInput(f"positions={positions!r}: expected a positive step")
    clock = _Clock()
    groups: dict[tuple[int, str], list[tuple[int, Any]]] = {}
    for (layer, neuron), value in neurons.items():
        places.check(layer, neuron, site)
        if not bool(torch.as_tensor(value).isfinite().all()):
            raise InvalidInput(f"the value for neuron {neuron} of layer {layer} is {value}: expected a finite number")
        groups.setdefault((layer, site), []).append((neuron, value))
    edits: dict[Site, Callable[[Tensor], Tensor]] = {}
    for (layer, kind), entries in groups.items():
        place = places.site(layer, tuple(neuron for neuron, _ in entries), kind)
        write = places.writes(layer, [neuron for neuron, _ in entries]) if kind == "add" else None
        edits[place] = _Edit([value for _, value in entries], write, chosen, clock, place.module)
    with ExitStack() as stack:
        for part in {id(m): m for m in (model, getattr(model, "base_model", model))}.values():
            stack.callback(part.register_forward_pre_hook(clock.note, with_kwargs=True).remove)
        stack.enter_context(replace(model, edits))
        yield model
    silent = [edit.name for edit in edits.values() if isinstance(edit, _Edit) and not edit.calls]
    if clock.passes and silent:
        raise UnsupportedModel(
            f"{silent[0]!r} was never called though the model ran: a fused or compiled path goes around it, and "
            "nothing was clamped. Load the model with plain modules (attn_implementation='eager', no compile)"
        )


@torch.no_grad()
def probability_of(
    model: nn.Module,
    words: str | int | Iterable[str | int],
    prompt: str | Sequence[str] | Tensor,
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
) -> Float[Tensor, " batch"]:
    """The probability that the next token is one of some words, after each prompt; clamped inside :func:`clamp`.

    Args:
        model: a causal language model.
        words: words (all their forms count) or token ids; their probabilities are added.
        prompt: text, texts, or token ids ``[batch, time]``.
        tokenizer: needed for words and text.
        attention_mask: ``[batch, time]`` of token ids, padding on either side.
    """
    ids, mask = encoded(prompt, tokenizer, attention_mask, next(model.parameters()).device)
    padded = right_padded(ids, mask)
    with evaluating(model):  # a causal model's earlier positions do not see padding on the right: no mask is needed
        logits = _logits(model(padded.input_ids))
    last = logits[torch.arange(len(ids), device=logits.device), padded.last]
    wanted = target_ids(words, tokenizer, last.shape[-1])
    last = last.to(torch.promote_types(last.dtype, torch.float32))
    return (last[:, wanted].logsumexp(-1) - last.logsumexp(-1)).exp()


@torch.no_grad()
def largest_values(
    model: nn.Module,
    neurons: Sequence[tuple[int, int]],
    prompt: str | Sequence[str] | Tensor,
    *,
    site: str = "post",
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
    mlp_map: Mapping[str, str] | None = None,
) -> Float[Tensor, " n"]:
    """The largest absolute value that each neuron takes on texts: a unit for clamps that fits the neuron.

    Args:
        model: a causal language model.
        neurons: ``(layer, neuron)``.
        prompt, tokenizer, attention_mask: as in :func:`probability_of`; padding does not count.
        site: where it is read; ``"add"`` counts as ``"post"``.
        mlp_map: as in :func:`decode_neurons`.
    """
    places = _Places(model, mlp_map)
    kind = "post" if site == "add" else site
    for layer, neuron in neurons:
        places.check(layer, neuron, kind)
    ids, mask = encoded(prompt, tokenizer, attention_mask, next(model.parameters()).device)
    padded = right_padded(ids, mask)
    layers = sorted({layer for layer, _ in neurons})
    sites = [places.site(layer, None, kind, label=str(layer)) for layer in layers]
    with evaluating(model), capture(model, sites) as seen:
        model(padded.input_ids)
    out = []
    for layer, neuron in neurons:
        value = seen[str(layer)][..., places.column(layer, neuron, kind)].abs()
        out.append((value if padded.attention_mask is None else value * padded.attention_mask.to(value)).max())
    return torch.stack(out)


@dataclass(frozen=True)
class ClampSweep:
    """How probable some words become as a neuron is held at one value after another.

    Attributes:
        values: ``[n]``, in units of ``scale``.
        scale: what one unit is.
        log_prob: ``[n]``, log-probability of the words, mean over prompts, nats.
        unclamped: the same without a clamp.
        controls: ``[c, n]``, the same for other neurons, each in its own units.
        name: of the neuron.
    """

    values: Float[Tensor, " n"]
    scale: float
    log_prob: Float[Tensor, " n"]
    unclamped: float
    controls: Float[Tensor, "c n"]
    name: str = ""

    @property
    def effect(self) -> Float[Tensor, " n"]:
        """By how much the words' log-probability rises, nats."""
        return self.log_prob - self.unclamped

    def to_frame(self) -> pd.DataFrame:
        """One row for each value: effect, and the controls' mean, least and largest."""
        table = pd.DataFrame({"value": self.values.tolist(), "effect": self.effect.tolist()})
        if len(self.controls):
            others = self.controls - self.unclamped
            table["control_mean"] = others.mean(0).tolist()
            table["control_min"], table["control_max"] = others.amin(0).tolist(), others.amax(0).tolist()
        return table

    def plot(self, ax: Any = None) -> Any:
        """The curve, and a band of the controls.

        Args:
            ax: matplotlib axes; None makes new ones.
        """
        ax = new_axes(ax)
        x = self.values.tolist()
        if len(self.controls):
            others = self.controls - self.unclamped
            ax.fill_between(
                x, others.amin(0).tolist(), others.amax(0).tolist(), color=COLOURS["light"], linewidth=0,
                label=f"{len(others)} other neurons",
            )  # fmt: skip
            ax.plot(x, others.mean(0).tolist(), color=COLOURS["neutral"], linewidth=1)
        ax.plot(
            x, self.effect.tolist(), color=COLOURS["ours"], marker="o", markersize=4, label=self.name or "this neuron"
        )
        ax.axhline(0, color=COLOURS["neutral"], linewidth=0.8, linestyle="--")
        ax.set(xlabel="held at (times its own largest value)", ylabel="log-probability of its words, change (nats)")
        ax.legend(loc="best")
        return ax


def clamp_sweep(
    model: nn.Module,
    neuron: tuple[int, int],
    values: Sequence[float | int] | Float[Tensor, " n"],
    words: str | int | Iterable[str | int],
    prompt: str | Sequence[str] | Tensor,
    *,
    site: str = "post",
    controls: Sequence[tuple[int, int]] = (),
    relative: bool = True,
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
    mlp_map: Mapping[str, str] | None = None,
) -> ClampSweep:
    """Hold a neuron at one value after another and see how probable some words become.

    Args:
        model: a causal language model.
        neuron: ``(layer, neuron)``.
        values: to hold it at.
        words, prompt, tokenizer, attention_mask: as in :func:`probability_of`.
        site: as in :func:`clamp`.
        controls: other neurons, held in the same way, to compare with.
        relative: whether values are multiples of each neuron's own largest absolute value on the prompts.
        mlp_map: as in :func:`decode_neurons`.
    """
    wanted = torch.as_tensor(values, dtype=torch.float64).flatten()
    every = [neuron, *controls]
    scales = torch.ones(len(every), dtype=torch.float64)
    ids, mask = encoded(prompt, tokenizer, attention_mask, next(model.parameters()).device)
    if relative:
        scales = largest_values(model, every, ids, site=site, attention_mask=mask, mlp_map=mlp_map).double().cpu()

    def log_prob() -> float:
        return float(probability_of(model, words, ids, tokenizer, mask).log().mean())

    words = [words] if isinstance(words, str | int) else list(words)
    curves = torch.empty(len(every), len(wanted), dtype=torch.float64)
    for i, (who, scale) in enumerate(zip(every, scales.tolist(), strict=True)):
        for j, value in enumerate(wanted.tolist()):
            with clamp(model, {who: value * scale}, site, mlp_map=mlp_map):
                curves[i, j] = log_prob()
    name = f"layers.{neuron[0]}.mlp.neuron.{neuron[1]}"
    return ClampSweep(wanted, float(scales[0]), curves[0], log_prob(), curves[1:], name)


def encoded(
    prompt: str | Sequence[str] | Tensor, tokenizer: Any, attention_mask: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Text or ids as ids ``[batch, time]`` and a mask, padded on the right."""
    if isinstance(prompt, Tensor):
        ids = prompt if prompt.ndim == 2 else prompt[None]
        return ids.to(device), None if attention_mask is None else attention_mask.to(device)
    if tokenizer is None:
        raise InvalidInput("prompt is text: hand in tokenizer=, or token ids [batch, time]")
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    rows = [tokenizer(text)["input_ids"] for text in texts]
    if not rows or not all(rows):
        empty = next((i for i, row in enumerate(rows) if not row), 0)
        raise InvalidInput(f"prompt {empty} is empty: expected text")
    longest = max(map(len, rows))
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, None if bool(mask.all()) else mask


# --------------------------------------------------------------------------------------------------------------- places


class _Places:
    """Where the neurons of a model are, for hooks."""

    def __init__(self, model: nn.Module, mlp_map: Mapping[str, str] | None) -> None:
        compiled = type(model).__name__ == "OptimizedModule"
        if compiled or any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()):
            raise UnsupportedModel(
                f"{type(model).__name__} is compiled: its graph goes around hooks. Hand in the model before "
                "torch.compile (model._orig_mod)"
            )
        self.weights = ModelWeights(model)
        self.layout = Layout(self.weights, mlp_map)

    def _mlp(self, layer: int) -> Any:
        count = max(self.layout.layers) + 1
        if layer not in self.layout.layers:
            raise InvalidInput(f"layer={layer}: the model has {count} layers with MLPs (0 to {count - 1})")
        kinds = self.layout.layers[layer]
        if None not in kinds:
            raise UnsupportedModel(
                f"layer {layer} is a mixture of experts: its neurons run inside one kernel and cannot be clamped"
            )
        return kinds[None]

    def check(self, layer: int, neuron: int, site: str) -> None:
        if site not in SITES:
            raise InvalidInput(f"site={site!r}: expected {', '.join(map(repr, SITES))}")
        mlp = self._mlp(layer)
        if not 0 <= neuron < mlp.width:
            raise InvalidInput(f"neuron={neuron}: layer {layer} has {mlp.width} neurons (0 to {mlp.width - 1})")
        if site == "gate" and mlp.gate is None:
            raise InvalidInput(f"site='gate': the MLP of layer {layer} has no gate; take 'post' or 'up'")

    def _matrix(self, layer: int, site: str) -> Matrix:
        mlp = self._mlp(layer)
        return {"post": mlp.down, "up": mlp.up, "gate": mlp.gate}[site]

    def column(self, layer: int, neuron: int, site: str) -> int:
        """Where a neuron stands in what its module gives or gets: fused matrices hold gate and up."""
        part = self._matrix(layer, site).part if site in ("up", "gate") else None
        return neuron if part is None else (part.start or 0) + neuron * (part.step or 1)

    def site(self, layer: int, neurons: tuple[int, ...] | None, site: str, label: str | None = None) -> Site:
        block = f"{self.layout.prefix}{layer}"
        path = self.weights.module(self._matrix(layer, "post").name)
        block = path[: path.index(block)] + block
        if site == "add":
            return Site(block, label=label)
        index = None if neurons is None else tuple(self.column(layer, n, site) for n in neurons)
        module = self.weights.module(self._matrix(layer, site).name)
        return Site(module, "input" if site == "post" else "output", index, label, tokens_of=block)

    def writes(self, layer: int, neurons: list[int]) -> Float[Tensor, "n d"]:
        return self._matrix(layer, "post").read(self.weights)[neurons]


@dataclass
class _Clock:
    """Which column of the whole text the present forward pass begins with."""

    start: int = 0
    passes: int = 0
    prompt: int = field(default=0)

    def note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.passes += 1
        past = kwargs.get("past_key_values")
        if past is None:
            self.start = 0
        elif hasattr(past, "get_seq_length"):
            self.start = int(past.get_seq_length())
        else:
            self.start = past[0][0].shape[-2] if len(past) else 0


class _Edit:
    """Puts the values in; called with what the place holds, ``[batch, time, neurons or features]``."""

    def __init__(
        self, values: list[Any], write: Tensor | None, positions: slice | None, clock: _Clock, name: str
    ) -> None:
        self.values, self.write, self.positions = values, write, positions
        self.clock, self.name, self.calls = clock, name, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        start, time = self.clock.start, x.shape[1]
        if start == 0:
            self.clock.prompt = time
        wanted = torch.stack([self._value(value, x, start) for value in self.values], -1)
        new = wanted if self.write is None else x + (wanted @ self.write.to(wanted)).to(x.dtype)
        if self.positions is None:
            return new.to(x.dtype)
        inside = self._inside(torch.arange(start, start + time, device=x.device))
        return torch.where(inside[None, :, None], new.to(x.dtype), x)

    def _value(self, value: Any, x: Tensor, start: int) -> Tensor:
        value = torch.as_tensor(value, device=x.device).to(torch.promote_types(x.dtype, torch.float32))
        if value.ndim and value.shape[-1] > 1:
            if value.shape[-1] < start + x.shape[1]:
                raise InvalidInput(
                    f"the clamp has values for {value.shape[-1]} positions, the text has come to {start + x.shape[1]}"
                )
            value = value[..., start : start + x.shape[1]]
        return value.expand(x.shape[:2])

    def _inside(self, columns: Tensor) -> Tensor:
        assert self.positions is not None
        first, last, step = self.positions.start or 0, self.positions.stop, self.positions.step or 1
        first = max(0, first + self.clock.prompt) if first < 0 else first
        inside = (columns >= first) & ((columns - first) % step == 0)
        if last is not None:
            inside &= columns < (last + self.clock.prompt if last < 0 else last)
        return inside


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None or logits.ndim != 3:
        raise UnsupportedModel(
            f"a {type(output).__name__} holds no logits [batch, time, vocab]: a language model is needed"
        )
    return logits
