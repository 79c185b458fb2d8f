"""Convergent learning, measured: which units three networks share that were trained from different seeds.

``small`` trains three convolutional networks on scikit-learn's digits. ``full`` takes CIFAR-10 from the user's folder,
and the user's own checkpoints of one torchvision architecture where there are any; else it trains four networks. Pairs
and maps are chosen on training images and scored on held-out ones.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from broadsheet.data.digits import load_digits_split
from broadsheet.data.images import load_cifar10
from broadsheet.errors import DataMissing, InvalidInput
from broadsheet.geometry.convergent_learning import (
    ConvergenceReport,
    ConvergentLearningWarning,
    LayerConvergence,
    UnitClusters,
    block_plot,
    convergence_report,
    match_units,
    matched_layer,
    sparse_map,
    sparse_path,
    spectral_unit_clusters,
    unit_correlation,
    unit_mutual_information,
)
from broadsheet.geometry.convergent_learning.report import correlation_tables
from broadsheet.lab import Context, Plate
from broadsheet.nn.batches import unit_samples
from broadsheet.nn.hooks import capture, replace
from broadsheet.nn.lasso import LassoWarning
from broadsheet.nn.plotting import COLOURS, CYCLE, DIVERGING, band, new_figure, style
from broadsheet.nn.seeding import generator
from broadsheet.nn.small_classifiers import accuracy, small_cnn, train_classifier
from broadsheet.nn.untrained import untrained_copy

DIGITS: dict[str, Any] = {
    "networks": 3, "channels": (32, 48, 64), "hidden": 64, "epochs": 7, "batch_size": 64, "lr": 2e-3, "n_test": 497,
    "n_choose": 800,
}  # fmt: skip
CIFAR: dict[str, Any] = {"networks": 4, "epochs": 30, "lr": 1e-3}
# Five convolutions, halved where the paper's networks are.
CIFAR_NETWORK: dict[str, Any] = {
    "channels": (64, 128, 256, 256, 256), "hidden": 512, "size": 32, "in_channels": 3, "halve": (1, 2, 5), "norm": True,
}  # fmt: skip
PENALTY = 0.03
POINTS = 10  # penalties of a path
STEPS = 1000  # of the paper's subgradient descent
ROWS = 6000  # positions that mutual information and the subgradient see
BATCH = 250
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass
class Subjects:
    """What is compared.

    Attributes:
        models: networks by name.
        layers: submodules, the convolutions in order first; a layer before the output may follow.
        convolutions: how many of the layers these are.
        x, y: images and labels for choosing.
        x_test, y_test: held out.
    """

    models: Mapping[str, nn.Module]
    layers: list[str]
    convolutions: int
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def run(ctx: Context) -> dict:
    """All claims of one seed."""
    subjects = _digits(ctx) if ctx.preset == "small" else _cifar(ctx)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergentLearningWarning)
        warnings.simplefilter("ignore", LassoWarning)
        report = convergence_report(
            subjects.models, subjects.layers, _batches(subjects.x), held_out=_batches(subjects.x_test),
            seed=ctx.seed, progress=ctx.progress,
        )  # fmt: skip
        matched = _matched(ctx, report, subjects)
        maps = _maps(ctx, report)
        groups = _groups(ctx, report)
        checks = _checks(ctx, subjects)
        stitched = _stitched(ctx, report, subjects)
    right = [accuracy(m, subjects.x_test, subjects.y_test, BATCH) for m in subjects.models.values()]
    return {
        "layers": subjects.layers, "accuracy": right, "matched": matched, "maps": maps, "groups": groups,
        "checks": checks, "stitched": stitched, "examples": _examples(report, subjects),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ subjects


def _digits(ctx: Context) -> Subjects:
    digits = load_digits_split(ctx.seed, DIGITS["n_test"])
    models: dict[str, nn.Module] = {}
    for i in range(DIGITS["networks"]):
        seed = 1000 * ctx.seed + i
        model = small_cnn(DIGITS["channels"], DIGITS["hidden"], seed=seed).to(ctx.device)
        train_classifier(
            model, digits.x, digits.y, epochs=DIGITS["epochs"], batch_size=DIGITS["batch_size"], lr=DIGITS["lr"],
            seed=seed, progress=ctx.progress, description=f"network {i + 1}", checkpoint=ctx.checkpoint / str(i),
        )  # fmt: skip
        models[f"network {i + 1}"] = model
    count = len(DIGITS["channels"])
    layers = [*(f"conv{i + 1}" for i in range(count)), "fc"]
    choose = DIGITS["n_choose"]  # of the training images, in random order: enough for sixty-four units
    return Subjects(models, layers, count, digits.x[:choose], digits.y[:choose], digits.x_test, digits.y_test)


def _cifar(ctx: Context) -> Subjects:
    folder = ctx.data_dir / "cifar10"
    parts = []
    for split in ("train", "test"):
        images = load_cifar10(folder, split)  # type: ignore[arg-type]
        pixels = (torch.from_numpy(images.as_float()) - torch.tensor(CIFAR_MEAN)[:, None, None]) / torch.tensor(
            CIFAR_STD
        )[:, None, None]
        parts += [pixels, torch.from_numpy(images.labels).long()]
    own = _checkpoints(ctx.data_dir / "convergent-learning", ctx)
    if own is not None:
        models, layers = own
        return Subjects(models, layers, len(layers), *parts)
    models = {}
    for i in range(CIFAR["networks"]):
        seed = 1000 * ctx.seed + i
        model = small_cnn(**CIFAR_NETWORK, seed=seed).to(ctx.device)
        train_classifier(
            model, parts[0], parts[1], epochs=CIFAR["epochs"], lr=CIFAR["lr"], seed=seed, progress=ctx.progress,
            description=f"network {i + 1}", checkpoint=ctx.checkpoint / str(i),
        )  # fmt: skip
        models[f"network {i + 1}"] = model
    count = len(CIFAR_NETWORK["channels"])
    return Subjects(models, [*(f"conv{i + 1}" for i in range(count)), "fc"], count, *parts)


def _checkpoints(folder: Path, ctx: Context) -> tuple[dict[str, nn.Module], list[str]] | None:
    """The user's networks: state dicts called ``ARCHITECTURE-anything.safetensors`` or ``.pt``, two or more."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.pt")]) if folder.is_dir() else []
    if not files:
        return None
    names = {file.name.split("-")[0] for file in files}
    if len(files) < 2 or len(names) > 1:
        raise DataMissing(
            f"{folder} holds {', '.join(file.name for file in files)}: two or more state dicts of one torchvision "
            "architecture are expected, called such as resnet18-0.safetensors and resnet18-1.safetensors; move them "
            "away to have networks trained here"
        )
    models = {}
    for file in files:
        weights = _state_dict(file)
        head = [value for value in weights.values() if value.ndim == 2]
        if not head:
            raise InvalidInput(f"{file}: no linear layer among its weights: is it a state dict of a classifier?")
        model = _torchvision_model(names.copy().pop(), len(head[-1]))
        model.load_state_dict(weights)
        models[file.stem] = model.to(ctx.device).eval()
    first = next(iter(models.values()))
    return models, _rectified(first)


def _state_dict(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def _torchvision_model(name: str, classes: int) -> nn.Module:
    try:
        import torchvision
    except ImportError as error:
        raise DataMissing("your own checkpoints need torchvision: pip install 'broadsheet[vision]'") from error
    return torchvision.models.get_model(name, num_classes=classes)


def _rectified(model: nn.Module) -> list[str]:
    """Stages of a network whose output is a map: children of the top, or the ReLUs of its ``features``."""
    stages = [name for name, _ in model.named_children() if name.startswith("layer")]
    found = stages or [name for name, module in model.named_modules() if isinstance(module, nn.ReLU)]
    if not found:
        raise InvalidInput(f"{type(model).__name__}: neither stages called layer1, layer2, ... nor any nn.ReLU")
    return [name for name in found if not name.startswith("classifier")]


def _batches(x: Tensor) -> list[Tensor]:
    return list(x.split(BATCH))


# ---------------------------------------------------------------------------------------------------------- one to one


def _matched(ctx: Context, report: ConvergenceReport, subjects: Subjects) -> dict[str, Any]:
    layers: dict[str, Any] = {}
    for one in report:
        curves: dict[str, list[list[float]]] = {"ours": [], "semi": [], "untrained": [], "shuffled": []}
        above, below, rank = [], [], []
        for i, j in one.chosen.pairs:
            matching = one.match(i, j)
            above.append(matching.share(above=0.8))
            below.append(matching.share(below=0.6))
            rank.append(matching.mean_rank)
            found = {"ours": matching, "semi": one.match(i, j, "semi")}
            found |= {null: one.match(i, j, null=null) for null in ("untrained", "shuffled")}
            for name, values in curves.items():
                score = found[name].score[found[name].matched]
                values.append(score.sort(descending=True).values.tolist())
        means = {name: float(np.mean([np.mean(row) for row in rows])) for name, rows in curves.items()}
        layers[one.layer] = {
            "curves": curves, "means": means, "above": float(np.mean(above)), "below": float(np.mean(below)),
            "rank": float(np.mean(rank)), "spectra": [_rounded(one.scored.means(i).sort(descending=True).values)
                                                      for i in range(len(report.names))],
        }  # fmt: skip
    means = {layer: found["means"] for layer, found in layers.items()}
    closest = min(means, key=lambda layer: means[layer]["ours"] - means[layer]["untrained"])
    ctx.measure(
        "matched-beyond-untrained",
        ours=means[closest]["ours"],
        baseline=means[closest]["untrained"],
        layer=closest,
        by_layer={layer: [m["ours"], m["untrained"]] for layer, m in means.items()},
    )
    first = means[subjects.layers[0]]
    ctx.measure("untrained-match-too", ours=first["untrained"], baseline=_shuffled_untrained(ctx, subjects))
    widths = np.array([len(found["curves"]["ours"][0]) for found in layers.values()])
    for claim, share in (("some-units-are-shared", "above"), ("some-units-are-not", "below")):
        shares = [found[share] for found in layers.values()]
        ctx.measure(
            claim, ours=float(np.average(shares, weights=widths)), by_layer=dict(zip(layers, shares, strict=True))
        )
    convolutions = [means[layer]["ours"] for layer in subjects.layers[: subjects.convolutions]]
    ctx.measure(
        "middle-layers-match-less", ours=min(convolutions[1:-1]), baseline=min(convolutions[0], convolutions[-1]),
        by_layer=convolutions,
    )  # fmt: skip
    shown = report[_shown(report)]
    tables = correlation_tables(shown.scored.correlation(), shown.match())
    return {"layers": layers, "tables": {name: _rounded(table) for name, table in tables.items()}}


def _shuffled_untrained(ctx: Context, subjects: Subjects) -> float:
    """Untrained networks that do not even see the same images: what is left is chance."""
    first, second = list(subjects.models.values())[:2]
    fresh = [untrained_copy(model, ctx.seed + 1 + i) for i, model in enumerate((first, second))]
    report = convergence_report(
        fresh, subjects.layers[0], _batches(subjects.x), ("shuffled",), held_out=_batches(subjects.x_test),
        within=False, exemplars=0, seed=ctx.seed,
    )  # fmt: skip
    return next(iter(report)).match(null="shuffled").mean


# ---------------------------------------------------------------------------------------------------------- few to one


def _maps(ctx: Context, report: ConvergenceReport) -> dict[str, Any]:
    layers: dict[str, Any] = {}
    for one in report:
        p = one.chosen.widths[0]
        pair, held = one.chosen.pair(0, 1), one.scored.pair(0, 1)
        path = sparse_path(pair, points=POINTS, refit=True).scored(held)
        table = path.to_frame()
        few, whole = path.at_most(p / 4), path.maps[-1]
        layers[one.layer] = {
            "active": table["active"].tolist(), "error": table["error"].tolist(), "units": p,
            "single": float(table["best_single"].iloc[-1]), "few": few.mean_error, "few_active": few.mean_active,
            "all": whole.mean_error, "canonical": one.subspaces().mean,
        }  # fmt: skip
    for claim, key in (("subspaces-are-shared", "all"), ("few-units-are-enough", "few")):
        worst = max(layers.values(), key=lambda found: found[key] / found["single"])
        by_layer = {layer: [found[key], found["single"]] for layer, found in layers.items()}
        ctx.measure(claim, ours=worst[key], baseline=worst["single"], by_layer=by_layer)
    return layers


# -------------------------------------------------------------------------------------------------------------- groups


def _groups(ctx: Context, report: ConvergenceReport) -> dict[str, Any]:
    """The first two networks' units, a fifth as many groups."""
    layers: dict[str, Any] = {}
    for one in report:
        two = one.chosen.only(0, 1)
        k = max(2, sum(two.widths) // 5)
        ours = spectral_unit_clusters(two, k, ctx.seed)
        null = spectral_unit_clusters(one.nulls["shuffled"][0].only(0, 1), k, ctx.seed)
        layers[one.layer] = {
            "k": k, "mixed": ours.mixed, "null": null.mixed,
            "balance": float(ours.balance.double().mean()), "overlap": float(ours.overlap.nanmean()),
        }  # fmt: skip
        if one.layer == _shown(report):
            layers[one.layer] |= {"blocks": _blocks(ours), "null_blocks": _blocks(null)}
    ctx.measure(
        "groups-are-mixed",
        ours=min(found["mixed"] for found in layers.values()),
        baseline=max(found["null"] for found in layers.values()),
        by_layer={layer: [found["mixed"], found["null"]] for layer, found in layers.items()},
    )
    return layers


def _shown(report: ConvergenceReport) -> str:
    """The layer whose matrices are drawn."""
    return report.layers[min(1, len(report.layers) - 1)].layer


def _blocks(clusters: UnitClusters) -> dict[str, Any]:
    order = clusters.order
    return {
        "table": _rounded(clusters.units.correlation[order][:, order].abs()),
        "owner": clusters.units.network[order].tolist(),
        "ends": clusters.ends,
    }


# -------------------------------------------------------------------------------- mutual information, and exact zeros


def _checks(ctx: Context, subjects: Subjects) -> dict[str, Any]:
    """The first layer of the first two networks: information beside correlation, subgradients beside the optimum."""
    first, second = list(subjects.models.values())[:2]
    a, b = _positions(ctx, (first, second), subjects)
    draw = generator(ctx.seed + 1)
    table = unit_correlation(a, b)
    by_correlation = match_units(table)
    by_information = match_units(unit_mutual_information(a, b)).scored(table)
    same = (by_information.partner == by_correlation.partner).double().mean()
    ctx.measure("information-agrees", ours=by_information.mean, baseline=by_correlation.mean, same_partner=float(same))
    by_size = match_units(table, signed=False)
    ctx.measure(
        "information-agrees-in-size",
        ours=float(by_information.score.abs().nanmean()),
        baseline=float(by_size.score.abs().nanmean()),
        same_partner=float((by_information.partner == by_size.partner).double().mean()),
    )
    apart = b[torch.randperm(len(b), generator=draw)]
    bias = {
        name: float(unit_mutual_information(a, apart, bias=name).nanmean()) for name in ("none", "cells", "official")
    }
    ctx.measure("bits-are-not-nats", ours=abs(bias["cells"]), baseline=abs(bias["official"]), **bias)
    exact = sparse_map(a, b, PENALTY)
    steps = sparse_map(a, b, PENALTY, "sgd", steps=STEPS, batch_size=1024, seed=ctx.seed)
    zero = [float((one.weight[one.live] == 0).double().mean()) for one in (exact, steps)]
    value = [one.mean_error + PENALTY * float(one.weight[one.live].abs().sum(1).mean()) for one in (exact, steps)]
    ctx.measure("zeros-are-zero", ours=zero[0], baseline=zero[1], objective=value)
    order = exact.error.nan_to_num(1.0).argsort()
    return {
        "exact": _rounded(exact.weight[order]), "steps": _rounded(steps.weight[order]), "objective": value,
        "sizes": {"exact": _rounded(exact.weight.abs().flatten().sort(descending=True).values, 6),
                  "steps": _rounded(steps.weight.abs().flatten().sort(descending=True).values, 6)},
    }  # fmt: skip


def _positions(ctx: Context, models: tuple[nn.Module, nn.Module], subjects: Subjects) -> list[Tensor]:
    """The first layer of two networks at the same positions, drawn from all batches: ``[ROWS, units]`` of each."""
    batches, draw, layer = _batches(subjects.x), generator(ctx.seed), subjects.layers[0]
    rows: list[list[Tensor]] = [[], []]
    for batch in batches:
        chosen: Tensor | None = None
        for model, kept in zip(models, rows, strict=True):
            with torch.no_grad(), capture(model, layer) as seen:
                model(batch.to(ctx.device))
            values = unit_samples(seen[layer])
            if chosen is None:
                chosen = torch.randperm(len(values), generator=draw)[: -(-ROWS // len(batches))]
            kept.append(values[chosen.to(values.device)].cpu().double())
    return [torch.cat(kept) for kept in rows]


# ----------------------------------------------------------------------------------------------- one network in another


def _stitched(ctx: Context, report: ConvergenceReport, subjects: Subjects) -> dict[str, Any]:
    """The second network's later layers on the first one's features, turned into its own by a layer between them."""
    names = list(subjects.models)
    right: dict[str, dict[str, float]] = {}
    for one in report:
        pair = one.chosen.pair(0, 1)
        between = {
            "all units": sparse_map(pair, l1=0.0).layer(),
            "one to one": matched_layer(one.chosen.match(0, 1), pair),
        }
        models = (subjects.models[names[0]], subjects.models[names[1]])
        right[one.layer] = {
            name: _accuracy_through(models, one.layer, layer.to(ctx.device), subjects)
            for name, layer in between.items()
        }
    mean = {name: float(np.mean([found[name] for found in right.values()])) for name in ("all units", "one to one")}
    ctx.measure("maps-carry-the-function", ours=mean["all units"], baseline=mean["one to one"], by_layer=right)
    return right


@torch.no_grad()
def _accuracy_through(models: tuple[nn.Module, nn.Module], layer: str, between: nn.Module, subjects: Subjects) -> float:
    first, second = models
    device, right = next(first.parameters()).device, 0
    for x, y in zip(subjects.x_test.split(BATCH), subjects.y_test.split(BATCH), strict=True):
        x = x.to(device)
        with capture(first, layer) as seen:
            first(x)
        with replace(second, {layer: between(seen[layer])}):
            right += int((second(x).argmax(1).cpu() == y).sum())
    return right / len(subjects.y_test)


# ------------------------------------------------------------------------------------------------------------ examples


def _examples(report: ConvergenceReport, subjects: Subjects, pairs: int = 3, images: int = 6) -> dict[str, Any]:
    """Images on which the best and the worst matched units of the last layer are most active."""
    last = report.layers[-1]
    table = last.most_alike(len(last.match().matched))
    both = torch.cat([subjects.x, subjects.x_test])  # counted through both loaders
    pairs_seen = zip(table["unit"].tolist(), table["partner"].tolist(), strict=True)
    table = table[[_peak(last, i, j) > 0 for i, j in pairs_seen]]  # units that are ever active
    found: dict[str, Any] = {}
    for name, rows in (("most alike", table.head(pairs)), ("least alike", table.tail(pairs))):
        found[name] = [
            {"score": score, "images": [[_rounded(both[i].mean(0)) for i in ids[:images]] for ids in top]}
            for score, *top in zip(*(rows[c].tolist() for c in ("score", "top_first", "top_second")), strict=True)
        ]
    return found


def _peak(layer: LayerConvergence, unit: int, partner: int) -> float:
    return min(float(layer.top[0].values[unit].min()), float(layer.top[1].values[partner].min()))


def _rounded(x: Tensor, digits: int = 3) -> list[Any]:
    return x.detach().cpu().double().round(decimals=digits).tolist()


# ------------------------------------------------------------------------------------------------------------- figures


def draw(records: list[dict]) -> list[Plate]:
    """The records of all seeds, as figures with captions."""
    with style():
        return [
            _matched_plate(records), _correlations_plate(records), _sparse_plate(records), _groups_plate(records),
            _stitched_plate(records), _weights_plate(records), _spectra_plate(records), _examples_plate(records),
        ]  # fmt: skip


def _matched_plate(records: list[dict]) -> Plate:
    layers = records[0]["layers"]
    figure, axes = new_figure(2.6 * len(layers) + 0.4, 3.1, len(layers), sharey=True, squeeze=False)
    looks = (
        ("semi", "each its best partner", COLOURS["accent"]),
        ("ours", "one to one", COLOURS["ours"]),
        ("untrained", "untrained networks", COLOURS["baseline"]),
        ("shuffled", "images shuffled", COLOURS["paper"]),
    )
    for ax, layer in zip(axes[0], layers, strict=True):
        rows = [r["matched"]["layers"][layer] for r in records]
        for name, label, colour in looks:
            curves = [curve for row in rows for curve in row["curves"][name]]
            grid = np.linspace(0, 1, 60)
            even = [np.interp(grid, np.linspace(0, 1, len(curve)), curve) for curve in curves if curve]
            band(ax, 100 * grid, even, colour, label)
        mean = np.mean([row["means"]["ours"] for row in rows])
        ax.set(title=layer, xlabel="units, best first (%)", ylim=(-0.25, 1.03))
        ax.text(0.97, 0.96, f"mean {mean:.2f}", transform=ax.transAxes, ha="right", va="top", color=COLOURS["ours"])
    axes[0, 0].set_ylabel("correlation of the pair")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return Plate(
        "matched",
        figure,
        "Correlation of matched units, the best first, on images that the pairs were not chosen on. Untrained networks "
        "match too, since they see the same images: what training adds lies between blue and red. With images shuffled "
        "nothing is left. Mean over seeds and pairs of networks, band: their range.",
    )


def _correlations_plate(records: list[dict]) -> Plate:
    tables, layers = records[0]["matched"]["tables"], records[0]["layers"]
    figure, axes = new_figure(11.2, 2.9, 4, squeeze=False)
    titles = {"first": "inside network 1", "second": "inside network 2"}
    image: Any = None
    for ax, (name, table) in zip(axes[0], tables.items(), strict=True):
        image = ax.imshow(np.array(table), cmap=DIVERGING, vmin=-1, vmax=1, interpolation="nearest", aspect="auto")
        ax.set_box_aspect(1)  # unequal widths, equal frames
        ax.set(title=titles.get(name, name), xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.grid(False)
    figure.colorbar(image, ax=list(axes[0]), label="correlation", shrink=0.85)
    return Plate(
        "correlations",
        figure,
        f"Correlations of the units of {layers[min(1, len(layers) - 1)]} on held-out images. Between two networks no "
        "order is to be seen until the second one's units are paired with the first one's, the best pair first: then "
        "the diagonal stands out, and fades towards the end.",
    )


def _sparse_plate(records: list[dict]) -> Plate:
    layers = records[0]["layers"]
    figure, axes = new_figure(2.6 * len(layers) + 0.4, 3.1, len(layers), sharey=True, squeeze=False)
    for ax, layer in zip(axes[0], layers, strict=True):
        rows = [r["maps"][layer] for r in records]
        for number, row in enumerate(rows):
            label = "sparse map" if number == 0 else None
            ax.plot(row["active"], row["error"], "o-", markersize=3, color=COLOURS["ours"], alpha=0.75, linewidth=1.2,
                    label=label)  # fmt: skip
        single = float(np.mean([row["single"] for row in rows]))
        ax.axhline(single, color=COLOURS["baseline"], linestyle="--", linewidth=1.2)
        ax.plot([1], [single], "D", color=COLOURS["baseline"], markersize=5, label="one best partner")
        ax.set(title=layer, xlabel="units in use for each", ylim=(0, 0.55), xlim=(-1, None))
    axes[0, 0].set_ylabel("half the mean squared error")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return Plate(
        "sparse",
        figure,
        "How well few units of one network predict a unit of another, on held-out images: from none (0.5) to all. What "
        "one network keeps in a unit, another spreads over several: a handful predicts far better than the one best "
        "partner. One line for each seed.",
    )


def _groups_plate(records: list[dict]) -> Plate:
    layers = records[0]["layers"]
    figure, axes = new_figure(10.6, 3.6, 3, squeeze=False, width_ratios=[1, 1, 0.95])
    found = next(g for g in records[0]["groups"].values() if "blocks" in g)
    for ax, key, title in zip(axes[0], ("blocks", "null_blocks"), ("two networks", "images shuffled"), strict=False):
        block_plot(torch.tensor(found[key]["table"]), found[key]["owner"], found[key]["ends"], ax)
        ax.set(title=title, xticks=[], yticks=[], xlabel="", ylabel="")
    figure.colorbar(axes[0, 1].images[0], ax=list(axes[0, :2]), label="size of the correlation", shrink=0.8)
    ax, at = axes[0, 2], np.arange(len(layers))
    for key, colour, label in (("mixed", COLOURS["ours"], "two networks"), ("null", COLOURS["paper"], "shuffled")):
        values = 100 * np.array([[r["groups"][layer][key] for layer in layers] for r in records])
        ax.vlines(at, values.min(0), values.max(0), color=colour, linewidth=2.5, alpha=0.4)
        ax.plot(at, values.mean(0), "o", color=colour, markersize=7, label=label, clip_on=False)
    ax.set(xticks=at, xticklabels=layers, xlim=(-0.5, len(layers) - 0.5), ylim=(-3, 105), title="groups of both (%)")
    ax.legend(loc="center right")
    return Plate(
        "groups",
        figure,
        f"Spectral groups (framed) of the units of two networks together, {layers[min(1, len(layers) - 1)]}; the strip "
        "says whose unit it is, red or blue. Left: most groups hold units of both, and these correlate. Middle: with "
        "images shuffled a group is one network's alone. Right: share of groups with units of both; bar: range.",
    )


def _stitched_plate(records: list[dict]) -> Plate:
    layers = records[0]["layers"]
    figure, axes = new_figure(5.6, 3.2, squeeze=False)
    ax, at = axes[0, 0], np.arange(len(layers))
    own = float(np.mean([r["accuracy"] for r in records]))
    ax.axhline(100 * own, color=COLOURS["neutral"], linestyle="--", linewidth=1.2, label="the networks themselves")
    for offset, key, colour, label in (
        (-0.18, "all units", COLOURS["ours"], "linear map of all units"),
        (0.18, "one to one", COLOURS["baseline"], "units one to one"),
    ):
        values = 100 * np.array([[r["stitched"][layer][key] for layer in layers] for r in records])
        ax.bar(at + offset, values.mean(0), 0.34, color=colour, label=label)
        ax.vlines(at + offset, values.min(0), values.max(0), color=COLOURS["neutral"], linewidth=1.2)
    ax.set(
        xticks=at, xticklabels=layers, ylim=(0, 105), ylabel="accuracy (%)", xlabel="layer behind which they are joined"
    )
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return Plate(
        "stitched",
        figure,
        "One network up to a layer, then another one's later layers. With a linear map of all units between them the "
        "second network understands the first; with each unit put in the place of its partner it understands less. "
        "Bars: mean over seeds, lines: their range.",
    )


def _weights_plate(records: list[dict]) -> Plate:
    found, layer = records[0]["checks"], records[0]["layers"][0]
    figure, axes = new_figure(10.4, 3.2, 3, squeeze=False, width_ratios=[1, 1, 1.1])
    limit = 0.6
    image: Any = None
    for ax, key, title in zip(axes[0], ("exact", "steps"), ("solved", "subgradient steps"), strict=False):
        table = np.array(found[key])
        image = ax.imshow(table, cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation="nearest", aspect="auto")
        ax.set(title=title, xlabel="unit of network 1")
        ax.grid(False)
    axes[0, 0].set_ylabel("unit of network 2, best predicted first")
    figure.colorbar(image, ax=list(axes[0, :2]), label="weight", shrink=0.85)
    ax = axes[0, 2]
    for key, colour, label in (
        ("steps", COLOURS["baseline"], "subgradient steps"),
        ("exact", COLOURS["ours"], "solved"),
    ):
        sizes = np.array([[max(v, 1e-6) for v in r["checks"]["sizes"][key]] for r in records])
        band(ax, np.linspace(0, 100, sizes.shape[1]), sizes, colour, label, logarithmic=True)
    ax.set(yscale="log", ylim=(1e-5, 3), xlabel="weights, largest first (%)", ylabel="size", title="sizes of weights")
    ax.legend(loc="upper right")
    return Plate(
        "weights",
        figure,
        f"A sparse map between two networks, {layer}, one penalty. Solved exactly, most weights are zero and the line "
        "ends; the published steps leave small weights everywhere, and a threshold has to say which of them count.",
    )


def _spectra_plate(records: list[dict]) -> Plate:
    layers = records[0]["layers"]
    figure, axes = new_figure(2.6 * len(layers) + 0.4, 2.8, len(layers), squeeze=False)
    for ax, layer in zip(axes[0], layers, strict=True):
        for i, values in enumerate(records[0]["matched"]["layers"][layer]["spectra"]):
            ax.plot(range(1, len(values) + 1), values, color=CYCLE[i % len(CYCLE)], label=f"network {i + 1}")
        ax.set(title=layer, xlabel="unit, most active first", ylim=(0, None))
    axes[0, 0].set_ylabel("mean activation")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return Plate(
        "spectra",
        figure,
        "Mean activation of each unit, the most active first: networks from different seeds have nearly the same "
        "profile, although the units behind it differ.",
    )


def _examples_plate(records: list[dict]) -> Plate:
    found = records[0]["examples"]
    rows = sum(len(pairs) for pairs in found.values())
    columns = max((len(one["images"][0]) for pairs in found.values() for one in pairs), default=1)
    figure, axes = new_figure(8.6, 0.72 * rows + 0.9, 2 * columns + 1, rows, squeeze=False,
                              width_ratios=[1] * columns + [0.4] + [1] * columns)  # fmt: skip
    for ax in axes.flat:
        ax.axis("off")
    row = 0
    for name, pairs in found.items():
        for one in pairs:
            for side, images in enumerate(one["images"]):
                for column, image in enumerate(images):
                    axes[row, column + side * (columns + 1)].imshow(np.array(image), cmap="gray_r")
            left, colour = axes[row, 0], COLOURS["ours" if name == "most alike" else "neutral"]
            place = {"transform": left.transAxes, "ha": "right", "va": "center"}
            left.text(-0.25, 0.5, f"{one['score']:.2f}", color=colour, **place)
            row += 1
    axes[0, columns // 2].set_title("network 1", loc="center")
    axes[0, columns + 1 + columns // 2].set_title("network 2", loc="center")
    return Plate(
        "examples",
        figure,
        "Images on which matched units of the last layer are most active, with the pair's correlation on the left: the "
        "three best pairs in red, the three worst in grey, one network on each side.",
    )
