"""Cards: numbers as a slow count gives them, examples from the right tenths, and a page that no text can break."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from broadsheet.data.language import TopicCorpus
from broadsheet.errors import InvalidInput, UnsupportedModel
from broadsheet.nn.activations import read_sites
from broadsheet.nn.blocks import block_map
from broadsheet.nn.card_page import visible
from broadsheet.nn.cards import feature_card, feature_cards, feature_page, token_texts
from broadsheet.nn.features import Feature, Projection, neuron, site_width
from broadsheet.nn.hooks import capture
from broadsheet.nn.seeding import generator
from broadsheet.nn.sparse_autoencoder import SparseAutoencoder
from broadsheet.nn.tiny_models import FAMILIES, VOCAB, tiny_inputs, tiny_model

DECODERS = [f for f in FAMILIES if not f.startswith("vit")]


def latent(model, site="layers.1.attn.z", seed=0, bias=0.0):
    d = site_width(model, site)
    draw = generator(seed)
    write, read = torch.randn(2, d, generator=draw).unbind()
    return Feature(site, write, Projection(read, bias, rectified=True), f"latent of {site}")


def seen_at(model, feature, ids):
    return read_sites(model, [block_map(model).resolve(feature.site)], ids)[feature.site]


def texts(n=6, batch=4, seed=0):
    return [tiny_inputs("gpt2", batch, seed=seed + i) for i in range(n)]


@pytest.mark.parametrize("family", DECODERS)
def test_numbers_are_those_of_a_slow_count(family):
    model = tiny_model(family, torch.float32)
    feature = latent(model)
    middle = torch.cat(
        [replace(feature.read, rectified=False)(seen_at(model, feature, ids)) for ids in texts()]
    ).median()
    feature = latent(model, bias=-float(middle))  # active on half the tokens
    card = feature_card(model, feature, texts(), k=5, words=3, generator=generator(0))
    values = torch.cat([feature.activations(model, ids) for ids in texts()]).numpy()
    on = values[values > 0]
    assert card.tokens == values.size
    assert card.density == pytest.approx(len(on) / values.size)
    assert card.maximum == pytest.approx(on.max(), rel=1e-5)
    assert card.mean == pytest.approx(on.mean(), rel=1e-5)
    assert card.counts.sum() == len(on)
    best = np.sort(values.max(1))[::-1][:5]
    np.testing.assert_allclose([e.activation for e in card.top], best, rtol=1e-5)
    for excerpt in card.top:
        row = values[excerpt.text]
        assert excerpt.place == row.argmax()
        np.testing.assert_allclose(excerpt.values, row, rtol=1e-4, atol=1e-6)
    try:
        wanted = feature.promoted(model, min(3, len(feature.logit_effect(model))))["effect"]
    except UnsupportedModel:  # no head, or one of several steps
        assert card.promoted == card.suppressed == ()
        assert family.startswith(("bert", "roberta", "llama-base", "opt-post-norm"))
    else:
        np.testing.assert_allclose([v for _, v in (*card.promoted, *card.suppressed)], wanted, rtol=1e-4)


def test_padding_on_either_side_changes_nothing():
    model = tiny_model("llama", torch.float32)
    feature, ids = latent(model), tiny_inputs("llama", 3)
    plain = feature_card(model, feature, [ids], generator=generator(0))
    pad = torch.ones(3, 2, dtype=torch.long)
    for sides in ((pad, ids), (ids, pad)):
        padded = torch.cat(sides, 1)
        mask = torch.cat([torch.zeros_like(s) if s is pad else torch.ones_like(s) for s in sides], 1)
        card = feature_card(model, feature, [(padded, mask)], generator=generator(0))
        assert (card.tokens, card.density) == (plain.tokens, plain.density)
        assert [e.token_ids for e in card.top] == [e.token_ids for e in plain.top]
        assert [e.place for e in card.top] == [e.place for e in plain.top]


def test_the_histogram_grows_with_the_values_and_loses_none():
    model = tiny_model("gpt2", torch.float32)
    feature = neuron(model, "layers.0.mlp.neuron.3")  # negative values too
    batches = sorted(texts(8, 2), key=lambda ids: float(seen_at(model, feature, ids)[..., 3].abs().max()))
    card = feature_card(model, feature, batches, bins=16)
    values = torch.cat([feature.activations(model, ids) for ids in batches]).double().numpy().ravel()
    assert card.edges[0] < 0 < card.edges[-1]
    np.testing.assert_array_equal(card.counts, np.histogram(values, card.edges)[0])
    assert card.counts.sum() == (values != 0).sum()


def test_examples_of_a_tenth_come_from_that_tenth():
    model = tiny_model("gpt2", torch.float32)
    feature = latent(model, bias=2.0)
    batches = texts(40, 8)
    card = feature_card(model, feature, batches, per_decile=4, generator=generator(1))
    values = torch.cat([feature.activations(model, ids) for ids in batches])
    ranks = np.sort(values[values > 0].numpy())
    assert len(card.deciles) == 10
    for i, decile in enumerate(card.deciles):
        assert len(decile.examples) == 4
        for e in decile.examples:
            assert decile.low <= e.activation <= decile.high
            # a tenth of a sample of 120: its borders are right to about five percentiles
            assert i / 10 - 0.15 < np.searchsorted(ranks, e.activation) / len(ranks) < (i + 1) / 10 + 0.15
    again = feature_card(model, feature, batches, per_decile=4, generator=generator(1))
    assert again.deciles == card.deciles
    other = feature_card(model, feature, batches, per_decile=4, generator=generator(2))
    assert other.deciles != card.deciles
    assert len(set(card.to_frame()["kind"])) == 11


def test_several_features_are_read_in_one_pass_and_do_not_disturb_each_other():
    model = tiny_model("gpt2", torch.float32)
    features = [latent(model), neuron(model, "layers.0.mlp.neuron.3"), latent(model, "layers.1.resid_post", 2)]
    calls = []
    handle = model.transformer.wte.register_forward_hook(lambda *_: calls.append(1))
    cards = feature_cards(model, features, texts(), generator=generator(5))
    handle.remove()
    assert len(calls) == 6
    for feature, card in zip(features, cards, strict=True):
        alone = feature_card(model, feature, texts(), generator=generator(5))
        assert (alone.top, alone.deciles, alone.density) == (card.top, card.deciles, card.density)


def test_the_forward_pass_stops_behind_the_last_place():
    model = tiny_model("gpt2", torch.float32)
    the_map, ids = block_map(model), tiny_inputs("gpt2")
    reached = []
    handles = [
        model.transformer.h[0].mlp.register_forward_hook(lambda *_: reached.append("mlp 0")),
        model.transformer.h[1].register_forward_hook(lambda *_: reached.append("block 1")),
    ]
    sites = [the_map.resolve(name) for name in ("layers.1.attn.z", "layers.0.attn.z")]
    found = read_sites(model, sites, ids)
    assert reached == ["mlp 0"]
    for handle in handles:
        handle.remove()
    with capture(model, sites) as seen, torch.no_grad():
        model(ids)
    for site in sites:
        assert torch.equal(found[site.label], seen[site.label])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_sources_are_asked_for_what_is_shown_only():
    model = tiny_model("gpt2", torch.float32)
    asked = []

    def sources(feature, ids, position):
        asked.append((tuple(ids.shape), position))
        return torch.arange(ids.shape[1]).float()

    card = feature_card(model, latent(model), texts(), k=3, per_decile=0, window=2, sources=sources)
    assert len(asked) == len(card.top) == 3 and not card.deciles
    for e, (shape, position) in zip(card.top, asked, strict=True):
        assert shape == (1, 7)
        assert e.sources == tuple(float(position - e.place + i) for i in range(len(e.token_ids)))


def test_a_feature_that_is_never_active_has_a_card_too():
    model = tiny_model("gpt2", torch.float32)
    card = feature_card(model, latent(model, bias=-1e6), texts())
    assert (card.density, card.maximum, card.mean, card.top, card.deciles) == (0, 0, 0, (), ())
    assert "active on none" in card.to_html()
    card.plot()


def test_tokens_stand_for_the_text_again():
    corpus = TopicCorpus()
    tokenizer = corpus.tokenizer()
    ids = corpus.sample(1, 12, generator(0))[0][0].tolist()
    assert "".join(token_texts(ids, tokenizer)) == tokenizer.decode(ids)

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    bytes_of = PreTrainedTokenizerFast(tokenizer_object=byte_level)
    text = "two  spaces, a\nline"
    assert "".join(token_texts(bytes_of(text)["input_ids"], bytes_of)) == text
    pieces = Tokenizer(models.WordLevel({"▁Hello": 0, "▁big": 1, "world": 2, "<unk>": 3}, unk_token="<unk>"))
    pieces.decoder = decoders.Metaspace()
    spm = PreTrainedTokenizerFast(tokenizer_object=pieces)
    assert "".join(token_texts([0, 1, 2], spm)) == " Hello bigworld"
    assert token_texts([7], spm) == ["⟨7⟩"]


class Parser(HTMLParser):
    void = frozenset({"meta", "rect", "line", "link", "br", "img"})

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.attributes, self.data = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.data.append(data)


HOSTILE = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'--><svg onload=x>", "&lt;b&gt;", "</bdi></p>",
    "\u202egnirts\u2066", "\x00\x1b[31m", "{{7*7}}", "--a:1;background:url(http://x)", "</style>", "\u2028",
)  # fmt: skip


class Hostile:
    """A tokenizer whose every token is an attack."""

    def convert_ids_to_tokens(self, ids):
        return [f"piece{i}" for i in ids]

    def decode(self, ids, **_):
        return "".join(HOSTILE[i % len(HOSTILE)] for i in ids)


def test_hostile_text_stays_text():
    model = tiny_model("gpt2", torch.float32)
    features = [
        Feature("layers.1.attn.z", torch.randn(24, generator=generator(i)), name=name) for i, name in enumerate(HOSTILE)
    ]
    cards = feature_cards(
        model, features, texts(), tokenizer=Hostile(), sources=lambda f, ids, p: torch.randn(ids.shape[1])
    )
    cards = [card.described(name).with_parts({name: 1.0}) for card, name in zip(cards, HOSTILE, strict=True)]
    page = feature_page(cards, HOSTILE[0])
    parser = Parser()
    parser.feed(page)
    assert parser.open == []
    assert set(parser.tags) <= {
        "html", "head", "meta", "title", "style", "body", "main", "header", "h1", "p", "span", "nav", "ol", "li", "a", "b",
        "i", "article", "div", "h2", "h3", "h4", "code", "dl", "dt", "dd", "figure", "svg", "rect", "line", "text",
        "figcaption", "section", "em", "details", "summary", "small", "bdi",
    }  # fmt: skip
    for tag, name, value in parser.attributes:
        assert not name.startswith("on") and name not in ("src", "srcset"), (tag, name)
        if name == "href":
            assert re.fullmatch(r"#card-\d+", value)
        if name == "style":
            assert re.fullmatch(r"(--[asw]:[\d.]+%?;?)*", value)
    assert "http" not in "".join(v or "" for _, _, v in parser.attributes)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in page
    said = "".join(parser.data)
    assert HOSTILE[0] in said  # shown as what it is
    assert "\u202e" not in page and "\x00" not in page and "\u2028" not in page and "U+202E" in page
    page.encode("utf-8")
    cards[5].plot()
    assert visible("\ud800") == "⟨U+D800⟩"


def test_the_page_says_what_the_card_holds():
    model = tiny_model("gpt2", torch.float32)
    card = feature_card(model, latent(model), texts(), description="about dogs", parts={"head 0": 0.25, "head 1": 0.75})
    page = card.to_html()
    for shown in ("about dogs", "head 1", "0.75", f"{100 * card.density:.3g} %", f"{card.tokens:,} tokens", "<nav" * 0):
        assert shown in page
    assert "<nav" not in page and "<nav" in feature_page([card, card])
    assert "underline" not in page.split("<body>")[1]  # no sources, no key for them
    figure = card.plot()
    assert len(figure.axes) == 3


def test_bad_input():
    model = tiny_model("gpt2", torch.float32)
    feature = latent(model)
    for how, word in (
        ({"k": 0}, "k=0"), ({"per_decile": -1}, "per_decile=-1"), ({"bins": 7}, "bins=7"), ({"window": -1}, "window=-1"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=word):
            feature_card(model, feature, texts(), **how)
    with pytest.raises(InvalidInput, match="batches is empty"):
        feature_card(model, feature, [])
    with pytest.raises(InvalidInput, match="features is empty"):
        feature_cards(model, [], texts())
    with pytest.raises(InvalidInput, match="cards is empty"):
        feature_page([])
    with pytest.raises(InvalidInput, match="no token is left"):
        feature_card(model, feature, texts(), exclude_tokens=range(VOCAB))
    with pytest.raises(InvalidInput, match="not finite"):
        feature_card(model, Feature(feature.site, feature.write, lambda x: x[..., 0] * torch.inf), texts())
    with pytest.raises(InvalidInput, match="3"):
        feature_card(model, Feature("layers.1.attn.z", torch.ones(3)), texts())
    vit = tiny_model("vit", torch.float32)
    with pytest.raises(InvalidInput, match="token ids"):
        feature_card(vit, latent(vit), [tiny_inputs("vit", dtype=torch.float32)])


def test_an_autoencoder_s_latents_have_cards():
    model = tiny_model("gpt2", torch.float32)
    sae = SparseAutoencoder(24, 30, scale=1.0, site="layers.1.attn.z")
    cards = feature_cards(model, [sae.feature(i) for i in range(3)], texts())
    assert [card.name for card in cards] == ["latent 0", "latent 1", "latent 2"]
