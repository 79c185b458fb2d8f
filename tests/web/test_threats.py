"""The list of threats is held to the tests that it names."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (TESTS.parent / "docs" / "security.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ")
][1:]


def functions_of(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_threat_names_tests_that_exist():
    assert len(ROWS) > 15
    for threat, answer, tried in ROWS:
        assert answer, threat
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", tried)
        assert named, threat
        assert len(named) == tried.count("`") / 2, f"{threat}: what is named is no test"
        for file, name in named:
            assert name in functions_of(TESTS / file), f"{threat}: {file} has no {name}"
