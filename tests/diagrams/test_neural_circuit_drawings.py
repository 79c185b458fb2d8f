"""Drawings: traced from modules, legible, and enough to rebuild the program."""

import itertools
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch import nn

from broadsheet.diagrams import neural_circuit_diagrams as ncd
from broadsheet.diagrams.neural_circuit_diagrams.drawing import axis_names, scene
from broadsheet.diagrams.neural_circuit_diagrams.grouping import Block
from broadsheet.diagrams.neural_circuit_diagrams.guess import guess_inputs
from broadsheet.diagrams.neural_circuit_diagrams.layout import GAP, PITCH, plan, slots, tidied
from broadsheet.diagrams.neural_circuit_diagrams.read import NEAR
from broadsheet.diagrams.neural_circuit_diagrams.zoo import zoo
from broadsheet.errors import InvalidInput
from broadsheet.experiments.neural_circuit_diagrams import architectures
from broadsheet.geometry.relative_representations import RelativeLayer, RelativeModel

pytest.importorskip("transformers")
ZOO = zoo(0)
DIAGRAMS = {}


def drawn(name):
    if name not in DIAGRAMS:
        DIAGRAMS[name] = ncd.diagram(*ZOO[name])
    return DIAGRAMS[name]


every = pytest.mark.parametrize("name", ZOO)


@every
def test_the_diagram_computes_what_the_module_computes(name):
    model, inputs = ZOO[name]
    with torch.no_grad():
        assert torch.allclose(drawn(name).run(*inputs), model(*inputs), atol=1e-5, rtol=0)
    assert ncd.opaque_share(drawn(name)) == 0


@pytest.mark.parametrize("name", ["encoder-layer", "unet"])
def test_in_double_precision_to_ten_digits(name):
    model, inputs = zoo(1, False, torch.float64)[name]
    with torch.no_grad():
        assert torch.allclose(ncd.diagram(model, inputs).run(*inputs), model(*inputs), atol=1e-10, rtol=0)


class Norms(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return torch.linalg.vector_norm(x, self.order, dim=1, keepdim=True).expand_as(x).mT + x.square().mT


@pytest.mark.parametrize(("order", "boxes"), [(1, 0), (2, 0), (float("inf"), 0), (3, 1)])
def test_norms_along_a_dimension_are_steps_of_their_own(order, boxes):
    model, x = Norms(order), torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    found = ncd.diagram(model, (x,))
    torch.testing.assert_close(found.run(x), model(x))
    assert (ncd.opaque_share(found) > 0) == bool(boxes)


@pytest.mark.parametrize("name", architectures())
def test_architectures_of_other_papers_are_drawn_without_boxes(name):
    model, inputs, caption = architectures()[name]
    drawing = ncd.diagram(model, inputs)
    inputs = tuple(torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) + 0.1 for x in inputs)
    with torch.no_grad():
        torch.testing.assert_close(drawing.run(*inputs), model(*inputs))
        rebuilt = ncd.read_svg(bare(drawing.svg(width=900.0)), drawing.weights)
        torch.testing.assert_close(rebuilt.run(*inputs), model(*inputs))
    assert ncd.opaque_share(drawing) == 0 and caption


def test_the_classifier_that_is_drawn_is_the_one_of_the_library():
    drawn_one, (x, anchors), _ = architectures()["relative-classifier"]
    x, anchors = (
        torch.randn(part.shape, generator=torch.Generator().manual_seed(i)) for i, part in enumerate((x, anchors))
    )
    layer = RelativeLayer(len(anchors))
    layer.norm = drawn_one.norm
    with torch.no_grad():
        theirs = RelativeModel(drawn_one.encoder, drawn_one.head, anchors, layer).eval()(x)
        torch.testing.assert_close(drawn_one(x, anchors), theirs)


def bare(svg):
    """A drawing without what only the writer knows."""
    return re.sub(r' data-\w+="[^"]*"', "", svg)


@every
@pytest.mark.parametrize("width", [1000.0, 330.0])
def test_the_program_is_rebuilt_from_the_drawing(name, width):
    model, inputs = ZOO[name]
    svg = drawn(name).svg(width=width)
    assert svg == drawn(name).svg(width=width)
    ElementTree.fromstring(svg)
    again = ncd.read_svg(bare(svg), drawn(name).weights)
    assert again.equals(tidied(drawn(name))[0])
    with torch.no_grad():
        assert torch.allclose(again.run(*inputs), model(*inputs), atol=1e-5, rtol=0)


def test_a_wire_that_is_moved_is_another_program():
    d = ncd.einsum("a b -> b a", {"a": 2, "b": 2})
    svg = bare(d.svg())
    wires = re.findall(r'<path class="wire" d="[^"]*"', svg)
    assert len(wires) == 2
    # both wires go straight on, the names at the ends stay: no longer a transposition
    straight = svg
    for wire in wires:
        y = re.search(r"M \S+ (\S+)", wire)[1]
        xs = [float(x) for x in re.findall(r"(-?[\d.]+) -?[\d.]+", wire)]
        points = re.findall(r"([ML]) (\S+) (\S+?)(?=[ \"])", wire)
        ends = f'<path class="wire" d="M {xs[0]} {y} L {points[1][1]} {y} L {points[1][1]} {y} '
        straight = straight.replace(wire, re.sub(r"C [^L\"]*", "", ends + f'L {max(xs)} {y}"'))
    x = torch.arange(4.0).reshape(2, 2)
    assert torch.equal(ncd.read_svg(svg).run(x), x.T)
    assert torch.equal(ncd.read_svg(straight).run(x), x)


def test_a_multi_axis_is_a_double_wire_with_a_bold_name():
    batch, x, y = ncd.axes("*b x y", b=6, x=4, y=3)
    made = ncd.wires("b x", {"b": batch, "x": x}) >> ncd.linear("x -> y", "F", sizes={"x": x, "y": y})
    svg = made.svg()
    root = ElementTree.fromstring(svg)
    paths = [
        (p.get("class"), p.get("stroke"), float(p.get("stroke-width", 0)), p.get("d"))
        for p in root.iter()
        if p.get("d")
    ]
    thick = [d for kind, _, width, d in paths if kind == "wire" and width > 4]
    inside = [d for kind, stroke, width, d in paths if (kind, stroke) == ("between", "white")]
    assert made.codomain[0][0].kind == (made >> ncd.softmax("b")).codomain[0][0].kind == "multi"
    assert len(thick) == 1 and inside == thick  # all along the one wire of b, and nowhere else
    bold = {t.text for t in root.iter("{http://www.w3.org/2000/svg}tspan") if t.get("font-weight") == "bold"}
    assert "b" in bold and "x" not in bold
    again = ncd.read_svg(bare(svg), made.weights)
    assert again.equals(tidied(made)[0]) and next(iter(again.values.values()))[0].kind == "multi"


def overlap(a, b, slack=0.6):
    return min(a[2], b[2]) - max(a[0], b[0]) > slack and min(a[3], b[3]) - max(a[1], b[1]) > slack


@every
@pytest.mark.parametrize("width", [1000.0, 330.0])
def test_no_label_or_glyph_lies_on_another(name, width):
    made = scene(drawn(name), width=width)
    labels = [(f"label {t.runs}", t.box) for t in made.labels]
    glyphs = []
    for g in made.glyphs:
        if g.kind.split()[1] in ("dots", "web", "copy", "discard"):
            glyphs += [(g.kind, part.box) for part in g.parts]
        elif g.kind.split()[1] == "add":
            glyphs += [(g.kind, part.box) for part in g.parts if part.kind in ("dot", "plus-ring")]
        else:
            glyphs.append((g.kind, g.box))
    for (one, a), (other, b) in itertools.combinations([*labels, *glyphs], 2):
        if {one, other} == {"glyph concat", "glyph dots"}:
            continue
        assert not overlap(a, b), (one, other, a, b)
    for _, box in [*labels, *glyphs]:
        assert box[0] >= 0 and box[2] <= made.width and box[1] >= 0 and box[3] <= made.height


@every
def test_wires_keep_their_distance_and_swaps_are_few(name):
    d, layout = tidied(drawn(name))
    for boundary, heights in zip(layout.boundaries, layout.heights, strict=True):
        ys = [(heights[s], v) for v in boundary for s in slots(d, v)]
        for (a, v), (b, w) in itertools.pairwise(ys):
            assert b - a >= (PITCH if v == w else GAP) - NEAR
    assert layout.swaps <= plan(drawn(name)).swaps
    assert layout.swaps == scene(drawn(name)).swaps
    assert len(set(axis_names(d).values())) == len(axis_names(d))


def test_what_need_not_cross_does_not():
    for name in ("digit-mlp", "multi-head-attention", "encoder-layer", "identity-resnet", "unet"):
        assert tidied(drawn(name))[1].swaps == 0, name


def test_every_backward_is_drawn_and_right():
    model, inputs = zoo(0, False, torch.float64)["encoder-layer"]
    d = ncd.diagram(model, inputs)
    pair = d.backward()
    x = inputs[0].clone().requires_grad_()
    y = model(x)
    g = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = dict(model.named_parameters())
    want = torch.autograd.grad(y, [x, *wanted.values()], g)
    _, (gx,), by_name = pair.run(inputs, [g])
    assert torch.allclose(gx, want[0], atol=1e-8, rtol=0)
    assert len(by_name) == len(wanted)
    for p, expected in zip(wanted, want[1:], strict=True):
        short = ".".join(p.split(".")[-2:])
        assert torch.allclose(by_name[short], expected, atol=1e-8, rtol=0), p
    assert "s" in pair.forward.svg(cost=True) and 'class="note"' in pair.backward.svg()


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_depth_and_repeats():
    model, x = Stack().eval(), torch.randn(2, 4)
    whole = ncd.diagram(model, x)
    assert len(whole.steps) == 7
    boxes = ncd.diagram(model, x, depth=1)
    assert [s.op.label for s in boxes.steps if isinstance(s.op, Block)] == ["blocks ×3", "head"]
    apart = ncd.diagram(model, x, depth=1, collapse_repeats=False)
    assert len(apart.steps) == 4
    nothing = ncd.diagram(model, x, depth=0)
    assert len(nothing.steps) == 1
    for d in (whole, boxes, apart, nothing):
        assert torch.allclose(d.run(x), model(x))
    assert int(boxes.cost().madds) == int(whole.cost().madds)


class Branching(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


def test_bad_input(tmp_path):
    with pytest.raises(InvalidInput, match="no single diagram"):
        ncd.diagram(Branching(), torch.zeros(3))
    with pytest.raises(InvalidInput, match="2 names for shape"):
        ncd.diagram(nn.Linear(3, 3), torch.zeros(2, 3, 3), axis_names=["b m"])
    with pytest.warns(ncd.TrainModeWarning):
        ncd.diagram(nn.Sequential(nn.Linear(3, 3), nn.Dropout()), torch.zeros(2, 3))
    with pytest.raises(InvalidInput, match=r"\.svg, \.pdf or \.png"):
        ncd.wires("a").save(tmp_path / "a.jpg")
    with pytest.raises(InvalidInput, match="not an SVG"):
        ncd.read_svg("<svg")
    with pytest.raises(InvalidInput, match="named in the drawing"):
        ncd.read_svg(drawn("digit-mlp").svg())
    assert ncd.wires("a b", {"a": 2}).save(tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_an_unknown_operator_is_a_box_that_still_runs():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.cumsum(x, 1) * 2

    x = torch.randn(2, 3)
    d = ncd.diagram(Odd(), x)
    assert torch.equal(d.run(x), Odd()(x)) and ncd.opaque_share(d) == 0.5
    with pytest.raises(InvalidInput, match="has no inside"):
        ncd.read_svg(d.svg())
    again = ncd.read_svg(d.svg(), functions={"cumsum": lambda x: x.cumsum(1)})
    assert torch.equal(again.run(x), Odd()(x))


def test_the_command_draws_a_module_of_the_users(tmp_path):
    from typer.testing import CliRunner

    from broadsheet.cli import app

    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\nfrom torch import nn\n"
        "class Model(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.f = nn.Linear(4, 3)\n"
        "    def forward(self, x):\n        return self.f(x).relu()\n"
        "def make():\n    return nn.Linear(5, 5)\nexample_inputs = torch.zeros(2, 4)\n"
    )
    out = tmp_path / "m.svg"
    done = CliRunner().invoke(app, ["draw", f"{file}:Model", "--out", str(out), "--cost"])
    assert done.exit_code == 0, done.output
    ElementTree.fromstring(out.read_text())
    done = CliRunner().invoke(
        app, ["draw", f"{file}:make", "--out", str(out), "--inputs", "2,7,5", "--axis-names", "b t m"]
    )
    assert done.exit_code == 0 and "[b=2 t=7 m=5]" in done.output
    file.write_text(file.read_text().partition("example_inputs")[0])
    done = CliRunner().invoke(app, ["draw", f"{file}:Model", "--out", str(out)])
    assert done.exit_code == 0 and "drawn for --inputs '2,4'" in done.output
    done = CliRunner().invoke(app, ["draw", f"{file}:nothing", "--out", str(out)])
    assert done.exit_code == 2 and "it has Model, make" in done.output
    done = CliRunner().invoke(app, ["draw", f"{file}:make", "--inputs", "2,x"])
    assert done.exit_code == 2 and "expected sizes" in done.output


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.positions = nn.Embedding(9, 6), nn.Parameter(torch.zeros(5, 6))
        self.layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)

    def forward(self, ids):
        return self.layer(self.embed(ids) + self.positions)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(7, 3)

    def forward(self, x, y, scale=2.0):
        return self.f(x + y) * scale


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.ReLU()), [(2, 4)]),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), [(2, 64)]),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 2)), [(2, 3, 28, 28)]),
        (nn.Conv1d(2, 4, 3), [(2, 2, 32)]),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), [(2, 5, 8)]),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)), [(2, 3, 32, 32)]),
        (Tokens(), [(2, 5)]),
        (Pair(), [(2, 7), (2, 7)]),
        (nn.ReLU(), None),
        (nn.Bilinear(3, 4, 2), None),
    ],
)
def test_inputs_are_guessed_from_the_first_layer(model, shapes):
    model.train()
    found = guess_inputs(model)
    assert (found if found is None else [tuple(x.shape) for x in found]) == shapes
    assert model.training
    if found is not None:
        with torch.no_grad():
            torch.testing.assert_close(ncd.diagram(model.eval(), found).run(*found), model(*found))
