"""What one method finds goes to every other: an autoencoder's latent is attributed, clamped, read and described."""

import copy

import pytest
import torch

from broadsheet.data.language import TopicCorpus
from broadsheet.interpretability import (
    AttentionSAE,
    Describer,
    SemiNMF,
    capture_z,
    decode_directions,
    find_concepts,
    text_exemplars,
)
from broadsheet.interpretability.codebook_features import fit, index_codes, wrap_codebooks
from broadsheet.nn.activations import ActivationBuffer
from broadsheet.nn.cards import feature_card, feature_page
from broadsheet.nn.features import neuron
from broadsheet.nn.small_lm import small_language_model, train_language_model

TOPICS = 4


class World:
    """A model that has learned topics, and what each method found in it."""

    def __init__(self):
        self.corpus = TopicCorpus(n_topics=TOPICS, n_common=6, topical=0.8)
        self.model = small_language_model(self.corpus.vocab_size, width=32, layers=2, heads=4, length=16)
        train_language_model(self.model, lambda n, g: self.corpus.sample(n, 12, g)[0], steps=220, batch=64)
        self.texts, self.topics = self.corpus.sample(192, 12, torch.Generator().manual_seed(1))
        self.batches = list(self.texts.split(64))
        self.sae = AttentionSAE.for_layer(self.model, 1, n_features=48)
        buffer = ActivationBuffer(self.model, self.sae.site, self.batches, batch_size=256, buffer_batches=4)
        self.sae.fit(buffer, steps=250, l1=0.3, lr=5e-3, warmup=20)
        with torch.no_grad():
            active = self.sae.encode(capture_z(self.model, self.texts, 1).flatten(-2))
        self.strength = active.amax((0, 1))
        means = torch.stack([active[self.topics == t].mean((0, 1)) for t in range(TOPICS)])
        self.latents = (means - means.mean(0)).argmax(1).tolist()
        self.concepts = find_concepts(
            self.model, self.texts, 1, snmf=SemiNMF(10, sparsity=0.1, max_iter=120, random_state=0)
        )
        rows = self.topics[self.concepts.activations.text]
        means = torch.stack([self.concepts.coefficients[rows == t].mean(0) for t in range(TOPICS)])
        self.factors = (means - means.mean(0)).argmax(1).tolist()

    def chance(self, topic, ids):
        with torch.no_grad():
            last = self.model(ids).logits[:, -1].softmax(-1)
        return float(last[:, self.corpus.topic_tokens[topic]].sum(-1).mean())

    def describer(self):
        known = [neuron(self.model, f"layers.1.mlp.neuron.{i}") for i in range(96)]
        shown = text_exemplars(self.model, known, self.batches, k=5, tokens="layers.1.resid_post")
        said = []
        for unit in known:
            best = unit.top_examples(self.model, self.batches, 5)
            tops = [ids[place] for ids, place in zip(best.token_ids, best.place, strict=True)]
            kinds = [int(self.corpus.topic_of[token]) for token in tops]
            kind = max(set(kinds), key=kinds.count)
            said.append(["words about " + self.corpus.names[kind] if kind >= 0 else "words of all topics"])
        return Describer.fit(
            shown, said, hidden=64, lr=5e-3, epochs=40, lm_sizes={"hidden": 32}, watch="loss", restore="best"
        )


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def describer(world):
    return world.describer()


@pytest.mark.parametrize("topic", range(TOPICS))
def test_a_latent_is_attributed_clamped_and_read(world, topic):
    feature = world.sae.feature(world.latents[topic])
    about, other = world.texts[world.topics == topic], world.texts[world.topics == (topic + 1) % TOPICS]
    # it is of its topic
    assert float(feature.activations(world.model, about).mean()) > 3 * float(
        feature.activations(world.model, other).mean()
    )
    # it was made by heads of its own layer, from words of its topic
    made = feature.attribution(world.model, about[:16])
    assert made.to_frame()["component"][0].startswith("layers.1.attn.head.")
    # held high, the model turns to the topic; taken out, it turns away
    neutral = other[:, :6]
    before = world.chance(topic, neutral)
    with feature.clamped(world.model, 30 * float(world.strength[world.latents[topic]])):
        assert world.chance(topic, neutral) > 2 * before
    assert world.chance(topic, neutral) == before
    # the output head reads the topic's words from it
    words = decode_directions(world.model, feature, topk=5).tokens[0]
    assert int((world.corpus.topic_of[words] == topic).sum()) >= 4


def test_latents_and_factors_of_every_topic_are_described_as_such(world, describer):
    features = [world.sae.feature(i) for i in world.latents] + [world.concepts.feature(i) for i in world.factors]
    seen = text_exemplars(world.model, features, world.batches, k=5, tokens="layers.1.resid_post")
    found = describer.describe(seen).to_frame()["text"].tolist()
    wanted = ["words about " + name for name in world.corpus.names] * 2
    right = [a == b for a, b in zip(found, wanted, strict=True)]
    assert sum(right) >= 7, list(zip(found, wanted, strict=True))  # eight, one slip allowed


def test_a_factor_and_a_code_go_where_a_latent_goes(world):
    topic = 0
    factor = world.concepts.feature(world.factors[topic])
    words = decode_directions(world.model, factor, topk=5).tokens[0]
    assert int((world.corpus.topic_of[words] == topic).sum()) >= 4
    wrapped = wrap_codebooks(copy.deepcopy(world.model), at="mlp", num_codes=32, init="kmeans", batches=world.batches)
    fit(wrapped, world.batches, steps=20, lr=1e-3)
    wanted = torch.isin(world.texts, world.corpus.topic_tokens[topic]).flatten()
    site, code = index_codes(wrapped, world.batches).search_codes(wanted).best
    coded = wrapped.feature(site, code)
    features = [world.sae.feature(world.latents[topic]), factor, neuron(world.model, "layers.1.mlp.neuron.3")]
    cards = [feature_card(world.model, one, world.batches, tokenizer=world.corpus.tokenizer()) for one in features]
    page = feature_page(cards, "A topic")
    assert all(one.name in page for one in features)
    assert coded.activations(wrapped.model, world.texts[:4]).shape == (4, 12)
    with coded.steered(wrapped.model, 5.0):
        moved = wrapped(world.texts[:4]).logits
    assert not torch.equal(moved, wrapped(world.texts[:4]).logits)
