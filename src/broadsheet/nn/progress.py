"""Progress of long work: a bar with step, numbers and time left on a terminal, nothing anywhere else."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Task:
    """One stretch of work. The base class shows nothing."""

    def advance(self, n: int = 1, **numbers: float) -> None:
        """Say that ``n`` more steps are done, with numbers worth seeing (such as ``loss=0.3``)."""


class Progress:
    """Where a method reports how far it is. The base class is silent."""

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        """A stretch of ``total`` steps (None: unknown)."""
        yield Task()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Room to print something else inside the block."""
        yield


SILENT = Progress()


class _Bar(Task):
    def __init__(self, bars: Any, task_id: Any) -> None:
        self._bars, self._id = bars, task_id

    def advance(self, n: int = 1, **numbers: float) -> None:
        shown = "  ".join(f"{name} {float(value):.4g}" for name, value in numbers.items())
        self._bars.update(self._id, advance=n, **({"numbers": shown} if numbers else {}))


class RichProgress(Progress):
    """Live bars on a terminal (rich): description, steps done, numbers such as the loss, time left."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        task_id = self._bars.add_task(description, total=total, numbers="")
        try:
            yield _Bar(self._bars, task_id)
        finally:
            self._bars.remove_task(task_id)

    @contextmanager
    def aside(self) -> Iterator[None]:
        self._bars.stop()
        try:
            yield
        finally:
            self._bars.start()


@contextmanager
def live(console: Any = None) -> Iterator[Progress]:
    """Live progress on the console if it is a terminal, else silence.

    Args:
        console: a ``rich.console.Console``; None makes one on standard error.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = console if console is not None else Console(stderr=True)
    if not console.is_terminal:
        yield SILENT
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        yield RichProgress(bars)
