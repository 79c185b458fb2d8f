"""Published results as they are read back: a paper's own figures, then the drawings of it in other papers' results."""

import json

import pytest

from broadsheet.catalog import paper
from broadsheet.errors import ResultsError
from broadsheet.lab import results
from broadsheet.lab.results import published


def write(folder, slug, *names):
    figures = [{"file": f"{slug}/{name}.png", "caption": f"{name} of {slug}"} for name in names]
    (folder / f"{slug}.json").write_text(json.dumps({"claims": [], "figures": figures, "seeds": [1]}))


@pytest.fixture
def drawn(monkeypatch):
    """An entry that names two drawings of its architecture."""
    entry = paper("cd-t").model_copy(update={"drawings": ("milan/net", "snmf/other")})
    monkeypatch.setattr(results, "paper", lambda _: entry)


def captions(folder):
    found = published("cd-t", folder)
    assert found is not None
    return [caption for _, caption in found.figures]


def test_drawings_of_other_papers_results_come_last(drawn, tmp_path):
    write(tmp_path, "cd-t", "own")
    write(tmp_path, "milan", "units", "net")
    write(tmp_path, "snmf", "other")
    assert captions(tmp_path) == ["own of cd-t", "net of milan", "other of snmf"]
    assert published("cd-t", tmp_path).figures[1][0] == tmp_path / "milan" / "net.png"


def test_drawings_that_are_not_published_are_left_out(drawn, tmp_path):
    write(tmp_path, "cd-t", "own")
    write(tmp_path, "milan", "units")
    (tmp_path / "snmf.json").write_text("not json")
    assert captions(tmp_path) == ["own of cd-t"]


def test_a_damaged_result_of_ones_own_is_an_error(drawn, tmp_path):
    (tmp_path / "cd-t.json").write_text("{}")
    with pytest.raises(ResultsError, match="damaged"):
        published("cd-t", tmp_path)
    assert published("milan", tmp_path / "nowhere") is None
