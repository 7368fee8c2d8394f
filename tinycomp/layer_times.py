"""Measured seconds of the layers that options would become: for budgets of time, and to leave out slow layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tinycomp.edits import Replace
from tinycomp.eval.timing import time_interleaved
from tinycomp.layers import LAYERS, DenseLinear, MaskedLinear
from tinycomp.methods import Method, MethodConfig, Option, Unit
from tinycomp.methods._pruning import Pruning
from tinycomp.models import UnitGroup, unit_groups

POINTS = 5  # sizes measured per method and shape; times between them are interpolated
REPEATS = 7
COLD_BYTES = 2**26  # weights rotate through this much memory, so that none stays in cache
MAX_COPIES = 64  # tiny matrices would need thousands of modules

Shape = tuple[int, ...]


def unit_costs(model: nn.Module, groups: Sequence[UnitGroup] | None = None, rows: int = 1) -> dict[str, float]:
    """Microseconds that a unit of each kind takes in its linears on this CPU: for `cost` of `SPP` and `make_elastic_`.

    Each linear is measured whole, and every row or column has an equal part of its time.

    Args:
        model: gives shapes and dtype; on meta too.
        groups: its unit groups; all unless given.
        rows: batch rows (sequences times tokens per step) of a call.

    Returns:
        kind ("ffn", "qk", "v") -> mean over the units of that kind.
    """
    times = LayerTimes(model, rows)
    totals: dict[str, float] = {}
    counts: dict[str, int] = {}
    for group in unit_groups(model) if groups is None else groups:
        for member in group.members:
            share = member.features.numel() / member.shape[member.dim]
            totals[group.kind] = totals.get(group.kind, 0.0) + share * 1e6 * times.linear(*member.shape)
        counts[group.kind] = counts.get(group.kind, 0) + group.count
    return {kind: total / counts[kind] for kind, total in totals.items()}


class LayerTimes:
    """Seconds per call of every option, from a few measured sizes of each method on each weight shape.

    Args:
        model: gives the dtype.
        rows: batch rows (sequences times tokens per step) of a call.
    """

    def __init__(self, model: nn.Module, rows: int) -> None:
        self.rows = rows
        self.dtype = next(model.parameters()).dtype
        self._dense: dict[Shape, float] = {}
        self._curves: dict[tuple[str, Shape], tuple[np.ndarray, np.ndarray]] = {}

    def dense(self, unit: Unit) -> float:
        """Seconds of the unit's own linears, one after another."""
        return sum(self.linear(x.out_features, x.in_features) for x in unit.linears)

    def linear(self, m: int, n: int) -> float:
        """Seconds of a dense linear with m outputs and n inputs."""
        if (m, n) not in self._dense:
            self._dense[m, n] = self._measure({"dense": self._linear(m, n)})["dense"]
        return self._dense[m, n]

    def timed(self, unit: Unit, method: Method, config: MethodConfig, options: list[Option]) -> list[Option]:
        """The options with their `seconds`."""
        whole = self.dense(unit)
        smaller = sorted((o for o in options if not o.choice.get("dense")), key=lambda o: (o.bits, o.size))
        if not smaller:
            return [replace(o, seconds=whole) for o in options]
        key = (method.name, tuple(n for x in unit.linears for n in x.weight.shape))
        if key not in self._curves:
            places = np.unique(np.linspace(0, len(smaller) - 1, POINTS).round().astype(int))
            points = [smaller[i] for i in places]
            seconds = self._widths(unit, points) if unit.kind == "ffn" else self._layers(unit, method, config, points)
            # A larger layer is not faster; where it measured so, that is noise.
            self._curves[key] = np.array([o.bits for o in points], float), np.maximum.accumulate(seconds)
        bits, seconds = self._curves[key]
        return [
            replace(o, seconds=whole if o.choice.get("dense") else float(np.interp(o.bits, bits, seconds)))
            for o in options
        ]

    def _widths(self, unit: Unit, points: list[Option]) -> np.ndarray:
        """Narrower plain linears."""
        full = unit.linears[-1].in_features
        seconds = []
        for option in points:
            width = max(round(full * option.size / unit.size), 1)
            *inputs, down = unit.linears
            dims = [(width, x.in_features) for x in inputs] + [(down.out_features, width)]
            seconds.append(sum(self.linear(m, n) for m, n in dims))
        return np.array(seconds)

    def _layers(self, unit: Unit, method: Method, config: MethodConfig, points: list[Option]) -> np.ndarray:
        """The layers that the method builds at these sizes, interleaved with the dense one that they stand for."""
        (linear,) = unit.linears
        runs = {"dense": self._linear(linear.out_features, linear.in_features)}
        for number, option in enumerate(points):
            (edit,) = method.build(unit, option.choice, config).edits
            assert isinstance(edit, Replace)
            runs[str(number)] = self._layer(edit, self._copies(linear.out_features, linear.in_features))
        found = self._measure(runs)
        scale = self.linear(linear.out_features, linear.in_features) / found["dense"]  # drift of the machine
        return np.array([found[str(i)] * scale for i in range(len(points))])

    def _measure(self, runs: dict[str, tuple[Callable[[], None], int]]) -> dict[str, float]:
        with torch.no_grad():
            times = time_interleaved({name: run for name, (run, _) in runs.items()}, repeats=REPEATS)
        return {name: times[name].median / copies for name, (_, copies) in runs.items()}

    def _copies(self, m: int, n: int) -> int:
        return min(max(COLD_BYTES // (m * n * self.dtype.itemsize), 1), MAX_COPIES)

    def _linear(self, m: int, n: int) -> tuple[Callable[[], None], int]:
        x = torch.randn(self.rows, n).to(self.dtype)
        weights = [torch.randn(m, n).to(self.dtype) for _ in range(self._copies(m, n))]

        def run() -> None:
            for weight in weights:
                F.linear(x, weight)

        return run, len(weights)

    def _layer(self, edit: Replace, copies: int) -> tuple[Callable[[], None], int]:
        x = torch.randn(self.rows, edit.kwargs["in_features"]).to(self.dtype)
        first = LAYERS[edit.layer](**edit.kwargs, dtype=self.dtype).eval()
        if isinstance(first, MaskedLinear):
            first = _masked(first)
        return _calls(first, x, copies), copies


def _calls(layer: nn.Module, x: torch.Tensor, copies: int) -> Callable[[], None]:
    """Calls of that many copies of a layer, one after another."""
    layers = [layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]

    def run() -> None:
        for each in layers:
            each(x)

    return run


def _masked(layer: MaskedLinear) -> MaskedLinear:
    """The same layer with places that a mask could have: a kernel's time depends on them."""
    m, n = layer.out_features, layer.in_features
    keep = torch.rand(m, n).argsort(1) < layer.nnz // m
    dense = nn.Linear(n, m, layer.bias is not None, dtype=layer.weight.dtype)
    return MaskedLinear.from_linear(dense, keep, layer.format, layer.value_bits)


def masks_over_dense(
    kept: Mapping[tuple[int, int], Sequence[int]], config: Pruning, dtype: torch.dtype, repeats: int = REPEATS
) -> float:
    """Seconds of all masked matrices over those of the library's dense kernel on the same shapes, on this CPU.

    Args:
        kept: (out, in) -> weights that a row keeps, of every masked matrix of that shape; measured at their mean.
        config: rows and width of the values.
        dtype: of activations and dense weights.
        repeats: timed rounds.
    """
    mine = dense = 0.0
    for (m, n), widths in kept.items():
        copies = min(max(COLD_BYTES // (m * n * dtype.itemsize), 1), MAX_COPIES)
        plain, x = nn.Linear(n, m, bias=False, dtype=dtype), torch.randn(config.rows, n).to(dtype)
        keep = torch.rand(m, n).argsort(1) < round(sum(widths) / len(widths))
        if config.pattern == "2:4":
            keep = (torch.arange(n) % 4 < 2).expand(m, n)
        runs = {
            "mask": _calls(MaskedLinear.from_linear(plain, keep, config.format, config.value_bits), x, copies),
            "dense": _calls(DenseLinear.from_linear(plain), x, copies),
        }
        with torch.no_grad():
            times = time_interleaved(runs, repeats=repeats)
        mine += len(widths) * times["mask"].median
        dense += len(widths) * times["dense"].median
    return mine / dense


def require_fast_masks(
    config: MethodConfig, kept: Mapping[tuple[int, int], Sequence[int]], dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse masks that this CPU multiplies by more slowly than by the dense matrices; see `Pruning.guard_speed`.

    Raises:
        ValueError: the masks are slower.
    """
    masked = isinstance(config, Pruning) and not config.structured and config.guard_speed
    if not masked or not kept or device.type not in ("cpu", "meta"):
        return
    assert isinstance(config, Pruning)
    found = masks_over_dense(kept, config, dtype)
    if found > 1.0:
        raise ValueError(
            f"{type(config).__name__}: got masks whose layers take {found:.2f} times as long as the dense kernel at "
            f"{config.rows} rows in {str(dtype).removeprefix('torch.')}, allowed those that are no slower; lower "
            "`ratio`, set value_bits=8, set `rows` to the rows you serve, or accept them with guard_speed=False"
        )
