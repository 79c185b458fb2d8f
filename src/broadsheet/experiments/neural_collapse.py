"""Neural collapse in deep linear heads, measured: descent on free features, vanishing classes, a network on digits.

``small`` needs no data: free features are solved for by descent and compared with the predicted frame and its rivals;
then dense networks on scikit-learn's digits, made imbalanced, are trained under the paper's objective. ``full`` trains
the paper's imbalanced CIFAR-10 recipe from the user's folder.
"""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from broadsheet.data.digits import load_digits_split
from broadsheet.data.images import load_cifar10
from broadsheet.geometry.neural_collapse import (
    CollapseMonitor,
    CollapseWarning,
    FreeFeatures,
    NCHead,
    collapse_metrics,
    cross_entropy_figures,
    gof_prediction,
    lengths_plot,
    sep_decay_loss,
    solve_ufm,
)
from broadsheet.lab import Context, Plate
from broadsheet.nn.plotting import COLOURS, CYCLE, band, new_figure, style
from broadsheet.nn.seeding import seeded
from broadsheet.nn.small_classifiers import mlp
from broadsheet.nn.training import fit

COUNTS = (200, 100, 50, 50)
DEPTHS = (1, 2, 3)
FREE: dict[str, Any] = {"d": 32, "wd": 5e-3, "fd": 5e-3, "steps": 1500, "init_std": 0.3, "record": 24}
SLOW = 6000  # steps where a class stands near the threshold
BALANCED = (60, 60, 60, 60)
STRONG = 0.0209  # the decay at which theory loses the two classes of 50
SMALL_START = 0.1  # initial values of the paper's scripts
DIGITS: dict[str, Any] = {
    "counts": (150, 130, 110, 95, 80, 65, 50, 40, 30, 20), "width": 64, "steps": 1200, "lr": 3e-3, "wd": 5e-3,
    "fd": 1e-5, "depths": (1, 3), "points": 24, "n_test": 200,
}  # fmt: skip
CIFAR: dict[str, Any] = {
    "counts": (100, 100, 200, 200, 300, 300, 400, 400, 500, 500), "width": 512, "steps": 12_000, "lr": 1e-4,
    "decay": 1e-5, "depth": 3, "points": 40,
}  # fmt: skip
RIVALS = ("etf", "orthogonal")


def run(ctx: Context) -> dict:
    """All claims of one seed."""
    full = {"cifar": _cifar(ctx)} if ctx.preset == "full" else {}  # files that are missing are said first
    return {**full, "free": _free(ctx), "lost": _lost(ctx), "entropy": _cross_entropy(ctx), "digits": _digits(ctx)}


# ------------------------------------------------------------------------------------------------------ free features


def _free(ctx: Context) -> dict[str, Any]:
    distances: dict[str, list[float]] = {name: [] for name in ("gof", *RIVALS)}
    worst, curves, imbalance, naive = 0.0, {}, [], []
    for depth in DEPTHS:
        found = _solve(ctx, COUNTS, depth, target="gof")
        for name, values in distances.items():
            values.append(_frame_distance(found, name))
        prediction = gof_prediction(COUNTS, FREE["wd"], FREE["fd"], depth)
        lengths = found.product.cpu().double().square().sum(1)
        worst = max(worst, float(((lengths - prediction.sigma2) / prediction.sigma2).abs().max()))
        # The same weights under torch's squared error (a mean over classes too, not halved): its decays as they stand.
        torch_decay = 2 / len(COUNTS) * FREE["wd"]
        read_as_is = gof_prediction(COUNTS, torch_decay, torch_decay, depth).sigma2
        naive.append(float(((lengths - read_as_is) / lengths).abs().max()))
        curves[depth] = {str(step): numbers for step, numbers in found.curve.items()}
        imbalance.append(found.imbalance())
    rival = [min(distances[name][i] for name in RIVALS) for i in range(len(DEPTHS))]
    ctx.measure(
        "frame-found", ours=max(distances["gof"]), by_depth=dict(zip(map(str, DEPTHS), distances["gof"], strict=True))
    )
    ctx.measure("frame-not-the-rivals", ours=max(distances["gof"]), baseline=min(rival))
    ctx.measure("lengths-predicted", ours=worst)
    ctx.measure("loss-of-torch-needs-other-decays", ours=worst, baseline=max(naive))
    plain, simplex = _solve(ctx, BALANCED, 2), _solve(ctx, BALANCED, 2, bias=True)
    ctx.measure(
        "bias-decides-the-frame",
        ours=max(_frame_distance(plain, "orthogonal"), _frame_distance(simplex, "etf")),
        baseline=min(_frame_distance(plain, "etf"), _frame_distance(simplex, "orthogonal")),
    )
    last = _solve(ctx, COUNTS, 1)
    prediction = gof_prediction(COUNTS, FREE["wd"], FREE["fd"], 1).layer()
    metrics = last.metrics("gof")
    return {
        "curves": curves,
        "distances": distances,
        "imbalance": imbalance,
        "gram": _numbers(metrics.weights_gram),
        "frame": _numbers(metrics.frame_weights),
        "weights": _numbers(last.product.norm(dim=1)),
        "means": _numbers(metrics.class_means.norm(dim=1)),
        "weights_predicted": _numbers(prediction.weights.sqrt()),
        "means_predicted": _numbers(prediction.features.sqrt()),
    }


def _solve(ctx: Context, counts: tuple[int, ...], depth: int, **how: Any) -> FreeFeatures:
    settings = {**FREE, **how, "seed": ctx.seed, "device": ctx.device, "progress": ctx.progress}
    d, wd, fd = settings.pop("d"), settings.pop("wd"), settings.pop("fd")
    return solve_ufm(counts, d, depth, wd, fd, **settings)


def _frame_distance(found: FreeFeatures, target: str) -> float:
    """Distance of the weights' Gram matrix from a frame; a bias matters for the simplex alone."""
    bias = None if target != "etf" else found.bias
    metrics = collapse_metrics(
        found.features, found.labels, found.product, bias, target, found.counts, found.weight_decay,
        found.feature_decay, len(found.weights),
    )  # fmt: skip
    return metrics.nc2_w


# --------------------------------------------------------------------------------------------------- vanishing classes


def _lost(ctx: Context) -> dict[str, Any]:
    predicted = gof_prediction(COUNTS, STRONG, STRONG, 1).lost
    found = _solve(ctx, COUNTS, 1, wd=STRONG, fd=STRONG, record=None, steps=SLOW)
    lengths = found.product.norm(dim=1).cpu()
    ctx.measure("small-classes-vanish", ours=float(lengths[predicted].max()))
    ctx.measure("large-classes-live", ours=float(lengths[~predicted].min()))
    # The curve: the smallest class's length against its size, found and predicted.
    sizes = (20, 50, 110, 150, 200)  # not too near the threshold, where descent takes very long
    curve = {"sizes": list(sizes), "found": []}
    for size in sizes:
        counts = (*COUNTS[:3], size)
        solved = _solve(ctx, counts, 1, wd=STRONG, fd=STRONG, record=None)
        curve["found"].append(float(solved.product[3].norm()))
    # Deep heads: at small initial values zero holds classes that the global minimum keeps.
    deep = {
        str(start): _solve(ctx, COUNTS, 3, init_std=start, record=None) for start in (SMALL_START, FREE["init_std"])
    }
    best = gof_prediction(COUNTS, FREE["wd"], FREE["fd"], 3).loss
    excess = {start: float(solved.losses[-1]) / best - 1 for start, solved in deep.items()}
    ctx.measure("descent-reaches-the-minimum", ours=excess[str(FREE["init_std"])])
    ctx.measure("small-start-is-caught", ours=excess[str(SMALL_START)])
    return {**curve, "excess": excess, "lengths": _numbers(lengths)}


# ------------------------------------------------------------------------------------------------------- cross entropy


def _cross_entropy(ctx: Context) -> dict[str, Any]:
    depths = (1, 2, 3, 4, 6)
    losses: dict[str, list[float]] = {"simplex": [], "polygon": []}
    for depth in depths:
        figures = {figure.name: figure.loss for figure in cross_entropy_figures(8, 100, 1e-3, 1e-3, depth)}
        for name, values in losses.items():
            values.append(figures[name])
    at = depths.index(4)
    ctx.measure("simplex-not-best-when-deep", ours=losses["polygon"][at], baseline=losses["simplex"][at])
    found = _solve(ctx, (20,) * 8, 4, loss="ce", wd=1e-3, fd=1e-3, bias=True, record=None, steps=SLOW // 2)
    reached = float(found.losses[-1])
    simplex = {f.name: f.loss for f in cross_entropy_figures(8, 20, 1e-3, 1e-3, 4)}["simplex"]
    ctx.measure(
        "descent-below-the-simplex",
        ours=reached,
        baseline=simplex,
        rank=int((found.product.cpu().double().svd().S > 1e-3).sum()),
    )
    return {"depths": list(depths), **losses, "reached": reached, "simplex_small": simplex}


# -------------------------------------------------------------------------------------------------------------- digits


class _Net(nn.Module):
    """A dense backbone and a deep linear head; the features are kept for the loss."""

    def __init__(self, inputs: int, width: int, classes: int, depth: int, hidden: int = 3, seed: int = 0) -> None:
        super().__init__()
        self.body = mlp([inputs, *[width] * hidden], last=True, seed=seed)
        with seeded(seed):
            self.head = NCHead(width, classes, depth)
        self.features: Tensor = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.body(x)
        return self.head(self.features)


def _train(
    ctx: Context, x: Tensor, y: Tensor, depth: int, counts: tuple[int, ...], sizes: dict[str, Any], name: str
) -> tuple[CollapseMonitor, _Net, dict[str, Any]]:
    """Full batch, Adam, the paper's objective; the metrics on the training samples over time."""
    wd, fd, steps = sizes["wd"], sizes["fd"], sizes["steps"]
    model = _Net(x.shape[1], sizes["width"], len(counts), depth, seed=ctx.seed).to(ctx.device)
    x, y = x.to(ctx.device), y.to(ctx.device)
    monitor = CollapseMonitor(model, [(x, y)], "head", target="gof", wd=wd, fd=fd, agreement=False)
    points = {round(steps ** (i / (sizes["points"] - 1))) for i in range(sizes["points"])}
    rivals: dict[str, list[float]] = {rival: [] for rival in RIVALS}

    def look(step: int) -> None:
        monitor.record(step)
        with torch.no_grad():
            features = model.body(x)
            for rival, values in rivals.items():
                values.append(collapse_metrics(features, y, model.head.product, target=rival).nc2_w)

    def follow(step: int, _: nn.Module) -> None:
        if step in points:
            look(step)

    def loss_fn(wrapped: Any, batch: Any) -> Tensor:
        return sep_decay_loss(wrapped(batch[0]), model.features, model.head, batch[1], wd, fd)

    optimizer = torch.optim.Adam(model.parameters(), sizes["lr"])
    decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, 3 * steps // 4], 0.3)
    look(0)
    fit(
        model, loss_fn, [(x, y)], steps=steps, optimizer=optimizer, scheduler=decay, callback=follow,
        progress=ctx.progress, description=f"{name}, {depth} linear", checkpoint=ctx.checkpoint / f"{name}-{depth}",
    )  # fmt: skip
    model.eval()
    return monitor, model, {"rivals": rivals}


def _follow(monitor: CollapseMonitor, extra: dict[str, Any]) -> dict[str, Any]:
    first = [report.metrics[0] for report in monitor.history]
    return {
        "steps": [int(report.epoch) for report in monitor.history],
        **{name: [getattr(m, name) for m in first] for name in ("nc1", "nc2_w", "nc2_h", "nc3_wh", "nc3_duality")},
        **extra["rivals"],
    }


def _digits(ctx: Context) -> dict[str, Any]:
    counts = DIGITS["counts"]
    digits = load_digits_split(ctx.seed, DIGITS["n_test"], counts).flat()
    record: dict[str, Any] = {}
    falls, ours, rival = [], [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)
        for depth in DIGITS["depths"]:
            monitor, model, extra = _train(ctx, digits.x, digits.y, depth, counts, DIGITS, "digits")
            followed = _follow(monitor, extra)
            record[str(depth)] = followed
            falls.append(followed["nc1"][0] / followed["nc1"][-1])
            ours.append(followed["nc2_w"][-1])
            rival.append(min(followed[name][-1] for name in RIVALS))
            if depth == DIGITS["depths"][0]:
                prediction = gof_prediction(counts, DIGITS["wd"], DIGITS["fd"], depth).layer()
                record["weights"] = _numbers(model.head.product.detach().norm(dim=1))
                record["weights_predicted"] = _numbers(prediction.weights.sqrt())
                record["counts"] = list(counts)
    ctx.measure("network-collapses", ours=min(falls), by_depth=falls)
    ctx.measure("network-nearest-the-frame", ours=max(ours), baseline=min(rival))
    return record


def _cifar(ctx: Context) -> dict[str, Any]:
    """The imbalanced CIFAR-10 subset of the paper, dense backbone."""
    images = load_cifar10(ctx.data_dir / "cifar10", "train")
    counts = CIFAR["counts"]
    pixels, labels = torch.from_numpy(images.as_float()).flatten(1), torch.from_numpy(images.labels).long()
    rows = torch.cat([(labels == k).nonzero().flatten()[:n] for k, n in enumerate(counts)])
    sizes = {**CIFAR, "wd": CIFAR["decay"], "fd": CIFAR["decay"]}
    monitor, _, extra = _train(ctx, pixels[rows], labels[rows], CIFAR["depth"], counts, sizes, "cifar")
    followed = _follow(monitor, extra)
    ctx.measure("cifar-collapses", ours=followed["nc1"][0] / followed["nc1"][-1])
    ctx.measure(
        "cifar-nearest-the-frame", ours=followed["nc2_w"][-1], baseline=min(followed[name][-1] for name in RIVALS)
    )
    return followed


def _numbers(x: Tensor | None) -> list[Any]:
    return [] if x is None else x.detach().cpu().double().tolist()


# ------------------------------------------------------------------------------------------------------------- figures


NAMES = {
    "nc1": "NC1",
    "nc2_w": "NC2, weights",
    "nc2_h": "NC2, means",
    "nc3_wh": "NC3, logits",
    "nc3_duality": "NC3, duality",
}


def draw(records: list[dict]) -> list[Plate]:
    """The records of all seeds, as figures with captions."""
    with style():
        plates = [_curves_plate(records), _gram_plate(records), _lengths_plate(records), _entropy_plate(records)]
        plates += [_network_plate(records, "digits", "1")]
        if "cifar" in records[0]:
            plates.append(_network_plate(records, "cifar", None))
        return plates


def _curves_plate(records: list[dict]) -> Plate:
    figure, axes = new_figure(3.4 * len(DEPTHS), 2.9, len(DEPTHS), squeeze=False)
    for ax, depth in zip(axes[0], DEPTHS, strict=True):
        steps = [int(step) for step in _depth(records[0]["free"]["curves"], depth)]
        for (name, label), colour in zip(NAMES.items(), CYCLE, strict=False):
            rows = [[n[name] for n in _depth(r["free"]["curves"], depth).values()] for r in records]
            band(ax, steps, rows, colour, label, logarithmic=True)
        ax.set(xscale="log", yscale="log", xlabel="step", title=f"{depth} linear layer{'s' if depth > 1 else ''}")
    axes[0, 0].set_ylabel("distance from the predicted frame")
    axes[0, -1].legend(fontsize=7, loc="lower left")
    counts = ", ".join(map(str, COUNTS))
    return Plate(
        "free-features",
        figure,
        f"Free features and a linear head under gradient descent, classes of {counts} samples: every distance from the "
        "geometry that counts and decays predict goes to rounding error. Mean over seeds, band: their range.",
    )


def _depth(curves: dict, depth: int) -> dict:
    return curves[depth] if depth in curves else curves[str(depth)]


def _gram_plate(records: list[dict]) -> Plate:
    from broadsheet.geometry.neural_collapse import gram_plot

    figure, axes = new_figure(6.4, 2.9, 2, squeeze=False)
    free = records[0]["free"]
    gram_plot(torch.tensor(free["gram"]), torch.tensor(free["frame"]), axes[0])
    names = [str(count) for count in COUNTS]
    for ax in axes[0]:
        ax.set(xlabel="samples of the class", xticks=range(len(names)), xticklabels=names)
    axes[0, 0].set(yticks=range(len(names)), yticklabels=names, ylabel="samples of the class")
    return Plate(
        "gram",
        figure,
        "Gram matrix of the class rows of the head, found by descent and predicted: orthogonal, longer for larger "
        "classes. An equiangular frame would have equal diagonals and equal negative entries elsewhere.",
    )


def _lengths_plate(records: list[dict]) -> Plate:
    figure, axes = new_figure(10.2, 2.9, 3, squeeze=False)
    first = records[0]
    counts = torch.tensor(COUNTS)
    for ax, name, title in zip(axes[0], ("weights", "means"), ("head's class rows", "class means"), strict=False):
        found = torch.tensor([r["free"][name] for r in records]).mean(0)
        lengths_plot(counts, found, torch.tensor(first["free"][f"{name}_predicted"]), ax)
        ax.set_title(title)
    lost, ax = first["lost"], axes[0, 2]
    fine = range(10, 201, 2)
    theory = [float(gof_prediction((*COUNTS[:3], size), STRONG, STRONG, 1).sigma2[3].sqrt()) for size in fine]
    ax.plot(fine, theory, color=COLOURS["neutral"], label="theory")
    ax.plot(
        lost["sizes"], np.mean([r["lost"]["found"] for r in records], axis=0), "o", color=COLOURS["ours"], label="found"
    )
    ax.set(xlabel="samples of the smallest class", ylabel="length of its row", title="a class that vanishes")
    ax.legend()
    return Plate(
        "lengths",
        figure,
        "Lengths against class counts, found (dots) and predicted (line). Larger classes have longer rows and shorter "
        "means. Right: with stronger decay a class below the threshold has no direction at all.",
    )


def _entropy_plate(records: list[dict]) -> Plate:
    figure, axes = new_figure(4.4, 3.0, squeeze=False)
    entropy, ax = records[0]["entropy"], axes[0, 0]
    for name, colour in (("simplex", COLOURS["baseline"]), ("polygon", COLOURS["ours"])):
        ax.plot(entropy["depths"], entropy[name], "o-", color=colour, label=name)
    ax.set(xlabel="linear layers", ylabel="loss with decays", xticks=entropy["depths"])
    ax.legend()
    return Plate(
        "cross-entropy",
        figure,
        "Cross entropy, eight balanced classes: the best loss of the simplex and of classes on a circle, by depth of "
        "the head. From three layers on the circle is below the simplex, which is then no global minimum.",
    )


def _network_plate(records: list[dict], name: str, depth: str | None) -> Plate:
    figure, axes = new_figure(6.8, 2.9, 2, squeeze=False)
    rows = [r[name] if depth is None else r[name][depth] for r in records]
    steps = np.maximum(rows[0]["steps"], 0.5)
    band(axes[0, 0], steps, [r["nc1"] for r in rows], COLOURS["ours"], "NC1", logarithmic=True)
    axes[0, 0].set(xscale="log", yscale="log", xlabel="step", ylabel="NC1", title="scatter within classes")
    for key, label, colour in (
        ("nc2_w", "predicted frame", COLOURS["ours"]),
        ("orthogonal", "equal and orthogonal", COLOURS["neutral"]),
        ("etf", "simplex", COLOURS["baseline"]),
    ):
        band(axes[0, 1], steps, [r[key] for r in rows], colour, label, logarithmic=True)
    axes[0, 1].set(xscale="log", xlabel="step", ylabel="distance", ylim=(0, 0.6), title="the head's Gram matrix")
    axes[0, 1].legend(fontsize=8, loc="upper left")
    what = "imbalanced digits" if name == "digits" else "an imbalanced part of CIFAR-10"
    return Plate(
        f"network-{name}",
        figure,
        f"A dense network on {what}: within-class scatter falls, and the head's rows end nearest the frame that counts "
        "and decays predict. Mean over seeds, band: their range.",
    )
