"""One row of bench/ops.py, and the copies of it that no cache holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]


@dataclass
class Case:
    """One row: an op at one size, and everything it is held against.

    `make()` gives the op's arguments; the driver copies them until `weights`, the bytes of one copy that must be cold,
    are more than any cache holds. `dense` is the weight of the dense layer, `peers` turn arguments into calls.
    """

    op: str
    label: str
    shape: str
    m: int
    dtype: torch.dtype
    make: Callable[[], tuple[Any, ...]]
    weights: int
    dense: Callable[[], Tensor] | None = None
    peers: dict[str, Callable[[tuple[Any, ...]], Call]] = field(default_factory=dict)
    compute: str = "fma"  # the ceiling its arithmetic has
    memory: str = "stream"  # the ceiling its bytes have: "stream" or "update"
    outside: tuple[int, int] | None = None  # (out, in) for peers that only run dense layers
    density: float = 1.0
    exact: bool = True  # whether the general tolerance applies; else outputs are held to 5 %

    @property
    def key(self) -> str:
        return f"{self.op}/{self.label}/{self.shape}/M{self.m}/{str(self.dtype).removeprefix('torch.')}"


def random_values(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).div_(math.sqrt(shape[-1])).to(dtype)


def last_level_cache() -> int:
    """Bytes; 32 MiB where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes), default=32 << 20)


def copies_of(values: tuple[Any, ...], count: int) -> list[tuple[Any, ...]]:
    def copy(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    return [values, *(tuple(map(copy, values)) for _ in range(count - 1))]


def rounds(calls: list[Callable[[], object]]) -> Callable[[], None]:
    """All copies once."""

    def run() -> None:
        for call in calls:
            call()

    return run
