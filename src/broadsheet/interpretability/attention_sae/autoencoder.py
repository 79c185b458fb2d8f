"""Sparse autoencoders of what an attention layer's heads put out, all heads side by side, before the output matrix.

    z = capture_z(model, input_ids, layer=5)                      # [batch, time, heads, d_head]
    sae = AttentionSAE.for_layer(model, 5)                        # 32 features for each of heads * d_head
    sae.fit(ActivationBuffer(model, sae.site, batches), steps=25_000, l1=1.0, resample_every=25_000)

Training, scale, features and files are those of :class:`~broadsheet.nn.sparse_autoencoder.SparseAutoencoder`; here
stands what comes with heads, and the exchange of files with SAELens and the authors' own format.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from broadsheet.errors import CheckpointError, InvalidInput
from broadsheet.nn.activations import read_sites
from broadsheet.nn.blocks import Attention, BlockMap
from broadsheet.nn.features import mapped
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.padding import right_padded
from broadsheet.nn.sparse_autoencoder import NAMES, SparseAutoencoder, read_saelens


class AttentionSAE(SparseAutoencoder):
    """A sparse autoencoder of a layer's head outputs.

    Args:
        n_heads, d_head: of the layer: query heads, and features of each.
        n_features: entries of the dictionary; None for 32 for each input.
        scale, site, seed: as in :class:`~broadsheet.nn.sparse_autoencoder.SparseAutoencoder`; the site is such as
            ``"layers.5.attn.z"``.
        bos_token_id: the token with which every text of the training began; None where there was none. Measurements
            refuse texts that begin otherwise.
    """

    def __init__(
        self,
        n_heads: int,
        d_head: int,
        n_features: int | None = None,
        scale: float | int | None = None,
        site: str = "",
        seed: int = 0,
        bos_token_id: int | None = None,
    ) -> None:
        for name, value in {"n_heads": n_heads, "d_head": d_head}.items():
            if value < 1:
                raise InvalidInput(f"{name}={value}: must be at least 1")
        d = n_heads * d_head
        super().__init__(d, 32 * d if n_features is None else n_features, scale, site, seed)
        self.n_heads, self.d_head, self.bos_token_id = n_heads, d_head, bos_token_id

    @classmethod
    def for_layer(
        cls, model: nn.Module | BlockMap, layer: int, n_features: int | None = None, **how: Any
    ) -> "AttentionSAE":
        """An untrained autoencoder of one layer of a model, on the model's device.

        Args:
            model: a Hugging Face model, or any module with a registered block map.
            layer: counted from 0.
            n_features: None for 32 for each input.
            **how: ``scale``, ``seed``, ``bos_token_id``.
        """
        the_map = mapped(model)
        attention, site = attention_at(the_map, layer)
        sae = cls(attention.n_heads, attention.head_dim, n_features, site=site, **how)
        return sae.to(attention.o.weight.device)

    @property
    def layer(self) -> int:
        """The layer whose head outputs these are."""
        match = re.fullmatch(r"layers\.(\d+)\.attn\.z", self.site)
        if match is None:
            raise InvalidInput(f"site={self.site!r}: set sae.site to a layer's head outputs, such as 'layers.0.attn.z'")
        return int(match[1])

    def heads_apart(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch heads d_head"]:
        """All heads side by side as heads and their features."""
        return x.unflatten(-1, (self.n_heads, self.d_head))

    @property
    def readers(self) -> Float[Tensor, "features heads d_head"]:
        """What every feature reads from each head."""
        return self.heads_apart(self.W_enc.detach().T)

    @property
    def writers(self) -> Float[Tensor, "features heads d_head"]:
        """What every feature writes to each head's output."""
        return self.heads_apart(self.W_dec.detach())

    @property
    def constants(self) -> Float[Tensor, " features"]:
        """Every feature's pre-activation at an input of zero, in the model's units."""
        return (self.b_enc - self.b_dec @ self.W_enc).detach() / self._scale

    def encode(self, x: Tensor) -> Tensor:
        """How active every feature is: ``[..., features]``, from ``[..., d]`` or ``[..., heads, d_head]``."""
        return super().encode(self._flat(x))

    def _flat(self, x: Tensor) -> Tensor:
        apart = x.ndim >= 2 and x.shape[-2:] == (self.n_heads, self.d_head)
        return x.flatten(-2) if apart and x.shape[-1] != self.d_in else x

    def check_model(self, model: nn.Module | BlockMap) -> BlockMap:
        """The model's block map, if the autoencoder fits the layer it was made for.

        Raises:
            InvalidInput: other heads, or a layer that the model does not have; the message holds both sides.
        """
        the_map = mapped(model)
        attention, _ = attention_at(the_map, self.layer)
        if (attention.n_heads, attention.head_dim) != (self.n_heads, self.d_head):
            raise InvalidInput(
                f"the autoencoder is one of {self.n_heads} heads of {self.d_head} features ({self.site}), the layer of "
                f"{type(the_map.model).__name__} has {attention.n_heads} of {attention.head_dim}: another model's?"
            )
        return the_map

    def check_feature(self, index: int) -> int:
        """The index, if there is such a feature."""
        if not 0 <= index < self.n_features:
            raise InvalidInput(f"feature {index}: the dictionary has {self.n_features} (0 to {self.n_features - 1})")
        return index

    def check_texts(self, input_ids: Int[Tensor, "batch time"]) -> None:
        """Whether texts, padding on the right, begin with the token that the autoencoder expects."""
        if self.bos_token_id is not None and bool((input_ids[:, 0] != self.bos_token_id).any()):
            row = int((input_ids[:, 0] != self.bos_token_id).nonzero()[0])
            raise InvalidInput(
                f"text {row} begins with token {int(input_ids[row, 0])}: the autoencoder was trained on texts that "
                f"begin with {self.bos_token_id} (BOS); put it there, or set sae.bos_token_id = None"
            )

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        """Weights (safetensors) and what rebuilds the autoencoder (config.json)."""
        names = ("n_heads", "d_head", "n_features", "site", "bos_token_id")
        config = {name: getattr(self, name) for name in names}
        return super(SparseAutoencoder, self).save_pretrained(save_directory, config=config, **kwargs)

    def save_saelens(self, folder: str | Path, *, reshape: str = "hook_z", **about: Any) -> None:
        """Write the files that SAELens reads, with its name of the place.

        Args:
            folder: made if it is not there.
            reshape: ``"hook_z"``: SAELens takes and gives heads and their features apart; ``"none"``: side by side.
            **about: further entries of the metadata, such as ``model_name``.
        """
        if self.site:
            about = {"hook_name": f"blocks.{self.layer}.attn.hook_z", "hook_head_index": None, **about}
        super().save_saelens(
            folder, reshape=reshape, **{"prepend_bos": self.bos_token_id is not None, **about},
        )  # fmt: skip

    @classmethod
    def from_saelens(
        cls, folder: str | Path, site: str = "", *, n_heads: int | None = None, bos_token_id: int | None = None
    ) -> "AttentionSAE":
        """Read a ``hook_z`` autoencoder of SAELens, of its standard architecture.

        Args:
            folder: with ``cfg.json`` and ``sae_weights.safetensors``.
            site: of the layer, such as ``"layers.5.attn.z"``; empty: SAELens's own name of the place is read.
            n_heads: of the layer; SAELens does not write it down.
            bos_token_id: of the model's tokenizer, where texts begin with it.

        Raises:
            CheckpointError: a file is missing, of another architecture, or not of head outputs.
        """
        config, weights = read_saelens(folder)
        about = {**config, **config.get("metadata", {})}
        hook = str(about.get("hook_name", about.get("hook_point", "")))
        if about.get("hook_head_index", about.get("hook_point_head_index")) is not None:
            raise CheckpointError(f"{folder}: it is of one head only, all heads side by side are expected")
        return cls._made(folder, weights, site or _site_of(hook, folder), n_heads, bos_token_id)

    @classmethod
    def from_official(
        cls, file: str | Path, site: str = "", *, n_heads: int | None = None, bos_token_id: int | None = None
    ) -> "AttentionSAE":
        """Read the format in which the paper's autoencoders were released.

        Args:
            file: ``NAME.pt``; beside it ``NAME_cfg.json``.
            site, n_heads, bos_token_id: as in :meth:`from_saelens`; 12 heads are assumed for GPT-2 small.

        Raises:
            CheckpointError: a file is missing, or holds something else.
        """
        source = Path(file)
        beside = source.with_name(source.name.removesuffix(".pt") + "_cfg.json")
        try:
            config = json.loads(beside.read_text())
            weights = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:  # unpickling fails in many ways; the reader needs one sentence
            raise CheckpointError(f"{source}: expected it and {beside.name} beside it ({error})") from error
        if not isinstance(weights, dict) or set(NAMES) - set(weights):
            raise CheckpointError(f"{source}: expected a dict with {', '.join(NAMES)}")
        if n_heads is None and "gpt2" in str(config.get("model_name", "")) and int(config.get("act_size", 0)) == 768:
            n_heads = 12
        return cls._made(file, weights, site or _site_of(str(config.get("act_name", "")), file), n_heads, bos_token_id)

    @classmethod
    def _made(
        cls, file: Any, weights: dict[str, Tensor], site: str, n_heads: int | None, bos_token_id: int | None
    ) -> "AttentionSAE":
        n_features, d = weights["W_dec"].shape
        if n_heads is None:
            raise InvalidInput(f"{file}: the file does not say how many heads its {d} inputs are: hand in n_heads=12")
        if n_heads < 1 or d % n_heads:
            raise InvalidInput(f"n_heads={n_heads}: {d} inputs cannot be shared out among them")
        sae = cls(n_heads, d // n_heads, n_features, 1.0, site, bos_token_id=bos_token_id)
        sae.fill(weights)
        return sae


def _site_of(hook: str, file: Any) -> str:
    match = re.fullmatch(r"blocks\.(\d+)\.attn\.hook_z", hook)
    if match is None and hook:
        raise CheckpointError(f"{file}: it is of {hook!r}, head outputs ('blocks.5.attn.hook_z') are expected")
    return "" if match is None else f"layers.{match[1]}.attn.z"


def attention_at(the_map: BlockMap, layer: int) -> tuple[Attention, str]:
    """The attention of a layer and the name of its head outputs."""
    site = f"layers.{layer}.attn.z"
    the_map.resolve(site)
    attention = the_map.blocks[layer].attention
    if attention is None:
        raise InvalidInput(f"layer {layer} has no attention")
    return attention, site


@torch.no_grad()
def capture_z(
    model: nn.Module, input_ids: Int[Tensor, "batch time"], layer: int, attention_mask: Tensor | None = None
) -> Float[Tensor, "batch time heads d_head"]:
    """What the heads of a layer put out, before the output matrix; the forward pass stops there.

    Args:
        model: a Hugging Face model, or any module with a registered block map.
        input_ids: ``[batch, time]``.
        layer: counted from 0.
        attention_mask: ``[batch, time]``; at padding, on either side, the result is 0.
    """
    the_map = mapped(model)
    attention, site = attention_at(the_map, layer)
    padded = right_padded(input_ids, attention_mask)
    with evaluating(model):
        z = read_sites(model, [the_map.resolve(site)], padded.input_ids, padded.attention_mask)[site]
    if padded.attention_mask is not None:
        z = z * padded.attention_mask[..., None].to(z)
    return padded.restore(z.unflatten(-1, (attention.n_heads, attention.head_dim)))


def as_tensor(features: int | Sequence[int] | Tensor, sae: AttentionSAE) -> Int[Tensor, " n"]:
    """Indices of features, checked."""
    index = torch.as_tensor(features, dtype=torch.long, device=sae.W_dec.device).reshape(-1)
    for i in index.tolist():
        sae.check_feature(i)
    return index
