"""Arguments of every op for a shape: what `--shapes` may name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tinycomp import ops
from tinycomp.kernels_dump._shapes import DEFAULTS as DEFAULTS
from tinycomp.ops.masked_formats import pack_masked
from tinycomp.ops.quant_linear import quantize

Args = tuple[Any, ...]
# For which number of processors the launches of a shape are chosen; 108 are those of an A100.
PROCESSORS = 108


class Draw:
    """Seeded tensors; weights are scaled so that products stay near 1."""

    def __init__(self, dtype: torch.dtype, seed: int):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        scale = max(shape[-1], 1) ** -0.5 if len(shape) > 1 else 1.0
        return (torch.randn(shape, generator=self.generator) * scale).to(dtype or self.dtype)

    def inputs(self, rows: int, columns: int) -> Tensor:
        return torch.randn((rows, columns), generator=self.generator).to(self.dtype)

    def labels(self, count: int, clusters: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(clusters, (count,), generator=self.generator).to(dtype)


def _lowrank_linear(
    draw: Draw, inputs: int, in_features: int, out_features: int, rank: int, pivoted: bool, bias: bool = True
) -> Args:
    order = torch.randperm(out_features, generator=draw.generator).int() if pivoted else None
    t = draw(out_features - rank if pivoted else out_features, rank)
    x, r = draw.inputs(inputs, in_features), draw(rank, in_features)
    return x, r, t, order, draw(out_features) if bias else None


def _cur_linear(draw: Draw, inputs: int, in_features: int, out_features: int, rank: int) -> Args:
    x, r, u, c = draw.inputs(inputs, in_features), draw(rank, in_features), draw(rank, rank), draw(out_features, rank)
    return x, r, u, c, draw(out_features)


def _sliced_linear(draw: Draw, inputs: int, in_features: int, out_features: int, whole: list[int]) -> Args:
    """`whole`: [out, in] of the weight of which a corner is used."""
    return draw.inputs(inputs, in_features), draw(*whole), draw(whole[0]), in_features, out_features


def _swsc_linear(
    draw: Draw, inputs: int, in_features: int, out_features: int, rank: int, clusters: int, axis: int, label_bits: int
) -> Args:
    channels = out_features if axis == 0 else in_features
    labels = draw.labels(channels, clusters, {8: torch.uint8, 32: torch.int32, 64: torch.int64}[label_bits])
    centroids = draw(clusters, in_features) if axis == 0 else draw(out_features, clusters)
    x, b, a = draw.inputs(inputs, in_features), draw(rank, in_features), draw(out_features, rank)
    return x, centroids, labels, b, a, draw(channels), draw(out_features), axis


def _quant_linear(
    draw: Draw,
    inputs: int,
    in_features: int,
    out_features: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    activation_bits: int = 0,
) -> Args:
    q = quantize(draw(out_features, in_features), bits, group_size, symmetric)
    return draw.inputs(inputs, in_features), *q, draw(out_features), bits, group_size, activation_bits


def _quant_lowrank_linear(
    draw: Draw, inputs: int, in_features: int, out_features: int, rank: int, pivoted: bool, bits: int, group_size: int
) -> Args:
    x, r, t, order, bias = _lowrank_linear(draw, inputs, in_features, out_features, rank, pivoted)
    r, t = quantize(r, bits, group_size, False), quantize(t, bits, group_size, False)
    return x, r.qweight, r.scales, t.qweight, t.scales, order, r.zeros, t.zeros, bias, bits, group_size, 0


def _quant_swsc_linear(
    draw: Draw,
    inputs: int,
    in_features: int,
    out_features: int,
    rank: int,
    clusters: int,
    axis: int,
    bits: int,
    group_size: int,
) -> Args:
    x, centroids, labels, b, a, scales, bias, _ = _swsc_linear(
        draw, inputs, in_features, out_features, rank, clusters, axis, 32
    )
    c, b, a = (quantize(w, bits, group_size, False) for w in (centroids, b, a))
    levels = (c.qweight, c.scales, labels, b.qweight, b.scales, a.qweight, a.scales)
    return x, *levels, c.zeros, b.zeros, a.zeros, scales, bias, axis, bits, group_size, 0


def _group(layers: list[list[int]], single: Callable[..., Args]) -> Args:
    """Tensors of three layers without their x: `layers` holds [out_features, rank, pivoted] of two or three."""
    found = [single(out_features=n, rank=rank, pivoted=bool(pivoted)) for n, rank, pivoted in layers]
    tensors = tuple(v for args in found for v in args[1:] if not isinstance(v, int))
    return tensors + (None,) * ((3 - len(layers)) * (len(tensors) // len(layers)))


def _lowrank_linears(draw: Draw, inputs: int, in_features: int, layers: list[list[int]]) -> Args:
    single = functools.partial(_lowrank_linear, draw, 1, in_features)
    return draw.inputs(inputs, in_features), *_group(layers, single)


def _quant_lowrank_linears(
    draw: Draw, inputs: int, in_features: int, layers: list[list[int]], bits: int, group_size: int
) -> Args:
    single = functools.partial(_quant_lowrank_linear, draw, 1, in_features, bits=bits, group_size=group_size)
    return draw.inputs(inputs, in_features), *_group(layers, single), bits, group_size, 0


def _sliced_linears(draw: Draw, inputs: int, in_features: int, layers: list[int]) -> Args:
    found = [v for n in layers for v in (draw(n, in_features), draw(n))]
    return draw.inputs(inputs, in_features), *found


def _quant_linears(
    draw: Draw,
    inputs: int,
    in_features: int,
    layers: list[int],
    bits: int,
    group_size: int,
    activation_bits: int = 0,
) -> Args:
    found = [v for n in layers for v in _quant_linear(draw, 1, in_features, n, bits, group_size, False)[1:5]]
    return draw.inputs(inputs, in_features), *found, *[None] * (12 - len(found)), bits, group_size, activation_bits


def _cur_linears(draw: Draw, inputs: int, in_features: int, layers: list[list[int]]) -> Args:
    """`layers` holds [out_features, rank] of two or three."""
    found = [v for n, rank in layers for v in _cur_linear(draw, 1, in_features, n, rank)[1:]]
    return draw.inputs(inputs, in_features), *found


def _swsc_linears(draw: Draw, inputs: int, in_features: int, layers: list[list[int]], axis: int = 0) -> Args:
    """`layers` holds [out_features, clusters, rank] of two or three."""
    found = [v for n, c, r in layers for v in _swsc_linear(draw, 1, in_features, n, r, c, axis, 32)[1:7]]
    return draw.inputs(inputs, in_features), *found, *[None] * (18 - len(found)), axis


def _masked_linear(draw: Draw, inputs: int, in_features: int, out_features: int, format: str, value_bits: int) -> Args:
    scores = draw(out_features, in_features, dtype=torch.float32)
    if format == "2:4":
        grouped = torch.nn.functional.pad(scores, (0, -in_features % 4)).reshape(out_features, -1, 4)
        keep = (grouped.argsort(2).argsort(2) < 2).reshape(out_features, -1)[:, :in_features]
    elif format == "block32":
        coarse = scores[::32, ::32] > 0
        keep = coarse.repeat_interleave(32, 0).repeat_interleave(32, 1)[:out_features, :in_features]
    else:
        keep = scores > 0
    packed = pack_masked(draw(out_features, in_features), keep, format, value_bits)
    return draw.inputs(inputs, in_features), *packed, draw(out_features), out_features, format, value_bits


def _quant_swsc_linears(
    draw: Draw, inputs: int, in_features: int, layers: list[list[int]], bits: int, group_size: int, axis: int = 0
) -> Args:
    """`layers` as of swsc_linears."""
    one = functools.partial(_quant_swsc_linear, draw, 1, in_features, axis=axis)
    each = [one(out_features=n, rank=r, clusters=c, bits=bits, group_size=group_size) for n, c, r in layers]
    found = [v for args in each for v in args[1:13]]
    return draw.inputs(inputs, in_features), *found, *[None] * (36 - len(found)), axis, bits, group_size, 0


def _masked_linears(draw: Draw, inputs: int, in_features: int, layers: list[int], format: str, value_bits: int) -> Args:
    found = [v for n in layers for v in _masked_linear(draw, 1, in_features, n, format, value_bits)[1:7]]
    return draw.inputs(inputs, in_features), *found, *[None] * (18 - len(found)), format, value_bits


def _column_norms(draw: Draw, rows: int, columns: int) -> Args:
    return (draw.inputs(rows, columns),)


def _gram_accumulate_(draw: Draw, rows: int, columns: int) -> Args:
    return draw(columns, columns, dtype=torch.float32), draw.inputs(rows, columns)


def _kmeans_assign(draw: Draw, points: int, clusters: int, columns: int) -> Args:
    return draw.inputs(points, columns), draw.inputs(clusters, columns)


def _kmeans_update(draw: Draw, points: int, clusters: int, columns: int) -> Args:
    return draw.inputs(points, columns), draw.labels(points, clusters, torch.int32), clusters


def _select_pivots(draw: Draw, rows: int, columns: int, k: int, method: str) -> Args:
    return draw.inputs(rows, columns), k, method


def _sample_without_replacement(draw: Draw, count: int) -> Args:
    p = (torch.rand(count, generator=draw.generator) + 0.5).to(draw.dtype)
    return p, count, int(torch.randint(2**62, (), generator=draw.generator))


def _split_bregman_step_(
    draw: Draw,
    count: int,
    momentum: bool,
    coupled: bool,
    adam: bool = False,
    gamma: bool = True,
    group_size: int = 0,
    support: bool = False,
) -> Args:
    state = draw(count), 2 * draw(count), draw(count) if gamma else None, torch.full((count,), -1, dtype=torch.int32)
    direction = draw(count), draw(count) if momentum or adam else None
    second = draw(count).abs() if adam else None
    bits = torch.full((-(-count // 8),), 255, dtype=torch.uint8) if support else None
    numbers = 3, 0.1, 2.0, 10.0, 0.5, 0.9, coupled, not coupled
    return *state, *direction, *numbers, second, 0.99, 1e-6, group_size, bits


_MAKERS: dict[str, Callable[..., Args]] = {
    "lowrank_linear": _lowrank_linear,
    "lowrank_linears": _lowrank_linears,
    "quant_lowrank_linears": _quant_lowrank_linears,
    "sliced_linears": _sliced_linears,
    "quant_linears": _quant_linears,
    "swsc_linears": _swsc_linears,
    "quant_swsc_linears": _quant_swsc_linears,
    "cur_linear": _cur_linear,
    "cur_linears": _cur_linears,
    "sliced_linear": _sliced_linear,
    "swsc_linear": _swsc_linear,
    "quant_linear": _quant_linear,
    "quant_lowrank_linear": _quant_lowrank_linear,
    "quant_swsc_linear": _quant_swsc_linear,
    "masked_linear": _masked_linear,
    "masked_linears": _masked_linears,
    "column_norms": _column_norms,
    "gram_accumulate_": _gram_accumulate_,
    "kmeans_assign": _kmeans_assign,
    "kmeans_update": _kmeans_update,
    "select_pivots": _select_pivots,
    "sample_without_replacement": _sample_without_replacement,
    "split_bregman_step_": _split_bregman_step_,
}


def make(name: str, dtype: torch.dtype, seed: int, shape: dict[str, Any]) -> Args:
    """Positional arguments of an op for a shape.

    Raises:
        ValueError: the shape names a field that the op has not, or leaves one out.
    """
    parameters = [p for p in inspect.signature(_MAKERS[name]).parameters.values() if p.name != "draw"]
    required = {p.name for p in parameters if p.default is p.empty}
    got, allowed = set(shape) - {"processors"}, {p.name for p in parameters}
    if not required <= got <= allowed:
        raise ValueError(
            f"kernels_dump: a shape of {name} has {sorted(got)}, allowed {sorted(allowed)} and processors, "
            f"required {sorted(required)}; repair the file of --shapes"
        )
    args = _MAKERS[name](Draw(dtype, seed), **{k: v for k, v in shape.items() if k != "processors"})
    arguments = getattr(torch.ops.tinycomp, name).default._schema.arguments
    args += tuple(argument.default_value for argument in arguments[len(args) :])
    ops.OPS[name].check(*args)
    return args
