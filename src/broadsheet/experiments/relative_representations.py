"""Relative representations, measured: a known rotation, stitched networks on digits, two word spaces, the proxy.

``small`` needs no data: spaces made for the purpose and scikit-learn's digits. ``full`` reads word vectors that the
user owns, and stitches Hugging Face encoders on the user's texts (with anchors from a table of translations where there
is one) or on one of the image sets.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from broadsheet.data.digits import Digits, load_digits_split
from broadsheet.data.images import IMAGE_SETS, load_image_set
from broadsheet.data.text_tables import load_labelled_texts, load_pairs
from broadsheet.data.word_spaces import made_word_spaces
from broadsheet.data.word_vectors import load_word_vectors
from broadsheet.errors import DataMissing
from broadsheet.geometry.relative_representations import (
    AbsoluteModel,
    Anchors,
    AnchorWarning,
    RelativeEncoder,
    RelativeHead,
    RelativeLayer,
    RelativeModel,
    SpaceComparison,
    anchor_curve,
    bootstrap_anchors,
    compare_spaces,
    latent_plot,
    latents_of,
    mean_pairwise_cosine,
    proxy_study,
    reconstruction_plot,
    relative_projection,
    select_anchors,
    shared_words,
    stitch,
    stitching_matrix,
)
from broadsheet.lab import Context, Plate
from broadsheet.nn.minilm import minilm_folder
from broadsheet.nn.plotting import COLOURS, CYCLE, band, new_figure, style
from broadsheet.nn.seeding import generator, seeded
from broadsheet.nn.small_classifiers import accuracy, mlp, small_cnn
from broadsheet.nn.training import fit

K = 100  # anchors on digits, ten of each class
ISOMETRY: dict[str, Any] = {"n": 1000, "d": 128, "k": 300}
CLASSIFIERS: dict[str, Any] = {"models": 3, "steps": 200, "lr": 3e-3, "hidden": (128,), "latent": 32}
CNN: dict[str, Any] = {"channels": (8, 16), "latent": 48}
DECODERS: dict[str, Any] = {"models": 2, "steps": 500, "lr": 2e-3, "hidden": (128,), "latent": 32}
PROXY: dict[str, Any] = {"rates": (3e-4, 1e-3, 3e-3), "runs": 6, "marks": (25, 60, 150)}
WORDS: dict[str, Any] = {"n": 1200, "contexts": 600, "rate": 1.0, "counts": (10, 20, 50, 100, 300), "draws": 2}
COMPANY: dict[str, Any] = {"steps": 110, "lr": 1e-3, "batch": 32}
REAL: dict[str, Any] = {"anchors": 300, "steps": 3000, "lr": 1e-3, "train": 10_000, "test": 2_000, "batch": 32}
FOLDER = "relative-representations"
KINDS = ("absolute", "procrustes", "relative")
KIND_COLOURS = {"absolute": COLOURS["baseline"], "procrustes": COLOURS["accent"], "relative": COLOURS["ours"]}
KIND_NAMES = {"absolute": "absolute", "procrustes": "rotated by\nthe anchors", "relative": "relative"}


def run(ctx: Context) -> dict:
    """All claims of one seed."""
    full = {"real": _real(ctx)} if ctx.preset == "full" else {}  # files that are missing are said first
    digits = load_digits_split(ctx.seed).flat()
    digits = Digits(*(t.to(ctx.device) for t in (digits.x, digits.y, digits.x_test, digits.y_test)))
    anchors = Anchors.take(digits.x, select_anchors(digits.x, K, stratify=digits.y.cpu(), seed=ctx.seed))
    with warnings.catch_warnings():
        # Networks trained on cosines draw their anchors together, which is itself measured.
        warnings.simplefilter("ignore", AnchorWarning)
        classifiers = _classifiers(ctx, digits, anchors)
        decoders, reference = _decoders(ctx, digits, anchors)
        return {
            **full,
            "isometry": _isometry(ctx),
            "classifiers": classifiers,
            "decoders": decoders,
            "proxy": _proxy(ctx, digits, anchors, reference),
            "words": _words(ctx),
        }


# ----------------------------------------------------------------------------------------------------- a known rotation


def _isometry(ctx: Context) -> dict[str, Any]:
    draw = generator(ctx.seed)
    n, d, k = (ISOMETRY[name] for name in ("n", "d", "k"))
    z = torch.randn(n, d, generator=draw, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=torch.float64))[0]
    lengths = torch.rand(n, 1, generator=draw, dtype=torch.float64) + 0.5
    turned = lengths * (z @ turn)
    shift = torch.randn(d, generator=draw, dtype=torch.float64)
    rows = select_anchors(z, k, seed=ctx.seed)

    def cosine(frame: str | None, other: Tensor) -> tuple[float, float]:
        left, right = (relative_projection(space, space[rows], frame=frame) for space in (z, other))
        return float(nn.functional.cosine_similarity(left, right).mean()), float((left - right).abs().max())

    relative, gap = cosine(None, turned)
    absolute = float(nn.functional.cosine_similarity(z, turned).mean())
    ctx.measure("rotation-drops-out", ours=relative, baseline=absolute)
    ctx.measure("exact-to-rounding", ours=gap)
    shifted = z @ turn + shift
    ctx.measure("shift-needs-centring", ours=cosine("centred", shifted)[0], baseline=cosine(None, shifted)[0])
    return {"absolute": absolute, "relative": relative}


# ------------------------------------------------------------------------------------------------------------ training


class _Batches:
    """Shuffled batches of tensors that lie in memory."""

    def __init__(self, x: Tensor, y: Tensor, seed: int, size: int) -> None:
        self.x, self.y, self.size, self.order = x, y, size, generator(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.x), generator=self.order).split(self.size):
            yield self.x[rows.to(self.x.device)], self.y[rows.to(self.y.device)]


def _cross_entropy(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _reconstruction(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[0])


def _train(
    ctx: Context, model: nn.Module, x: Tensor, y: Tensor, loss: Callable[..., Tensor], sizes: dict[str, Any], seed: int,
    name: str, marks: tuple[int, ...] = (), look: Callable[[], None] | None = None,
) -> None:  # fmt: skip
    """Adam with a cosine schedule; every kind of model gets the same batches and steps."""
    model.to(ctx.device)
    batches = _Batches(x, y, seed, sizes.get("batch", 64))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], sizes["lr"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, sizes["steps"])

    def follow(step: int, _: nn.Module) -> None:
        if look is not None and step in marks:
            look()

    with seeded(seed):
        fit(
            model, loss, batches, steps=sizes["steps"], optimizer=optimizer, scheduler=schedule, callback=follow,
            generators=[batches.order], progress=ctx.progress, description=name,
            checkpoint=None if look else ctx.checkpoint / name.replace(" ", "-"),
        )  # fmt: skip
    model.eval()


def _networks(
    ctx: Context, kind: str, digits: Digits, anchors: Anchors, sizes: dict[str, Any], outputs: int, loss: Any
) -> list[Any]:
    """Networks of one kind that differ in their seeds alone."""
    made = []
    for i in range(sizes["models"]):
        seed = 1000 * ctx.seed + i
        encoder = mlp([64, *sizes["hidden"], sizes["latent"]], nn.GELU, seed=2 * seed)
        if kind == "absolute":
            model: Any = AbsoluteModel(encoder, mlp([sizes["latent"], 128, outputs], nn.GELU, seed=2 * seed + 1))
        else:
            head = mlp([len(anchors), 128, outputs], nn.GELU, seed=2 * seed + 1)
            model = RelativeModel(encoder, head, anchors)
        _train(ctx, model, digits.x, digits.y, loss, sizes, seed, f"{kind} {loss.__name__.strip('_')} {i}")
        made.append(model)
    return made


# ---------------------------------------------------------------------------------------------------------- classifiers


def _classifiers(ctx: Context, digits: Digits, anchors: Anchors) -> dict[str, Any]:
    absolute = _networks(ctx, "absolute", digits, anchors, CLASSIFIERS, 10, _cross_entropy)
    relative = _networks(ctx, "relative", digits, anchors, CLASSIFIERS, 10, _cross_entropy)
    test = [(digits.x_test, digits.y_test)]
    table = stitching_matrix(relative, test, "accuracy", absolute=absolute)
    ctx.measure("classifiers-stitched", ours=table.stitched() / table.own(), accuracy=table.stitched())
    ctx.measure("absolute-cannot", ours=table.stitched("absolute"))
    ctx.measure("accuracy-is-kept", ours=table.own(), baseline=table.own("absolute"))
    ctx.measure("classifiers-beat-a-rotation", ours=table.stitched(), baseline=table.stitched("procrustes"))
    other, own = _other_architecture(ctx, digits, anchors)
    crossed = [accuracy(stitch(other, model), digits.x_test, digits.y_test) for model in relative]
    kept = [model.head for model in relative]
    ctx.measure("architectures-stitched", ours=float(np.mean(crossed)) / own, own=own, crossed=crossed, heads=len(kept))
    _company(ctx, digits, anchors, absolute[0])
    spaces = [latents_of(model, digits.x_test).cpu() for model in absolute]
    against = [latents_of(model, anchors.samples).cpu() for model in absolute]
    return {
        "tables": {kind: values.tolist() for kind, values in table.tables().items()},
        "crossed": crossed,
        "absolute": [z[:300].tolist() for z in spaces],
        "relative": [relative_projection(z, a)[:300].tolist() for z, a in zip(spaces, against, strict=True)],
        "labels": digits.y_test[:300].tolist(),
    }


def _other_architecture(ctx: Context, digits: Digits, anchors: Anchors) -> tuple[RelativeModel, float]:
    """A convolutional network with a wider latent space, trained on the same anchors, and its own accuracy."""
    seed = 1000 * ctx.seed + 500
    encoder = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), small_cnn(CNN["channels"], hidden=64, classes=CNN["latent"], seed=seed)
    )
    model = RelativeModel(encoder, mlp([len(anchors), 128, 10], nn.GELU, seed=seed + 1), anchors)
    _train(ctx, model, digits.x, digits.y, _cross_entropy, CLASSIFIERS, seed, "convolutional")
    return model, accuracy(model, digits.x_test, digits.y_test)


def _company(ctx: Context, digits: Digits, anchors: Anchors, model: AbsoluteModel) -> None:
    """The head for frozen encoders, ours and as released, asked class by class."""
    frozen = RelativeEncoder(model.encoder, anchors, RelativeLayer(len(anchors), "l2"), frozen=True)
    r, r_test = frozen(digits.x), frozen(digits.x_test)
    scores = []
    for official in (False, True):
        with seeded(ctx.seed):
            head = RelativeHead(len(anchors), 10, official)
        name = f"head {'as released' if official else 'ours'}"
        _train(ctx, head, r, digits.y, _cross_entropy, COMPANY, ctx.seed, name)
        order = digits.y_test.argsort(stable=True)
        size = COMPANY["batch"]
        parts = zip(r_test[order].split(size), digits.y_test[order].split(size), strict=True)
        with torch.no_grad():
            right = sum(int((head(x).argmax(1) == y).sum()) for x, y in parts if len(y) > 1)
        scores.append(right / len(order))
    ctx.measure("company-decides", ours=scores[0], baseline=scores[1])


# ------------------------------------------------------------------------------------------------------------- decoders


def _decoders(ctx: Context, digits: Digits, anchors: Anchors) -> tuple[dict[str, Any], AbsoluteModel]:
    absolute, relative = (
        _networks(ctx, kind, digits, anchors, DECODERS, 64, _reconstruction) for kind in ("absolute", "relative")
    )
    table = stitching_matrix(relative, [(digits.x_test, digits.x_test)], "mse", absolute=absolute)
    own, stitched = ({kind: score(kind) for kind in KINDS} for score in (table.own, table.stitched))
    ctx.measure("decoders-stitched", ours=stitched["relative"], baseline=stitched["absolute"])
    ctx.measure("decoders-beat-a-rotation", ours=stitched["relative"], baseline=stitched["procrustes"])
    ctx.measure("reconstruction-is-kept", ours=own["relative"], baseline=own["absolute"])
    cones = [
        float(np.mean([mean_pairwise_cosine(latents_of(model, anchors.samples)) for model in models]))
        for models in (relative, absolute)
    ]
    ctx.measure("training-narrows-the-cone", ours=cones[0], baseline=cones[1])
    # The same two spaces, trained on absolute latents, compared through cosines about three origins and axes.
    spaces = [torch.cat([latents_of(m, digits.x_test), latents_of(m, anchors.samples)]).cpu() for m in absolute[:2]]
    rows = torch.arange(len(digits.x_test), len(spaces[0]))
    found = {
        frame or "cosine": compare_spaces(spaces[0], spaces[1], rows, frame=frame, hold_out_anchors=True).jaccard
        for frame in (None, "centred", "whitened")
    }
    ctx.measure("centring-helps", ours=found["centred"], baseline=found["cosine"])
    ctx.measure("whitening-helps", ours=found["whitened"], baseline=found["cosine"])
    shown = torch.stack([digits.x_test[digits.y_test == c][0] for c in range(10)])
    pairs: dict[str, Any] = {
        "absolute": stitch(absolute[0], absolute[1], baseline="absolute"),
        "procrustes": stitch(absolute[0], absolute[1], anchors, baseline="procrustes"),
        "relative": stitch(relative[0], relative[1]),
    }
    with torch.no_grad():
        drawn = {kind: _rounded(pairs[kind](shown)) for kind in KINDS}
    return {"own": own, "stitched": stitched, "frames": found, "shown": _rounded(shown), "drawn": drawn}, absolute[0]


# ---------------------------------------------------------------------------------------------------------------- proxy


def _proxy(ctx: Context, digits: Digits, anchors: Anchors, reference: AbsoluteModel) -> dict[str, Any]:
    """Autoencoders of varied rate and length of training against one that was trained to the end."""
    spaces: list[Tensor] = []
    errors: list[float] = []

    def keep(model: AbsoluteModel) -> None:
        spaces.append(latents_of(model, anchors.samples).cpu())
        with torch.no_grad():
            errors.append(float(nn.functional.mse_loss(model(digits.x_test), digits.x_test)))

    marks, rates, latent = PROXY["marks"], PROXY["rates"], DECODERS["latent"]
    for i in range(PROXY["runs"]):
        seed = 1000 * ctx.seed + 700 + i
        encoder = mlp([64, *DECODERS["hidden"], latent], nn.GELU, seed=2 * seed)
        model = AbsoluteModel(encoder, mlp([latent, 128, 64], nn.GELU, seed=2 * seed + 1)).to(ctx.device)
        sizes = {"steps": marks[-1], "lr": rates[i % len(rates)]}
        look = partial(keep, model)
        _train(ctx, model, digits.x, digits.y, _reconstruction, sizes, seed, f"proxy {i}", marks, look)
    goal = latents_of(reference, anchors.samples).cpu()
    plain, centred = (proxy_study(spaces, errors, goal, frame=frame) for frame in (None, "centred"))
    ctx.measure("proxy-foresees", ours=plain.spearman, models=len(errors))
    ctx.measure("centred-proxy-foresees-more", ours=centred.spearman, baseline=plain.spearman)
    return {"plain": plain.distances.tolist(), "centred": centred.distances.tolist(), "errors": errors}


# ---------------------------------------------------------------------------------------------------------------- words


def _words(ctx: Context) -> dict[str, Any]:
    made = made_word_spaces(WORDS["n"], contexts=WORDS["contexts"], rate=WORDS["rate"], seed=ctx.seed)
    left, right = made.left, made.right
    curve = anchor_curve(left, right, WORDS["counts"], draws=WORDS["draws"], seed=ctx.seed)
    at = dict(zip(WORDS["counts"], curve.mean("relative"), strict=True))
    few, many = WORDS["counts"][0], K if K in at else WORDS["counts"][-1]
    ctx.measure("words-absolute-cannot", ours=curve.mean("absolute")[0])
    ctx.measure("words-relative", ours=at[many])
    ctx.measure("few-anchors", ours=at[few], baseline=curve.mean("procrustes")[0])
    seeds = select_anchors(left, few, seed=ctx.seed)
    found = bootstrap_anchors(left, right, seeds, seeds, many)
    plain = compare_spaces(left, right, seeds)
    grown = _compared(left, right, found.left, found.right)
    ctx.measure(
        "anchors-found",
        ours=grown.jaccard,
        baseline=plain.jaccard,
        right=float((found.left == found.right).float().mean()),
    )
    kinds = ("relative", "procrustes", "absolute")
    return {
        "counts": list(WORDS["counts"]),
        **{kind: {score: curve.mean(kind, score) for score in ("jaccard", "mrr")} for kind in kinds},
        "grown": {"jaccard": grown.jaccard, "mrr": grown.mrr, "from": few, "to": many},
    }


def _compared(left: Tensor, right: Tensor, a: Tensor, b: Tensor) -> SpaceComparison:
    """Spaces with anchors in different rows."""
    return compare_spaces(relative_projection(left, left[a]), relative_projection(right, right[b]))


def _rounded(images: Tensor) -> list[Any]:
    return (images.cpu() * 1000).round().div(1000).tolist()


# ----------------------------------------------------------------------------------------------------------- full: real


@dataclass(frozen=True)
class _Side:
    """One encoder and what it reads."""

    encoder: RelativeEncoder
    train: Any
    labels: Tensor
    test: Any
    test_labels: Tensor


def _real(ctx: Context) -> dict[str, Any]:
    root = ctx.data_dir / FOLDER
    words = _word_files(root)
    sides = {}
    if (root / "texts").is_dir():
        sides["texts"] = _text_sides(ctx, root / "texts")
    if (root / "images").is_dir():
        sides["images"] = _image_sides(ctx, root / "images")
    if not sides:
        raise DataMissing(
            f"{root} has neither texts/ (train.tsv and test.tsv: label, tab, text; encoder-b/ as `hf download` lays it "
            "out, and encoder-a/, or MiniLM stands in for it; anchors.tsv with train-b.tsv and test-b.tsv where b "
            "reads another language) nor images/ (encoder-a/ and encoder-b/; pictures from one of "
            f"{', '.join(IMAGE_SETS)} in {ctx.data_dir}). At least one of the two is needed"
        )
    record: dict[str, Any] = {"words": _real_words(ctx, *words)}
    shares = []
    for name, (a, b) in sides.items():
        record[name] = _stitched_heads(ctx, name, a, b)
        table = np.array(record[name])
        shares += [table[i, 1 - i] / table[1 - i, 1 - i] for i in range(2)]
    ctx.measure("real-encoders-stitched", ours=float(min(shares)), of=list(sides))
    return record


def _word_files(root: Path) -> tuple[Path, Path]:
    found = []
    for side in ("left", "right"):
        options = [root / "words" / f"{side}{end}" for end in (".vec", ".txt", ".bin", ".vec.gz", ".txt.gz", ".bin.gz")]
        there = [path for path in options if path.is_file()]
        if not there:
            raise DataMissing(
                f"{root / 'words'} lacks {side}.vec or {side}.bin: two files of word vectors, such as fastText's "
                "(https://fasttext.cc) and word2vec's (https://code.google.com/archive/p/word2vec)"
            )
        found.append(there[0])
    return found[0], found[1]


def _real_words(ctx: Context, left: Path, right: Path) -> dict[str, Any]:
    limit = 200_000  # the 20,000 words that are taken stand far above
    shared = shared_words(load_word_vectors(left, limit), load_word_vectors(right, limit))
    rows = select_anchors(shared.words, min(REAL["anchors"], len(shared.words)), seed=ctx.seed)
    found = compare_spaces(shared.left.to(ctx.device), shared.right.to(ctx.device), rows)
    ctx.measure("real-words", ours=found.jaccard, mrr=found.mrr, cosine=found.cosine, words=len(shared.words))
    return {"jaccard": found.jaccard, "mrr": found.mrr, "cosine": found.cosine}


def _text_sides(ctx: Context, folder: Path) -> tuple[_Side, _Side]:
    from transformers import AutoModel, AutoTokenizer

    if not (folder / "encoder-b").is_dir():
        raise DataMissing(f"{folder} lacks encoder-b, a Hugging Face text encoder as `hf download` lays it out")
    pairs = load_pairs(folder / "anchors.tsv") if (folder / "anchors.tsv").is_file() else None
    sides, numbers = [], None
    for i, end in enumerate(("", "-b" if pairs else "")):
        train, y, numbers = load_labelled_texts(folder / f"train{end}.tsv", numbers)
        test, y_test, _ = load_labelled_texts(folder / f"test{end}.tsv", numbers)
        path = folder / f"encoder-{'ab'[i]}"
        path = path if path.is_dir() else minilm_folder()
        labels = torch.tensor(y)
        if pairs:
            anchors = Anchors.of(pairs[i], range(len(pairs[i])))  # line i of both columns is one anchor
        else:
            rows = select_anchors(train, min(REAL["anchors"], len(train)), stratify=labels, seed=ctx.seed)
            anchors = Anchors.take(train, rows)
        encoder = RelativeEncoder(
            AutoModel.from_pretrained(path, local_files_only=True).to(ctx.device),
            anchors, RelativeLayer(len(anchors), "l2"), frozen=True, pool="mean",
            tokenizer=AutoTokenizer.from_pretrained(path, local_files_only=True),
        )  # fmt: skip
        sides.append(_Side(encoder, train, labels, test, torch.tensor(y_test)))
    return sides[0], sides[1]


class _Pixels(nn.Module):
    """A Hugging Face image encoder that takes images in [0, 1] of any size."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import AutoModel

        if not folder.is_dir():
            raise DataMissing(f"{folder} is not there: a Hugging Face image encoder, as `hf download` lays it out")
        self.model = AutoModel.from_pretrained(folder, local_files_only=True)
        file = folder / "preprocessor_config.json"
        about = json.loads(file.read_text()) if file.is_file() else {}
        size = about.get("size", getattr(self.model.config, "image_size", 224))
        size = size.get("height", size.get("shortest_edge", 224)) if isinstance(size, dict) else size
        self.size = int(size[0] if isinstance(size, list | tuple) else size)
        self.mean, self.std = about.get("image_mean", [0.5] * 3), about.get("image_std", [0.5] * 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(x.expand(-1, 3, -1, -1), (self.size, self.size), mode="bilinear", antialias=True)
        mean, std = (
            torch.tensor(values, dtype=x.dtype, device=x.device)[:, None, None] for values in (self.mean, self.std)
        )
        hidden = self.model(pixel_values=(x - mean) / std).last_hidden_state
        return hidden.mean((2, 3)) if hidden.ndim == 4 else hidden[:, 0]


def _image_sides(ctx: Context, folder: Path) -> tuple[_Side, _Side]:
    there = [name for name in IMAGE_SETS if (ctx.data_dir / name).is_dir()]
    if not there:
        raise DataMissing(f"{ctx.data_dir} has none of {', '.join(IMAGE_SETS)}: the pictures for the image encoders")
    parts = []
    sets = [load_image_set(there[0], ctx.data_dir, "train"), load_image_set(there[0], ctx.data_dir, "test")]
    for images, count in zip(sets, (REAL["train"], REAL["test"]), strict=True):
        rows = torch.randperm(len(images), generator=generator(ctx.seed))[:count].numpy()
        pixels = torch.from_numpy(images.images[rows].astype(np.float32) / 255)
        parts += [pixels, torch.from_numpy(images.labels[rows])]
    x, y, x_test, y_test = parts
    rows = select_anchors(x, min(REAL["anchors"], len(x)), stratify=y, seed=ctx.seed)
    anchors, sides = Anchors.take(x, rows), []
    for side in "ab":
        network = _Pixels(folder / f"encoder-{side}").to(ctx.device)
        encoder = RelativeEncoder(network, anchors, RelativeLayer(len(anchors), "l2"), frozen=True, batch_size=32)
        sides.append(_Side(encoder, x, y, x_test, y_test))
    return sides[0], sides[1]


def _stitched_heads(ctx: Context, name: str, a: _Side, b: _Side) -> list[list[float]]:
    """Accuracy of encoder i (row) under head j (column); each head was trained on its own frozen encoder."""
    classes = int(torch.cat([a.labels, b.labels]).max()) + 1
    models, shared = [], []
    for side, which in ((a, "a"), (b, "b")):
        with seeded(ctx.seed):
            head = RelativeHead(len(side.encoder.anchors), classes)
        r = _embedded(ctx, side.encoder, side.train, f"{name} {which}")
        y = side.labels.to(ctx.device)
        _train(ctx, head, r, y, _cross_entropy, REAL, ctx.seed, f"{name} head {which}")
        models.append(RelativeModel(side.encoder, head).eval())
        shared.append(_embedded(ctx, side.encoder, side.test, f"{name} {which} test"))
    table = []
    for i, side in enumerate((a, b)):
        row = []
        for model in models:
            stitch(models[i], model)  # refuses what does not go together
            with torch.no_grad():
                found = model.head(shared[i]).argmax(1).cpu()
            row.append(float((found == side.test_labels).float().mean()))
        table.append(row)
    return table


def _embedded(ctx: Context, encoder: RelativeEncoder, samples: Any, name: str) -> Tensor:
    """Relative latents of many samples, a batch at a time."""
    size, parts = REAL["batch"], []
    with torch.no_grad(), ctx.progress.task(name, len(samples)) as task:
        for start in range(0, len(samples), size):
            parts.append(encoder(samples[start : start + size]))
            task.advance(len(parts[-1]))
    return torch.cat(parts)


# -------------------------------------------------------------------------------------------------------------- figures


def draw(records: list[dict]) -> list[Plate]:
    """The records of all seeds, as figures with captions."""
    with style():
        plates = [
            _latents_plate(records[0]["classifiers"]), _tables_plate(records), _decoders_plate(records),
            _words_plate(records), _proxy_plate(records),
        ]  # fmt: skip
        if "real" in records[0]:
            plates.append(_real_plate(records))
        return plates


def _latents_plate(record: dict) -> Plate:
    n = len(record["absolute"])
    figure, axes = new_figure(2.5 * n, 5.0, n, 2, squeeze=False)
    for row, kind in zip(axes, ("absolute", "relative"), strict=True):
        titles = [f"{kind}, network {i + 1}" for i in range(n)]
        spaces = {title: torch.tensor(z) for title, z in zip(titles, record[kind], strict=True)}
        latent_plot(spaces, record["labels"], row, size=9, named=True)
    return Plate(
        "latents",
        figure,
        "Test digits in the latent spaces of classifiers that differ in their seeds alone, seen in the main plane of "
        "the first. Above as they are; below as cosines to the same 100 anchors, same networks. Colours: digits.",
    )


def _tables_plate(records: list[dict]) -> Plate:
    from broadsheet.geometry.relative_representations import StitchingMatrix

    mean = {
        kind: torch.tensor([r["classifiers"]["tables"][kind] for r in records]).mean(0).double()
        for kind in ("relative", "absolute", "procrustes")
    }
    names = tuple(str(i + 1) for i in range(len(mean["relative"])))
    table = StitchingMatrix(names, "accuracy", **mean)
    figure, axes = new_figure(9.6, 3.3, 3, squeeze=False)
    for ax in table.plot(axes[0]):
        ax.set_xlabel("head of network")
        ax.set_xticklabels(names, rotation=0, ha="center")
    axes[0, 0].set_ylabel("encoder of network")
    axes[0, 2].set_title("rotated by the anchors")
    return Plate(
        "stitched-classifiers",
        figure,
        "Accuracy on test digits of every encoder under every head, mean over seeds; the diagonal is not stitched. "
        "Absolute latents fail across networks, relative ones and a rotation fitted on the same anchors do not.",
    )


def _decoders_plate(records: list[dict]) -> Plate:
    figure, axes = new_figure(10.0, 2.9, 2, squeeze=False, width_ratios=(1.9, 1))
    first, (left, right) = records[0]["decoders"], axes[0]
    rows = {"original": first["shown"], **{KIND_NAMES[kind]: first["drawn"][kind] for kind in KINDS}}
    reconstruction_plot({name: torch.tensor(images).reshape(-1, 8, 8) for name, images in rows.items()}, left)
    left.set_title("one network's encoder, another's decoder")
    places = np.arange(len(KINDS))
    for name, shift, alpha in (("own", -0.19, 0.45), ("stitched", 0.19, 1.0)):
        values = np.array([[r["decoders"][name][kind] for kind in KINDS] for r in records]).mean(0)
        right.bar(places + shift, values, 0.36, color=[KIND_COLOURS[kind] for kind in KINDS], alpha=alpha)
        for x, y in zip(places + shift, values, strict=True):
            right.annotate(f"{y:.3f}", (x, y), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    right.set(yscale="log", ylabel="squared error per pixel", title="own (pale) and stitched")
    right.set_xticks(places, [KIND_NAMES[kind] for kind in KINDS])
    right.set_ylim(top=right.get_ylim()[1] * 1.3)
    return Plate(
        "stitched-decoders",
        figure,
        "Autoencoders of digits stitched across seeds. Left: what comes out for ten test digits. Right: error of a "
        "decoder on its own encoder and on another's, mean over seeds, logarithmic.",
    )


def _words_plate(records: list[dict]) -> Plate:
    figure, axes = new_figure(8.6, 3.2, 2, squeeze=False, sharey=True)
    counts, grown = records[0]["words"]["counts"], records[0]["words"]["grown"]
    for ax, score, title in zip(
        axes[0], ("jaccard", "mrr"), ("same neighbours (Jaccard)", "retrieval (MRR)"), strict=True
    ):
        for kind in ("relative", "procrustes", "absolute"):
            label = KIND_NAMES[kind].replace("\n", " ")
            band(ax, counts, [r["words"][kind][score] for r in records], KIND_COLOURS[kind], label, marker="o", ms=4)
        found = np.mean([r["words"]["grown"][score] for r in records])
        ax.plot([grown["from"]], [found], "*", color=COLOURS["good"], ms=13, zorder=5, label="relative, anchors found")
        ax.set(xscale="log", xlabel="known anchors", title=title, ylim=(-0.03, 1.05))
        ax.set_xticks(counts, [str(k) for k in counts])
        ax.minorticks_off()
    axes[0, 0].set_ylabel("mean over words")
    axes[0, 0].legend(loc="upper left", fontsize=8, ncols=2)
    return Plate(
        "words",
        figure,
        "Two word spaces counted in different contexts, against the number of anchors. Star: "
        f"{grown['from']} known anchors grown to {grown['to']} by mutual nearest neighbours. Band: range over seeds.",
    )


def _proxy_plate(records: list[dict]) -> Plate:
    figure, axes = new_figure(8.2, 3.2, 2, squeeze=False, sharey=True)
    for ax, (name, title) in zip(
        axes[0], (("plain", "cosines, as in the paper"), ("centred", "cosines about the anchors' mean")), strict=True
    ):
        for i, r in enumerate(records):
            colour = CYCLE[i % len(CYCLE)]
            ax.plot(r["proxy"][name], r["proxy"]["errors"], "o", color=colour, ms=4.5, alpha=0.75, mew=0)
        ax.set(xlabel="distance from the reference", yscale="log", title=title)
    axes[0, 0].set_ylabel("test error")
    axes[0, 0].set_yticks([0.02, 0.05, 0.1, 0.2], ["0.02", "0.05", "0.1", "0.2"])
    axes[0, 0].minorticks_off()
    axes[0, 1].minorticks_off()
    return Plate(
        "proxy",
        figure,
        "Autoencoders of varied learning rate and length of training: distance of the anchors' relative latents from "
        "those of one well-trained network, and the error on test digits, a colour for each seed of the experiment.",
    )


def _real_plate(records: list[dict]) -> Plate:
    names = [name for name in ("texts", "images") if name in records[0]["real"]]
    figure, axes = new_figure(3.2 * (1 + len(names)), 3.0, 1 + len(names), squeeze=False)
    scores = ("jaccard", "mrr", "cosine")
    axes[0, 0].bar(scores, [np.mean([r["real"]["words"][s] for r in records]) for s in scores], color=COLOURS["ours"])
    axes[0, 0].set(ylim=(0, 1), title="words")
    for ax, name in zip(axes[0, 1:], names, strict=True):
        table = np.mean([r["real"][name] for r in records], axis=0)
        ax.imshow(table, cmap="YlGnBu", vmin=0, vmax=1)
        for (i, j), value in np.ndenumerate(table):
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.55 else "black")
        ax.set(title=name, xticks=[0, 1], yticks=[0, 1], xlabel="head of", ylabel="encoder of")
        ax.set_xticklabels(["a", "b"])
        ax.set_yticklabels(["a", "b"])
        ax.grid(False)
    return Plate(
        "real",
        figure,
        "The user's own spaces: two files of word vectors compared through anchors, and accuracy of frozen encoders "
        "under each other's heads.",
    )
