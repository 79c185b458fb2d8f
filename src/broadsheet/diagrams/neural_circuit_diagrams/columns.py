"""Which step stands in which column: as soon as its inputs are there, constants as late as they can."""

from __future__ import annotations

from broadsheet.diagrams.neural_circuit_diagrams.diagram import Diagram
from broadsheet.diagrams.neural_circuit_diagrams.generators import Discard


def columns(diagram: Diagram) -> list[list[int]]:
    """Numbers of the steps in each column; steps of one column work on different arrays."""
    maker = {v: i for i, step in enumerate(diagram.steps) for v in step.outs}
    user = {v: i for i, step in enumerate(diagram.steps) for v in step.ins}
    place: dict[int, int] = {}
    for i, step in enumerate(diagram.steps):
        place[i] = max((place[maker[v]] + 1 for v in step.ins if v in maker), default=0)
    # What starts from nothing or ends in nothing waits for its user, so that no wire is longer than it must be.
    for i in reversed(range(len(diagram.steps))):
        step = diagram.steps[i]
        alone = all(v in maker and not diagram.steps[maker[v]].ins for v in step.ins) and not isinstance(
            step.op, Discard
        )
        users = [place[user[v]] for v in step.outs if v in user]
        if alone and users and len(users) == len(step.outs):
            place[i] = max(place[i], min(users) - 1)
    depth = 1 + max(place.values(), default=-1)
    found: list[list[int]] = [[] for _ in range(depth)]
    for i in range(len(diagram.steps)):
        found[place[i]].append(i)
    # A constant whose user stands in the first column needs a column before it.
    early = [i for i in found[0] if not diagram.steps[i].ins] if found else []
    if any(place[user[v]] == 0 for i in early for v in diagram.steps[i].outs if v in user):  # pragma: no cover
        raise AssertionError("a constant stands beside its user")
    return [column for column in found if column]


def live(diagram: Diagram, placed: list[list[int]]) -> list[list[int]]:
    """The values between columns: before the first, after the first, ..., after the last."""
    now = list(diagram.inputs)
    found = [list(now)]
    for column in placed:
        for i in column:
            now = [v for v in now if v not in diagram.steps[i].ins] + list(diagram.steps[i].outs)
        found.append(list(now))
    return found
