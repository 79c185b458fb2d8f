import sys

import numpy as np
import pytest
import torch

from broadsheet.lab import memory
from broadsheet.lab.memory import PeakMemory, peak

exact = pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps the highest resident size")
SIZE = 64 * memory.MIB


def busy():
    """64 MiB through torch and 32 through numpy, alive together, freed on return."""
    big, other = torch.ones(SIZE // 4), np.ones(SIZE // 16)
    return float(big[0] + other[0])


@exact
def test_what_earlier_work_has_freed_counts_again():
    result, first = peak(busy)
    assert result == 2
    rises = [first, *(peak(busy)[1] for _ in range(3))]
    assert min(rises) > 90
    assert max(rises) < 130


@exact
def test_small_blocks_kept_by_the_allocator_count_again():
    def fragments():
        return [torch.ones(2000) for _ in range(8000)]  # 8 kB each: below what the allocator maps one by one

    first, second = (peak(fragments)[1] for _ in range(2))
    assert min(first, second) > 50


def test_idle_work_needs_nothing():
    assert peak(lambda: None)[1] < 5


@exact
def test_nested_blocks_each_see_their_own_peak():
    with PeakMemory() as outer:
        busy()
        with PeakMemory() as inner:
            pass
    assert outer.rise_mib > 90
    assert inner.rise_mib < 10


def test_sampling_where_the_kernel_keeps_no_mark(monkeypatch):
    monkeypatch.setattr(memory, "_reset_kernel_peak", lambda: False)

    def slow():
        big = torch.ones(SIZE // 4)
        for _ in range(20):
            big.mul_(1.0)
        return big

    _, rise = peak(slow)
    assert rise > 60


@exact
def test_the_peak_is_kept_when_the_work_fails():
    watch = PeakMemory()
    with pytest.raises(ZeroDivisionError), watch:
        busy()
        1 / 0  # noqa: B018
    assert watch.rise_mib > 90
    assert watch not in PeakMemory._open


@exact
def test_freed_memory_does_not_count_where_it_goes_back_at_once():
    def one_after_another():
        return [float(torch.ones(2**18)[0]) for _ in range(200)]  # 1 MiB each, none kept

    def growing():  # what is kept counts as before
        return [torch.ones(2**18) for _ in range(60)]

    with memory.freed_at_once():
        # One at a time is 1 MiB, and what the process itself does meanwhile; the library alone would keep up to 64.
        assert peak(one_after_another)[1] < 16
        assert peak(growing)[1] > 55
