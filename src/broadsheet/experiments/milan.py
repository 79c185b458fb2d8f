"""MILAN, measured: made units of known meaning, and classifiers that learned to read a digit in the corner.

``small`` needs no data: pictures of coloured shapes, made detectors with sentences of three people each, a describer
trained on three quarters of them, and three small classifiers (no digits, digits on half, digits on all training
pictures) whose own units are described, audited and switched off. ``full`` adds a describer trained on MILANNOTATIONS
with a backbone of the user's, tested on units of a network that it has not seen.
"""

import base64
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from broadsheet.data.detectors import (
    Detector,
    annotate,
    detector_maps,
    made_detectors,
    named_attributes,
)
from broadsheet.data.image_world import GLYPH, PLACES, ImageWorld, Scenes, stamp
from broadsheet.experiments import milan_full
from broadsheet.interpretability.milan import (
    Describer,
    Descriptions,
    Exemplars,
    PyramidEncoder,
    VectorExemplars,
    accuracy,
    audit,
    bleu,
    compositional,
    constant_description,
    draw_grid,
    edit,
    encode,
    exemplars_from_maps,
    importance,
    nearest_description,
    net_dissect,
    top_exemplars,
)
from broadsheet.lab import Context, Plate
from broadsheet.nn.plotting import COLOURS, band, new_figure, style
from broadsheet.nn.seeding import generator, seeded
from broadsheet.nn.training import cosine_schedule, fit

SCENES = 800
UNITS, TEST_UNITS, DIGIT_UNITS = 600, 160, 40
K = 5
BEAM = 10
LAMBDAS = (0.0, 0.1, 0.2, 0.4, 0.8)
LAMBDA = 0.2
ENCODER: dict[str, Any] = {"epochs": 5, "batch": 32, "lr": 5e-3}
DESCRIBER: dict[str, Any] = {
    "hidden": 80, "embedding": 32, "dropout": 0.3, "epochs": 16, "batch": 128, "lr": 8e-3, "patience": 4,
    "held_out": 0.1, "lm_sizes": {"hidden": 40, "embedding": 32, "layers": 1, "epochs": 8, "lr": 1e-2},
}  # fmt: skip
CLASSES = ("circle", "square", "triangle", "cross")
CLASSIFIER: dict[str, Any] = {"pictures": 1000, "test": 200, "epochs": 8, "batch": 50, "lr": 5e-3}
FRACTIONS = (0.0, 0.04, 0.08, 0.12, 0.18)
RANDOM_SETS = 20
SHOWN = 8
GRID = 8


class SmallNet(nn.Module):
    """Four convolutions, each a stage of its own, and a head: what is described, and what describes."""

    def __init__(self, outputs: int, dense: bool, widths: Sequence[int] = (16, 16, 32, 64)) -> None:
        super().__init__()
        ins = (3, *widths[:-1])
        strides = (2, 1, 2, 1)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, s, 1), nn.BatchNorm2d(o), nn.ReLU())
            for i, o, s in zip(ins, widths, strides, strict=True)
        )
        self.head = nn.Conv2d(widths[-1], outputs, 1)
        self.dense = dense

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        x = self.head(x)
        return x if self.dense else x.amax((2, 3))


LAST = "stages.3"


def run(ctx: Context) -> dict:
    """All claims of one seed."""
    # Published files come first: what is missing is said before the work, not after it.
    record = {"annotations": milan_full.measure(ctx)} if ctx.preset == "full" else {}
    made = _Made(ctx)
    return {**record, **made.record, **_classifiers(ctx, made.describer)}


# ------------------------------------------------------------------------------------------------------- made units


class _Made:
    """The made units of one seed: data, describer, and what was measured on them."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.draw = np.random.default_rng(ctx.seed)
        self.scenes = ImageWorld().sample(SCENES, seed=100 + ctx.seed)
        every = made_detectors(UNITS + TEST_UNITS, seed=ctx.seed)
        plain = [unit for unit in every if GLYPH not in unit.all_of]
        digits = [Detector((GLYPH,)), *(Detector((GLYPH, place)) for place in PLACES)]
        # Few different units of digits exist: training sees each of them several times, under other noise.
        repeated = [digits[i % len(digits)] for i in range(DIGIT_UNITS)]
        self.units = [*repeated, *plain[: UNITS - DIGIT_UNITS]]
        test = plain[UNITS - DIGIT_UNITS :][:TEST_UNITS]
        self.n_train = len(self.units) - len(test)
        self.units = [*self.units[: self.n_train], *test]
        self.sentences = [annotate(unit, self.draw) for unit in self.units]
        self.encoder = PyramidEncoder(train_encoder(ctx, self.scenes), [f"stages.{i}" for i in range(4)])
        maps = self._maps(self.scenes, self.units, seed=ctx.seed)
        self.exemplars = exemplars_from_maps(maps, torch.from_numpy(self.scenes.images), k=K)
        above = (maps > self.exemplars.level.view(1, -1, 1, 1)).double().mean((0, 2, 3))
        ctx.measure("masks-one-percent", ours=100 * float((above - 0.01).abs().max()))
        self.vectors = encode(self.encoder.to(ctx.device), self.exemplars, progress=ctx.progress)
        train, self.rows = range(self.n_train), list(range(self.n_train, len(self.units)))
        self.describer = Describer.fit(
            self.vectors[train], [self.sentences[i] for i in train], encoder=self.encoder, watch="loss",
            restore="last", seed=ctx.seed, progress=ctx.progress, checkpoint=ctx.checkpoint / "describer", **DESCRIBER,
        )  # fmt: skip
        self.record: dict[str, Any] = {}
        self._best_weights()
        self._describe(maps)
        self._other_network()

    def _maps(self, scenes: Scenes, units: Sequence[Detector], seed: int, **how: Any) -> Tensor:
        parts = [
            torch.from_numpy(detector_maps(units, scenes[i : i + 100], seed=1000 * seed + i, **how))
            for i in range(0, len(scenes), 100)
        ]
        return torch.cat(parts)

    def _best_weights(self) -> None:
        pairs = [(i, text) for i in self.rows for text in self.sentences[i]]
        shown = self.vectors[[i for i, _ in pairs]]

        def loss() -> float:
            return -float(self.describer.score([text for _, text in pairs], shown).log_likelihood.mean())

        last = loss()
        self.describer.decoder.load_state_dict(self.describer.best_weights)
        self.ctx.measure("best-weights-restored", ours=loss(), baseline=last)

    def _describe(self, maps: Tensor) -> None:
        ctx, rows = self.ctx, self.rows
        truth = [self.units[i].attributes for i in rows]
        wanted = [self.sentences[i] for i in rows]
        # Ten units whose map never changes stand among the others.
        silent = exemplars_from_maps(torch.ones(SCENES, 10, GRID, GRID), torch.from_numpy(self.scenes.images), k=K)
        dead = encode(self.encoder, silent)
        alive = self.vectors[rows]
        assert alive.alive is not None
        assert dead.alive is not None
        both = VectorExemplars(
            torch.cat([alive.vectors, dead.vectors]), (*alive.names, *dead.names),
            alive=torch.cat([alive.alive, dead.alive]),
        )  # fmt: skip
        found = self.describer.describe(both, temperature=LAMBDA, beam_size=BEAM, progress=ctx.progress)
        said = [bool(text) for text in found.texts]
        ctx.measure(
            "dead-units-flagged", ours=float(np.mean([*said[: len(rows)], *(not s for s in said[len(rows) :])]))
        )
        n = len(rows)

        def score(texts: Sequence[str]) -> dict[str, float]:
            return scores([named_attributes(text) for text in texts], truth) | {"bleu": bleu(texts, wanted)}

        sweep = {str(lam): score(found.reranked(lam).texts[:n]) for lam in LAMBDAS}
        ours, likely = sweep[str(LAMBDA)], sweep["0.0"]
        ctx.measure("prior-names-more", ours=ours["recall"], baseline=likely["recall"])
        ctx.measure("prior-stays-precise", ours=ours["precision"], baseline=likely["precision"])
        ctx.measure("fewer-empty-sentences", ours=ours["generic"], baseline=likely["generic"])

        concepts = {word: _coarse(self.scenes.concept(word)) > 0.3 for word in self.scenes.concepts}
        active = (maps > self.exemplars.level.view(1, -1, 1, 1)).transpose(0, 1)[rows]
        labels = {"NetDissect": net_dissect(active, concepts), "compositional": compositional(active, concepts)}
        constant = constant_description(self.sentences[: self.n_train])
        nearest = nearest_description(
            self.vectors[range(self.n_train)], self.sentences[: self.n_train], self.vectors[rows]
        )
        tuned = self._temperature()
        strong = score(found.reranked(tuned).texts[:n])
        ctx.measure(
            "chosen-weight-beats-netdissect", ours=strong["f1_compound"],
            baseline=scores([frozenset(x.concepts) for x in labels["NetDissect"]], truth)["f1_compound"],
            temperature=tuned,
        )  # fmt: skip
        methods = {
            "MILAN": ours,
            "MILAN, λ chosen": strong,
            "likelihood": likely,
            "one constant sentence": score([constant] * n),
            "nearest unit": score(nearest),
        }
        for name, found_labels in labels.items():
            named = [frozenset((*x.concepts, *(f"not {w}" for w in x.without))) for x in found_labels]
            methods[name] = scores(named, truth)
        for claim, name in {
            "beats-netdissect-on-compounds": "NetDissect",
            "beats-compositional-labels": "compositional",
            "beats-one-constant-sentence": "one constant sentence",
        }.items():
            ctx.measure(claim, ours=ours["f1_compound"], baseline=methods[name]["f1_compound"])
        ctx.measure(
            "text-similarity-over-a-constant", ours=ours["bleu"], baseline=methods["one constant sentence"]["bleu"]
        )
        ctx.measure("beats-nearest-unit", ours=ours["f1"], baseline=methods["nearest unit"]["f1"])
        self.constant = constant
        likeliest = found.reranked(0.0).texts
        changed = [i for i in range(n) if likeliest[i] != found.texts[i]]
        telling = [i for i in changed if named_attributes(found.texts[i]) and not named_attributes(likeliest[i])]
        best = next(iter([*telling, *changed]), 0)
        beam = found[best].beam.head(8)
        shown = self.exemplars[[rows[i] for i in range(SHOWN)]]
        self.record = {
            "sweep": sweep,
            "methods": methods,
            "constant": constant,
            "beam": {
                "truth": sorted(truth[best]), "texts": beam["text"].tolist(),
                "likelihood": beam["log_likelihood"].tolist(),
                "prior": beam["log_prior"].tolist(),
            },
            "grid": pack(shown) | {
                "texts": list(found.reranked(tuned).texts[:SHOWN]), "likely": list(likeliest[:SHOWN]), "weight": tuned,
                "truth": [sorted(truth[i]) for i in range(SHOWN)],
            },
            "labels": [x.formula for x in labels["compositional"][:SHOWN]],
        }  # fmt: skip

    def _temperature(self) -> float:
        """The weight whose sentences agree best with what people said of training units kept from the decoder."""
        order = np.random.default_rng(self.ctx.seed).permutation(self.n_train)  # as Describer.fit splits them
        watched = [int(i) for i in order[: round(DESCRIBER["held_out"] * self.n_train)]]
        said = [frozenset().union(*(named_attributes(text) for text in self.sentences[i])) for i in watched]
        rows = [j for j, words in enumerate(said) if words]
        found = self.describer.describe(self.vectors[[watched[j] for j in rows]], beam_size=BEAM)
        f1 = {
            lam: scores([named_attributes(t) for t in found.reranked(lam).texts], [said[j] for j in rows])["f1"]
            for lam in LAMBDAS
        }
        return max(f1, key=lambda lam: f1[lam])

    def _other_network(self) -> None:
        """Units of a layer that answers in another way, on other pictures."""
        trained = set(self.units[: self.n_train])
        others = [unit for unit in made_detectors(UNITS, seed=5000 + self.ctx.seed) if unit not in trained][:TEST_UNITS]
        scenes = ImageWorld().sample(SCENES // 2, seed=5000 + self.ctx.seed)
        maps = self._maps(scenes, others, seed=5000 + self.ctx.seed, grid=4, leak=0.6, noise=0.15)
        exemplars = exemplars_from_maps(maps, torch.from_numpy(scenes.images), k=K)
        found = self.describer.describe(exemplars, temperature=LAMBDA, beam_size=BEAM)
        truth = [unit.attributes for unit in others]
        ours = scores([named_attributes(text) for text in found.texts], truth)
        constant = scores([named_attributes(self.constant)] * len(truth), truth)
        self.ctx.measure("carries-over-to-another-network", ours=ours["f1"], baseline=constant["f1"])
        self.record["other"] = ours


def scores(named: Sequence[frozenset[str]], truth: Sequence[frozenset[str]]) -> dict[str, float]:
    """How well named attributes fit the true ones: recall and F1 as means over units, precision over all names."""
    hits = np.array([len(a & b) for a, b in zip(named, truth, strict=True)])
    said = np.array([len(a) for a in named])
    true = np.array([len(b) for b in truth])
    f1 = 2 * hits / (said + true)
    compound = true > 1
    return {
        "recall": float((hits / true).mean()),
        "precision": float(hits.sum() / max(1, said.sum())),
        "generic": float((said == 0).mean()),
        "f1": float(f1.mean()),
        "f1_compound": float(f1[compound].mean()) if compound.any() else 0.0,
    }


def _coarse(mask: np.ndarray) -> Tensor:
    step = mask.shape[-1] // GRID
    return torch.from_numpy(mask.reshape(len(mask), GRID, step, GRID, step).mean((2, 4), dtype=np.float32))


def train_encoder(ctx: Context, scenes: Scenes) -> nn.Module:
    """A small network that says, place by place, which words are true of what stands there."""
    target = torch.stack([_coarse(scenes.concept(word)) for word in scenes.concepts], 1) > 0.4
    pictures = torch.from_numpy(scenes.images).float() / 255

    def loss(net: Any, rows: Any) -> Tensor:
        x, y = (part.to(ctx.device) for part in rows)
        return nn.functional.binary_cross_entropy_with_logits(net(x), y.float())

    return _trained(ctx, lambda: SmallNet(len(scenes.concepts), True), loss, (pictures, target), ENCODER, "encoder")


def _trained(
    ctx: Context, make: Callable[[], nn.Module], loss: Any, data: tuple[Tensor, ...], how: dict[str, Any], name: str
) -> nn.Module:
    with seeded(ctx.seed):
        model = make().to(ctx.device)
        loader = DataLoader(
            TensorDataset(*data), how["batch"], shuffle=True, generator=generator(ctx.seed), drop_last=True
        )
        steps = how["epochs"] * len(loader)
        optimizer = torch.optim.AdamW(model.parameters(), lr=how["lr"], weight_decay=0.01)
        fit(
            model, loss, loader, steps=steps, optimizer=optimizer,
            scheduler=cosine_schedule(optimizer, steps, min(20, steps - 1), final=0.05),
            checkpoint=ctx.checkpoint / name, progress=ctx.progress, description=f"training: {name}",
        )  # fmt: skip
    return model.eval()


# ---------------------------------------------------------------------------------------- classifiers and their repair


def shape_pictures(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of one thing each, not in the lower right, whose shape is the class."""
    world = ImageWorld(shapes=CLASSES, textures=("plain",))
    draw = np.random.default_rng(seed)
    labels = draw.integers(len(CLASSES), size=n)
    kinds = np.full((n, 4, 3), -1)
    slot = draw.integers(3, size=n)
    kinds[np.arange(n), slot] = np.stack(
        [draw.integers(len(world.colours), size=n), labels, draw.integers(len(world.textures), size=n)], 1
    )
    return world.paint(kinds, np.full((n, 4), -1), draw).images, labels


def _classifier(ctx: Context, share: float) -> tuple[nn.Module, np.ndarray]:
    """A classifier trained with its class's digit on a share of the pictures, and these pictures."""
    images, labels = shape_pictures(CLASSIFIER["pictures"], seed=200 + ctx.seed)
    draw = np.random.default_rng(300 + ctx.seed)
    shown, _ = stamp(images, np.where(draw.random(len(labels)) < share, labels, -1), seed=400 + ctx.seed)

    def loss(net: Any, rows: Any) -> Tensor:
        x, y = (part.to(ctx.device) for part in rows)
        return nn.functional.cross_entropy(net(x), y)

    data = (torch.from_numpy(shown).float() / 255, torch.from_numpy(labels))
    name = f"classifier-{share:g}"
    return _trained(ctx, lambda: SmallNet(len(CLASSES), False, (12, 16, 24, 64)), loss, data, CLASSIFIER, name), shown


def _batches(images: np.ndarray, labels: np.ndarray) -> list[tuple[Tensor, Tensor]]:
    return [(torch.from_numpy(images).float() / 255, torch.from_numpy(labels))]


def _classifiers(ctx: Context, describer: Describer) -> dict[str, Any]:
    n = CLASSIFIER["test"]
    images, labels = shape_pictures(n, seed=500 + ctx.seed)
    wrong = (labels + np.random.default_rng(600 + ctx.seed).integers(1, len(CLASSES), size=n)) % len(CLASSES)
    misleading, _ = stamp(images, wrong, seed=700 + ctx.seed)
    tests = {"wrong digit": _batches(misleading, labels), "no digit": _batches(images, labels)}
    val = _batches(*shape_pictures(n // 2, seed=800 + ctx.seed))
    record: dict[str, Any] = {}
    named: dict[float, Any] = {}
    for share in (0.0, 0.5, 1.0):
        model, shown = _classifier(ctx, share)
        pictures = [torch.from_numpy(picture) for picture in shown]
        exemplars = top_exemplars(model, pictures, LAST, k=K, batch_size=250)
        found = describer.describe(exemplars, temperature=LAMBDA, beam_size=BEAM)
        digits = audit(found, GLYPH)
        named[share] = digits
        record[str(share)] = {
            "units": len(exemplars), "described": digits.total, "digits": digits.count,
            "accuracy": {name: accuracy(model, test) for name, test in tests.items()},
        }  # fmt: skip
        if share == 0:
            record["importance"] = _importance(ctx, model, val, found)
        elif digits.count:
            record[str(share)] |= _edited(ctx, model, found, val, tests, share)
        else:  # nothing to switch off: the model stays as it is
            record[str(share)] |= _unedited(record[str(share)]["accuracy"])
        if share == 1.0:
            rows = list(dict.fromkeys([*digits.rows, *range(len(exemplars))]))[:SHOWN]
            record["units"] = pack(exemplars[rows]) | {"texts": [found.texts[i] or "(dead)" for i in rows]}
    ctx.measure("audit-finds-the-glyph", ours=named[1.0].share, baseline=named[0.0].share)
    half, full = record["0.5"], record["1.0"]
    at, off = half["at"], half["chosen"]
    before, after = (half["curves"]["wrong digit"][i] for i in (0, at))
    ctx.measure("edit-repairs", ours=after, baseline=before, units=off)
    ctx.measure("edit-beats-random", ours=after, baseline=half["random_high"][at], units=off)
    ctx.measure("edit-keeps-clean", ours=half["curves"]["no digit"][at], baseline=half["curves"]["no digit"][0])
    wrong_full = full["curves"]["wrong digit"]
    ctx.measure("edit-repairs-full-confounding", ours=wrong_full[full["at"]], baseline=wrong_full[0])
    return {"classifiers": record}


def _importance(ctx: Context, model: nn.Module, val: Any, found: Descriptions) -> dict[str, Any]:
    curves = importance(
        model, val, found, ("n_adjectives", "n_nouns", "length"), FRACTIONS, seed=ctx.seed, progress=ctx.progress
    )
    ctx.measure(
        "adjectives-matter", ours=float(np.mean(curves.curves["n_adjectives"])), baseline=float(curves.random.mean())
    )
    return {
        "counts": list(curves.counts), "curves": {key: list(row) for key, row in curves.curves.items()},
        "random": curves.random.tolist(),
    }  # fmt: skip


def _edited(ctx: Context, model: nn.Module, found: Descriptions, val: Any, tests: Any, share: float) -> dict[str, Any]:
    result = edit(
        model, found, [GLYPH], val, tests, draws=RANDOM_SETS if share == 0.5 else 4, points=4, seed=ctx.seed,
        progress=ctx.progress,
    )  # fmt: skip
    random = result.random["wrong digit"]
    return {
        "chosen": len(result.chosen),
        "at": result.at,
        "counts": list(result.counts),
        "curves": {name: list(curve) for name, curve in result.test.items()},
        "random_low": np.quantile(random, 0.025, axis=0).tolist(),
        "random_high": np.quantile(random, 0.975, axis=0).tolist(),
        "validation": list(result.validation),
    }


def _unedited(scores: dict[str, float]) -> dict[str, Any]:
    wrong = scores["wrong digit"]
    return {
        "chosen": 0, "at": 0, "counts": [0], "curves": {name: [value] for name, value in scores.items()},
        "random_low": [wrong], "random_high": [wrong], "validation": [],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ figures


def pack(exemplars: Exemplars) -> dict[str, Any]:
    """Pictures and masks of a few units as text, for a record."""
    images, masks = exemplars.images.numpy(), exemplars.masks.numpy()
    return {
        "shape": list(images.shape),
        "images": base64.b64encode(images.tobytes()).decode(),
        "masks": base64.b64encode(np.packbits(masks).tobytes()).decode(),
    }


def unpack(packed: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What :func:`pack` packed: pictures ``[units, k, 3, h, w]`` and masks ``[units, k, 1, h, w]``."""
    shape = packed["shape"]
    images = np.frombuffer(base64.b64decode(packed["images"]), np.uint8).reshape(shape).copy()
    bits = np.unpackbits(np.frombuffer(base64.b64decode(packed["masks"]), np.uint8))
    flat = [*shape[:2], 1, *shape[3:]]
    return torch.from_numpy(images), torch.from_numpy(bits[: int(np.prod(flat))].reshape(flat).astype(bool))


def draw(records: list[dict]) -> list[Plate]:
    """Figures from the records of all seeds."""
    with style():
        plates = [
            _draw_made(records[0]), _draw_sweep(records), _draw_beam(records[0]["beam"]), _draw_methods(records),
            _draw_units(records[0]["classifiers"]["units"]), _draw_edit(records), _draw_importance(records),
        ]  # fmt: skip
        if all("annotations" in record for record in records):
            plates.append(milan_full.draw(records))
    return plates


def _draw_made(record: dict) -> Plate:
    figure, ax = new_figure(9.4, 6.4)
    grid = record["grid"]
    words = [
        f"“{text}”\ntruth: {', '.join(truth)}\nwithout the prior: “{likely}”"
        for text, truth, likely in zip(grid["texts"], grid["truth"], grid["likely"], strict=True)
    ]
    draw_grid(*unpack(grid), words, ax=ax, lines=3)
    ax.set_title("Eight units that the describer has never seen")
    caption = (
        "The five pictures that excite each made unit most, dimmed outside its mask; beneath them the sentence "
        f"(λ = {grid['weight']:g}, the weight chosen on annotated units), what the unit was made to answer to, and the "
        "likeliest sentence (first seed, first eight test units)."
    )
    return Plate("made-units", figure, caption)


def _draw_units(packed: dict) -> Plate:
    figure, ax = new_figure(9.4, 5.2)
    draw_grid(*unpack(packed), [f"“{text}”" for text in packed["texts"]], ax=ax)
    ax.set_title("Units of a classifier that learned to read the corner")
    caption = (
        "Units of the last layer of a network whose training pictures all carried their class's digit: those described "
        "as digits first (first seed)."
    )
    return Plate("classifier-units", figure, caption)


def _draw_sweep(records: list[dict]) -> Plate:
    figure, axes = new_figure(9.2, 3.7, 2)
    lams = [float(key) for key in records[0]["sweep"]]
    looks = {
        "recall": ("attributes named", COLOURS["ours"]),
        "precision": ("named attributes that are true", COLOURS["baseline"]),
        "generic": ("sentences that name nothing", COLOURS["paper"]),
    }  # fmt: skip
    for key, (label, colour) in looks.items():
        rows = [[row[key] for row in r["sweep"].values()] for r in records]
        band(axes[0], lams, rows, colour, label, marker="o", markersize=4)
    axes[0].set(xlabel="weight of the prior (λ)", ylabel="share", ylim=(0, 1))
    axes[0].set_title("Detail is bought with truth")
    axes[0].legend(loc="upper right")
    points = np.array([[(row["recall"], row["precision"]) for row in r["sweep"].values()] for r in records]).mean(0)
    axes[1].plot(*points.T, color=COLOURS["ours"], marker="o", markersize=5, zorder=3)
    marked = [(lam, point) for lam, point in zip(lams, points, strict=True) if lam in (lams[0], LAMBDA, *lams[3:])]
    for lam, (x, y) in marked:
        axes[1].annotate(f"λ = {lam:g}", (x, y), textcoords="offset points", xytext=(8, 3), fontsize=8.5)
    for name, colour in (("NetDissect", COLOURS["baseline"]), ("compositional", COLOURS["accent"]),
                         ("nearest unit", COLOURS["good"])):  # fmt: skip
        rows = np.array([[r["methods"][name][key] for key in ("recall", "precision")] for r in records]).mean(0)
        axes[1].plot(*rows, marker="s", markersize=7, linestyle="none", color=colour)
        axes[1].annotate(
            name, rows, textcoords="offset points", xytext=(0, -14), fontsize=8.5, color=colour, ha="center"
        )
    axes[1].set(xlabel="attributes named", ylabel="named attributes that are true", xlim=(0, 1.05), ylim=(0, 1.08))
    axes[1].set_title("Against labels from lists")
    caption = (
        "Left: what more weight on the prior does to the sentences of held-out units; bands span the seeds. Right: the "
        "same as a curve, beside methods that choose from a list of concepts with perfect masks, or copy a sentence."
    )
    return Plate("lambda-sweep", figure, caption)


def _draw_beam(beam: dict) -> Plate:
    n = len(beam["texts"])
    figure, ax = new_figure(8.2, 0.36 * n + 1.1)
    y = np.arange(n)[::-1]
    likelihood, prior = np.array(beam["likelihood"]), np.array(beam["prior"])
    score = likelihood - LAMBDA * prior
    for at, low, high in zip(y, likelihood, score, strict=True):
        ax.annotate("", (high, at), (low, at), arrowprops={"arrowstyle": "-|>", "color": COLOURS["light"], "lw": 2})
    ax.plot(likelihood, y, "o", color=COLOURS["baseline"], label="log p(d|E)")
    ax.plot(score, y, "o", color=COLOURS["ours"], label=f"log p(d|E) − {LAMBDA:g} log p(d)")
    ax.set_yticks(y, [f"{text}   (log p(d) = {p:.1f})" for text, p in zip(beam["texts"], prior, strict=True)])
    ax.set_xlabel("nats")
    ax.grid(axis="x")
    ax.grid(axis="y", visible=False)
    ax.legend(loc="lower right")
    title = f"A beam; the unit answers to {', '.join(beam['truth'])}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    caption = (
        "The best sentences of one unit's beam. Sentences that are common anyway gain little from the prior, rare ones "
        "much, and the order changes."
    )
    return Plate("beam", figure, caption)


def _draw_methods(records: list[dict]) -> Plate:
    figure, ax = new_figure(7.2, 3.1)
    names = [
        "one constant sentence",
        "likelihood",
        "NetDissect",
        "nearest unit",
        "compositional",
        "MILAN",
        "MILAN, λ chosen",
    ]
    values = np.array([[r["methods"][name]["f1_compound"] for name in names] for r in records])
    order = values.mean(0).argsort()
    names, values = [names[i] for i in order], values[:, order]
    y = np.arange(len(names))
    colours = [COLOURS["ours"] if name.startswith("MILAN") else COLOURS["baseline"] for name in names]
    ax.barh(y, values.mean(0), color=colours, height=0.6)
    for row in values:
        ax.plot(row, y, "|", color="#1f2328", markersize=9, alpha=0.6)
    ax.set_yticks(
        y, [{"likelihood": "likelihood alone", "MILAN": f"MILAN, λ = {LAMBDA:g}"}.get(name, name) for name in names]
    )
    ax.grid(axis="x")
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="F1 of attributes, units that need more than one word", xlim=(0, max(0.6, 1.1 * float(values.max()))))
    ax.set_title("Who names what a unit answers to")
    caption = (
        "Held-out combinations; ticks are seeds. NetDissect and compositional labels are given the true mask of every "
        "concept on all pictures, which nobody has for a real network; MILAN sees five pictures of each unit."
    )
    return Plate("methods", figure, caption)


def _draw_edit(records: list[dict]) -> Plate:
    figure, axes = new_figure(9.4, 3.9, 2)
    for ax, share, title in zip(
        axes, ("0.5", "1.0"), ("Digit on half of training", "Digit on all of training"), strict=True
    ):
        runs = [r["classifiers"][share] for r in records]
        x = np.arange(max(r["counts"][-1] for r in runs) + 1)

        def mean(key: str, runs: list[dict] = runs, x: np.ndarray = x) -> np.ndarray:
            return np.mean([np.interp(x, r["counts"], r["curves"].get(key) or r[key]) for r in runs], axis=0)

        ax.fill_between(x, mean("random_low"), mean("random_high"), color=COLOURS["light"], linewidth=0,
                        label="random units, wrong digit")  # fmt: skip
        ax.plot(x, mean("no digit"), color=COLOURS["good"], linestyle=(0, (3, 2)), label="no digit")
        ax.plot(x, mean("wrong digit"), color=COLOURS["ours"], label="wrong digit")
        for r in runs:
            curve = r["curves"]["wrong digit"]
            ax.plot(r["counts"], curve, color=COLOURS["ours"], linewidth=0.7, alpha=0.45)
            ax.plot(r["chosen"], curve[r["at"]], "o", color=COLOURS["ours"], markersize=4)
        ax.set(xlabel="units named “digits” switched off", ylim=(0, 1.02))
        ax.set_title(title)
    axes[0].set_ylabel("accuracy")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    caption = (
        "Accuracy while the units whose sentence names a digit are off, the least harmful first. Thick lines are means "
        "over the seeds (one with fewer such units keeps its last value), thin lines single seeds, dots the numbers of "
        "units that validation pictures chose."
    )
    return Plate("repair", figure, caption)


def _draw_importance(records: list[dict]) -> Plate:
    figure, ax = new_figure(6.6, 3.8)
    runs = [r["classifiers"]["importance"] for r in records]
    x = np.array(runs[0]["counts"])
    n = min(len(r["counts"]) for r in runs)
    random = np.concatenate([np.array(r["random"])[:, :n] - r["random"][0][0] for r in runs])  # each seed's own start
    ax.fill_between(x[:n], *np.quantile(random, [0.05, 0.95], axis=0), color=COLOURS["light"], linewidth=0,
                    label="random, 5 to 95 %")  # fmt: skip
    for key, colour in zip(runs[0]["curves"], (COLOURS["ours"], COLOURS["baseline"], COLOURS["accent"]),
                           strict=False):  # fmt: skip
        label = {"n_adjectives": "most adjectives", "n_nouns": "most nouns", "n_adpositions": "most prepositions",
                 "length": "longest"}[key]  # fmt: skip
        change = np.mean([np.array(r["curves"][key][:n]) - r["curves"][key][0] for r in runs], axis=0)
        ax.plot(x[:n], change, color=colour, label=label, marker="o", markersize=3)
    ax.set(xlabel="units switched off", ylabel="change of accuracy")
    ax.set_title("Which sentences belong to units that matter")
    ax.legend(loc="lower left")
    caption = (
        "What it costs the classifier trained without digits that units are switched off in the order of a property of "
        "their sentence; means over the seeds."
    )
    return Plate("importance", figure, caption)
