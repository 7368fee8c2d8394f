"""What calling an op through tinycomp.ops costs beyond torch.ops, per call. Target: at most 1 microsecond."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from tinycomp import ops

ROUNDS, CALLS = 2000, 20


def least_us(calls: dict[str, Callable[..., Any]], args: tuple[Any, ...]) -> dict[str, float]:
    """Microseconds per call, the least of many short interleaved rounds: what is left when nothing interferes."""
    least = dict.fromkeys(calls, float("inf"))
    with torch.no_grad():
        for _ in range(ROUNDS):
            for name, call in calls.items():
                start = time.perf_counter()
                for _ in range(CALLS):
                    call(*args)
                least[name] = min(least[name], (time.perf_counter() - start) / CALLS * 1e6)
    return least


def main() -> None:
    args = (torch.ones(1, 4), torch.ones(2, 4), torch.ones(4, 2), None, None)
    found = least_us({"torch.ops": torch.ops.tinycomp.lowrank_linear, "tinycomp.ops": ops.lowrank_linear}, args)
    extra = found["tinycomp.ops"] - found["torch.ops"]
    print(f"lowrank_linear 1 x 4   torch.ops {found['torch.ops']:.2f} us   tinycomp.ops {found['tinycomp.ops']:.2f} us")
    print(f"extra {extra:.2f} us, target 1.00 us: {'reached' if extra <= 1.0 else 'missed'}")


if __name__ == "__main__":
    main()
