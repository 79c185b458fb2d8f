"""Several seeds of one experiment at a time, each in a process of its own with its share of the cores.

Small models leave cores idle: two processes with one thread each get nearly twice as much done as one with two.
Progress comes back through a queue, an interruption reaches every process so that trainings save their checkpoints, and
a process that is killed (memory, say) is an error, not a wait without end.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from broadsheet.errors import BroadsheetError
from broadsheet.lab.context import Context
from broadsheet.nn.progress import Progress, Task

GIB_EACH = 3  # memory a seed may need; automatic choice only
STOP_GRACE_S = 30.0  # in which interrupted processes save what they have


def automatic_jobs(device: Any, seeds: int) -> int:
    """How many seeds at a time: as many as there are cores and memory for on the CPU, one on an accelerator."""
    if getattr(device, "type", str(device)) != "cpu":
        return 1
    memory = int(psutil.virtual_memory().available / 2**30 / GIB_EACH)
    return max(1, min(seeds, _cores(), memory))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_seeds(
    one_seed: Any, contexts: Sequence[tuple[Context, Path]], jobs: int, progress: Progress
) -> Generator[tuple[Context, BaseException | None], None, None]:
    """Run seeds, of one paper or of several, some at a time.

    Args:
        one_seed: ``(context, done)``, a function of a module; it measures the context's seed and writes ``done``.
        contexts: one for each seed with the folder that stands when it is done; their own progress is not used.
        jobs: processes.
        progress: where all of them show themselves.

    Yields:
        each context as soon as its seed is done, in any order, with the error that ended it or None.

    Raises:
        BroadsheetError: a process was killed.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork of a process that holds threads may wait for ever
    messages = spawn.Queue()
    before = {child.pid for child in multiprocessing.active_children()}
    executor = ProcessPoolExecutor(jobs, spawn, _prepare, (messages, max(1, _cores() // jobs)))
    finished = False
    with _relayed(messages, progress):
        try:
            futures = {
                executor.submit(_work, one_seed, replace(context, progress=Progress()), done): context
                for context, done in contexts
            }
            for future in as_completed(futures):
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise BroadsheetError(
                        "a process that measured a seed was killed, perhaps for want of memory: --jobs 1 needs least"
                    ) from error
                yield futures[future], error
            finished = True
        finally:
            executor.shutdown(wait=finished, cancel_futures=True)
            if not finished:
                _stop([child for child in multiprocessing.active_children() if child.pid not in before])


def _stop(children: Sequence[Any]) -> None:
    """Interrupt processes, so that they save their checkpoints, and end those that take too long."""
    for child in children:
        with suppress(ProcessLookupError, ValueError, OSError):
            os.kill(child.pid, signal.SIGINT)
    until = time.monotonic() + STOP_GRACE_S
    for child in children:
        child.join(max(0.0, until - time.monotonic()))
        if child.is_alive():
            child.terminate()


# -------------------------------------------------------------------------------------------- in the seed's own process


_messages: Any = None
_stopping = False


def _prepare(messages: Any, threads: int) -> None:
    global _messages
    _messages = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # between seeds there is nothing to save
    import scipy.linalg  # noqa: F401  # numerical libraries have to be there before their threads are bounded
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(threads)
    threadpool_limits(threads)


def _work(one_seed: Any, context: Context, done: Path) -> None:
    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not disturb the saving
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        one_seed(replace(context, progress=_Sent(_messages, context)), done)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Sent(Progress):
    """Progress that is shown by another process."""

    def __init__(self, messages: Any, context: Context) -> None:
        self._messages, self._from, self._tasks = messages, (context.slug, context.seed), 0

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        self._tasks += 1
        slug, seed = self._from
        key = (slug, seed, self._tasks)
        self._messages.put(("begin", key, f"{slug}, seed {seed}: {description}", total))
        try:
            yield _SentTask(self._messages, key)
        finally:
            self._messages.put(("end", key, None, None))


class _SentTask(Task):
    """Steps are sent a few times a second: a training of thousands would else be held up by telling of them."""

    def __init__(self, messages: Any, key: tuple[str, int, int]) -> None:
        self._messages, self._key, self._steps, self._sent = messages, key, 0, 0.0

    def advance(self, n: int = 1, **numbers: float) -> None:
        self._steps += n
        if (now := time.monotonic()) - self._sent < 0.2:
            return
        self._messages.put(("advance", self._key, self._steps, {k: float(v) for k, v in numbers.items()}))
        self._steps, self._sent = 0, now


# ------------------------------------------------------------------------------------------------- in the first process


@contextmanager
def _relayed(messages: Any, progress: Progress) -> Iterator[None]:
    """Show what the other processes say for as long as the block lasts."""
    listener = threading.Thread(target=_listen, args=(messages, progress), daemon=True)
    listener.start()
    try:
        yield
    finally:
        messages.put(None)
        listener.join(timeout=5)


def _listen(messages: Any, progress: Progress) -> None:
    shown: dict[tuple[str, int, int], tuple[ExitStack, Task]] = {}
    while (message := messages.get()) is not None:
        kind, key, what, more = message
        if kind == "begin":
            stack = ExitStack()
            shown[key] = stack, stack.enter_context(progress.task(what, more))
        elif key in shown and kind == "advance":
            shown[key][1].advance(what, **more)
        elif key in shown:
            shown.pop(key)[0].close()
    for stack, _ in shown.values():
        stack.close()
