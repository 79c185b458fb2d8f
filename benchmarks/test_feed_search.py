"""Search of the feed beside other ways to do its parts, on 20,000 made papers; a million: ``feed_scale.py``."""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_papers import MadeVectors, queries, records

from broadsheet.feed.database import Database
from broadsheet.feed.importing import import_records
from broadsheet.feed.search import SearchIndex

N = 20_000
ROUNDS = 50


class Setting:
    """The papers, indexed; and the same by the peers."""

    def __init__(self, folder: Path) -> None:
        import bm25s

        database = Database(f"sqlite:///{folder / 'feed.sqlite'}")
        database.migrate()
        import_records(database, records(N))
        SearchIndex(folder / "index", database, MadeVectors(1_000)).update()
        self.index = SearchIndex(folder / "index", database)
        self.index.warm()
        view = self.index._current().vectors.view()
        self.matrix = np.asarray(view.matrix[view.rows.rows], dtype=np.float32)
        self.view = view
        self.bm25 = bm25s.BM25()
        tokens = bm25s.tokenize([f"{r.title} {r.abstract}" for r in records(N)], show_progress=False)
        self.bm25.index(tokens, show_progress=False)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: Any) -> Setting:
    return Setting(tmp_path_factory.mktemp("search"))


def measure(benchmark: Any, work: Any, asked: Iterator[Any]) -> None:
    """Each round asks something new: nothing is answered from memory."""
    benchmark.pedantic(work, setup=lambda: ((next(asked),), {}), rounds=ROUNDS, warmup_rounds=3)


@pytest.mark.benchmark(group="feed: embedding of a query")
def test_ours(benchmark: Any, setting: Setting) -> None:
    from broadsheet.feed.search.index import shared_queries

    measure(benchmark, shared_queries().vector, iter(queries(200, seed=11)))


@pytest.mark.benchmark(group="feed: embedding of a query")
def test_sentence_transformers(benchmark: Any) -> None:
    from broadsheet.nn.minilm import Embedder

    embedder = Embedder()
    measure(benchmark, lambda query: embedder.embed([query]), iter(queries(200, seed=11)))


@pytest.mark.benchmark(group="feed: embedding of a query")
def test_transformers(benchmark: Any) -> None:
    import torch

    from broadsheet.nn.minilm import load_minilm

    model, tokenizer = load_minilm()

    def work(query: str) -> np.ndarray:
        with torch.inference_mode():
            read = tokenizer([query], return_tensors="pt", truncation=True, max_length=256)
            mean = model(**read).last_hidden_state.mean(1)
            return torch.nn.functional.normalize(mean, dim=1)[0].numpy()

    measure(benchmark, work, iter(queries(200, seed=11)))


@pytest.mark.benchmark(group="feed: 100 nearest of 20,000 papers")
def test_ours_graph(benchmark: Any, setting: Setting) -> None:
    measure(benchmark, lambda vector: setting.view.nearest(vector, 100), cycle(setting.matrix[::101]))


@pytest.mark.benchmark(group="feed: 100 nearest of 20,000 papers")
def test_all_compared(benchmark: Any, setting: Setting) -> None:
    def work(vector: np.ndarray) -> np.ndarray:
        scores = setting.matrix @ vector
        best = np.argpartition(-scores, 100)[:100]
        return best[np.argsort(-scores[best])]

    measure(benchmark, work, cycle(setting.matrix[::101]))


@pytest.mark.benchmark(group="feed: 20 of 20,000 papers by words")
def test_ours_words(benchmark: Any, setting: Setting) -> None:
    """With filters, total, titles and highlighted passages read from the database."""
    measure(benchmark, lambda query: setting.index.search(query, mode="words"), iter(queries(200, seed=12)))


@pytest.mark.benchmark(group="feed: 20 of 20,000 papers by words")
def test_bm25s(benchmark: Any, setting: Setting) -> None:
    """Numbers of papers only."""
    import bm25s

    def work(query: str) -> Any:
        return setting.bm25.retrieve(bm25s.tokenize(query, show_progress=False), k=20, show_progress=False)

    measure(benchmark, work, iter(queries(200, seed=12)))


@pytest.mark.benchmark(group="feed: 20 of 20,000 papers by words and meaning")
def test_ours_hybrid(benchmark: Any, setting: Setting) -> None:
    measure(benchmark, setting.index.search, iter(queries(200, seed=13)))
