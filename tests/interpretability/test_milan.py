"""MILAN: exemplars against brute force, the describer against NumPy, and what its sentences are used for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from broadsheet.data.image_world import GLYPH, ImageWorld
from broadsheet.data.language import TopicCorpus
from broadsheet.errors import InvalidInput, MissingExtra
from broadsheet.interpretability import milan
from broadsheet.interpretability.milan import (
    CaptionDecoder,
    Describer,
    Descriptions,
    Exemplars,
    PyramidEncoder,
    SentenceLM,
    SpatialEncoder,
    VectorExemplars,
    Vocabulary,
    as_maps,
    attention_penalty,
    audit,
    bleu,
    compositional,
    constant_description,
    edit,
    encode,
    exemplars_from_maps,
    grammar,
    importance,
    nearest_description,
    net_dissect,
    order_by,
    tag_words,
    text_exemplars,
    top_exemplars,
)
from broadsheet.nn.features import Feature, neuron
from broadsheet.nn.seeding import seeded
from broadsheet.nn.small_lm import small_language_model
from broadsheet.nn.sparse_autoencoder import SparseAutoencoder


class Net(nn.Module):
    """A small classifier with a normalisation that would show if it were left in training mode."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.deep(self.conv(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> Net:
    with seeded(0):
        return Net()


@pytest.fixture(scope="module")
def pictures() -> list[torch.Tensor]:
    return [torch.from_numpy(x) for x in ImageWorld().sample(23, seed=0).images]


# ---------------------------------------------------------------------------------------------------------- exemplars


def brute(net: nn.Module, pictures: list[torch.Tensor], layer: str) -> torch.Tensor:
    net.eval()
    with torch.no_grad():
        x = torch.stack(pictures).float() / 255
        return net.deep(net.conv(x)) if layer == "deep" else net.conv(x)  # type: ignore[operator]


@pytest.mark.parametrize("layer", ["conv", "deep"])
def test_exemplars_are_those_of_a_brute_force_pass(net: Net, pictures: list, layer: str) -> None:
    found = top_exemplars(net, pictures, layer, k=4, batch_size=5, quantile=0.9)
    maps = brute(net, pictures, layer)
    peak = maps.flatten(2).amax(2)
    level = torch.quantile(maps.movedim(1, 0).flatten(1).double(), 0.9, dim=1).float()
    torch.testing.assert_close(found.level, level)
    for unit in range(maps.shape[1]):
        order = sorted(range(len(pictures)), key=lambda i: (-float(peak[i, unit]), i))[:4]
        assert found.ids[unit].tolist() == order
        assert torch.equal(found.activations[unit], peak[order, unit])
        assert torch.equal(found.images[unit], torch.stack([pictures[i] for i in order]))
        wide = nn.functional.interpolate(maps[order, unit][:, None], size=(32, 32), mode="bilinear")
        assert torch.equal(found.masks[unit], wide > found.level[unit])
    above = (maps > found.level.view(1, -1, 1, 1)).double().mean((0, 2, 3))
    live = level > 0  # a level of 0 is that of a unit that is silent more often than not
    assert float((above - 0.1)[live].abs().max()) < 0.01 and bool(live.any())
    assert len(found.to_frame()) == 4 * len(found)


def test_the_sketch_gives_the_same_exemplars(net: Net, pictures: list, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = top_exemplars(net, pictures, "deep", k=3)
    monkeypatch.setattr(milan.exemplars, "EXACT_BYTES", 0)
    sketched = top_exemplars(net, pictures, "deep", k=3)
    assert torch.equal(exact.ids, sketched.ids)
    torch.testing.assert_close(exact.level, sketched.level)


def test_units_sizes_saving_and_the_models_mode(net: Net, pictures: list, tmp_path: Path) -> None:
    net.train()
    net.conv.eval()
    seen, state = net.conv[1].running_mean.clone(), torch.get_rng_state()
    found = top_exemplars(net, pictures, "deep", units=[5, 2], k=2, size=48, preprocess=lambda x: x - 0.5)
    assert net.training and not net.conv.training and torch.equal(seen, net.conv[1].running_mean)
    assert torch.equal(state, torch.get_rng_state())
    net.eval()
    assert found.names == (("deep", 5), ("deep", 2)) and found.images.shape == (2, 2, 3, 48, 48)
    found.save(tmp_path / "exemplars")
    again = Exemplars.load(tmp_path / "exemplars")
    assert all(
        torch.equal(getattr(found, n), getattr(again, n)) for n in ("index", "pictures", "maps", "level", "alive")
    )
    assert found[[1]].names == (("deep", 2),)
    ax = found.plot(texts=["one thing", "another"])
    assert len(ax.images) == 4 and {t.get_text() for t in ax.texts} == {"one thing", "another"}


def test_constant_and_silent_units_are_flagged() -> None:
    maps = torch.rand(10, 3, 4, 4)
    maps[:, 1] = 0
    maps[:, 2] = 0.7
    found = exemplars_from_maps(maps, torch.zeros(10, 3, 8, 8, dtype=torch.uint8), k=2)
    assert found.alive.tolist() == [True, False, False] and not found.masks[1:].any()


def test_a_generators_own_pictures_are_its_exemplars() -> None:
    with seeded(0):
        generator = nn.Sequential(nn.ConvTranspose2d(4, 5, 4), nn.ReLU(), nn.ConvTranspose2d(5, 3, 2, 2), nn.Tanh())
    latents = [torch.randn(4, 1, 1, generator=torch.Generator().manual_seed(i)) for i in range(9)]
    found = top_exemplars(generator, latents, "1", k=2, generative=True)
    with torch.no_grad():
        made = generator(torch.stack(latents))
    expected = ((made + 1) / 2 * 255).round().to(torch.uint8)
    assert torch.equal(found.images[0], expected[found.ids[0]])


def test_tokens_become_maps() -> None:
    grid = torch.arange(4 * 2.0).view(1, 4, 2)
    with_class = torch.cat([torch.full((1, 1, 2), -1.0), grid], 1)
    assert torch.equal(as_maps(with_class), as_maps(grid)) and as_maps(grid)[0, 1, 1, 0] == grid[0, 2, 1]
    registers = torch.cat([torch.full((1, 5, 2), -1.0), torch.arange(12.0).view(1, 6, 2)], 1)
    assert as_maps(registers, grid=(2, 3)).shape == (1, 2, 2, 3) and float(as_maps(registers, grid=(2, 3)).min()) == 0
    for wrong, message in ((torch.zeros(1, 7, 2), "neither 7 nor 6"), (torch.zeros(3, 2), "before the pooling")):
        with pytest.raises(InvalidInput, match=message):
            as_maps(wrong, "encoder")
    with pytest.raises(InvalidInput, match="fewer than 20"):
        as_maps(grid, "encoder", (4, 5))


def backbones() -> dict[str, tuple[nn.Module, list[str]]]:
    from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

    with seeded(0):
        resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
        vit = ViTModel(
            ViTConfig(
                hidden_size=12,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=16,
                image_size=32,
                patch_size=8,
            )
        )
        own = Net()
    return {
        "resnet": (resnet, ["embedder", "encoder.stages.0", "encoder.stages.1"]),
        "vit": (vit, ["embeddings", "layers.1"] if hasattr(vit, "layers") else ["embeddings", "encoder.layer.1"]),
        "own": (own, ["conv", "deep"]),
    }


@pytest.mark.parametrize("name", ["resnet", "vit", "own"])
def test_any_backbone_encodes_and_is_described(name: str, pictures: list) -> None:
    backbone, layers = backbones()[name]
    found = top_exemplars(backbone, pictures, layers[-1], units=range(3), k=2, quantile=0.9)
    encoder = PyramidEncoder(backbone, layers, mean=(0.5,) * 3, std=(0.2,) * 3)
    vectors = encode(encoder, found)
    assert vectors.vectors.shape[:2] == (3, 2) and vectors.units == found.names
    images = found.images.flatten(0, 1).float() / 255
    full = encoder(images, torch.ones(6, 1, 32, 32))
    means = torch.cat([m.mean((2, 3)) for m in encoder.maps(images)], 1)
    torch.testing.assert_close(full, means, atol=1e-5, rtol=1e-5)
    weights = torch.rand(6, 1, 32, 32)
    torch.testing.assert_close(encoder(images, weights), encoder(images, 7.5 * weights), atol=1e-5, rtol=1e-4)
    assert not encoder(images, torch.zeros(6, 1, 32, 32)).any()
    half = torch.zeros(6, 1, 32, 32)
    half[..., :16, :] = 1
    assert not torch.allclose(encoder(images, half), full)
    spatial = SpatialEncoder(backbone, layers[-1])
    assert encode(spatial, found).vectors.shape[1] % 2 == 0 and encode(spatial, found).vectors.shape[1] > 2


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"layer": "depe"}, "nearest names: deep"),
        ({"layer": "head"}, r"shape \(23, 3\)"),
        ({"k": 24}, "k=24: the data set has 23"),
        ({"quantile": 1.0}, "quantile=1"),
        ({"units": [8]}, "unit 8 of 'deep': the layer has 8"),
    ],
)
def test_wrong_arguments_are_refused(net: Net, pictures: list, how: dict, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        top_exemplars(net, pictures, **{"layer": "deep", "k": 2, **how})


@pytest.mark.parametrize(
    ("picture", "message"),
    [(torch.full((3, 8, 8), 2.0), "from 2 to 2"), (torch.zeros(1, 8, 8), r"\(1, 8, 8\)"), ("x.png", "gives str")],
)
def test_wrong_pictures_are_refused(net: Net, picture: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        top_exemplars(net, [(picture, 0)], "deep", k=1)


# -------------------------------------------------------------------------------------------------------------- words


def test_words_and_their_numbers() -> None:
    words = Vocabulary.of(["Red things, on top", "red rings"], min_count=1)
    assert words.words[:5] == ("<start>", "<stop>", "<pad>", "<unk>", "red")
    ids = words.encode(["red rings", "green things, on top"])
    assert ids[0].tolist()[-1] == words.pad and words.decode(ids[0]) == "red rings"
    assert words.decode(ids[1]) == "<unk> things, on top"
    assert words.encode(["red red red"], length=2).tolist() == [[4, 4]]  # cut: it has no end
    with pytest.raises(InvalidInput, match="sentence 1 is empty"):
        words.encode(["red", " "])
    with pytest.raises(InvalidInput, match="no word"):
        Vocabulary.of([""])
    with pytest.raises(MissingExtra, match="spacy"):
        milan.spacy_words("no_such_model")


def test_the_rules_know_plain_sentences() -> None:
    assert tag_words(milan.split_words("the upper edge of round red things")) == [
        "other", "adjective", "noun", "adposition", "adjective", "adjective", "noun",
    ]  # fmt: skip
    found = grammar("crosses that are not red at the top")
    assert (found.n_nouns, found.n_adpositions, found.length) == (3, 1, 8) and found.parse_depth == 3


def test_bleu_is_one_for_the_same_and_counts_each_word_once() -> None:
    assert bleu(["red round things here"], [["x", "red round things here"]]) == pytest.approx(1)
    assert bleu(["the the the the"], [["the cat sat down"]], order=1) == pytest.approx(1 / 4)
    # 3 of 4 words, 1 of 3 pairs, then no run of three (half of 1/2) and of four (a quarter of 1/1); no brevity penalty.
    expected = (3 / 4 * 1 / 3 * 1 / 4 * 1 / 4) ** (1 / 4)
    assert bleu(["a b c d"], [["a b x d"]]) == pytest.approx(expected)
    assert bleu(["a b"], [["a b c d"]], order=2) == pytest.approx(np.exp(1 - 4 / 2))
    assert bleu(["q"], [["a"]]) == 0


# ------------------------------------------------------------------------------------------- the decoder, in NumPy


def numpy_decoder(net: CaptionDecoder, vectors: np.ndarray, tokens: list[int]) -> tuple[float, np.ndarray]:
    """One sentence's log-probability, word by word in float64, from the equations."""
    w = {name: p.detach().double().numpy() for name, p in net.state_dict().items()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    f = (vectors - w["centre"]) / w["scale"]
    h, c = np.tanh(linear("first_hidden", f.mean(0))), np.tanh(linear("first_cell", f.mean(0)))
    total, last, looked = 0.0, 0, []
    for token in tokens:
        e = linear("score", np.tanh(linear("query", h) + linear("key", f)))[:, 0]
        a = np.exp(e - e.max()) / np.exp(e - e.max()).sum()
        x = np.concatenate([w["embedding.weight"][last], sigmoid(linear("gate", h)) * (a @ f)])
        gates = x @ w["lstm.weight_ih"].T + w["lstm.bias_ih"] + h @ w["lstm.weight_hh"].T + w["lstm.bias_hh"]
        i, forget, g, o = np.split(gates, 4)
        c = sigmoid(forget) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        logits = linear("output", h)
        total += logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        looked.append(a)
        last = token
    return total, np.array(looked)


def test_the_decoder_is_its_equations() -> None:
    net = CaptionDecoder(7, 11, embedding=4, hidden=6, seed=3).double().eval()
    random = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 3, 7, dtype=torch.float64, generator=random) * 3 + 1
    net.standardise(vectors)
    tokens = torch.randint(4, 11, (2, 5), generator=random)
    logp, attention = net(vectors, tokens)
    for i in range(2):
        total, looked = numpy_decoder(net, vectors[i].numpy(), tokens[i].tolist())
        assert float(logp[i].gather(1, tokens[i][:, None]).detach().sum()) == pytest.approx(total, abs=1e-10)
        np.testing.assert_allclose(attention[i].detach().numpy(), looked, atol=1e-12)
    order = [2, 0, 1]
    permuted, looked = net(vectors[:, order], tokens)
    torch.testing.assert_close(permuted, logp)
    torch.testing.assert_close(looked, attention[..., order])
    with pytest.raises(InvalidInput, match="5 entries, the describer was trained on 7"):
        net(torch.zeros(1, 2, 5, dtype=torch.float64), tokens[:1])


def test_the_penalty_leaves_padding_out_unless_asked() -> None:
    attention = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])
    real = torch.tensor([[True, False]])
    assert float(attention_penalty(attention, real)) == pytest.approx(0.25)
    assert float(attention_penalty(attention)) == pytest.approx(0.25)  # (1 - 1.5)^2 and (1 - 0.5)^2
    assert float(attention_penalty(attention[:, :1])) == pytest.approx(0.25)
    assert float(attention_penalty(torch.tensor([[[0.2, 0.8], [0.9, 0.1]]]), real)) != pytest.approx(
        float(attention_penalty(torch.tensor([[[0.2, 0.8], [0.9, 0.1]]])))
    )


# ---------------------------------------------------------------------------------------------------- the describer

SIZES: dict[str, Any] = {"hidden": 32, "embedding": 16, "dropout": 0.0, "epochs": 25, "lr": 1e-2, "held_out": 0.0}
LM: dict[str, Any] = {"hidden": 24, "embedding": 16, "dropout": 0.0, "epochs": 15, "lr": 1e-2}
THINGS = ("red circles", "blue squares on the left", "written digits")


def made(n: int = 60, seed: int = 0) -> tuple[VectorExemplars, list[list[str]], list[int]]:
    """Three kinds of units; half of the sentences about them say nothing."""
    draw = np.random.default_rng(seed)
    kinds = draw.integers(3, size=n)
    vectors = torch.from_numpy(draw.normal(size=(n, 4, 6))).float() * 0.3
    vectors[torch.arange(n), :, torch.from_numpy(kinds)] += 2
    sentences = [["things", THINGS[kind]] for kind in kinds]
    return (
        VectorExemplars(vectors, tuple(map(str, range(n))), tuple(("layer", i) for i in range(n))),
        sentences,
        kinds.tolist(),
    )


@pytest.fixture(scope="module")
def describer() -> Describer:
    vectors, sentences, _ = made()
    return Describer.fit(vectors, sentences, lm_sizes=LM, **SIZES)


@pytest.fixture(scope="module")
def found(describer: Describer) -> Descriptions:
    return describer.describe(made(seed=1)[0], beam_size=20, temperature=0.5)


def test_the_prior_turns_general_sentences_into_special_ones(found: Descriptions) -> None:
    kinds = made(seed=1)[2]
    assert [THINGS[kind] for kind in kinds] == list(found.texts)
    assert set(found.reranked(0).texts) != set(found.texts)  # without the prior some are only "things"
    assert list(found.to_frame().columns) == ["unit", "text", "score", "log_likelihood", "log_prior", "alive"]
    assert len(found[0].attention) == len(found.texts[0].split()) + 1


def test_scores_of_the_beam_are_those_of_teacher_forcing(describer: Describer, found: Descriptions) -> None:
    terms = describer.score(found.texts, made(seed=1)[0])
    rows = torch.arange(len(found))
    torch.testing.assert_close(terms.log_likelihood, found.log_likelihood[rows, found.chosen], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(terms.log_prior, found.log_prior[rows, found.chosen], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(terms.pmi(0.5), found.score, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(describer.lm.logp(found.texts), terms.log_prior)


def test_more_weight_on_the_prior_never_chooses_a_likelier_sentence(describer: Describer, found: Descriptions) -> None:
    rows, last = torch.arange(len(found)), None
    for weight in (0.0, 0.1, 0.2, 0.4, 0.8, 2.0):
        prior = found.log_prior[rows, found.reranked(weight).chosen]
        assert last is None or bool((prior <= last + 1e-6).all())
        last = prior
    vectors = made(seed=1)[0]
    assert describer.describe(vectors, "beam", beam_size=20).texts == found.reranked(0).texts
    greedy = describer.describe(vectors, "greedy")
    assert greedy.texts == describer.describe(vectors, "beam", beam_size=1).texts
    assert describer.describe(vectors, "stepwise", temperature=0.0, beam_size=20).texts == found.reranked(0).texts
    with pytest.raises(InvalidInput, match="temperature=-1"):
        found.reranked(-1)


def test_exemplars_in_another_order_give_the_same_sentences(describer: Describer, found: Descriptions) -> None:
    vectors = made(seed=1)[0].vectors
    moved = describer.describe(vectors[:, [3, 1, 0, 2]], beam_size=20, temperature=0.5)
    assert moved.texts == found.texts
    torch.testing.assert_close(moved.score, found.score, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moved.attention[0], found.attention[0][:, [3, 1, 0, 2]], atol=1e-4, rtol=1e-4)


def test_stepwise_scores_are_likelihoods_too(describer: Describer) -> None:
    vectors = made(seed=1)[0][range(5)]
    said = describer.describe(vectors, "stepwise", temperature=0.3, beam_size=5)
    torch.testing.assert_close(
        describer.score(said.texts, vectors).log_likelihood, said.log_likelihood[torch.arange(5), said.chosen],
        atol=1e-4, rtol=1e-4,
    )  # fmt: skip


def test_a_describer_is_saved_whole(describer: Describer, found: Descriptions, tmp_path: Path) -> None:
    describer.save_pretrained(tmp_path)
    again = Describer.load(tmp_path)
    assert again.describe(made(seed=1)[0], beam_size=20, temperature=0.5).texts == found.texts
    again.encoder = PyramidEncoder(Net(), ["deep"])
    assert again.encoder is not None and not any("encoder" in name for name, _ in again.named_parameters())


def test_training_is_deterministic_resumes_and_leaves_the_global_state(tmp_path: Path) -> None:
    vectors, sentences, _ = made(20)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    how = {**SIZES, "epochs": 3, "held_out": 0.2, "lm_sizes": {**LM, "epochs": 2}}
    first = Describer.fit(vectors, sentences, checkpoint=tmp_path, **how)
    assert torch.equal(torch.get_rng_state(), state)
    again = Describer.fit(vectors, sentences, checkpoint=tmp_path, **how)  # finished: nothing is trained
    fresh = Describer.fit(vectors, sentences, **how)
    for other in (again, fresh):
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert fresh.history == first.history


def test_units_that_cannot_be_described_get_no_sentence(describer: Describer) -> None:
    vectors = made(4)[0]
    dead = VectorExemplars(vectors.vectors, vectors.names, vectors.units, torch.tensor([True, False, True, True]))
    said = describer.describe(dead, beam_size=3)
    assert said.texts[1] == "" and bool(said.score[1].isnan()) and all(said.texts[i] for i in (0, 2, 3))
    assert audit(said, ".").total == 3 and order_by(said, "length").count(1) == 0


def test_a_sentence_has_a_word_and_an_end_where_it_can() -> None:
    likelihood = torch.tensor([[-1.0, -5.0, -torch.inf]])
    best = milan.descriptions.best_of(likelihood, torch.zeros(1, 3), torch.tensor([[False, True, True]]), 0.2)
    assert best.tolist() == [1]
    words = Vocabulary.of(["a b"])
    untrained = Describer(list(words.words), 3, hidden=8, embedding=4, lm={"hidden": 4, "embedding": 4}, length=3)
    with torch.no_grad():
        untrained.decoder.output.bias[words.stop] += 50
    assert all(untrained.describe(torch.randn(3, 2, 3), "greedy").texts)


def test_wrong_training_data_is_refused(describer: Describer) -> None:
    vectors, sentences, _ = made(5)
    other = SentenceLM(["<start>", "<stop>", "<pad>", "<unk>", "zebra"], hidden=4, embedding=4)
    for args, how, message in (
        ((vectors, sentences[:4]), {}, "4 units for 5"),
        ((vectors, [*sentences[:4], []]), {}, "unit 4 .* has no description"),
        ((vectors, sentences), {"lm": other, "vocabulary": describer.vocabulary}, "another vocabulary"),
        ((vectors, sentences), {"restore": "first"}, "restore='first'"),
    ):
        with pytest.raises(InvalidInput, match=message):
            Describer.fit(*args, **how)
    with pytest.raises(InvalidInput, match="strategy='best'"):
        describer.describe(vectors, "best")
    with pytest.raises(InvalidInput, match="these exemplars are pictures"):
        describer.describe(exemplars_from_maps(torch.rand(3, 2, 4, 4), torch.zeros(3, 3, 8, 8, dtype=torch.uint8), k=1))
    with pytest.raises(InvalidInput, match="NaN"):
        VectorExemplars(torch.full((1, 1, 1), torch.nan), ("a",))
    with pytest.raises(InvalidInput, match="texts is empty"):
        SentenceLM.fit([])


def test_the_language_model_sums_to_one_over_short_sentences() -> None:
    model = SentenceLM(["<start>", "<stop>", "<pad>", "<unk>", "a"], hidden=5, embedding=3, length=3, seed=1).eval()
    stopped = torch.tensor([[1, 2, 2], [4, 1, 2], [4, 4, 1]])
    total = model.token_logp(stopped).exp()
    step, _ = model.step(torch.tensor([0]), None)
    assert float(total[0]) == pytest.approx(float(step.exp()[0, 1]), rel=1e-5)
    state, expected, token = None, 0.0, torch.tensor([0])
    for word in (4, 4, 1):
        logp, state = model.step(token, state)
        expected, token = expected + float(logp.detach()[0, word]), torch.tensor([word])
    assert float(total[2].log()) == pytest.approx(expected, rel=1e-5)


# --------------------------------------------------------------------------------------- baselines, analysis, repair


def test_labels_from_concepts_recover_planted_formulas() -> None:
    draw = torch.Generator().manual_seed(0)
    concepts = {name: torch.rand(50, 4, 4, generator=draw) < 0.4 for name in "abcd"}
    active = torch.stack([
        concepts["b"], (concepts["a"] & concepts["c"]) | concepts["d"], concepts["a"] & ~concepts["b"],
    ])  # fmt: skip
    single = net_dissect(active, concepts)
    assert single[0].formula == "b" and single[0].iou == pytest.approx(1)
    both = active[2] & concepts["a"]
    assert single[2].formula == "a" and single[2].iou == pytest.approx(float(both.sum() / concepts["a"].sum()))
    formulas = compositional(active, concepts, beam=60)
    assert [round(x.iou, 6) for x in formulas] == [1, 1, 1]
    assert formulas[0].formula == "b" and set(formulas[1].concepts) == {"a", "c", "d"}
    assert formulas[2].concepts == ("a",) and formulas[2].without == ("b",)
    with pytest.raises(InvalidInput, match="concepts is empty"):
        compositional(active, {})


def test_constant_and_nearest_sentences() -> None:
    vectors, sentences, kinds = made(30)
    assert constant_description(sentences) == "things"
    new, _, others = made(10, seed=5)
    said = nearest_description(vectors, sentences, new)
    assert said == [THINGS[kind] for kind in others] and kinds


@pytest.fixture(scope="module")
def spurious() -> tuple[nn.Module, Descriptions, dict[str, Any]]:
    """A classifier of which units 0 and 1 read the corner and 2 and 3 the true cue, and sentences that say so."""
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[2.0, 1.0, 1.0, 0.5], [-2.0, -1.0, -1.0, -0.5]]))
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (200,), generator=draw)
    sign = 1.0 - 2 * labels
    cue = sign[:, None] + 0.3 * torch.randn(200, 2, generator=draw)
    corner = sign[:, None].expand(200, 2)
    sets = {
        name: [(torch.cat([f * corner, cue], 1), labels)]
        for name, f in {"wrong": -1.0, "none": 0.0, "right": 1.0}.items()
    }
    texts = ("written digits", "a white digit on the left", "red circles", "striped red circles at the top of things")
    n = len(texts)
    found = Descriptions(
        tuple(map(str, range(n))), tuple(("0", i) for i in range(n)), torch.ones(n, dtype=torch.bool),
        tuple((text,) for text in texts), torch.zeros(n, 1), torch.zeros(n, 1), torch.ones(n, 1, dtype=torch.bool),
        0.2, torch.zeros(n, dtype=torch.long), (torch.zeros(1, 1),) * n,
    )  # fmt: skip
    return model, found, sets


def test_repair_switches_off_the_named_units(spurious: tuple) -> None:
    model, found, sets = spurious
    repair = edit(model, found, [GLYPH], sets["none"], {"wrong": sets["wrong"], "right": sets["right"]}, all_units=True)
    assert set(repair.chosen) == {("0", 0), ("0", 1)} and repair.before("wrong") < 0.1
    assert repair.after("wrong") > 0.95 and repair.after("right") > 0.95
    with repair.apply(model):
        assert milan.accuracy(model, sets["wrong"]) == repair.after("wrong")
    assert milan.accuracy(model, sets["wrong"]) == repair.before("wrong")
    assert repair.random["wrong"].shape == (5, 3) and list(repair.to_frame()["chosen"]) == [True, True]
    assert len(repair.all_units["wrong"]) == 3 and repair.plot().get_xlabel() == "units switched off"
    # Where the validation pictures carry the digit, too, losing it costs, and fewer units go.
    harmful = edit(model, found, ["red"], sets["none"], sets["none"], tolerance=0.02)
    assert len(harmful.chosen) < 2

    def margin(net: nn.Module) -> float:
        x, y = sets["none"][0]
        with torch.no_grad():
            return float((net(x)[:, 0] * (1.0 - 2 * y)).mean())

    ordered = edit(model, found, ["red"], margin, sets["none"], tolerance=10.0)
    assert ordered.chosen == (("0", 3), ("0", 2)) and ordered.alone[0] > ordered.alone[1]  # the least harmful first
    with pytest.raises(InvalidInput, match=r"holds any of face.*Frequent words here: .*red"):
        edit(model, found, ["face"], sets["none"], sets["none"])


def test_audit_order_and_importance(spurious: tuple) -> None:
    model, found, sets = spurious
    seen = audit(found, "DIGIT")
    assert seen.rows == (0, 1) and seen.share == 0.5 and seen.units == (("0", 0), ("0", 1))
    assert order_by(found, "n_adpositions")[0] == 3 and order_by(found, "length")[-1] in (0, 2)
    assert sorted(order_by(found, "random", seed=1)) == [0, 1, 2, 3]
    vectors = {"red": torch.tensor([1.0, 0]), "digits": torch.tensor([0.0, 1]), "digit": torch.tensor([0.0, 1]),
               "circles": torch.tensor([1.0, 0.5])}  # fmt: skip
    assert set(order_by(found, "similarity_to(digits)", vectors=vectors)[:2]) == {0, 1}
    assert order_by(found, "max_word_distance", vectors=vectors)[0] in (2, 3)
    curves = importance(model, sets["none"], found, ["n_adjectives", "n_nouns"], (0.0, 0.5, 1.0))
    assert curves.counts == (0, 2, 4) and curves.random.shape == (5, 3)
    assert curves.curves["n_nouns"][0] == milan.accuracy(model, sets["none"])
    assert set(curves.to_frame()["order"]) == {"n_adjectives", "n_nouns", "random"}
    assert curves.plot().get_ylabel() == "accuracy"
    with pytest.raises(InvalidInput, match="key='n_words'"):
        order_by(found, "n_words")
    with pytest.raises(InvalidInput, match="needs vectors="):
        order_by(found, "max_word_distance")
    vectorless = Descriptions.join([found, found])
    assert len(vectorless) == 8 and vectorless.plot(0).get_xlabel() == "nats"


def test_clip_chooses_what_fits_the_pictures(found: Descriptions) -> None:
    from transformers import CLIPConfig, CLIPModel

    some = exemplars_from_maps(torch.rand(6, 60, 4, 4), torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8), k=2)
    wanted = found.beam[3][2]

    def similarity(pictures: torch.Tensor, texts: Any) -> torch.Tensor:
        return torch.tensor([[float(text == wanted) for text in texts]]).expand(len(pictures), -1)

    assert milan.rerank_with_clip(found, some, similarity).texts[3] == wanted
    with pytest.raises(InvalidInput, match="lam=2"):
        milan.rerank_with_clip(found, some, similarity, lam=2)
    side = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = CLIPModel(CLIPConfig(
        text_config={**side, "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 2},
        vision_config={**side, "image_size": 8, "patch_size": 4}, projection_dim=6,
    ))  # fmt: skip

    class Words(dict):
        def to(self, device: Any) -> "Words":
            return self

    def tokenizer(texts: list[str], **_: Any) -> Words:
        ids = torch.tensor([[3 + len(text) % 15, 2] for text in texts])
        return Words(input_ids=ids, attention_mask=torch.ones_like(ids))

    fit = milan.clip_similarity(model, tokenizer)(torch.rand(3, 3, 16, 16), ["a", "bb"])
    assert fit.shape == (3, 2) and float(fit.abs().max()) <= 1 + 1e-5


# ------------------------------------------------------------------------------------------ features of language models


def topic_features(
    model: nn.Module, corpus: TopicCorpus, site: str, texts: torch.Tensor, labels: torch.Tensor
) -> list[Feature]:
    """Directions from the mean of all texts to that of each topic."""
    from broadsheet.nn.activations import collect_activations

    rows = collect_activations(model, site, [texts])
    means = torch.stack([rows.values[labels[rows.text] == topic].mean(0) for topic in range(corpus.n_topics)])
    return [Feature(site, direction, name=f"topic {i}") for i, direction in enumerate(means - means.mean(0))]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_latents_of_a_language_model_get_sentences(kind: str) -> None:
    corpus = TopicCorpus(n_topics=4, n_common=8)
    model = small_language_model(corpus.vocab_size, kind=kind, width=32, layers=2, heads=2, length=16)
    texts, labels = corpus.sample(80, 12, torch.Generator().manual_seed(0))
    site = "layers.0.resid_post"
    annotated = topic_features(model, corpus, site, texts, labels)
    batches = list(texts.split(20))
    shown = text_exemplars(model, annotated, batches, k=4)
    assert shown.vectors.shape == (4, 4, 32) and shown.names[0] == "topic 0" and shown.units is None
    # An excerpt's vector is the mean of its tokens' vectors, weighted by the feature.
    best = annotated[0].top_examples(model, batches, 4)
    weight = torch.tensor(best.values[0]).clamp_min(0)
    table = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    expected = (weight[:, None] * table[list(best.token_ids[0])]).sum(0) / weight.sum()
    torch.testing.assert_close(shown.vectors[0, 0], expected)
    sentences = [[f"words about {name}", "words"] for name in corpus.names]
    describer = Describer.fit(shown, sentences, lm_sizes=LM, **{**SIZES, "epochs": 60})
    sae = SparseAutoencoder(32, 4, site=site)
    with torch.no_grad():  # latents that are the topics' directions: what an autoencoder would find
        rows = torch.stack([feature.unit for feature in annotated])
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        sae.scale.fill_(1.0)
    latents = [sae.feature(i) for i in range(4)]
    said = describer.describe(text_exemplars(model, latents, batches, k=4), beam_size=10, temperature=0.5)
    assert said.texts == tuple(f"words about {name}" for name in corpus.names)
    inside = text_exemplars(model, latents[:1], batches, k=2, tokens="layers.1.resid_post")
    assert inside.vectors.shape == (1, 2, 32) and not torch.allclose(inside.vectors[0], shown.vectors[0, :2])
    silent = Feature(site, torch.ones(32), lambda x: x[..., 0] * 0, "never")
    assert text_exemplars(model, [silent], batches, k=2).alive.tolist() == [False]  # type: ignore[union-attr]
    unit = text_exemplars(model, [neuron(model, "layers.0.mlp.neuron.3")], iter(batches), k=2)
    assert unit.excerpts is not None and len(unit.excerpts[0]) == 2
    with pytest.raises(InvalidInput, match="features is empty"):
        text_exemplars(model, [], batches)
    with pytest.raises(InvalidInput, match="k=99"):
        text_exemplars(model, latents[:1], batches, k=99)
