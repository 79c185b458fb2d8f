"""A model with codebook bottlenecks in it, and how it is made."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from broadsheet.errors import CheckpointError, InvalidInput
from broadsheet.interpretability.codebook_features.places import Place, find_places
from broadsheet.interpretability.codebook_features.reader import CodeReader
from broadsheet.nn.features import Feature
from broadsheet.nn.hooks import evaluating, replace
from broadsheet.nn.padding import right_padded
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.quantization import Quantizer, straight_through

MARK = "_codebook_features"  # on a model that carries bottlenecks
CODEBOOKS, CONFIG, MODEL = "codebooks.safetensors", "codebook_features.json", "model"


@dataclass(frozen=True)
class Clock:
    """Where a forward pass stands in its text: column ``offset`` is its first, ``prompt`` columns were given at first.

    Columns before ``offset`` are in the key-value cache; they are not computed again.
    """

    offset: int = 0
    prompt: int | None = None
    mask: Tensor | None = None


@dataclass
class Snap:
    """One bottleneck's work in the latest forward pass: detached inputs are kept only while they are asked for."""

    codes: Tensor
    loss: Tensor
    inputs: Tensor | None = None


Edit = Callable[[str, Tensor, Tensor, Tensor, Clock], tuple[Tensor, Tensor]]


class CodebookModel(nn.Module, PyTorchModelHubMixin):
    """A model in whose activations codes stand in; made by :func:`wrap_codebooks`.

    The bottlenecks are hooks on the user's own model: ``cb.model`` and everything that runs it (``generate``, other
    methods of this library) has them in effect, until :meth:`unwrap` takes them out or :attr:`snap` is False.

    Attributes:
        model: the user's model.
        codebooks: one :class:`~broadsheet.nn.quantization.Quantizer` for each place, by place.
        snap: False gives the model as it was, bit by bit.
    """

    def __init__(self, model: nn.Module, places: Sequence[Place], options: Mapping[str, Any]) -> None:
        super().__init__()
        if getattr(model, MARK, False):
            raise InvalidInput(
                f"this {type(model).__name__} carries codebooks already: call unwrap() of its CodebookModel first"
            )
        weight = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.model = model
        self.places = tuple(places)
        self.options = dict(options)
        self.snap = True
        self._layers = nn.ModuleDict()
        seed = int(self.options.pop("seed", 0))
        for number, place in enumerate(self.places):
            made = Quantizer(place.width, groups=place.groups, seed=seed * 10_007 + number, **self.options)
            self._layers[_key(place.name)] = made.to(weight.device, dtype)
        self._where = {name: (place, g) for place in self.places for g, name in enumerate(place.codebooks)}
        self._latest: dict[str, Snap] = {}
        self._edits: list[Edit] = []
        self._clock = Clock()
        self._prompt: int | None = None
        self._keep_inputs = False
        self._stack = ExitStack()
        handle = model.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._stack.callback(handle.remove)
        for place in self.places:
            self._stack.enter_context(replace(model, {place.site: partial(self._snap, place)}))
        setattr(model, MARK, True)
        self._stack.callback(delattr, model, MARK)

    # ------------------------------------------------------------------------------------------------ running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output, codes in the place of activations; arguments are the model's."""
        return self.model(*args, **kwargs)

    def generate(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``generate``; positions of interventions below 0 count from the end of the prompt.

        Args:
            inputs: token ids ``[batch, time]``.
            *args, **kwargs: of the model.
        """
        model: Any = self.model
        self._prompt = int(inputs.shape[1])
        try:
            with evaluating(self.model), torch.no_grad():
                return model.generate(inputs, *args, **kwargs)
        finally:
            self._prompt = None

    @contextmanager
    def off(self) -> Iterator[nn.Module]:
        """The original model inside the block."""
        before, self.snap = self.snap, False
        try:
            yield self.model
        finally:
            self.snap = before

    @contextmanager
    def edited(self, edit: Edit) -> Iterator["CodebookModel"]:
        """Codes changed on their way inside the block.

        Args:
            edit: ``(place, x, codes, weights, clock) -> (codes, weights)``, called for every bottleneck: normalised
                inputs ``[batch, time, (groups,) d]``, ids and weights ``[batch, time, (groups,) slots]``.
        """
        self._edits.append(edit)
        try:
            yield self
        finally:
            self._edits.remove(edit)

    @contextmanager
    def keeping_inputs(self) -> Iterator[None]:
        """Every bottleneck's raw input is kept in :attr:`latest` inside the block."""
        before, self._keep_inputs = self._keep_inputs, True
        try:
            yield
        finally:
            self._keep_inputs = before

    def unwrap(self) -> nn.Module:
        """Take the bottlenecks out for good and give the user's model back."""
        self._stack.close()
        return self.model

    # ------------------------------------------------------------------------------------------------ looking

    @property
    def sites(self) -> tuple[str, ...]:
        """The name of every codebook."""
        return tuple(self._where)

    @property
    def codebooks(self) -> dict[str, Quantizer]:
        """Place -> quantizer; a place with heads holds one codebook for each."""
        return {place.name: self.quantizer(place.name) for place in self.places}

    @property
    def latest(self) -> dict[str, Snap]:
        """Place -> what its bottleneck did in the latest forward pass."""
        return self._latest

    @property
    def loss(self) -> Tensor:
        """Sum over bottlenecks of the latest forward pass's losses, to be added to the task's."""
        losses = [snap.loss for snap in self._latest.values()]
        if not losses:
            raise InvalidInput("no forward pass with codebooks yet (or snap is False): call the model first")
        return torch.stack(losses).sum()

    def quantizer(self, place: str) -> Quantizer:
        """The bottleneck at a place."""
        found = self._layers[_key(place)]
        assert isinstance(found, Quantizer)
        return found

    def where(self, site: str, code: int | None = None) -> tuple[Place, int]:
        """The place and group of a codebook.

        Args:
            site: a codebook's name.
            code: checked to be one of its codes.

        Raises:
            InvalidInput: an unknown name, with the nearest ones, or a code out of range.
        """
        if site not in self._where:
            near = get_close_matches(str(site), self.sites, n=5, cutoff=0.3) or self.sites[:5]
            raise InvalidInput(f"no codebook {site!r}; nearest of {len(self.sites)}: {', '.join(near)}")
        place, group = self._where[site]
        n = self.quantizer(place.name).num_codes
        if code is not None and not 0 <= code < n:
            raise InvalidInput(f"code {code}: the codebook at {site!r} has {n} (0 to {n - 1})")
        return place, group

    def codebook(self, site: str) -> Float[Tensor, "codes d"]:
        """The codes of one codebook, as rows."""
        place, group = self.where(site)
        return self.quantizer(place.name).codebook[group].detach()

    def feature(self, site: str, code: int) -> Feature:
        """One code for every other method: 1 where it is chosen, 0 elsewhere.

        Read, ablated, clamped and steered it acts behind the bottleneck, on the code's own share of the output. An
        attribution goes through the model without bottlenecks (the block map computes the model from its weights);
        its gradient is that of the code's cosine with the normalised activation.

        Args:
            site, code: which.

        Raises:
            InvalidInput: a place that other methods have no name for.
        """
        place, group = self.where(site, code)
        if not place.mapped:
            raise InvalidInput(
                f"{site!r} is a submodule of the user's: only places in mapped blocks are features of other methods"
            )
        quantizer = self.quantizer(place.name)
        row = quantizer.codebook[group, code].detach()
        write = row.new_zeros(place.width * (place.groups or 1))
        write[group * place.width : (group + 1) * place.width] = row / (
            quantizer.k if quantizer.reduce == "mean" else 1
        )
        return Feature(place.name, write, CodeReader(self, place, group, code), f"{site} code {code}")

    def parameter_groups(
        self, lr: float | int, weight_decay: float | int, model_lr_factor: float | int = 1.0
    ) -> list[dict[str, Any]]:
        """Parameters for an optimizer: no weight decay on codebooks, another learning rate for the model if wished."""
        own = [p for p in self._layers.parameters() if p.requires_grad]
        rest = [p for p in self.model.parameters() if p.requires_grad]
        groups = [{"params": own, "lr": lr, "weight_decay": 0.0}]
        if model_lr_factor > 0 and rest:
            groups.append({"params": rest, "lr": lr * model_lr_factor, "weight_decay": weight_decay})
        return groups

    # ------------------------------------------------------------------------------------------------ k-means

    @torch.no_grad()
    def init_kmeans(
        self, batches: Iterable[Any], *, max_vectors: int = 10_000, seed: int = 0, progress: Progress = SILENT
    ) -> None:
        """Set every codebook to the centres of its activations in the original model.

        Args:
            batches: ids ``[batch, time]``, or pairs of them and attention masks.
            max_vectors: activations that are read for each codebook.
            seed: of k-means.
            progress: where batches and places are shown.

        Raises:
            InvalidInput: no batch.
        """
        kept: dict[str, list[Tensor]] = {place.name: [] for place in self.places}
        n = 0
        before = self.snap
        with evaluating(self.model), self.keeping_inputs(), progress.task("activations for k-means") as task:
            try:
                self.snap = False
                for batch in batches:
                    self.run(batch)
                    mask = self._clock.mask
                    for name, snap in self._latest.items():
                        x = snap.inputs
                        assert x is not None
                        kept[name].append(x[mask.bool()] if mask is not None and mask.shape == x.shape[:2] else x)
                    last = kept[self.places[0].name][-1]
                    shape = last.shape[:-2] if self.places[0].groups is not None else last.shape[:-1]
                    n += shape.numel()
                    task.advance()
                    if n >= max_vectors:
                        break
            finally:
                self.snap = before
        if n == 0:
            raise InvalidInput("batches is empty: k-means needs activations, hand in token ids [batch, time]")
        with progress.task("k-means", total=len(self.places)) as task:
            for place in self.places:
                quantizer = self.quantizer(place.name)
                tail = (place.width,) if place.groups is None else (place.groups, place.width)
                rows = torch.cat([part.reshape(-1, *tail) for part in kept[place.name]])[:max_vectors]
                quantizer.init_kmeans(rows, seed)
                task.advance()

    def run(self, batch: Any) -> Any:
        """The model's output on one batch: ids, a pair of ids and mask, or a mapping of arguments."""
        device = next(self.model.parameters()).device
        if isinstance(batch, Mapping):
            moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            return self.model(**moved)
        ids, mask = batch if isinstance(batch, tuple | list) else (batch, None)
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            return self.model(ids.to(device))
        padded = right_padded(ids.to(device), None if mask is None else mask.to(device))
        if padded.attention_mask is None:
            return self.model(padded.input_ids)
        return self.model(padded.input_ids, attention_mask=padded.attention_mask)

    # ------------------------------------------------------------------------------------------------ the hooks

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before every forward pass of the model: where in the text it stands, and what counts."""
        cache: Any = kwargs.get("past_key_values")
        offset = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        mask = kwargs.get("attention_mask")
        usable = isinstance(mask, Tensor) and mask.ndim == 2 and offset == 0
        self._clock = Clock(offset, self._prompt, mask if usable else None)
        self._latest = {}

    def _snap(self, place: Place, a: Tensor) -> Tensor:
        if not self.snap and not self._keep_inputs:
            return a
        quantizer = self.quantizer(place.name)
        split = a if place.groups is None else a.unflatten(-1, (place.groups, place.width))
        if not self.snap:
            empty = torch.empty(0, device=a.device)
            self._latest[place.name] = Snap(empty, empty, inputs=split.detach().clone())
            return a
        mask = self._clock.mask
        lead = split.shape[:-1] if place.groups is None else split.shape[:-2]
        mask = mask if mask is not None and mask.shape == lead else None
        if self._edits:
            codes, values, loss = self._edited(place, quantizer, split)
        else:
            out = quantizer(split, mask=mask)
            codes, values, loss = out.codes, out.values, out.loss
        kept = split.detach().clone() if self._keep_inputs else None
        self._latest[place.name] = Snap(codes, loss, inputs=kept)
        return values.reshape(a.shape).to(a.dtype)

    def _edited(self, place: Place, quantizer: Quantizer, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = quantizer.normalised(a)
        codes = quantizer.assign(x)
        share = 1 / quantizer.k if quantizer.reduce == "mean" else 1.0
        weights = torch.full(codes.shape, share, dtype=x.dtype, device=x.device)
        before = codes
        for edit in self._edits:
            codes, weights = edit(place.name, x, codes, weights, self._clock)
        y = quantizer.decode(codes) if codes is before else quantizer.decode(codes, weights)
        return codes, straight_through(y, x), quantizer.loss_of(x, y)

    # ------------------------------------------------------------------------------------------------ on disk

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> Any:
        """Codebooks (safetensors), what rebuilds them (JSON) and, in ``model/``, the user's Hugging Face model.

        A model that is no Hugging Face model is the user's to save; its weights stand in ``model/weights.safetensors``.
        """
        return super().save_pretrained(save_directory, config=None, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        codebooks = {name: x.detach().cpu().contiguous() for name, x in self._layers.state_dict().items()}
        save_file(codebooks, folder / CODEBOOKS)
        places = [
            {
                **asdict(place),
                "site": {**asdict(place.site), "index": _numbers(place.site.index)},
            }
            for place in self.places
        ]
        about = {"format": 1, "options": self.options, "places": places, "class": type(self.model).__name__}
        (folder / CONFIG).write_text(json.dumps(about, indent=1) + "\n")
        model: Any = self.model
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(folder / MODEL)
        else:
            (folder / MODEL).mkdir(exist_ok=True)
            weights = {name: x.detach().cpu().contiguous().clone() for name, x in model.state_dict().items()}
            save_file(weights, folder / MODEL / "weights.safetensors")

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, model: nn.Module | None = None, map_location: str = "cpu", **hub: Any
    ) -> "CodebookModel":
        folder = Path(model_id)
        if not folder.is_dir():
            known = ("revision", "cache_dir", "force_download", "local_files_only", "token")
            folder = Path(snapshot_download(model_id, **{k: hub[k] for k in known if k in hub}))
        try:
            about = json.loads((folder / CONFIG).read_text())
            weights = load_file(folder / CODEBOOKS)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: expected {CONFIG} and {CODEBOOKS} of a CodebookModel ({error})"
            ) from error
        if model is None:
            import transformers

            if not (folder / MODEL / "config.json").exists():
                raise InvalidInput(
                    f"{folder} holds codebooks of a {about['class']}: hand in model=, made as it was then"
                )
            kind = getattr(transformers, about["class"])
            model = kind.from_pretrained(folder / MODEL)
        elif (folder / MODEL / "weights.safetensors").exists():
            model.load_state_dict(load_file(folder / MODEL / "weights.safetensors"))
        assert model is not None
        places = [_place(entry) for entry in about["places"]]
        made = cls(model, places, about["options"])
        made._layers.load_state_dict(weights)
        return made.eval().to(map_location)


def _key(place: str) -> str:
    return place.replace(".", "/")  # a ModuleDict takes no dots


def _numbers(index: Any) -> list[int] | None:
    return None if index is None else list(index)


def _place(entry: dict[str, Any]) -> Place:
    from broadsheet.nn.hooks import Site

    site = entry["site"]
    index = None if site["index"] is None else tuple(site["index"])
    return Place(**{**entry, "site": Site(**{**site, "index": index}), "codebooks": tuple(entry["codebooks"])})


def wrap_codebooks(
    model: nn.Module,
    at: str | Sequence[str] = ("attn_heads", "mlp"),
    num_codes: int = 1000,
    k: int = 1,
    *,
    layers: str | Iterable[int] = "all",
    similarity: str = "cosine",
    reduce: str = "mean",
    normalise: bool = True,
    train_norm: bool = True,
    loss: str = "reconstruction",
    beta: float | int = 0.25,
    init: str = "normal",
    batches: Iterable[Any] | None = None,
    groups: int | None = None,
    example: Any = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> CodebookModel:
    """Put codebook bottlenecks into a model.

    Args:
        model: a Hugging Face decoder or encoder, any module with a registered block map, or any module at all by names
            of submodules. It is changed in place, until ``unwrap()``.
        at: ``"attn_heads"`` (each head's output before the output matrix, one codebook each), ``"attn"`` (after it),
            ``"mlp"``, ``"mlp_mid"`` (the hidden units), ``"block"`` (the residual stream), ``"qkv"``; or names of
            submodules, wildcards allowed, whose output has the features last.
        num_codes: in each codebook.
        k: codes that stand in for an activation.
        layers: ``"all"`` or numbers; for the kinds only.
        similarity, reduce, normalise, train_norm, loss, beta: of :class:`~broadsheet.nn.quantization.Quantizer`.
        init: ``"normal"``, or ``"kmeans"`` of the model's activations on ``batches``.
        batches: for k-means: ids ``[batch, time]``, or pairs of them and attention masks.
        groups: codebooks side by side at submodules given by name; None for one.
        example: an input of the model (or a tuple or dict of arguments), from which the width of submodules is read.
        seed: of the codes.
        progress: where k-means is shown.

    Returns:
        the model with its bottlenecks, in evaluation mode, on the model's device.

    Raises:
        InvalidInput: a model that is wrapped already, an unknown name, ``k`` larger than the codebook, a layer out of
            range, k-means without batches.
        UnsupportedModel: a kind of place asked of a model whose blocks are unknown.
    """
    if init not in ("normal", "kmeans"):
        raise InvalidInput(f"init={init!r}: expected 'normal' or 'kmeans'")
    if (init == "kmeans") != (batches is not None):
        raise InvalidInput(
            "init='kmeans' needs batches=" if batches is None else f"batches= is for init='kmeans', not {init!r}"
        )
    names = (at,) if isinstance(at, str) else tuple(at)
    if getattr(model, MARK, False):
        raise InvalidInput(
            f"this {type(model).__name__} carries codebooks already: call unwrap() of its CodebookModel first"
        )
    places = find_places(model, names, layers, groups, example)
    options = {
        "num_codes": num_codes, "k": k, "similarity": similarity, "reduce": reduce, "normalise": normalise,
        "train_norm": train_norm, "loss": loss, "beta": float(beta), "seed": seed,
    }  # fmt: skip
    cb = CodebookModel(model, places, options)
    cb.eval()
    if batches is not None:
        try:
            cb.init_kmeans(batches, seed=seed, progress=progress)
        except BaseException:
            cb.unwrap()
            raise
    return cb


def latest_codes(cb: CodebookModel) -> dict[str, Int[Tensor, "..."]]:
    """Codebook -> ids ``[..., k]`` of the latest forward pass."""
    found = {}
    for place in cb.places:
        snap = cb.latest.get(place.name)
        if snap is not None:
            for group, name in enumerate(place.codebooks):
                found[name] = snap.codes if place.groups is None else snap.codes[..., group, :]
    return found
