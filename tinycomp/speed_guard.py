"""Measured break-even sizes: an option whose layer is slower than the dense linear is not worth offering."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tinycomp.edits import Replace
from tinycomp.eval.timing import time_interleaved
from tinycomp.layers import LAYERS
from tinycomp.methods import Method, MethodConfig, Option, Unit

STEPS = 4  # bisection steps for the largest size that is not slower
COLD_BYTES = 2**26  # weights rotate through this much memory, so that none stays in cache
MAX_COPIES = 64  # tiny matrices would need thousands of modules


class SpeedGuard:
    """Drops options slower than dense at `config.rows` rows, by one bisection per method and weight shape.

    Time is taken to grow with size, so the largest size that is not slower bounds them all.
    """

    def __init__(self, model: nn.Module, config: Any, notes: list[str]) -> None:
        self.rows, self.notes = config.rows, notes
        self.dtype = next(model.parameters()).dtype
        self.limits: dict[tuple[str, int, int], int] = {}

    def keep(self, unit: Unit, method: Method, config: MethodConfig, options: list[Option]) -> list[Option]:
        """The options no slower than dense. Narrower plain linears always are, so feed-forward units pass."""
        if unit.kind != "linear":
            return options
        (linear,) = unit.linears
        key = (method.name, linear.out_features, linear.in_features)
        candidates = sorted((o for o in options if not o.choice.get("dense")), key=lambda o: (o.bits, o.size))
        if key not in self.limits:
            self.limits[key] = self._limit(unit, method, config, candidates)
            lost = sum(o.bits > self.limits[key] for o in candidates)
            if lost:
                self.notes.append(
                    f"{method.name} on {key[1]} x {key[2]}: {lost} of {len(candidates)} sizes are slower than dense at "
                    f"{self.rows} rows on this machine and were not offered"
                )
        return [o for o in options if o.choice.get("dense") or o.bits <= self.limits[key]]

    def _limit(self, unit: Unit, method: Method, config: MethodConfig, candidates: list[Option]) -> int:
        low, high = -1, len(candidates) - 1  # low: known to be fast enough
        if candidates and self._fast(unit, method, config, candidates[high]):
            return candidates[high].bits
        for _ in range(STEPS):
            if high - low <= 1:
                break
            middle = (low + high) // 2
            if self._fast(unit, method, config, candidates[middle]):
                low = middle
            else:
                high = middle
        return candidates[low].bits if low >= 0 else -1

    def _fast(self, unit: Unit, method: Method, config: MethodConfig, option: Option) -> bool:
        (linear,) = unit.linears
        (edit,) = method.build(unit, option.choice, config).edits
        assert isinstance(edit, Replace)
        copies = min(max(COLD_BYTES // (linear.weight.numel() * self.dtype.itemsize), 1), MAX_COPIES)
        x = torch.randn(self.rows, linear.in_features).to(self.dtype)
        dense = [torch.randn(linear.out_features, linear.in_features).to(self.dtype) for _ in range(copies)]
        layers = [LAYERS[edit.layer](**edit.kwargs, dtype=self.dtype).eval() for _ in range(copies)]

        def run_dense() -> None:
            for weight in dense:
                F.linear(x, weight)

        def run_layer() -> None:
            for layer in layers:
                layer(x)

        with torch.no_grad():
            times = time_interleaved({"dense": run_dense, "layer": run_layer}, repeats=7)
        return times["layer"].median <= times["dense"].median
