"""Encoder, relative layer and head as one model, trained end to end, saved and loaded; and the absolute baseline."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from broadsheet.errors import CheckpointError, InvalidInput
from broadsheet.geometry.relative_representations.anchors import Anchors
from broadsheet.geometry.relative_representations.encoder import RelativeEncoder
from broadsheet.geometry.relative_representations.layer import RelativeLayer
from broadsheet.nn.checkpoint import load_tree, save_tree
from broadsheet.nn.pooling import Pool

CONFIG, WEIGHTS, ANCHORS = "relative.json", "model.safetensors", "anchors"


class RelativeModel(nn.Module, PyTorchModelHubMixin, library_name="broadsheet"):
    """A head that reads an encoder's relative latents, both trained together (or the head alone).

    Args:
        encoder: any encoder, or a :class:`RelativeEncoder`, which brings its own anchors and settings.
        head: from relative latents to the output: a classifier, a decoder.
        anchors: samples, as for :class:`RelativeEncoder`.
        layer: None for cosines and the paper's LayerNorm behind them.
        **how: of :class:`RelativeEncoder` (``frozen``, ``pool``, ``tokenizer``, ``ids``, ...).

    Example:
        >>> model = RelativeModel(nn.Linear(3, 2), nn.Linear(4, 5), torch.eye(4, 3) + 1)
        >>> model(torch.ones(7, 3)).shape
        torch.Size([7, 5])
    """

    def __init__(
        self,
        encoder: Callable[..., Any],
        head: nn.Module,
        anchors: Any = None,
        layer: RelativeLayer | None = None,
        **how: Any,
    ) -> None:
        super().__init__()
        if isinstance(encoder, RelativeEncoder):
            if anchors is not None or layer is not None or how:
                raise InvalidInput("a RelativeEncoder has its anchors and settings: hand in nothing but the head")
            self.relative = encoder
        else:
            if anchors is None:
                raise InvalidInput("anchors are missing: hand in the samples, chosen by select_anchors for example")
            anchors = Anchors.of(anchors, how.pop("ids", None))
            self.relative = RelativeEncoder(encoder, anchors, layer or RelativeLayer(len(anchors)), **how)
        self.head = head

    @property
    def encoder(self) -> Any:
        return self.relative.encoder

    @property
    def anchors(self) -> Anchors:
        return self.relative.anchors

    @property
    def layer(self) -> RelativeLayer:
        return self.relative.layer

    def forward(self, x: Any) -> Any:
        """The head's output; anchors are embedded with the weights of now."""
        return self.head(self.relative(x))

    # ------------------------------------------------------------------------------------------------ saving

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        """Weights of encoder, layer and head (safetensors), the anchors and their ids; the architecture is the user's.

        Anchors are tensors, mappings of tensors, or texts; a function's own weights are not saved.
        """
        return super().save_pretrained(save_directory, config=None, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().cpu().contiguous().clone() for name, value in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS)
        samples = self.anchors.samples
        samples = dict(samples) if isinstance(samples, Mapping) else samples
        save_tree(folder / ANCHORS, {"samples": samples, "ids": list(self.anchors.ids)})
        layer = self.layer
        labels = None if layer.labels is None else layer.labels.tolist()
        about = {
            "k": layer.k, "normalise_output": layer.normalise_output, "quantise": layer.quantise,
            "per_class_mean": labels, "similarity": layer.similarity, "frame": layer.frame, "heads": layer.heads,
        }  # fmt: skip
        how = {
            "frozen": self.relative.frozen, "anchor_gradient": self.relative.anchor_gradient,
            "passes": self.relative.passes, "batch_size": self.relative.batch_size,
            "pool": self.relative.pool if isinstance(self.relative.pool, str) else None,
        }  # fmt: skip
        (folder / CONFIG).write_text(json.dumps({"format": 1, "layer": about, "encoder": how}, indent=1) + "\n")

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        encoder: Callable[..., Any] | None = None,
        head: nn.Module | None = None,
        pool: Pool = None,
        tokenizer: Callable[..., Any] | None = None,
        map_location: str = "cpu",
        **hub: Any,
    ) -> "RelativeModel":
        if encoder is None or head is None:
            raise InvalidInput("hand in encoder= and head=, built as they were: their weights are loaded into them")
        folder = Path(model_id)
        if not folder.is_dir():
            known = ("revision", "cache_dir", "force_download", "local_files_only", "token")
            folder = Path(snapshot_download(model_id, **{key: hub[key] for key in known if key in hub}))
        try:
            about = json.loads((folder / CONFIG).read_text())
            weights = load_file(folder / WEIGHTS)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: expected {CONFIG} and {WEIGHTS} of a RelativeModel ({error})") from error
        kept, _ = load_tree(folder / ANCHORS)
        how = {**about["encoder"], "pool": pool if pool is not None else about["encoder"]["pool"]}
        anchors = Anchors.of(kept["samples"], kept["ids"])
        model = cls(encoder, head, anchors, RelativeLayer(**about["layer"]), tokenizer=tokenizer, **how)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"{folder}: the weights are those of another encoder or head ({error})") from error
        return model.eval().to(map_location)


class AbsoluteModel(nn.Module):
    """A head on absolute latents: what relative ones are compared with.

    Args:
        encoder: from samples to ``[n, d]``.
        head: from ``[n, d]`` to the output.
    """

    def __init__(self, encoder: Callable[..., Any], head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def encode(self, x: Any) -> Tensor:
        latents: Tensor = self.encoder(x)
        if latents.ndim != 2:
            raise InvalidInput(f"the encoder gives {tuple(latents.shape)}: one vector for each sample is expected")
        return latents

    def forward(self, x: Any) -> Any:
        return self.head(self.encode(x))


def latents_of(model: RelativeModel | AbsoluteModel, x: Any) -> Tensor:
    """A model's absolute latents of samples, in evaluation mode without gradient."""
    from broadsheet.nn.hooks import evaluating

    with torch.no_grad(), evaluating(model):
        return model.relative.encode(x) if isinstance(model, RelativeModel) else model.encode(x)
