"""MILAN: the sentence that is likely for a unit's exemplars and unlikely for any other unit's (arXiv:2201.11114).

describer = Describer.fit(vectors, sentences)              # annotations: yours, MILANNOTATIONS, or made ones
describer.describe(vectors).texts                          # argmax of log p(d|E) - temperature * log p(d)
describer.save_pretrained(folder); Describer.load(folder)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from broadsheet.errors import InvalidInput
from broadsheet.interpretability.milan.decoder import CaptionDecoder, attention_penalty
from broadsheet.interpretability.milan.descriptions import Descriptions, best_of
from broadsheet.interpretability.milan.encoders import VectorExemplars, encode
from broadsheet.interpretability.milan.exemplars import Exemplars
from broadsheet.interpretability.milan.language_model import SentenceLM, sequence_logp
from broadsheet.interpretability.milan.metrics import bleu
from broadsheet.interpretability.milan.text import Vocabulary
from broadsheet.nn.beam_search import Beams, beam_search
from broadsheet.nn.early_stopping import BestWeights
from broadsheet.nn.hooks import evaluating
from broadsheet.nn.progress import SILENT, Progress
from broadsheet.nn.seeding import generator, seeded

STRATEGIES = ("rerank", "beam", "greedy", "stepwise")


@dataclass(frozen=True)
class PMITerms:
    """How well sentences fit units.

    Attributes:
        log_likelihood: ``[n]``, log p(d|E), nats.
        log_prior: ``[n]``, log p(d), nats.
    """

    log_likelihood: Float[Tensor, " n"]
    log_prior: Float[Tensor, " n"]

    def pmi(self, temperature: float | int = 1.0) -> Float[Tensor, " n"]:
        """``log p(d|E) - temperature * log p(d)``; with 1 the pointwise mutual information, nats."""
        return self.log_likelihood - temperature * self.log_prior


class Describer(nn.Module, PyTorchModelHubMixin):
    """A captioning model of exemplars and a language model of descriptions.

    The encoder that turned pictures into vectors is not part of it: hand it in as ``encoder=`` and pictures may be
    given wherever vectors are.

    After :meth:`fit`, ``history`` holds the score of each look at the held-out units, and ``best_weights`` the
    decoder's weights at the best one.

    Args:
        words: of the vocabulary, the special ones first.
        width: of an exemplar's vector.
        embedding, hidden, attention, dropout: of the decoder; see :class:`CaptionDecoder`.
        lm: arguments of the :class:`SentenceLM`.
        length: words of a sentence at most.
        seed: of the initial weights.
    """

    def __init__(
        self,
        words: Sequence[str],
        width: int,
        embedding: int = 128,
        hidden: int = 512,
        attention: int | None = None,
        dropout: float = 0.5,
        lm: dict[str, Any] | None = None,
        length: int = 15,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.vocabulary, self.length = Vocabulary(tuple(words)), length
        self.decoder = CaptionDecoder(width, len(words), embedding, hidden, attention, dropout, seed)
        self.lm = SentenceLM(list(words), **{"length": length, **(lm or {})})
        self._encoder: list[nn.Module] = []  # in a list: neither its weights nor its mode are this module's
        self.history: dict[int, float] = {}
        self.best_weights: dict[str, Tensor] = {}

    @property
    def encoder(self) -> nn.Module | None:
        """From pictures and masks to vectors; None where only vectors are described."""
        return self._encoder[0] if self._encoder else None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "encoder":  # a module would be made a submodule before a property's setter is asked
            self._encoder[:] = [] if value is None else [value]
        else:
            super().__setattr__(name, value)

    @property
    def device(self) -> torch.device:
        return self.decoder.centre.device

    @classmethod
    def fit(
        cls,
        exemplars: Exemplars | VectorExemplars | Float[Tensor, "units k d"],
        descriptions: Sequence[Sequence[str]],
        *,
        encoder: nn.Module | None = None,
        vocabulary: Vocabulary | None = None,
        lm: SentenceLM | None = None,
        held_out: float | int = 0.05,
        epochs: int = 100,
        batch: int = 64,
        lr: float = 1e-3,
        weight_decay: float | int = 1e-2,
        patience: int = 4,
        evenness: float | int = 1.0,
        count_padding: bool = False,
        watch: str = "bleu",
        restore: str = "best",
        seed: int = 0,
        device: torch.device | str | None = None,
        progress: Progress = SILENT,
        checkpoint: str | Path | None = None,
        lm_sizes: dict[str, Any] | None = None,
        **sizes: Any,
    ) -> "Describer":
        """Train decoder and prior on annotated units.

        Args:
            exemplars: of the annotated units.
            descriptions: one or more sentences for each unit.
            encoder: for exemplars that are pictures.
            vocabulary: of the sentences; None makes one of them.
            lm: a prior trained elsewhere, with the same words; None trains one.
            held_out: share of units on which the training is watched; 0 does all epochs.
            epochs, batch, lr, weight_decay: of AdamW.
            patience: epochs without a better score before the training ends.
            evenness: weight of the attention's penalty.
            count_padding: let the penalty count padding, as the official code does.
            watch: ``"bleu"``: of greedy sentences, as in the paper; ``"loss"``: of the people's sentences, which is
                steadier where there are few units.
            restore: ``"best"`` leaves the weights that were best on the held-out units, ``"last"`` the last ones.
            seed: of weights, split and order.
            device: None for the vectors'.
            progress: where steps are shown.
            checkpoint: a folder to resume from.
            lm_sizes: of the prior: ``embedding``, ``hidden``, ``layers``, ``dropout``, ``epochs``, ``batch``.
            **sizes: of the decoder: ``embedding``, ``hidden``, ``attention``, ``dropout``, ``length``.

        Raises:
            InvalidInput: units without a sentence, other numbers of units, a prior with other words.
        """
        seen = _vectors(exemplars, encoder, progress)
        if len(descriptions) != len(seen):
            raise InvalidInput(f"descriptions of {len(descriptions)} units for {len(seen)} units of exemplars")
        sentences = [[text] if isinstance(text, str) else list(text) for text in descriptions]
        if empty := [i for i, texts in enumerate(sentences) if not texts]:
            raise InvalidInput(f"unit {empty[0]} ({seen.names[empty[0]]}) has no description: leave such units out")
        if restore not in ("best", "last") or watch not in ("bleu", "loss") or not 0 <= held_out < 1:
            raise InvalidInput(
                f"restore={restore!r}, watch={watch!r}, held_out={held_out}: expected 'best' or 'last', 'bleu' or "
                "'loss', and 0 <= held_out < 1"
            )
        everything = [text for texts in sentences for text in texts]
        vocabulary = vocabulary or (lm.vocabulary if lm is not None else Vocabulary.of(everything))
        if lm is not None and lm.vocabulary.words != vocabulary.words:
            missing = sorted(set(vocabulary.words) ^ set(lm.vocabulary.words))[:5]
            raise InvalidInput(f"the prior has another vocabulary (they differ in {', '.join(missing) or 'order'})")
        where = torch.device(device) if device is not None else seen.vectors.device
        order = np.random.default_rng(seed).permutation(len(seen))
        watched = [int(i) for i in order[: round(held_out * len(seen))]]
        trained = sorted(set(range(len(seen))) - set(watched))
        folder = None if checkpoint is None else Path(checkpoint)
        lm_how = dict(lm_sizes or {})
        if lm is None:
            lm = SentenceLM.fit(
                [text for i in trained for text in sentences[i]], vocabulary,
                held_out=[text for i in watched for text in sentences[i]], seed=seed, device=where, progress=progress,
                checkpoint=None if folder is None else folder / "prior",
                length=sizes.get("length", 15), **lm_how,
            )  # fmt: skip
        lm_config = {
            "embedding": lm.embedding.embedding_dim, "hidden": lm.lstm.hidden_size, "layers": lm.lstm.num_layers,
            "dropout": lm.dropout.p, "length": lm.length,
        }  # fmt: skip
        model = cls(list(vocabulary.words), seen.vectors.shape[-1], lm=lm_config, seed=seed, **sizes)
        model.lm.load_state_dict(lm.state_dict())
        model.vocabulary = model.lm.vocabulary = vocabulary
        model.encoder = encoder
        model = model.to(where)
        model._train_decoder(
            seen, sentences, trained, watched, epochs=epochs, batch=batch, lr=lr, weight_decay=weight_decay,
            patience=patience, evenness=evenness, count_padding=count_padding, watch=watch, restore=restore == "best",
            seed=seed, progress=progress, checkpoint=None if folder is None else folder / "decoder",
        )  # fmt: skip
        return model.eval()

    def _train_decoder(
        self, seen: VectorExemplars, sentences: list[list[str]], trained: list[int], watched: list[int], *,
        epochs: int, batch: int, lr: float, weight_decay: float | int, patience: int, evenness: float | int,
        count_padding: bool,
        watch: str, restore: bool, seed: int, progress: Progress, checkpoint: Path | None,
    ) -> None:  # fmt: skip
        vectors = seen.vectors.to(self.device)
        self.decoder.standardise(vectors[trained])
        unit = torch.tensor([i for i in trained for _ in sentences[i]])
        tokens = self.vocabulary.encode([text for i in trained for text in sentences[i]], self.length)
        loader = DataLoader(TensorDataset(unit, tokens), batch, shuffle=True, generator=generator(seed))
        pad = self.vocabulary.pad

        def loss(net: Any, rows: Any) -> Tensor:
            units, target = (part.to(self.device) for part in rows)
            target = target[:, : int((target != pad).sum(1).max())]
            logp, attention = net(vectors[units], target)
            real = target != pad
            likelihood = (logp.gather(-1, target[..., None])[..., 0] * real).sum() / real.sum()
            return -likelihood + evenness * attention_penalty(attention, None if count_padding else real)

        others = torch.tensor([i for i in watched for _ in sentences[i]])
        told = self.vocabulary.encode([text for i in watched for text in sentences[i]], self.length)

        def score(net: nn.Module) -> float:
            if watch == "loss":
                return -float(loss(net, (others, told)))
            beams = self._search(vectors[watched], 1)
            said = [self.vocabulary.decode(row) for row in beams.tokens[:, 0]]
            return bleu(said, [sentences[i] for i in watched], self.vocabulary.split)

        keeper = BestWeights(score if watched else (lambda _: 0.0), len(loader), patience if watched else epochs + 1)
        optimizer = torch.optim.AdamW(self.decoder.parameters(), lr=lr, weight_decay=weight_decay)
        with seeded(seed):
            keeper.fit(
                self.decoder, loss, loader, steps=epochs * len(loader), optimizer=optimizer, checkpoint=checkpoint,
                progress=progress, description="training the describer", restore=restore and bool(watched),
            )  # fmt: skip
        self.history, self.best_weights = keeper.history, keeper.best

    @classmethod
    def load(cls, path: str | Path, encoder: nn.Module | None = None) -> "Describer":
        """What ``save_pretrained`` kept.

        Args:
            path: a folder, or a repository of the Hugging Face hub.
            encoder: the one that it was trained with, so that pictures may be handed in.
        """
        model = cls.from_pretrained(str(path))
        model.encoder = encoder
        return model.eval()

    def describe(
        self,
        exemplars: Exemplars | VectorExemplars | Float[Tensor, "units k d"],
        strategy: str = "rerank",
        temperature: float | int = 0.2,
        beam_size: int = 50,
        *,
        units_at_once: int = 64,
        progress: Progress = SILENT,
    ) -> Descriptions:
        """A sentence for each unit.

        Args:
            exemplars: pictures (with an encoder), or vectors ``[units, k, d]`` whatever they are of; ``k`` need not be
                that of the training.
            strategy: ``"rerank"``: beam search for likely sentences, of which the one with the largest
                ``log p(d|E) - temperature * log p(d)`` is taken; ``"beam"``: the likeliest; ``"greedy"``: word by word;
                ``"stepwise"``: the prior is subtracted at every word of the search.
            temperature: weight of the prior (lambda in the paper).
            beam_size: sentences weighed.
            units_at_once: in one call of the model.
            progress: where units done are shown.

        Raises:
            InvalidInput: an unknown strategy, other vectors than in training, pictures without an encoder.
        """
        if strategy not in STRATEGIES:
            raise InvalidInput(f"strategy={strategy!r}: expected one of {', '.join(STRATEGIES)}")
        if beam_size < 1 or not temperature >= 0:
            raise InvalidInput(f"beam_size={beam_size}, temperature={temperature}: expected at least 1 and 0")
        seen = _vectors(exemplars, self.encoder, progress)
        width = 1 if strategy == "greedy" else beam_size
        weight = temperature if strategy in ("rerank", "stepwise") else 0.0
        parts = []
        with evaluating(self), torch.no_grad(), progress.task("describing units", total=len(seen)) as task:
            for start in range(0, len(seen), units_at_once):
                vectors = seen.vectors[start : start + units_at_once].to(self.device)
                parts.append(self._weigh(vectors, width, weight if strategy == "stepwise" else None, weight))
                task.advance(len(vectors))
        likelihood, prior, finished, chosen = (torch.cat(column) for column in list(zip(*parts, strict=True))[:4])
        beam = tuple(texts for part in parts for texts in part[4])
        attention = tuple(weights for part in parts for weights in part[5])
        alive = seen.alive if seen.alive is not None else torch.ones(len(seen), dtype=torch.bool)
        return Descriptions(
            seen.names, seen.units, alive.cpu(), beam, likelihood, prior, finished, float(weight), chosen, attention
        )

    def _weigh(
        self, vectors: Tensor, width: int, stepwise: float | int | None, temperature: float | int
    ) -> tuple[Any, ...]:
        """Search, then both terms of every sentence found."""
        beams = self._search(vectors, width, stepwise)
        n, kept, time = beams.tokens.shape
        flat = beams.tokens.flatten(0, 1)
        logp = beams.score
        attention_of_all: Tensor | None = None
        if stepwise is not None:  # the search's scores are not likelihoods: say the sentences again
            said, attention_of_all = self.decoder(vectors.repeat_interleave(kept, 0), flat, self.vocabulary.start)
            logp = sequence_logp(said, flat, self.vocabulary.pad).view(n, kept)
            logp = torch.where(beams.score.isfinite(), logp, -torch.inf)
        prior = self.lm.token_logp(flat).view(n, kept)
        if stepwise is not None:
            chosen = torch.zeros(n, dtype=torch.long, device=vectors.device)
        else:
            chosen = best_of(logp, prior, beams.finished, temperature)
        rows = torch.arange(n, device=vectors.device)
        best = beams.tokens[rows, chosen]
        if attention_of_all is not None:
            looked = attention_of_all.view(n, kept, time, -1)[rows, chosen]
        else:
            looked = self.decoder(vectors, best, self.vocabulary.start)[1]
        lengths = (best != self.vocabulary.pad).sum(1).tolist()
        attention = [weights[:length].cpu() for weights, length in zip(looked, lengths, strict=True)]
        texts = [tuple(self.vocabulary.decode(row) for row in unit) for unit in beams.tokens.tolist()]
        return logp.cpu(), prior.cpu(), beams.finished.cpu(), chosen.cpu(), texts, attention

    def _search(self, vectors: Tensor, width: int, stepwise: float | int | None = None) -> Beams:
        looked = self.decoder.look(vectors)
        words = self.vocabulary
        never = [words.start, words.pad, words.unknown]
        state: dict[str, Any] = {"looked": tuple(looked), "lstm": self.decoder.begin(looked)}
        if stepwise is not None:
            zero = vectors.new_zeros(
                len(vectors), self.lm.lstm.num_layers, self.lm.lstm.hidden_size, dtype=self.lm.output.weight.dtype
            )
            state["lm"] = (zero, zero)

        def step(token: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
            logp, lstm, _ = self.decoder.step(token, type(looked)(*state["looked"]), state["lstm"])
            new = {**state, "lstm": lstm}
            if stepwise is not None:
                prior, new["lm"] = self.lm.step(token, state["lm"])
                logp = logp - stepwise * prior
            logp = logp.clone()
            logp[:, never] = -torch.inf  # a sentence is made of words
            logp[token == words.start, words.stop] = -torch.inf  # and of at least one
            return logp, new

        return beam_search(
            step, state, len(vectors), beam=width, max_length=self.length + 1, start=words.start, stop=words.stop,
            pad=words.pad, device=vectors.device,
        )  # fmt: skip

    @torch.no_grad()
    def score(
        self, texts: Sequence[str], exemplars: Exemplars | VectorExemplars | Float[Tensor, "units k d"]
    ) -> PMITerms:
        """Both terms of the pointwise mutual information of given sentences, one for each unit.

        Args:
            texts: one sentence for each unit.
            exemplars: as in :meth:`describe`.

        Raises:
            InvalidInput: other numbers of sentences and units, or an empty sentence.
        """
        seen = _vectors(exemplars, self.encoder, SILENT)
        if len(texts) != len(seen):
            raise InvalidInput(f"{len(texts)} sentences for {len(seen)} units: one for each is expected")
        tokens = self.vocabulary.encode(texts, self.length).to(self.device)
        with evaluating(self):
            logp, _ = self.decoder(seen.vectors.to(self.device), tokens, self.vocabulary.start)
            likelihood = sequence_logp(logp, tokens, self.vocabulary.pad)
            return PMITerms(likelihood.cpu(), self.lm.token_logp(tokens).cpu())

    def word_vectors(self) -> dict[str, Float[Tensor, " embedding"]]:
        """The decoder's vector of each word."""
        table = self.decoder.embedding.weight.detach().cpu()
        return {word: table[i] for i, word in enumerate(self.vocabulary.words) if i > self.vocabulary.unknown}


def _vectors(
    exemplars: Exemplars | VectorExemplars | Int[Tensor, "..."] | Float[Tensor, "..."],
    encoder: nn.Module | None,
    progress: Progress,
) -> VectorExemplars:
    if isinstance(exemplars, VectorExemplars):
        return exemplars
    if isinstance(exemplars, Exemplars):
        if encoder is None:
            raise InvalidInput(
                "these exemplars are pictures: set encoder= to what turns them into vectors, such as a PyramidEncoder"
            )
        return encode(encoder, exemplars, progress=progress)
    if exemplars.ndim != 3:
        raise InvalidInput(f"vectors of shape {tuple(exemplars.shape)}: expected [units, k, d]")
    return VectorExemplars(exemplars, tuple(f"unit {i}" for i in range(len(exemplars))))
