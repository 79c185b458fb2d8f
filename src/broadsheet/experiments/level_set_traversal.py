"""Blind spots of image classifiers, measured: walks between digits, what other classifiers see at their ends.

``small`` trains a convolutional network and a robust twin on scikit-learn's digits. What people would see is stood in
for by classifiers of pixels: the nearest neighbour and a support vector machine. ``full`` takes a pretrained ResNet-50
(and DeiT-S) of timm and an ImageNet validation folder of the user's.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from torch import Tensor, nn

from broadsheet.data.digits import load_digits_split
from broadsheet.errors import DataMissing, need
from broadsheet.evaluation.level_set_traversal import (
    SkippedSources,
    Traversal,
    blind_spot_grid,
    image_distances,
    level_set_traversal,
    path_confidence,
    triangle_confidence,
)
from broadsheet.lab import Context, Plate
from broadsheet.nn.adversarial import AdversarialLoss, pgd_attack
from broadsheet.nn.plotting import COLOURS, CYCLE, new_figure, style
from broadsheet.nn.seeding import generator
from broadsheet.nn.small_classifiers import accuracy, small_cnn, train_classifier

PAIRS = 40
SURE = 0.6
WALK: dict[str, Any] = {"step": 1e-2, "iterations": 400, "threshold": 0.2, "init_noise": 0.0}
NETWORK: dict[str, Any] = {"channels": (16, 32, 32), "hidden": 64, "epochs": 12, "lr": 2e-3}
ROBUST: dict[str, Any] = {"eps": 0.15, "steps": 4, "epochs": 12}
PUBLISHED_PARALLEL = 2e-3
FULL: dict[str, Any] = {"models": ("resnet50", "deit_small_patch16_224"), "pairs": 200, "batch": 20}

METHODS: dict[str, dict[str, Any]] = {
    "level set": {"parallel": "auto"},
    "published correction": {"parallel": PUBLISHED_PARALLEL},
    "projection only": {"parallel": 0.0},
    "adaptive step": {"parallel": "auto", "adaptive": True},
    "straight line": {"method": "straight", "mode": "stop"},
    "random walk": {"method": "random", "parallel": 0.0},
}


def run(ctx: Context) -> dict:
    """All claims of one seed."""
    full = _imagenet(ctx) if ctx.preset == "full" else {}  # files that are missing are said first
    return {**full, "digits": _digits(ctx)}


# -------------------------------------------------------------------------------------------------------------- digits


def _digits(ctx: Context) -> dict[str, Any]:
    digits = load_digits_split(ctx.seed)
    models: dict[str, nn.Module] = {}
    losses: tuple[tuple[str, dict[str, Any]], ...] = (
        ("plain", {}),
        ("robust", {"loss_fn": AdversarialLoss(ROBUST["eps"], ROBUST["steps"])}),
    )
    for name, loss in losses:
        model = small_cnn(NETWORK["channels"], NETWORK["hidden"], seed=ctx.seed).to(ctx.device)
        train_classifier(
            model, digits.x, digits.y, epochs=NETWORK["epochs"] if name == "plain" else ROBUST["epochs"],
            lr=NETWORK["lr"], seed=ctx.seed, progress=ctx.progress, description=f"{name} network",
            checkpoint=ctx.checkpoint / name, **loss,
        )  # fmt: skip
        models[name] = model
    x, y = digits.x_test.to(ctx.device), digits.y_test.to(ctx.device)
    attacked = {name: pgd_attack(model, x, y, ROBUST["eps"], 10) for name, model in models.items()}
    facts = {
        name: {"accuracy": accuracy(model, x, y), "attacked": accuracy(model, attacked[name], y)}
        for name, model in models.items()
    }
    judges = _judges(digits.x, digits.y)
    source, target, labels, aims = _pairs(models, x, y, ctx.seed)
    table: dict[str, dict[str, float]] = {}
    walks: dict[str, Traversal] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkippedSources)
        for method, settings in METHODS.items():
            walks[method] = level_set_traversal(
                models["plain"], source, target, labels, progress=ctx.progress, record_every=50, seed=ctx.seed,
                **WALK, **settings,
            )  # fmt: skip
            table[method] = _row(models["plain"], walks[method], judges, aims)
        twin = level_set_traversal(
            models["robust"], source, target, labels, progress=ctx.progress, parallel="auto", seed=ctx.seed, **WALK
        )
        table["robust network"] = _row(models["robust"], twin, judges, aims)
        other = source[_another(labels, aims, ctx.seed)]
        second = {
            name: level_set_traversal(models[name], source, other, labels, parallel="auto", seed=ctx.seed, **WALK)
            for name in models
        }
    first = {"plain": walks["level set"], "robust": twin}
    triangles = {
        name: triangle_confidence(models[name], source, first[name].images, second[name].images, labels)
        for name in models
    }
    ours, line = table["level set"], table["straight line"]
    ctx.measure("comes-nearer", ours=ours["remaining"], baseline=line["remaining"])
    ctx.measure("stays-surer", ours=ours["confidence"], baseline=line["confidence"])
    ctx.measure("seen-as-the-target", ours=ours["nearest"], baseline=line["nearest"])
    ctx.measure("seen-as-the-target-by-margins", ours=ours["svm"], baseline=line["svm"])
    ctx.measure("paths-stay-confident", ours=ours["path_kept"])
    ctx.measure("not-any-direction", ours=ours["remaining"], baseline=table["random walk"]["remaining"])
    ctx.measure(
        "published-correction-stalls", ours=table["published correction"]["remaining"], baseline=ours["remaining"]
    )
    ctx.measure(
        "robust-has-smaller-blind-spots", ours=table["robust network"]["remaining"], baseline=ours["remaining"], **facts
    )
    ctx.measure(
        "robust-triangles-more-confident",
        ours=float(triangles["robust"].mean.mean()),
        baseline=float(triangles["plain"].mean.mean()),
    )
    ctx.measure("adaptive-comes-nearer", ours=table["adaptive step"]["remaining"], baseline=ours["remaining"])
    strip = walks["level set"]
    assert strip.path is not None
    chosen = int(strip.remaining.argmin())
    grid = _grid(ctx, models["plain"], x, y)
    return {
        "table": table,
        "facts": facts,
        "distance": {
            m: (w.distance.double() / w.distance[:, :1].double().clamp_min(1e-12)).mean(0).tolist()
            for m, w in walks.items()
        },
        "strip": [_numbers(im) for im in (strip.source[chosen], *strip.path[chosen], strip.target[chosen])],
        "strip_confidence": _strip_confidence(models["plain"], strip, chosen),
        "triangles": {name: _triangle(t, chosen) for name, t in triangles.items()},
        "grid": grid,
        "paths": {
            m: path_confidence(models["plain"], walks[m].source, walks[m].images, 21, labels).mean(0).tolist()
            for m in ("level set", "straight line")
        },
    }


def _judges(x: Tensor, y: Tensor) -> dict[str, Any]:
    flat = x.flatten(1).numpy()
    return {
        "nearest": KNeighborsClassifier(1).fit(flat, y.numpy()),
        "svm": SVC(C=10, gamma="scale").fit(flat, y.numpy()),
    }


def _pairs(models: dict[str, nn.Module], x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs of different classes, images that every network is rightly sure of."""
    sure = torch.ones(len(x), dtype=torch.bool, device=x.device)
    with torch.no_grad():
        for model in models.values():
            p = model(x).softmax(1)
            sure &= (p.argmax(1) == y) & (p.max(1).values > SURE)
    rows = sure.nonzero().flatten().cpu()
    order = rows[torch.randperm(len(rows), generator=generator(seed))]
    first = order[: min(PAIRS, len(order) // 2)]
    rest = order[len(first) :]
    second = torch.stack([rest[(y.cpu()[rest] != y.cpu()[i]).nonzero()[k % 7, 0]] for k, i in enumerate(first)])
    return x[first], x[second], y[first], y[second]


def _another(labels: Tensor, aims: Tensor, seed: int) -> Tensor:
    """For each source another source, of a class that is neither its own nor its target's."""
    order = torch.randperm(len(labels), generator=generator(seed + 1)).to(labels.device)
    found = []
    for i in range(len(labels)):
        turned = order.roll(-i)
        fits = (labels[turned] != labels[i]) & (labels[turned] != aims[i])
        found.append(turned[fits.nonzero()[0, 0]])
    return torch.stack(found)


def _row(model: nn.Module, walk: Traversal, judges: dict[str, Any], aims: Tensor) -> dict[str, float]:
    """What is published of one method: means over pairs."""
    flat = walk.images.flatten(1).cpu().numpy()
    wanted = aims[walk.rows].cpu().numpy()
    path = path_confidence(model, walk.source, walk.images, label=walk.labels)
    lowest = path.min(1).values
    apart = image_distances(walk.images, walk.target)
    return {
        "remaining": float(walk.remaining.mean()),
        "confidence": float(walk.confidence.mean()),
        "path_minimum": float(lowest.mean()),
        "path_kept": float((lowest >= walk.start_confidence - WALK["threshold"]).double().mean()),
        "accepted": float(walk.accepted.double().mean()),
        "rmse": float(apart["rmse"].to_numpy().mean()),
        "ssim": float(apart["ssim"].to_numpy().mean()),
        **{name: float((judge.predict(flat) == wanted).mean()) for name, judge in judges.items()},
    }


def _strip_confidence(model: nn.Module, walk: Traversal, row: int) -> list[float]:
    assert walk.path is not None
    shots = torch.cat([walk.source[row][None], walk.path[row], walk.target[row][None]])
    with torch.no_grad():
        return model(shots).softmax(1)[:, walk.labels[row]].tolist()


def _triangle(t: Any, row: int) -> dict[str, Any]:
    return {
        "weights": _numbers(t.weights), "confidence": _numbers(t.confidence[row]), "images": _numbers(t.images[row]),
        "mean": float(t.mean.mean()), "above": {str(d): float(t.above(d).mean()) for d in (0.0, 0.1, 0.2, 0.3)},
    }  # fmt: skip


def _grid(ctx: Context, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        p = model(x).softmax(1)
    best = [int(torch.where((y == k) & (p.argmax(1) == k), p[:, k], 0).argmax()) for k in (0, 1, 4, 7)]
    grid = blind_spot_grid(model, x[best], parallel="auto", seed=ctx.seed, **WALK)
    return {"ends": _numbers(grid.ends), "confidence": _numbers(grid.confidence), "classes": list(grid.classes)}


def _numbers(x: Tensor) -> list[Any]:
    return x.detach().cpu().float().tolist()


# ------------------------------------------------------------------------------------------------------------ ImageNet


def _imagenet(ctx: Context) -> dict[str, Any]:
    """Pretrained models on a folder of images by class, ImageNet's settings of the paper."""
    images, labels = _folder(ctx.data_dir / "imagenet" / "val", ctx.seed)
    timm = need("timm", "vision")
    record: dict[str, Any] = {}
    for number, name in enumerate(FULL["models"]):
        model = timm.create_model(name, pretrained=True).to(ctx.device).eval()
        config = timm.data.resolve_model_data_config(model)
        mean, std = (torch.tensor(config[key], device=ctx.device).view(1, 3, 1, 1) for key in ("mean", "std"))

        def normalise(z: Tensor, mean: Tensor = mean, std: Tensor = std) -> Tensor:
            return (z - mean) / std

        x, y = images.to(ctx.device), labels.to(ctx.device)
        with torch.no_grad():
            p = torch.cat([model(normalise(part)).softmax(1) for part in x.split(FULL["batch"])])
        sure = ((p.argmax(1) == y) & (p.max(1).values > SURE)).nonzero().flatten()[: FULL["pairs"]]
        order = sure.roll(1)
        sure, order = sure[y[sure] != y[order]], order[y[sure] != y[order]]
        rows = []
        for a, b in zip(sure.split(FULL["batch"]), order.split(FULL["batch"]), strict=True):
            walk = level_set_traversal(
                model, x[a], x[b], y[a], 1e-2, PUBLISHED_PARALLEL, 0.2, 400, normalise=normalise, progress=ctx.progress,
                seed=ctx.seed,
            )  # fmt: skip
            path = path_confidence(
                model, walk.source, walk.images, label=walk.labels, normalise=normalise, batch_size=64
            )
            apart = image_distances(walk.images, walk.target)
            rows.append((walk.remaining.mean(), walk.confidence.mean(), path.mean(), apart["rmse"].to_numpy().mean()))
        means = np.mean([[float(v) for v in row] for row in rows], axis=0).tolist()
        record[name] = dict(zip(("remaining", "confidence", "path_mean", "rmse"), means, strict=True))
        if number == 0:
            ctx.measure("imagenet-nearly-the-target", ours=record[name]["rmse"])
            ctx.measure("imagenet-paths-stay-confident", ours=record[name]["path_mean"])
    return {"imagenet": record}


def _folder(folder: Path, seed: int) -> tuple[Tensor, Tensor]:
    """Images of a folder with one subfolder for each class, in ImageNet's order of classes, 224 x 224."""
    if not folder.is_dir() or not any(folder.iterdir()):
        raise DataMissing(
            f"{folder} is not there: expected ImageNet's validation images, a folder for each class (n01440764, ...); "
            "they come from https://image-net.org after registration"
        )
    from PIL import Image

    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    draw = np.random.default_rng(seed)
    images, labels = [], []
    for label in draw.permutation(len(classes))[: 2 * FULL["pairs"]]:
        files = sorted(classes[label].iterdir())
        with Image.open(files[int(draw.integers(len(files)))]) as opened:
            picture = opened.convert("RGB")
            scale = 256 / min(picture.size)
            picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
            left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
            pixels = np.asarray(picture.crop((left, top, left + 224, top + 224)), dtype=np.float32) / 255
        images.append(torch.from_numpy(pixels).permute(2, 0, 1))
        labels.append(int(label))
    return torch.stack(images), torch.tensor(labels)


# ------------------------------------------------------------------------------------------------------------- figures


def draw(records: list[dict]) -> list[Plate]:
    """The records of all seeds, as figures with captions."""
    with style():
        return [
            _strip_plate(records[0]["digits"]),
            _grid_plate(records[0]["digits"]),
            _table_plate(records),
            _distance_plate(records),
            _triangle_plate(records),
        ]


def _strip_plate(record: dict) -> Plate:
    from broadsheet.evaluation.level_set_traversal import show

    shots, sure = record["strip"], record["strip_confidence"]
    figure, axes = new_figure(1.05 * len(shots), 1.55, len(shots), 1, squeeze=False)
    names = ["source", *(f"step {50 * i}" for i in range(1, len(shots) - 1)), "target"]
    for ax, image, p, name in zip(axes[0], shots, sure, names, strict=True):
        show(ax, torch.tensor(image), name)
        ax.set_xlabel(f"{p:.2f}", fontsize=9)
    return Plate(
        "film-strip",
        figure,
        "One walk, from a digit to another one. Beneath: the network's confidence that it is still the first digit. "
        "The last picture is the target itself.",
    )


def _grid_plate(record: dict) -> Plate:
    from broadsheet.evaluation.level_set_traversal import BlindSpotGrid

    grid = record["grid"]
    ends, confidence = torch.tensor(grid["ends"]), torch.tensor(grid["confidence"])
    k = len(ends)
    figure, axes = new_figure(1.05 * k, 1.2 * k, k, k, squeeze=False)
    BlindSpotGrid(ends[range(k), range(k)], ends, confidence, tuple(grid["classes"])).plot(axes)
    return Plate(
        "grid",
        figure,
        "Walks between four digits: every picture in a row is the row's digit to the network, its confidence above it.",
    )


def _table_plate(records: list[dict]) -> Plate:
    columns = (
        ("remaining", "distance left, share"),
        ("confidence", "confidence at the end"),
        ("nearest", "nearest neighbour: target"),
        ("svm", "support vectors: target"),
    )
    names = list(records[0]["digits"]["table"])
    figure, axes = new_figure(10.4, 2.9, len(columns), 1, squeeze=False)
    for ax, (key, title) in zip(axes[0], columns, strict=True):
        values = np.array([[r["digits"]["table"][name][key] for name in names] for r in records])
        colours = [COLOURS["ours"] if name == "level set" else COLOURS["baseline"] for name in names]
        at = np.arange(len(names))[::-1]
        spread = [values.mean(0) - values.min(0), values.max(0) - values.mean(0)]
        ax.barh(
            at, values.mean(0), color=colours, xerr=spread, error_kw={"elinewidth": 1, "ecolor": COLOURS["neutral"]}
        )
        ax.set(xlim=(0, 1.05), xticks=[0, 0.5, 1], yticks=at, yticklabels=names if key == "remaining" else [])
        ax.set_title(title, fontsize=9)
        ax.grid(axis="y", visible=False)
    return Plate(
        "methods",
        figure,
        "What each way of walking ends in: how near the target, how sure the network still is of the source, and how "
        "often two classifiers of pixels see the target. Mean over seeds, whiskers: their range.",
    )


def _distance_plate(records: list[dict]) -> Plate:
    figure, axes = new_figure(7.4, 2.9, 2, 1, squeeze=False)
    for method, colour in zip(METHODS, CYCLE, strict=False):
        longest = max(len(r["digits"]["distance"][method]) for r in records)
        rows = [r["digits"]["distance"][method] for r in records]
        rows = [row + [row[-1]] * (longest - len(row)) for row in rows]
        curve = np.mean(rows, axis=0)
        whole = np.concatenate([curve, np.full(WALK["iterations"] + 1 - len(curve), curve[-1])])
        axes[0, 0].plot(whole, color=colour, label=method)
    axes[0, 0].set(xlabel="iteration", ylabel="distance to the target, share", ylim=(0, 1.5))
    axes[0, 0].legend(fontsize=7, ncol=2, loc="upper right")
    for method, colour in (("level set", COLOURS["ours"]), ("straight line", COLOURS["baseline"])):
        curve = np.mean([r["digits"]["paths"][method] for r in records], axis=0)
        axes[0, 1].plot(np.linspace(0, 1, len(curve)), curve, color=colour, label=f"to the end of: {method}")
    axes[0, 1].set(xlabel="way from source to end", ylabel="confidence in the source's class", ylim=(0, 1.05))
    axes[0, 1].legend(fontsize=8, loc="lower left")
    return Plate(
        "distance",
        figure,
        "Left: how the walks come nearer. Right: confidence on the straight line from the source to the end, mean over "
        "pairs and seeds.",
    )


def _triangle_plate(records: list[dict]) -> Plate:
    from broadsheet.evaluation.level_set_traversal import TriangleConfidence

    figure, axes = new_figure(7.6, 3.3, 2, 1, squeeze=False)
    for ax, (name, t) in zip(axes[0], records[0]["digits"]["triangles"].items(), strict=True):
        made = TriangleConfidence(
            torch.tensor(t["weights"]), torch.tensor(t["confidence"])[None], torch.tensor(t["images"])[None], 10
        )
        made.plot(0, ax)
        mean = np.mean([r["digits"]["triangles"][name]["mean"] for r in records])
        ax.set_title(f"{name} network, mean {mean:.2f}", fontsize=10)
    return Plate(
        "triangles",
        figure,
        "Confidence in the source's class over the triangle of a source and two ends of walks, for the plain network "
        "and the one trained against attacks. Means are over all triangles and seeds.",
    )
