"""What this machine can do at most: rates of its memory and of its arithmetic, and weights read for nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tinycomp import ops
from tinycomp.eval.timing import time_interleaved

SMALL = 16 << 10  # bytes of what is no weight: inputs, scales of rows, orders


class Memory:
    """Rates of main memory: "stream" only reads; "update" writes what it reads, and processors with paths for both move
    more bytes then. Buffers are `size` bytes, which no cache holds."""

    def __init__(self, clock: Callable[[], float], size: int) -> None:
        from tinycomp import _C

        self.clock, self.size = clock, size
        self.patterns: dict[str, int] = {}
        if hasattr(_C, "read_words"):  # the library of another commit may lack it
            self.patterns = {"in order": 1, "side by side": 8}

    def rate(self, name: str, repeats: int) -> float:
        """GB/s, best of several tries."""
        from tinycomp import _C

        rows = torch.ones(self.size >> 14, 4096)
        runs: dict[str, tuple[int, Callable[[], object]]]
        if name == "stream":
            vector = torch.ones(4096)
            runs = {"mv": (1, lambda: rows @ vector), "sum": (1, rows.sum)}
            for key, count in self.patterns.items():
                runs[key] = 1, lambda n=count: _C.read_words(rows.data_ptr(), rows.numel(), n)
        else:
            other = rows.clone()
            runs = {"mul": (2, lambda: rows.mul_(0.5)), "add": (3, lambda: rows.add_(other))}
        timed = time_interleaved({key: run for key, (_, run) in runs.items()}, repeats, clock=self.clock)
        return max(rows.nbytes * runs[key][0] / min(t.seconds) for key, t in timed.items()) / 1e9

    def reads(self, copies: list[tuple[Any, ...]]) -> dict[str, list[Callable[[], object]]]:
        """By pattern, for each copy of a call's arguments: its weights read and added up, no more. "read and call" is
        "in order" and then a call of an op that has next to nothing to do, whose code the weights have driven out."""
        from tinycomp import _C

        spans = [
            [(t.data_ptr(), t.nbytes // 4) for t in args if isinstance(t, Tensor) and t.nbytes > SMALL]
            for args in copies
        ]
        x, w = torch.ones(1, 32, dtype=torch.bfloat16), torch.ones(16, 32, dtype=torch.bfloat16)

        def call() -> Tensor:
            return ops.sliced_linear(x, w, None, 32, 16)

        found = {
            f"read {key}": [lambda s=s, n=count: [_C.read_words(*span, n) for span in s] for s in spans]
            for key, count in self.patterns.items()
        }
        if found:
            found["read and call"] = [lambda s=s: ([_C.read_words(*span, 1) for span in s], call()) for s in spans]
        return found


def peaks(threads: int, memory: Memory) -> dict[str, float]:
    """GB/s of memory, G operations/s of FMA, of bfloat16 and byte products (times threads), best of several tries; of
    float32 and float16 also as six and four products of bfloat16 tiles (csrc/common/parts_amx.cpp)."""
    from tinycomp import _C

    found = {name: memory.rate(name, 7) for name in ("stream", "update")}
    for name, candidates in (
        ("fma", ("fma512", "fma256")),
        ("bf16", ("bf16_512", "amx_bf16")),
        ("vnni", ("vnni512", "amx_int8")),
        ("tiles", ("amx_bf16",)),
    ):
        best = 0.0
        for instruction in candidates:
            for _ in range(5):
                start = time.thread_time()
                done = _C.run_peak(instruction, 2_000_000)
                best = max(best, done / max(time.thread_time() - start, 1e-9) / 1e9)
        found[name] = best * threads
    tiles = found.pop("tiles")
    found |= {"f32": tiles / 6, "f16": tiles / 4}
    return found | {name: max(found[name], found["fma"]) for name in ("bf16", "vnni", "f32", "f16")}
