"""Peak memory of a stretch of work: resident memory on the CPU, allocated memory on CUDA.

On Linux the kernel itself keeps the highest resident size, to the page. Memory that earlier work has freed but the
allocator has kept would be used again without that size rising, so it is given back to the system first: what is
measured is what the work needs, whatever came before it. Elsewhere the resident size is sampled.
"""

import contextlib
import ctypes
import gc
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import psutil

MIB = 2**20
Result = TypeVar("Result")


def _kernel_mib(field: str) -> float:
    """A size in MiB from the kernel's account of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))


def _reset_kernel_peak() -> bool:
    """Set the kernel's highest resident size to the present one; False where that cannot be done."""
    try:
        with open("/proc/self/clear_refs", "w") as switch:
            switch.write("5")
    except OSError:
        return False
    return True


def _give_back_freed_memory() -> None:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # only the GNU C library can
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """Inside the block freed memory goes back to the system at once, so that :func:`peak` shows what is held.

    The GNU C library otherwise keeps up to 64 MiB that have been freed, more or less of it from run to run: too much
    where little is measured. Work inside the block is slower. Elsewhere nothing is changed.
    """
    try:
        tune = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        yield
        return
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of <malloc.h>
    try:
        tune(mmap, 2**16)
        tune(trim, 2**16)
        yield
    finally:
        tune(mmap, 2**25)  # what the library arrives at by itself in a process that uses large blocks
        tune(trim, 2**26)


class PeakMemory:
    """The highest memory use inside a ``with`` block; blocks may be nested.

    Attributes:
        peak_mib: highest value seen, in MiB.
        rise_mib: how far that lies above the value at the start, in MiB.
    """

    _open: ClassVar[list["PeakMemory"]] = []  # the kernel keeps one mark for all of them

    def __init__(self, device: Any = None, interval_s: float = 0.01) -> None:
        self._cuda = device is not None and getattr(device, "type", str(device)).startswith("cuda")
        self._device, self._interval_s = device, interval_s
        self._process = psutil.Process(os.getpid())
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.start_mib = self.peak_mib = 0.0

    @property
    def rise_mib(self) -> float:
        return self.peak_mib - self.start_mib

    def _sample(self) -> None:
        self.peak_mib = max(self.peak_mib, self._process.memory_info().rss / MIB)

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._sample()

    def __enter__(self) -> "PeakMemory":
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
            self.start_mib = torch.cuda.memory_allocated(self._device) / MIB
            return self
        _give_back_freed_memory()
        for outer in self._open:  # what they have reached so far, before the mark is set back
            outer.peak_mib = max(outer.peak_mib, _kernel_mib("VmHWM"))
        if _reset_kernel_peak():
            self.start_mib = self.peak_mib = _kernel_mib("VmRSS")
            self._open.append(self)
        else:
            self._sample()
            self.start_mib = self.peak_mib
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._cuda:
            import torch

            self.peak_mib = torch.cuda.max_memory_allocated(self._device) / MIB
        elif self._thread is None:
            self.peak_mib = max(self.peak_mib, _kernel_mib("VmHWM"))
            self._open.remove(self)
        else:
            self._stop.set()
            self._thread.join()
            self._sample()


def peak(function: Callable[[], Result], device: Any = None) -> tuple[Result, float]:
    """Call a function and say by how many MiB the memory rose above its start at most.

    Args:
        function: called once. What a first call loads (modules, threads) counts too, so call it before where that is
            not meant.
        device: a CUDA device, to measure its memory instead.
    """
    with PeakMemory(device, interval_s=0.002) as memory:
        result = function()
    return result, memory.rise_mib
