"""The benchmark engine: candidates timed round robin in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat, in the order in which they ran."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, q: float) -> float:
        """Linear interpolation between the sorted repeats, q in [0, 1]."""
        return float(torch.tensor(self.seconds, dtype=torch.float64).quantile(q))

    def rate(self, count: int) -> Rate:
        """`count` things per second; the 20th percentile of the rate comes from the 80th of the time."""
        return Rate(count / self.median, count / self.quantile(0.8), count / self.quantile(0.2))


@dataclass(frozen=True)
class Rate:
    """Things per second: median and the 20th and 80th percentiles over the repeats."""

    median: float
    p20: float
    p80: float


def interleaved(names: Sequence[str], repeats: int) -> Iterator[str]:
    """Every name once per round; each round starts one further, so that no candidate always follows the same one."""
    for turn in range(repeats):
        start = turn % len(names)
        yield from (*names[start:], *names[:start])


def time_interleaved(
    candidates: Mapping[str, Callable[[], object]],
    repeats: int = 7,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time candidates round robin in this process, so that drift of the machine meets all of them alike.

    Args:
        candidates: name -> function without arguments. Bind loop variables when you build them.
        repeats: timed rounds.
        warmup: rounds that are run and thrown away.
        clock: `time.process_time` for one thread on a shared machine, where waiting must not count.

    Raises:
        ValueError: no candidates, repeats below 1.
    """
    if not candidates or repeats < 1:
        raise ValueError(f"timing: got {len(candidates)} candidates, repeats={repeats}; needs at least 1 of each")
    for name in interleaved(list(candidates), warmup):
        candidates[name]()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for name in interleaved(list(candidates), repeats):
        start = clock()
        candidates[name]()
        seconds[name].append(clock() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
