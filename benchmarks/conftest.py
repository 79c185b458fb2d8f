"""Every benchmark also says how much memory it needs, measured apart from its time."""

from collections.abc import Callable
from typing import Any

import pytest

from broadsheet.lab.memory import peak


@pytest.fixture
def benchmark(benchmark: Any) -> Any:
    """pytest-benchmark's fixture, whose ``pedantic`` adds ``peak_mib`` to what is kept.

    Memory is that of one more call after the timed ones, so that what a first call loads does not count. Work that is
    too long for another call asks for no warm-up: then it is that of the timed call itself.
    """
    timed = benchmark.pedantic

    def pedantic(
        target: Callable[..., Any], args: Any = (), kwargs: Any = None, warmup_rounds: int = 0, **how: Any
    ) -> Any:
        def run() -> Any:
            return timed(target, args, kwargs, warmup_rounds=warmup_rounds, **how)

        if warmup_rounds == 0:
            result, benchmark.extra_info["peak_mib"] = peak(run)
        else:
            result = run()
            given, named = how["setup"]() if "setup" in how else (args, kwargs or {})
            _, benchmark.extra_info["peak_mib"] = peak(lambda: target(*given, **named))
        return result

    benchmark.pedantic = pedantic
    return benchmark
