"""The algebra of diagrams: meaning, laws, cost and backward against torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from broadsheet.diagrams import neural_circuit_diagrams as ncd
from broadsheet.diagrams.neural_circuit_diagrams.laws import difference, random_inputs
from broadsheet.errors import InvalidInput

SIZES = {"y": 3, "x": 4, "k": 5, "h": 2}


def attention(sizes=SIZES):
    return (ncd.einsum("y k h, x k h -> y x h", sizes) >> ncd.scale(0.5) >> ncd.softmax("x")) & ncd.wires(
        "x k h", sizes
    )


def whole_attention(sizes=SIZES):
    return attention(sizes) >> ncd.einsum("y x h, x k h -> y k h")


def random(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_attention_computes_what_torch_computes():
    q, k, v = random((3, 5, 2), (4, 5, 2), (4, 5, 2))
    want = torch.nn.functional.scaled_dot_product_attention(
        *(t.permute(2, 0, 1) for t in (q, k, v)), scale=0.5
    ).permute(1, 2, 0)
    assert torch.allclose(whole_attention().run(q, k, v), want, atol=1e-12, rtol=0)
    # Without sizes it is the same drawing, and cost is a polynomial.
    free = whole_attention(None)
    assert torch.allclose(free.run(q, k, v), want, atol=1e-12, rtol=0)
    assert str(free.cost().polynomial) == "2*h*k*x*y + 6*h*x*y"


def test_types_that_do_not_meet_are_shown_with_the_first_difference():
    with pytest.raises(InvalidInput, match=r"array 0, axis 1: b against c"):
        ncd.wires("a b") >> ncd.permute("a c -> c a")
    with pytest.raises(InvalidInput, match="sizes"):
        ncd.wires("a", {"a": 3}) & ncd.wires("a", {"a": 4})
    with pytest.raises(InvalidInput, match=r"declared linear"):
        ncd.op("f", "a -> a", torch.relu, linear=True, sizes={"a": 4})
    with pytest.raises(InvalidInput, match="shape"):
        ncd.wires("a b", {"a": 3}).run(torch.zeros(4, 2))
    with pytest.raises(InvalidInput, match="elementwise function 'nope'"):
        ncd.elementwise("nope")


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_laws_of_lifting(a, b, c, seed):
    sizes = {"a": a, "b": b, "c": c}
    f, g = ncd.linear("a -> b", "F", sizes=sizes), ncd.softmax("b")
    # lift(f;g) = lift f; lift g, and lifting is mapping
    whole, parts = ncd.lift(f >> g, "c"), ncd.lift(f, "c") >> ncd.lift(g, "c")
    (x,) = random((a, c), seed=seed)
    whole, parts = whole.bind(c=c), parts.bind(c=c)
    weights = {n: w.double() for n, w in whole.weights.items()}
    assert torch.equal(whole.run(x, weights=weights), parts.run(x, weights=weights))
    assert whole.equals(parts)
    mapped = torch.stack([(f >> g).run(x[:, i], weights=weights) for i in range(c)], -1)
    assert torch.allclose(whole.run(x, weights=weights), mapped, atol=1e-12, rtol=0)
    # index before = index after a lift
    chosen = seed % c
    before = ncd.wires("a c", sizes) >> ncd.index("c", chosen) >> f
    after = ncd.wires("a c", sizes) >> f >> ncd.index("c", chosen)
    assert difference(before, after) < 1e-12
    # inner broadcast: the other input is shared
    dot = ncd.einsum("a, a -> ", sizes)
    shared = ncd.lift(dot, "c", on={0})
    x, y = random((a, c), (a,), seed=seed)
    assert torch.allclose(shared.run(x, y), x.T @ y, atol=1e-12, rtol=0)


def test_interchange_associativity_and_identity_are_equality():
    f, g, h = ncd.linear("a -> b", "F"), ncd.linear("c -> d", "G"), ncd.softmax("b")
    one = (f & ncd.wires("c")) >> (ncd.wires("b") & g)
    other = (ncd.wires("a") & g) >> (f & ncd.wires("d"))
    assert one.equals(other) and one.equals(f & g)
    assert ((f >> h) >> ncd.scale(2)).equals(f >> (h >> ncd.scale(2)))
    assert (ncd.wires("a") >> f).equals(f)
    assert not f.equals(ncd.linear("a -> b", "G"))
    assert not (f >> h).equals(f)


@pytest.mark.parametrize(
    ("f", "expected"),
    [(ncd.softmax("a"), True), (ncd.elementwise("tanh"), True), (ncd.linear("a -> b", "F"), True)],
)
def test_copy_is_natural(f, expected):
    start = ncd.wires("a", {"a": 4})
    assert (difference(start >> f >> ncd.copy(), start >> ncd.copy() >> (f & f)) < 1e-12) is expected


def test_a_bent_wire_pulled_straight_is_the_wire():
    wire = ncd.Axis("a", "a", 3)
    straight = ncd.wires("a", {"a": wire})
    cap = ncd.cap("a", {"a": wire})
    assert torch.equal(cap.run(), torch.eye(3))
    ends = {"x": wire, "y": wire}
    left = (straight & cap) >> ncd.einsum("x, x y -> y", ends)
    right = (cap & straight) >> ncd.einsum("y x, x -> y", ends)
    for snake in (left, right):
        assert difference(snake, straight) < 1e-12
        pulled = snake.rewrite("fuse").rewrite("cancel")
        assert pulled.steps == ()
        assert pulled.equals(straight)
    # both ends joined to one another are a circle: a number, the size of the axis, and no einsum of nothing
    circle = cap >> ncd.einsum("x x ->", {"x": wire})
    assert float(circle.run()) == 3
    assert len(circle.einsum_form().steps) == 2


def test_dots_are_a_special_commutative_frobenius_algebra():
    a = ncd.Axis("a", "a", 4)
    three = dict.fromkeys("xyz", a)
    wire, merge, split = ncd.wires("a", {"a": a}), ncd.einsum("x, x -> x", three), ncd.einsum("x -> x x", three)
    two = ncd.wires("a, a", {"a": a})
    (x,), (x1, x2, x3) = random((4,)), random((4,), (4,), (4,))
    # special: split, then merge the two ends (one array of two axes: its diagonal)
    special = split >> ncd.einsum("x x -> x", three)
    assert torch.equal(special.run(x), x)
    assert torch.equal(split.run(x), torch.diag(x))
    # associative and commutative
    one, other = (merge & wire) >> merge, (wire & merge) >> merge
    assert torch.allclose(one.run(x1, x2, x3), other.run(x1, x2, x3), atol=1e-15, rtol=0)
    assert torch.equal(merge.run(x1, x2), merge.run(x2, x1))
    # Frobenius: split one and merge with the other, on either side, is merge then split
    matrix = ncd.einsum("x y, x -> x y", three)
    middle = merge >> split
    sided = (split & wire) >> ncd.einsum("x y, y -> x y", three)
    assert torch.allclose(middle.run(x1, x2), sided.run(x1, x2), atol=1e-15, rtol=0)
    assert torch.allclose(middle.run(x1, x2), ((split & wire) >> matrix).run(x1, x2), atol=1e-15, rtol=0)
    # and every such web is one einsum that computes the same
    for web in (special, one, other, middle, sided, two >> merge >> split >> ncd.einsum("x x -> x", three)):
        fused = web.einsum_form()
        assert len(fused.steps) == 1
        assert difference(web, fused) < 1e-12
    assert one.einsum_form().equals(other.einsum_form())
    chain = (ncd.einsum("a b, b c -> a c") & ncd.wires("c d")) >> ncd.einsum("a c, c d -> a d")
    assert len(chain.einsum_form().steps) == 1
    assert difference(chain, chain.einsum_form()) < 1e-12


def test_linear_steps_commute_and_others_are_refused_and_false():
    start = ncd.wires("a b", {"a": 3, "b": 4})
    f = ncd.linear("a -> c", "F", bias=False, sizes={"a": 3, "c": 2})
    g = ncd.linear("b -> d", "G", bias=False, sizes={"b": 4, "d": 5})
    both = start >> f >> g
    turned = both.rewrite("commute", step=0)
    assert not turned.equals(both) and turned.steps[0].op.name == "G" and difference(both, turned) < 1e-12
    assert turned.rewrite("commute", step=0).equals(both)
    for other in (ncd.softmax("b"), ncd.reduce("b", "max"), ncd.linear("b -> d", "B", sizes={"b": 4, "d": 5})):
        with pytest.raises(ncd.IllegalRewrite, match=r"not linear|not commute"):
            (start >> f >> other).rewrite("commute", step=0)
        assert difference(start >> f >> other, start >> other >> f) > 1e-3
    with pytest.raises(ncd.IllegalRewrite, match="does not pass"):
        (start >> ncd.elementwise("ReLU") >> f).rewrite("commute", step=0)
    assert difference(start >> ncd.elementwise("ReLU") >> f, start >> f >> ncd.elementwise("ReLU")) > 1e-3
    turned = (start >> ncd.elementwise("ReLU") >> ncd.permute("a b -> b a")).rewrite("commute", step=0)
    assert [type(s.op).__name__ for s in turned.steps] == ["Einsum", "Elementwise"]
    viewed = start >> ncd.view("a b -> m", {"a": 3, "b": 4, "m": 12}) >> ncd.view("m -> a b", {"a": 3, "b": 4})
    assert viewed.rewrite("cancel").steps == ()


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (ncd.linear("a -> d", "F", bias=False, sizes={"a": 3, "d": 2}), "F"),
        (ncd.linear("c -> d e", "G", bias=False, sizes={"c": 5, "d": 2, "e": 3}), "G"),
        (ncd.reduce("b", "mean"), ""),
        (ncd.scale(2.5), ""),
    ],
)
def test_an_outer_product_slides_past_a_linear_step(step, name):
    factors = ncd.wires("a b, c", {"a": 3, "b": 4, "c": 5})
    both = factors >> ncd.einsum("a b, c -> a b c") >> step
    turned = both.rewrite("slide", step=0)
    assert isinstance(turned.steps[-1].op, type(both.steps[0].op)) and len(turned.steps[-1].ins) == 2
    assert not name or turned.steps[0].op.name == name
    assert difference(both, turned) < 1e-12
    assert int(turned.cost().madds) < int(both.cost().madds)


def test_what_an_outer_product_does_not_slide_past():
    factors = ncd.wires("a, c", {"a": 3, "c": 5})
    outer = ncd.einsum("a, c -> a c")
    for step, word in (
        (ncd.softmax("a"), "not linear"),
        (ncd.elementwise("ReLU"), "not linear"),
        (ncd.linear("a -> d", "B", sizes={"a": 3, "d": 2}), "not linear"),
        (ncd.view("a c -> m", {"a": 3, "c": 5, "m": 15}), "several factors"),
    ):
        with pytest.raises(ncd.IllegalRewrite, match=word):
            (factors >> outer >> step).rewrite("slide", step=0)
    with pytest.raises(ncd.IllegalRewrite, match="outer product"):  # a dot: both factors have the axis
        shared = ncd.wires("a, a", {"a": 3}) >> ncd.einsum("a, a -> a") >> ncd.reduce("a", "sum")
        shared.rewrite("slide", step=0)


def test_a_rewrite_that_changes_numbers_is_refused(monkeypatch):
    from broadsheet.diagrams.neural_circuit_diagrams import laws

    monkeypatch.setitem(laws.LAWS, "wrong", lambda d: d >> ncd.scale(2.0))
    with pytest.raises(ncd.IllegalRewrite, match="changed the numbers"):
        ncd.wires("a", {"a": 3}).rewrite("wrong")


def test_cost_is_what_torch_counts():
    sizes = {"y": 7, "x": 6, "k": 5, "h": 2}
    d = whole_attention(sizes)
    q, k, v = (t.permute(2, 0, 1) for t in random((7, 5, 2), (6, 5, 2), (6, 5, 2)))
    with FlopCounterMode(display=False) as counter:
        torch.softmax(q @ k.transpose(1, 2), -1) @ v
    contractions = sum(
        int(c) for c, s in zip(d.cost().per_step, d.steps, strict=True) if type(s.op).__name__ == "Einsum"
    )
    assert contractions * 2 == counter.get_total_flops()
    # of the columns' arrays: q and k and v; the scores and v (before and after scale and softmax); the result
    q_size, kv_size, scores = 7 * 5 * 2, 6 * 5 * 2, 7 * 6 * 2
    assert d.cost().peak_elements == max(q_size + 2 * kv_size, scores + kv_size, q_size)
    frame = d.cost().to_frame()
    assert frame["multiply_adds"].sum() == int(d.cost().madds) and "y" in frame["elements_held_polynomial"][0]


DIAGRAMS = {
    "attention": whole_attention,
    "mlp": lambda: (
        ncd.linear("a -> b", "F", sizes={"a": 3, "b": 4}) >> ncd.elementwise("tanh") >> ncd.linear("b -> c", "G", sizes={"b": 4, "c": 2})
    ),
    "residual": lambda: (
        ncd.wires("x a", {"x": 5, "a": 3})
        >> ncd.copy()
        >> ((ncd.wires("x a") >> ncd.norm("a") >> ncd.linear("a -> a'", "F", sizes={"a": 3, "a'": 3}) >> ncd.elementwise("ReLU")) & ncd.wires("x a"))
        >> ncd.einsum("x a', x a -> x a a'")
    ),
    "reduce": lambda: ncd.wires("x a", {"x": 5, "a": 3}) >> ncd.elementwise("exp") >> ncd.reduce("x") >> ncd.reduce("a", "max"),
    "views": lambda: (
        ncd.wires("x m, x m'", {"x": 5, "m": 6, "m'": 2})
        >> ncd.concat("m, m' -> n", {"m": 6, "m'": 2, "n": 8})
        >> ncd.view("n -> h k", {"n": 8, "h": 2, "k": 4})
        >> ncd.permute("x h k -> k x h")
        >> ncd.index("h", 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIAGRAMS)
def test_backward_is_autograd(name):
    d = DIAGRAMS[name]()
    inputs, weights = random_inputs(d)
    d = ncd.Diagram.of(d.values, d.steps, d.inputs, d.outputs, weights)
    pair = d.backward()
    leaves = [x.requires_grad_() for x in inputs]
    learned = {n: w.clone().requires_grad_() for n, w in weights.items()}
    y = d.run(*leaves, weights=learned)
    (g,) = random(y.shape, seed=3)
    want = torch.autograd.grad(y, [*leaves, *learned.values()], g)
    outputs, grads, by_name = pair.run([x.detach() for x in inputs], [g])
    assert torch.allclose(outputs[0], y, atol=1e-12, rtol=0)
    for got, expected in zip([*grads, *(by_name[n] for n in learned)], want, strict=True):
        assert torch.allclose(got, expected, atol=1e-8, rtol=0)
    # <Jv, w> = <v, Rw>
    vs = random(*(x.shape for x in inputs), seed=5)
    _, jv = torch.func.jvp(lambda *xs: d.run(*xs, weights=weights), tuple(x.detach() for x in inputs), tuple(vs))
    assert float((jv * g).sum()) == pytest.approx(float(sum((v * r).sum() for v, r in zip(vs, grads, strict=True))))


def test_saved_elements_are_no_more_than_autograd_saves():
    d = whole_attention()
    held = {}
    inputs = [x.requires_grad_() for x in random((3, 5, 2), (4, 5, 2), (4, 5, 2))]

    def pack(x):
        held[(x.untyped_storage().data_ptr())] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = d.run(*inputs)
    assert y.shape and int(d.backward().saved_elements) <= sum(held.values())
    assert int(d.backward().saved_elements) == 30 + 40 + 40 + 24


def test_module_has_the_weights_as_parameters():
    d = DIAGRAMS["mlp"]()
    module = d.module()
    x = torch.randn(3)
    assert torch.equal(module(x), d.run(x))
    assert {n for n, _ in module.named_parameters()} == {"F__weight", "F__bias", "G__weight", "G__bias"}


def test_show_index_takes_one_entry():
    d = whole_attention()
    q, k, v = random((3, 5, 2), (4, 5, 2), (4, 5, 2))
    assert torch.equal(d.show_index(y=1, h=0).run(q, k, v), d.run(q, k, v)[1, :, 0])
    with pytest.raises(InvalidInput, match="no axis 'q'"):
        d.show_index(q=1)
