"""Diffusion spectral entropy, measured: intrinsic dimension under noise, label corruption, learning against memorising.

``small`` uses made data and scikit-learn's digits. ``full`` adds CIFAR-10 from the user's folder (three ways of
training a ResNet-18, and the initialisation study) and, where the user has saved some, features of pretrained models.
"""

import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from broadsheet.data.images import load_cifar10
from broadsheet.errors import InvalidInput, need
from broadsheet.geometry.diffusion_spectral_entropy import (
    BandwidthWarning,
    RepresentationMonitor,
    Snapshot,
    adjacency_spectral_mutual_information,
    compare_initialisations,
    diffusion_eigenvalues,
    diffusion_spectral_entropy,
    diffusion_spectral_mutual_information,
    nearest_neighbour_mutual_information,
    rank_models,
    reinitialise,
    shannon_entropy_binned,
    shannon_mutual_information_binned,
    spectral_entropy,
)
from broadsheet.lab import Context, Plate
from broadsheet.nn.plotting import COLOURS, CYCLE, band, style
from broadsheet.nn.seeding import generator, seeded
from broadsheet.nn.training import cosine_schedule, fit

SMALL: dict[str, Any] = {
    "samples": 500,
    "ambient": 2048,
    "dimensions": (20, 51, 102, 512, 1024, 2048),
    "blob_samples": 1200,
    "blob_dimensions": (20, 100, 1000),
    "digit_epochs": 80,
    "digit_points": (0, 1, 2, 4, 8, 16, 32, 56, 80),
}
SIZES = {"small": SMALL, "full": {**SMALL, "blob_samples": 5000}}
CIFAR: dict[str, Any] = {
    "epochs": 200,
    "initialisation_epochs": 40,
    "batch_size": 128,
    "learning_rate": 1e-4,
    "width": 64,
    "measured": 5000,
    "snapshots": 21,
    "mine_steps": 2000,
}
NOISES = (0.01, 0.1, 0.5)
CORRUPTIONS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
SHOWN = 102  # dimensions from here on are those of the claim; smaller ones are where heavy noise drowns them


def run(ctx: Context) -> dict:
    """Measure every claim for one seed."""
    with warnings.catch_warnings():
        # A network before training sits far below the bandwidth and a noisy cloud far above it: that is what is
        # measured.
        warnings.simplefilter("ignore", BandwidthWarning)
        sizes = SIZES[ctx.preset]
        if ctx.preset == "full":
            _cifar10(ctx.data_dir / "cifar10")  # what is missing is said before an hour of work, not after it
        record: dict[str, Any] = {
            "intrinsic": _intrinsic(ctx, sizes),
            "corruption": _corruption(ctx, sizes),
            "digits": _digits(ctx, sizes),
            "definition": _definition(ctx),
        }
        if ctx.preset == "full":
            record["cifar"] = _cifar(ctx)
            record["ranking"] = _ranking(ctx)
        return record


# --- (i) intrinsic dimension -----------------------------------------------------------------------------------------


def uniform_cloud(samples: int, ambient: int, dimension: int, noise: float, seed: int) -> np.ndarray:
    """Points uniform in [-1, 1] in the first ``dimension`` coordinates; uniform noise of that amplitude in all."""
    draw = np.random.default_rng([seed, dimension])
    points = np.zeros((samples, ambient))
    points[:, :dimension] = draw.uniform(-1, 1, size=(samples, dimension))
    return points + noise * draw.uniform(-1, 1, size=points.shape)


def _intrinsic(ctx: Context, sizes: dict[str, Any]) -> dict[str, Any]:
    dimensions = [d for d in sizes["dimensions"] if d <= sizes["ambient"]]
    times = (1, 2)
    dse = np.zeros((len(NOISES), len(dimensions), len(times)))
    cse = np.zeros((len(NOISES), len(dimensions)))
    decay: dict[str, list[float]] = {}
    with ctx.progress.task("intrinsic dimension", total=len(NOISES) * len(dimensions)) as task:
        for i, noise in enumerate(NOISES):
            for j, dimension in enumerate(dimensions):
                cloud = uniform_cloud(sizes["samples"], sizes["ambient"], dimension, noise, ctx.seed)
                entropy = diffusion_spectral_entropy(cloud, sigma=10.0, t=list(times))
                dse[i, j], cse[i, j] = entropy.value, shannon_entropy_binned(cloud)
                if noise == NOISES[1] and entropy.eigenvalues is not None:
                    decay[str(dimension)] = entropy.eigenvalues.tolist()
                task.advance()
    shown = [j for j, d in enumerate(dimensions) if d >= SHOWN]
    quiet = [i for i, noise in enumerate(NOISES) if noise <= 0.1]
    ranks = [float(spearmanr(np.array(dimensions)[shown], dse[i, shown, 0]).statistic) for i in quiet]
    ctx.measure("dimension-order", ours=min(ranks))
    ctx.measure("binned-entropy-is-blind", ours=float(np.ptp(cse[:, shown])))
    loud = NOISES.index(0.5)
    low = [j for j, d in enumerate(dimensions) if d <= SHOWN]
    one_step, two_steps = (float(np.ptp(dse[loud, low, k])) for k in range(2))
    ctx.measure("heavy-noise-t1", ours=one_step)
    ctx.measure("heavy-noise-t2", ours=two_steps, baseline=one_step)
    return {
        "dimensions": dimensions,
        "noises": list(NOISES),
        "dse_t1": dse[..., 0],
        "dse_t2": dse[..., 1],
        "cse": cse,
        "ceiling": math.log2(sizes["samples"]),
        "eigenvalues": decay,
    }


# --- (ii) label corruption -------------------------------------------------------------------------------------------


def corrupt(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Replace a share of the labels, drawn at random, by uniformly random ones."""
    draw = np.random.default_rng(seed)
    replaced = draw.random(len(labels)) < share
    random = draw.integers(0, labels.max() + 1, size=len(labels))
    return np.where(replaced, random, labels)


def blob_cloud(samples: int, dimension: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three isotropic blobs with Gaussian noise of standard deviation 0.5 on top."""
    from sklearn.datasets import make_blobs

    points, labels = (np.asarray(one) for one in make_blobs(samples, dimension, centers=3, random_state=seed)[:2])
    return points + 0.5 * np.random.default_rng(seed).normal(size=points.shape), labels


def _corruption(ctx: Context, sizes: dict[str, Any]) -> dict[str, Any]:
    measured: dict[str, dict[str, list[float]]] = {}
    dimensions = sizes["blob_dimensions"]
    with ctx.progress.task("label corruption", total=len(dimensions) * len(CORRUPTIONS)) as task:
        for dimension in dimensions:
            points, labels = blob_cloud(sizes["blob_samples"], dimension, ctx.seed)
            rows: dict[str, list[float]] = {"dsmi": [], "dsmi_error": [], "csmi": [], "asmi": [], "knn": []}
            for share in CORRUPTIONS:
                wrong = corrupt(labels, share, ctx.seed)
                value = diffusion_spectral_mutual_information(points, wrong, sigma="sqrt_dim", seed=ctx.seed)
                rows["dsmi"].append(float(value))
                rows["dsmi_error"].append(float(value.standard_error))
                rows["csmi"].append(float(shannon_mutual_information_binned(points, wrong, bins=5, seed=ctx.seed)))
                rows["asmi"].append(
                    float(adjacency_spectral_mutual_information(points, wrong, sigma="sqrt_dim", seed=ctx.seed))
                )
                rows["knn"].append(float(nearest_neighbour_mutual_information(points, wrong)))
                task.advance()
            measured[str(dimension)] = rows
    first, last = measured[str(dimensions[0])], measured[str(dimensions[-1])]
    ctx.measure("corruption-order", ours=float(spearmanr(CORRUPTIONS, first["dsmi"]).statistic))
    ctx.measure("binned-information-is-blind", ours=float(np.ptp(first["csmi"])))
    ctx.measure("more-than-nearest-neighbours", ours=first["dsmi"][0], baseline=first["knn"][0])
    ctx.measure("clean-above-corrupted-high-dimension", ours=last["dsmi"][0], baseline=last["dsmi"][1])
    return {"corruptions": list(CORRUPTIONS), "by_dimension": measured}


# --- (iii) learning against memorising, on digits --------------------------------------------------------------------


def digit_network() -> nn.Sequential:
    """64-256-128-10; the followed layer is the ReLU named ``features``."""
    model = nn.Sequential()
    model.add_module("hidden", nn.Linear(64, 256))
    model.add_module("relu", nn.ReLU())
    model.add_module("second", nn.Linear(256, 128))
    model.add_module("features", nn.ReLU())
    model.add_module("out", nn.Linear(128, 10))
    return model


def _digits(ctx: Context, sizes: dict[str, Any]) -> dict[str, Any]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x, held_x, y, held_y = train_test_split(
        images.astype(np.float32) / 16, labels, test_size=0.4, random_state=ctx.seed, stratify=labels
    )
    held = [(torch.from_numpy(held_x), torch.from_numpy(held_y))]
    results: dict[str, Any] = {"log2_samples": math.log2(len(held_x))}
    for regime in ("true", "shuffled"):
        targets = y if regime == "true" else np.random.default_rng(ctx.seed).permutation(y)
        with seeded(ctx.seed):
            model = digit_network().to(ctx.device)
        monitor = RepresentationMonitor(model, "features", held, sigma=10.0, seed=ctx.seed)
        monitor.record(0)
        order = generator(ctx.seed)
        data = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(targets))
        loader = torch.utils.data.DataLoader(data, batch_size=128, shuffle=True, generator=order)
        per_epoch, wanted = len(loader), set(sizes["digit_points"])

        def follow(step: int, _: nn.Module, monitor=monitor, per_epoch=per_epoch, wanted=wanted) -> None:
            if step % per_epoch == 0 and step // per_epoch in wanted:
                monitor.record(step // per_epoch)

        fit(
            model,
            _cross_entropy,
            loader,
            steps=sizes["digit_epochs"] * per_epoch,
            optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
            progress=ctx.progress,
            description=f"digits, {regime} labels",
            callback=follow,
        )
        activations, _ = monitor.activations()
        results[regime] = {
            **{name: values.tolist() for name, values in monitor.to_frame().items()},
            "csmi": float(shannon_mutual_information_binned(activations, held_y)),
            "knn": float(nearest_neighbour_mutual_information(activations, held_y)),
        }
    true, shuffled = results["true"], results["shuffled"]
    ctx.measure("learning-not-memorising", ours=true["dsmi_labels"][-1], baseline=shuffled["dsmi_labels"][-1])
    ctx.measure("entropy-grows", ours=true["dse"][-1], baseline=true["dse"][0])
    ctx.measure(
        "sharper-than-nearest-neighbours",
        ours=true["dsmi_labels"][-1] / max(shuffled["dsmi_labels"][-1], 1e-9),
        baseline=true["knn"] / max(shuffled["knn"], 1e-9),
    )
    return results


def _cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    device = next(model.parameters()).device
    return nn.functional.cross_entropy(model(inputs.to(device)), targets.to(device))


# --- what the code computes against what the paper defines -----------------------------------------------------------


def _definition(ctx: Context) -> dict[str, Any]:
    draw = np.random.default_rng(ctx.seed)
    dense, sparse = draw.normal(size=(500, 5)), 5 * draw.normal(size=(100, 5))
    uneven = np.concatenate([dense, sparse])
    even = uniform_cloud(500, 64, 64, 0.1, ctx.seed)
    gaps = {}
    for name, cloud, sigma in (("even", even, 5.0), ("uneven", uneven, 5.0)):
        code, paper = (
            float(diffusion_spectral_entropy(cloud, sigma, normalisation=n)) for n in ("walk", "anisotropic")
        )
        gaps[name] = abs(code - paper)
    eigenvalues = diffusion_eigenvalues(uniform_cloud(500, 2048, 512, 0.1, ctx.seed))
    rounded = spectral_entropy(eigenvalues.half().double())
    ctx.measure("code-follows-definition", ours=gaps["uneven"])
    ctx.measure("half-precision-cache", ours=abs(rounded - spectral_entropy(eigenvalues)))
    return gaps


# --- CIFAR-10 --------------------------------------------------------------------------------------------------------


def _cifar10(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (N, 3, 32, 32) in [0, 1] and labels (N,)."""
    parts = [load_cifar10(folder, split) for split in ("train", "test")]
    return tuple(torch.from_numpy(a) for part in parts for a in (part.as_float(), part.labels))  # type: ignore[return-value]


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.skip = nn.Identity()
        if stride != 1 or inside != outside:
            self.skip = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class SmallResNet(nn.Module):
    """ResNet-18 for 32 x 32 images (3 x 3 stem, no pooling in front); ``features`` is the penultimate layer."""

    def __init__(self, width: int = 64, n_classes: int = 10) -> None:
        super().__init__()
        blocks: list[nn.Module] = [
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        inside = width
        for level in range(4):
            outside = width * 2**level
            blocks += [_Block(inside, outside, 1 if level == 0 else 2), _Block(outside, outside, 1)]
            inside = outside
        self.body = nn.Sequential(*blocks)
        self.features = nn.Flatten()
        self.out = nn.Linear(inside, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.features(self.body(x).mean((2, 3))))


def augment(images: Tensor, seed: torch.Generator) -> Tensor:
    """Random crops after padding by 4, flips, and changes of brightness and contrast, for contrastive views."""
    n, _, height, width = images.shape
    padded = nn.functional.pad(images, (4, 4, 4, 4), mode="reflect")
    tops, lefts = (torch.randint(0, 9, (n,), generator=seed).to(images.device) for _ in range(2))
    row = tops[:, None] + torch.arange(height, device=images.device)
    column = lefts[:, None] + torch.arange(width, device=images.device)
    flip = (torch.rand(n, generator=seed) < 0.5).to(images.device)
    column = torch.where(flip[:, None], column.flip(1), column)
    views = padded[torch.arange(n, device=images.device)[:, None, None], :, row[:, :, None], column[:, None, :]]
    views = views.permute(0, 3, 1, 2)
    gain, shift = (0.4 * (2 * torch.rand(n, 1, 1, 1, generator=seed).to(images.device) - 1) for _ in range(2))
    return ((views - 0.5) * (1 + gain) + 0.5 + 0.5 * shift).clamp(0, 1)


def contrastive_loss(first: Tensor, second: Tensor, temperature: float = 0.5) -> Tensor:
    """Normalised temperature-scaled cross-entropy between two views of each image (SimCLR)."""
    both = nn.functional.normalize(torch.cat([first, second]), dim=1)
    similarity = both @ both.T / temperature
    similarity = similarity.masked_fill(torch.eye(len(both), dtype=torch.bool, device=both.device), -torch.inf)
    n = len(first)
    partner = torch.cat([torch.arange(n, 2 * n), torch.arange(n)]).to(both.device)
    return nn.functional.cross_entropy(similarity, partner)


def _cifar(ctx: Context) -> dict[str, Any]:
    x, y, test_x, test_y = _cifar10(ctx.data_dir / "cifar10")
    chosen = torch.randperm(len(test_x), generator=generator(ctx.seed))[: CIFAR["measured"]]
    size = CIFAR["batch_size"]
    held = [(test_x[chosen[i : i + 500]], test_y[chosen[i : i + 500]]) for i in range(0, len(chosen), 500)]
    record: dict[str, Any] = {"regimes": {}}

    def train(name: str, model: nn.Module, targets: Tensor, epochs: int, views: bool = False) -> RepresentationMonitor:
        monitor = RepresentationMonitor(
            model, "features", held, sigma=10.0, max_samples=CIFAR["measured"], seed=ctx.seed
        )
        history = ctx.checkpoint / f"{name}-history.json"  # beside the training's own checkpoint
        if history.exists():
            monitor.history = [Snapshot(**one) for one in json.loads(history.read_text())]
        else:
            monitor.record(0)
        data = torch.utils.data.TensorDataset(x, targets)
        loader = torch.utils.data.DataLoader(
            data, size, shuffle=True, drop_last=len(x) > size, generator=generator(ctx.seed)
        )
        noise = generator(ctx.seed)
        steps = epochs * len(loader)
        optimizer = torch.optim.AdamW(model.parameters(), lr=CIFAR["learning_rate"])
        every = max(1, steps // max(1, CIFAR["snapshots"] - 1))

        def loss(model: nn.Module, batch: Any) -> Tensor:
            images, labels = batch
            images, labels = images.to(ctx.device), labels.to(ctx.device)
            if views:
                return contrastive_loss(model(augment(images, noise)), model(augment(images, noise)))
            return nn.functional.cross_entropy(model(images), labels)

        def follow(step: int, _: nn.Module) -> None:
            if step % every == 0:
                epoch = step / len(loader)
                monitor.history = [one for one in monitor.history if one.epoch < epoch]  # seen before an interruption
                monitor.record(epoch)
                history.parent.mkdir(parents=True, exist_ok=True)
                history.write_text(json.dumps([asdict(one) for one in monitor.history]))

        fit(
            model,
            loss,
            loader,
            steps=steps,
            optimizer=optimizer,
            scheduler=cosine_schedule(optimizer, steps, warmup=min(10, max(epochs // 5, 0)) * len(loader)),
            generators=[noise],
            checkpoint=ctx.checkpoint / name,
            progress=ctx.progress,
            description=f"CIFAR-10, {name}",
            callback=follow,
        )
        if monitor.history[-1].epoch < epochs:  # uneven division
            monitor.record(epochs)
        return monitor

    def network() -> SmallResNet:
        return SmallResNet(CIFAR["width"])

    wrong = y[torch.randperm(len(y), generator=generator(ctx.seed))]
    for name, targets, views in (("supervised", y, False), ("contrastive", y, True), ("wrong labels", wrong, False)):
        with seeded(ctx.seed):
            model = network().to(ctx.device)
            if views:
                model.out = nn.Linear(model.out.in_features, 128).to(ctx.device)  # the projection head
        monitor = train(name.replace(" ", "-"), model, targets, CIFAR["epochs"], views)
        activations, labels = monitor.activations()
        frame = {column: values.tolist() for column, values in monitor.to_frame().items()}
        frame["csmi"] = float(shannon_mutual_information_binned(activations, labels))
        frame["knn"] = float(nearest_neighbour_mutual_information(activations, labels))
        frame["mine"] = mine(activations.float(), test_y[chosen], CIFAR["mine_steps"], ctx.seed)
        if views:
            frame["probe_accuracy"] = _linear_probe(model, x, y, test_x, test_y, ctx.seed)
        record["regimes"][name] = frame
    regimes = record["regimes"]
    ctx.measure(
        "cifar-learning-not-memorising",
        ours=regimes["supervised"]["dsmi_labels"][-1],
        baseline=regimes["wrong labels"]["dsmi_labels"][-1],
    )
    stds = (0.01, 0.1)
    study = compare_initialisations(
        lambda: network().to(ctx.device), stds, held, "features", seed=ctx.seed, max_samples=CIFAR["measured"]
    )
    accuracy = {}
    for std in stds:
        with seeded(ctx.seed):
            model = reinitialise(network(), std, seed=ctx.seed).to(ctx.device)
        monitor = train(f"std-{std}", model, y, CIFAR["initialisation_epochs"])
        accuracy[std] = [[one.epoch, one.accuracy] for one in monitor.history]
    ctx.measure("cifar-low-entropy-start", ours=accuracy[0.01][-1][1], baseline=accuracy[0.1][-1][1])
    record["initialisation"] = {
        "stds": list(stds),
        "dse": list(study.dse),
        "ceiling": study.ceiling,
        "accuracy": {str(std): values for std, values in accuracy.items()},
    }
    return record


@torch.no_grad()
def _features(model: SmallResNet, images: Tensor) -> np.ndarray:
    device = next(model.parameters()).device
    model.eval()
    parts = [model.body(images[i : i + 500].to(device)).mean((2, 3)).cpu() for i in range(0, len(images), 500)]
    return torch.cat(parts).numpy()


def _linear_probe(model: SmallResNet, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, seed: int) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, random_state=seed))
    probe.fit(_features(model, x), y.numpy())
    return float(probe.score(_features(model, test_x), test_y.numpy()))


def mine(x: Tensor, labels: Tensor, steps: int = 2000, seed: int = 0, hidden: int = 128) -> float:
    """Neural estimate of the information between features and labels (Belghazi et al. 2018), in bits.

    The bound E[T(x, y)] - log E[exp T(x, y')] is maximised on one half of the samples and evaluated on the other.

    Args:
        x: (N, D) features, float32.
        labels: (N,) whole numbers.
        steps: of Adam, batches of 256.
        seed: of the network, the split and the batches.
        hidden: width of the network.
    """
    draw = generator(seed)
    x = ((x - x.mean(0)) / x.std(0).clamp(min=1e-6)).cpu()
    y = nn.functional.one_hot(labels.cpu()).to(x.dtype)
    order = torch.randperm(len(x), generator=draw)
    train, held = order[: len(x) // 2], order[len(x) // 2 :]
    with seeded(seed):
        net = nn.Sequential(
            nn.Linear(x.shape[1] + y.shape[1], hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )

    def bound(index: Tensor) -> Tensor:
        other = index[torch.randperm(len(index), generator=draw)]
        joint = net(torch.cat([x[index], y[index]], 1)).mean()
        apart = net(torch.cat([x[index], y[other]], 1))[:, 0]
        return joint - (torch.logsumexp(apart, 0) - math.log(len(index)))

    def batches() -> Iterator[Tensor]:
        while True:
            yield train[torch.randint(0, len(train), (min(256, len(train)),), generator=draw)]

    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    for _, index in zip(range(steps), batches(), strict=False):
        optimizer.zero_grad()
        (-bound(index)).backward()
        optimizer.step()
    with torch.no_grad():
        return float(bound(held)) / math.log(2)


def _ranking(ctx: Context) -> dict[str, Any] | None:
    """What the features of the user's pretrained models tell about her labels, and how that goes with their accuracy.

    Features come from ``model-features/NAME.npz`` (features, labels, accuracy), all of the same images, or from timm
    models saved as ``models/NAME.safetensors`` (NAME as timm calls the architecture) run on ``images/CLASS/*``.
    """
    saved = _saved_features(ctx.data_dir / "model-features") or _timm_features(ctx)
    if not saved:
        return None
    labels = next(iter(saved.values()))[1]
    for name, (_, own, _) in saved.items():
        if not np.array_equal(labels, own):
            raise InvalidInput(f"{name} has other labels than {next(iter(saved))}: all models must see the same images")
    features, accuracies = ({name: row[i] for name, row in saved.items()} for i in (0, 2))
    ranking = rank_models(features, labels, accuracies, seed=ctx.seed)
    return {
        "names": list(ranking.names),
        "dse": list(ranking.dse),
        "dsmi": list(ranking.dsmi),
        "accuracies": list(ranking.accuracies or ()),
        "correlations": ranking.correlations,
    }


Features = dict[str, tuple[np.ndarray, np.ndarray, float]]  # model -> features, labels, accuracy


def _saved_features(folder: Path) -> Features:
    found: Features = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as saved:
            if missing := [name for name in ("features", "labels", "accuracy") if name not in saved]:
                raise InvalidInput(f"{path} has no {', '.join(missing)}: expected features, labels and accuracy")
            found[path.stem] = saved["features"], saved["labels"], float(saved["accuracy"])
    return found


@torch.no_grad()
def _timm_features(ctx: Context) -> Features:
    weights = sorted((ctx.data_dir / "models").glob("*.safetensors"))
    classes = sorted(path for path in (ctx.data_dir / "images").glob("*") if path.is_dir())
    if not weights or not classes:
        return {}
    timm = need("timm", "vision")
    from PIL import Image

    files = [(path, _imagenet_class(folder.name)) for folder in classes for path in sorted(folder.iterdir())]
    labels = np.array([label for _, label in files])
    found: Features = {}
    for path in weights:
        model = timm.create_model(path.stem, pretrained=False, checkpoint_path=str(path)).to(ctx.device).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        hidden, right = [], 0
        with ctx.progress.task(path.stem, total=len(files)) as task:
            for start in range(0, len(files), 64):
                chosen = files[start : start + 64]
                images = torch.stack([transform(Image.open(file).convert("RGB")) for file, _ in chosen]).to(ctx.device)
                features = model.forward_features(images)
                hidden.append(model.forward_head(features, pre_logits=True).cpu())
                guesses = model.forward_head(features).argmax(1).cpu().numpy()
                right += int((guesses == labels[start : start + 64]).sum())
                task.advance(len(chosen))
        found[path.stem] = torch.cat(hidden).numpy(), labels, right / len(files)
    return found


def _imagenet_class(folder: str) -> int:
    """The class that a folder of images stands for: its number, or its WordNet id such as n01440764."""
    if folder.isdigit():
        return int(folder)
    names = need("timm.data", "vision").ImageNetInfo().label_names()
    if folder not in names:
        raise InvalidInput(f"images/{folder}: expected the class's number or its WordNet id, such as 0 or n01440764")
    return names.index(folder)


# --- figures ---------------------------------------------------------------------------------------------------------

SHADES = {0.01: "#8c1c13", 0.1: "#d9962b", 0.5: "#2f5d8a"}


def draw(records: list[dict]) -> list[Plate]:
    """Figures of all seeds together: lines are means, bands the range over seeds."""
    with style():
        plates = [
            _draw_intrinsic([r["intrinsic"] for r in records]),
            _draw_eigenvalues(records[0]["intrinsic"]),
            _draw_corruption([r["corruption"] for r in records]),
            _draw_regimes(
                [{"true labels": r["digits"]["true"], "shuffled labels": r["digits"]["shuffled"]} for r in records],
                "learning-and-memorising",
                "A small network on digits, measured on held-out images through training. With true labels the layer "
                "spreads out and tells more about the labels; with shuffled labels it moves without "
                "learning about them.",
            ),
        ]
        if "cifar" in records[0]:
            plates.append(
                _draw_regimes(
                    [r["cifar"]["regimes"] for r in records],
                    "cifar-10-regimes",
                    "ResNet-18 on CIFAR-10 in three regimes, measured on test images: supervised, "
                    "contrastive, and with "
                    "wrong labels.",
                )
            )
            plates.append(_draw_initialisation([r["cifar"]["initialisation"] for r in records]))
        ranked = [r["ranking"] for r in records if r.get("ranking")]
        if ranked:
            plates.append(_draw_ranking(ranked[0]))
    return plates


def _draw_intrinsic(records: list[dict]) -> Plate:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.9))
    axes = figure.subplots(1, 2, sharey=True)
    dimensions, ceiling = records[0]["dimensions"], records[0]["ceiling"]
    for ax, key, t in zip(axes, ("dse_t1", "dse_t2"), (1, 2), strict=True):
        for i, noise in enumerate(records[0]["noises"]):
            values = [np.asarray(r[key])[i] for r in records]
            band(ax, dimensions, values, SHADES.get(noise, CYCLE[i]), f"DSE, noise {noise:g}", marker="o", markersize=4)
        binned = [np.asarray(r["cse"]).mean(0) for r in records]
        band(ax, dimensions, binned, COLOURS["neutral"], "binned entropy", linestyle="--")
        ax.set(xscale="log", xlabel="intrinsic dimension", ylim=(0, ceiling * 1.08))
        ax.set_xticks(dimensions, [str(d) for d in dimensions])
        ax.minorticks_off()
        ax.set_title(f"t = {t}")
    axes[0].set_ylabel("entropy (bits)")
    axes[1].legend(loc="center left", bbox_to_anchor=(0.02, 0.62))
    return Plate(
        "entropy-against-dimension",
        figure,
        "Entropy of 500 points in 2048 dimensions against the dimension they really have. Diffusion "
        "spectral entropy grows "
        "with it while binned entropy sits at its ceiling, log2 of the number of points. Under heavy noise "
        "(0.5) the cloud "
        "is wider than the bandwidth: at t = 1 the left end of the curve is flat and high; t = 2 pulls it down again.",
    )


def _draw_eigenvalues(record: dict) -> Plate:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 3.9))
    ax = figure.subplots()
    colours = mpl.colormaps["magma_r"](np.linspace(0.2, 0.9, len(record["eigenvalues"])))
    for colour, (dimension, values) in zip(colours, record["eigenvalues"].items(), strict=True):
        ax.plot(np.arange(1, len(values) + 1), np.maximum(values, 1e-9), color=colour, label=dimension)
    ax.axhline(0.01, color=COLOURS["light"], linewidth=1.2, zorder=0)
    ax.annotate("0.01", (1.05, 0.0115), fontsize=8, color=COLOURS["paper"])
    ax.set(xscale="log", yscale="log", ylim=(1e-4, 1.6), xlabel="rank", ylabel="eigenvalue of the walk")
    ax.legend(title="intrinsic dimension", loc="lower left", ncols=2, title_fontsize=9)
    return Plate(
        "eigenvalue-decay",
        figure,
        "Eigenvalues of the random walk at noise 0.1 (first seed): the more dimensions the points fill, the "
        "more of the "
        "spectrum survives, and the entropy counts what survives.",
    )


def _draw_corruption(records: list[dict]) -> Plate:
    from matplotlib.figure import Figure

    by_dimension = records[0]["by_dimension"]
    figure = Figure(figsize=(9.6, 3.5))
    axes = np.atleast_1d(figure.subplots(1, len(by_dimension), sharey=True))
    share = 100 * np.array(records[0]["corruptions"])
    lines = {
        "dsmi": ("DSMI", COLOURS["ours"]),
        "knn": ("nearest neighbours", COLOURS["baseline"]),
        "asmi": ("adjacency spectrum", COLOURS["accent"]),
        "csmi": ("binned (5 bins)", COLOURS["neutral"]),
    }
    for ax, dimension in zip(axes, by_dimension, strict=True):
        for key, (label, colour) in lines.items():
            values = [r["by_dimension"][dimension][key] for r in records]
            band(ax, share, values, colour, label, marker="o", markersize=3.5)
        ax.set(xlabel="corrupted labels (%)")
        ax.set_title(f"{dimension} dimensions")
    axes[0].set_ylabel("mutual information (bits)")
    axes[-1].legend()
    return Plate(
        "label-corruption",
        figure,
        "What three noisy blobs tell about their labels as the labels are corrupted. Diffusion spectral "
        "information falls "
        "to nothing and binned information never leaves it. In high dimension the clean labels score below "
        "those with a "
        "fifth corrupted: the curve should fall there and rises.",
    )


def _draw_regimes(records: list[dict], name: str, caption: str) -> Plate:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.3))
    axes = figure.subplots(1, 3)
    titles = {"dse": "DSE(Z)", "dsmi_labels": "DSMI(Z; labels)", "dsmi_inputs": "DSMI(Z; inputs)"}
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        for regime, colour in zip(records[0], [COLOURS["ours"], COLOURS["baseline"], COLOURS["accent"]], strict=False):
            values = [r[regime][key] for r in records]
            band(ax, records[0][regime]["epoch"], values, colour, regime, marker="o", markersize=3)
        ax.set_title(title)
        ax.set_xlabel("epoch")
        ax.axhline(0, color=COLOURS["light"], linewidth=0.8)
    axes[0].set_ylabel("bits")
    axes[0].legend(loc="best")
    return Plate(name, figure, caption)


def _draw_initialisation(records: list[dict]) -> Plate:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 3.8))
    ax = figure.subplots()
    for i, (std, colour) in enumerate(zip(records[0]["stds"], [COLOURS["ours"], COLOURS["baseline"]], strict=True)):
        curves = [np.array(r["accuracy"][str(std)]) for r in records]
        start = np.mean([r["dse"][i] for r in records])
        label = f"std {std:g}, starts at {start:.1f} bits"
        band(ax, curves[0][:, 0], [100 * c[:, 1] for c in curves], colour, label, marker="o", markersize=3)
    ax.set(xlabel="epoch", ylabel="test accuracy (%)")
    ax.legend(loc="lower right")
    return Plate(
        "initialisation",
        figure,
        "Test accuracy on CIFAR-10 after starting the convolutions with two spreads, and so at two entropies.",
    )


def _draw_ranking(record: dict) -> Plate:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4.0))
    ax = figure.subplots()
    ax.plot(record["dsmi"], record["accuracies"], "o", color=COLOURS["ours"])
    for name, x, y in zip(record["names"], record["dsmi"], record["accuracies"], strict=True):
        ax.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8, color=COLOURS["neutral"])
    rho = record["correlations"]["dsmi"]
    ax.margins(x=0.2)  # room for the names
    ax.set(xlabel="DSMI(Z; labels) (bits)", ylabel="accuracy")
    ax.set_title(f"Pearson {rho['pearson']:.2f}, Spearman {rho['spearman']:.2f}")
    return Plate(
        "pretrained-models", figure, "What the features of pretrained models tell about the labels, and their accuracy."
    )
