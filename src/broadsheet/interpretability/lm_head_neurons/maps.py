"""What the neurons of a model stand for: a map of all of them, to search, summarise, plot, keep and look at."""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from broadsheet.errors import CheckpointError, InvalidInput
from broadsheet.interpretability.lm_head_neurons.html import map_page
from broadsheet.interpretability.lm_head_neurons.words import word_ids
from broadsheet.nn.features import Feature, neuron
from broadsheet.nn.plotting import COLOURS, new_axes

TENSORS = ("tokens", "logits", "bottom_tokens", "bottom_logits", "logsumexp", "entropy", "agreement", "write_logit")
SETTINGS = ("weights", "norm", "fold_norm", "orient", "expert", "temperature")


@dataclass(frozen=True)
class NeuronMap:
    """The words that the neurons of ``L`` layers point at, ``F`` neurons each.

    A neuron whose weights hold NaN or infinite values has tokens -1 and NaN for every number.

    Attributes:
        tokens: ``[L, F, k]``, the largest logit first.
        logits: ``[L, F, k]``, of those tokens, before division by the temperature.
        bottom_tokens, bottom_logits: ``[L, F, k]``, the smallest logit first: the words of the opposite direction.
        logsumexp: ``[L, F]``, over the vocabulary, of the logits divided by the temperature.
        entropy: ``[L, F]``, of their softmax, nats.
        agreement: ``[L, F]``, cosine of what the neuron reads (its up or gate weights) and what it writes.
        write_logit: ``[L, F]``, logit of the neuron's first token in the direction that it writes.
        layers: numbers of the layers.
        vocab_size: words of the head.
        weights, norm, fold_norm, orient, expert, temperature: how the map was made.
        words: the text of every token id; None where no tokenizer was handed in.
    """

    tokens: Int[Tensor, "L F k"]
    logits: Float[Tensor, "L F k"]
    bottom_tokens: Int[Tensor, "L F k"]
    bottom_logits: Float[Tensor, "L F k"]
    logsumexp: Float[Tensor, "L F"]
    entropy: Float[Tensor, "L F"]
    agreement: Float[Tensor, "L F"]
    write_logit: Float[Tensor, "L F"]
    layers: tuple[int, ...]
    vocab_size: int
    weights: str = "up"
    norm: str = "none"
    fold_norm: bool = False
    orient: str = "none"
    expert: int | str | None = None
    temperature: float = 1.0
    words: tuple[str, ...] | None = None

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def width(self) -> int:
        """Neurons of a layer."""
        return self.tokens.shape[1]

    @property
    def probs(self) -> Float[Tensor, "L F k"]:
        """Softmax probabilities of ``tokens``, over the whole vocabulary."""
        return (self.logits / self.temperature - self.logsumexp[..., None]).exp()

    @property
    def labels(self) -> Int[Tensor, "L F"]:
        """The first token of every neuron."""
        return self.tokens[..., 0]

    @property
    def clamp_sign(self) -> Float[Tensor, "L F"]:
        """The sign of a value that makes the neuron write towards its first token: +1 or -1.

        Labels come from what a neuron reads; what a clamp does is decided by what it writes.
        """
        return torch.where(self.write_logit < 0, -1.0, 1.0)

    @property
    def settings(self) -> dict[str, Any]:
        """How the map was made."""
        return {name: getattr(self, name) for name in SETTINGS}

    def row(self, layer: int, neuron: int = 0) -> int:
        """Where a layer stands in the tensors; checks the neuron's number too."""
        if layer not in self.layers:
            raise InvalidInput(f"layer={layer}: the map holds layers {', '.join(map(str, self.layers))}")
        if not 0 <= neuron < self.width:
            raise InvalidInput(f"neuron={neuron}: a layer has {self.width} neurons (0 to {self.width - 1})")
        return self.layers.index(layer)

    def words_of(self, layer: int, neuron: int, k: int | None = None, bottom: bool = False) -> list[str]:
        """A neuron's words, the strongest first; ids as text where there is no tokenizer.

        Args:
            layer, neuron: which one.
            k: how many; None for all.
            bottom: the words of the opposite direction instead.
        """
        table = self.bottom_tokens if bottom else self.tokens
        return [self.word(int(i)) for i in table[self.row(layer, neuron), neuron][:k]]

    def word(self, token: int) -> str:
        """The text of a token id."""
        if token < 0:
            return "(no finite weights)"
        return str(token) if self.words is None else self.words[token]

    def feature(self, model: Any, layer: int, neuron_index: int) -> Feature:
        """A neuron as a feature that every other method takes: ablate it, clamp it, attribute to it, show its texts.

        Args:
            model: the model itself (or its block map), with the MLP of that layer.
            layer, neuron_index: which one.
        """
        self.row(layer, neuron_index)
        found = neuron(model, f"layers.{layer}.mlp.neuron.{neuron_index}")
        return changed(found, name=f"{found.name} {self.words_of(layer, neuron_index, 1)[0].strip()!r}")

    # --------------------------------------------------------------------------------------------------- searching

    def find(
        self,
        word: str | int,
        case: bool = False,
        variants: bool = True,
        tokenizer: Any = None,
    ) -> pd.DataFrame:
        """The neurons that have a word among their top words, the most probable first.

        Args:
            word: as written, or a token id.
            case: whether capitals matter.
            variants: count tokens with a space before the word, and its plural.
            tokenizer: splits a word that is no single token; without it the map's own words are used.

        Returns:
            columns ``layer``, ``neuron``, ``token_id``, ``word``, ``prob``, ``logit``, ``rank`` (1 for the label),
            ``clamp_sign`` and ``name`` (of the component, as everywhere in this library); one row for each neuron.

        Warns:
            SeveralTokens: the word is no single token.
        """
        if isinstance(word, str):
            if self.words is None:
                raise InvalidInput(f"{word!r}: the map holds no words; decode with tokenizer=, or search a token id")
            ids = word_ids(word, self.words, case=case, variants=variants, tokenizer=tokenizer)
        else:
            ids = [int(word)]
            if not 0 <= ids[0] < self.vocab_size:
                raise InvalidInput(f"token id {word}: the vocabulary has {self.vocab_size} tokens")
        hit = torch.isin(self.tokens, torch.tensor(ids, device=self.tokens.device))
        where = hit.any(-1).nonzero()
        rank = hit[where[:, 0], where[:, 1]].int().argmax(-1)
        picked = [part[where[:, 0], where[:, 1], rank] for part in (self.tokens, self.probs, self.logits)]
        table = self._table(where[:, 0], where[:, 1])
        table["token_id"], table["prob"], table["logit"] = (part.cpu().numpy() for part in picked)
        table["word"] = [self.word(int(i)) for i in table["token_id"]]
        table["rank"] = rank.cpu().numpy() + 1
        order = ["layer", "neuron", "token_id", "word", "prob", "logit", "rank", "clamp_sign", "name"]
        return table[order].sort_values("prob", ascending=False, ignore_index=True, kind="stable")

    def specialised(self, min_prob: float | None = None, max_entropy: float | None = None) -> pd.DataFrame:
        """The neurons with one sharply preferred word, the sharpest first; with neither limit all of them.

        Args:
            min_prob: least probability of the first word.
            max_entropy: largest entropy, nats.

        Returns:
            the rows of :meth:`to_frame` that are within the limits.
        """
        keep = self.tokens[..., 0] >= 0
        if min_prob is not None:
            keep &= self.probs[..., 0] >= min_prob
        if max_entropy is not None:
            keep &= self.entropy <= max_entropy
        where = keep.nonzero()
        return self._frame(where[:, 0], where[:, 1]).sort_values(
            "prob", ascending=False, ignore_index=True, kind="stable"
        )

    def by_layer(self, min_prob: float = 0.5) -> pd.DataFrame:
        """One row for each layer: mean probability of the first word, mean entropy, how many neurons are specialised.

        Args:
            min_prob: what counts as specialised.
        """
        top = self.probs[..., 0].double()
        rows = []
        for i, layer in enumerate(self.layers):
            good = self.tokens[i, :, 0] >= 0
            agreement = self.agreement[i][good].double()
            rows.append(
                {
                    "layer": layer,
                    "neurons": int(good.sum()),
                    "prob": float(top[i][good].mean()),
                    "entropy": float(self.entropy[i][good].double().mean()),
                    "specialised": int((top[i][good] >= min_prob).sum()),
                    "labels": len(self.tokens[i, :, 0][good].unique()),
                    "agreement": float(agreement.mean()),
                }
            )
        return pd.DataFrame(rows)

    def to_frame(self, k: int = 5) -> pd.DataFrame:
        """One row for each neuron: its first word and its probability, entropy, and ``k`` words of either direction."""
        layers = torch.arange(self.n_layers).repeat_interleave(self.width)
        return self._frame(layers, torch.arange(self.width).repeat(self.n_layers), k)

    def _table(self, row: Tensor, neurons: Tensor) -> Any:
        layer = np.array(self.layers)[row.cpu().numpy()]
        which = neurons.cpu().numpy()
        sign = self.clamp_sign[row, neurons].cpu().numpy().astype(int)
        names = [f"layers.{a}.mlp.neuron.{b}" for a, b in zip(layer, which, strict=True)]
        return pd.DataFrame({"layer": layer, "neuron": which, "clamp_sign": sign, "name": names})

    def _frame(self, row: Tensor, neurons: Tensor, k: int = 5) -> Any:
        table = self._table(row, neurons)
        table["token_id"] = self.tokens[row, neurons, 0].cpu().numpy()
        table["word"] = [self.word(int(i)) for i in table["token_id"]]
        table["prob"] = self.probs[row, neurons, 0].cpu().numpy()
        table["entropy"] = self.entropy[row, neurons].cpu().numpy()
        table["agreement"] = self.agreement[row, neurons].cpu().numpy()
        for name, source in (("words", self.tokens), ("bottom_words", self.bottom_tokens)):
            ids = source[row, neurons, :k].tolist()
            table[name] = [[self.word(i) for i in line] for line in ids]
        order = ["layer", "neuron", "token_id", "word", "prob", "entropy", "agreement", "clamp_sign"]
        return table[[*order, "words", "bottom_words", "name"]]

    # --------------------------------------------------------------------------------------------------- looking

    def plot(self, ax: Any = None) -> Any:
        """How sharply the neurons of each layer prefer one word: quantiles of the first word's probability.

        Args:
            ax: matplotlib axes; None makes new ones.
        """
        ax = new_axes(ax)
        top = self.probs[..., 0].double().cpu().numpy()
        levels = np.nanquantile(top, [0.05, 0.25, 0.5, 0.75, 0.95, 1.0], axis=1)
        x = np.arange(self.n_layers)
        ours = COLOURS["ours"]
        ax.fill_between(x, levels[0], levels[4], color=ours, alpha=0.12, linewidth=0, label="5 to 95 % of neurons")
        ax.fill_between(x, levels[1], levels[3], color=ours, alpha=0.25, linewidth=0, label="middle half")
        ax.plot(x, levels[2], color=ours, label="median", marker="o" if self.n_layers < 20 else None, markersize=4)
        ax.plot(x, levels[5], color=COLOURS["neutral"], linestyle=":", label="sharpest neuron")
        step = max(1, self.n_layers // 12)
        ax.set_xticks(x[::step], [str(layer) for layer in self.layers[::step]])
        ax.set_yscale("log")
        ax.axhline(1 / self.vocab_size, color=COLOURS["neutral"], linewidth=0.8, linestyle="--")
        ax.annotate("uniform", (x[0], 1 / self.vocab_size), xytext=(2, 3), textcoords="offset points", fontsize=8)
        ax.set(xlabel="layer", ylabel="probability of the first word")
        ax.legend(loc="best")
        return ax

    def to_html(self, title: str = "Neurons", limit: int | None = 20000, k: int = 8) -> str:
        """One page with the most specialised neurons in a table to search, sort and filter; it needs no other file.

        Args:
            title: of the page.
            limit: neurons at most, the sharpest first; None for all.
            k: words shown of either direction.

        Returns:
            the page: write it to a file and open that in a browser.
        """
        return map_page(self, title, limit, k)

    # --------------------------------------------------------------------------------------------------- keeping

    def save(self, path: str | Path) -> None:
        """Write the map to one ``.npz`` file, whole or not at all.

        Args:
            path: of the file.
        """
        path = Path(path)
        about = {**self.settings, "layers": list(self.layers), "vocab_size": self.vocab_size, "format": 1}
        text = json.dumps({**about, "words": None if self.words is None else list(self.words)})
        arrays: dict[str, Any] = {name: getattr(self, name).detach().cpu().numpy() for name in TENSORS}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, about=np.frombuffer(text.encode(), dtype=np.uint8), **arrays)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(buffer.getvalue())
            os.replace(part, path)
        except OSError as error:
            raise CheckpointError(f"{path}: the map could not be written ({error.strerror or error})") from error
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "NeuronMap":
        """Read a map that :meth:`save` wrote.

        Raises:
            CheckpointError: no such file, or one that holds no map.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(bytes(file["about"]).decode())
                tensors = {name: torch.from_numpy(file[name]) for name in TENSORS}
            if about.pop("format") != 1:
                raise ValueError("another format")
            words = about.pop("words")
            layers = tuple(about.pop("layers"))
            return cls(**tensors, **about, layers=layers, words=None if words is None else tuple(words))
        except Exception as error:  # any way of being broken ends in one clear sentence
            raise CheckpointError(f"{path}: no map of neurons ({type(error).__name__}: {error})") from error


def stacked(parts: Sequence[Any], **about: Any) -> NeuronMap:
    """A map from one dictionary of tensors for each layer."""
    return NeuronMap(**{name: torch.stack([part[name] for part in parts]) for name in TENSORS}, **about)
