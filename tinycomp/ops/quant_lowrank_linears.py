"""Two or three rounded low-rank linear layers of the same input in one call."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinycomp.ops._group import Args, define_group
from tinycomp.ops._registry import Sample
from tinycomp.ops._sampling import Draw, sliced, transposed
from tinycomp.ops.quant_linear import quantize


def quant_lowrank_linears(x: Tensor, *layers: Tensor | int | None) -> Tensor:
    """`quant_lowrank_linear` of two or three layers, their outputs beside each other: q, k, v or gate, up.

        y = [quant_lowrank_linear(x, r1, ..., bias1), quant_lowrank_linear(x, r2, ..., bias2), ...]

    Args:
        x: (..., in_features) float32, bfloat16, float16 or float64.
        *layers: r, r_scales, t, t_scales, order, r_zeros, t_zeros, bias of each of three layers, as for
            `quant_lowrank_linear` (None throughout for a third that is not there), then bits, group_size and
            activation_bits of all.

    Returns:
        (..., sum of out_features) in the dtype of x.

    Raises:
        ValueError, TypeError: as `quant_lowrank_linear`.

    Cost: that of the layers, x read once; on a GPU one launch (Triton in graphs: two) for at most 16 inputs.
    """
    return _call(x, *layers)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def make(
        lead: tuple[int, ...], k: int, bits: int, group: int, symmetric: bool, *layers: tuple[int, int, bool]
    ) -> Args:
        draw = Draw(dtype)
        args: Args = (draw(*lead, k),)
        for n, rank, pivoted in layers:
            r = quantize(draw(rank, k), bits, group, symmetric)
            t = quantize(draw(n - rank if pivoted else n, rank), bits, group, symmetric)
            order = draw.permutation(n) if pivoted else None
            args += r.qweight, r.scales, t.qweight, t.scales, order, r.zeros, t.zeros, draw(n)
        return args + (None,) * (25 - len(args)) + (bits, group, 0)

    for bits in (8, 4):
        layers = ((48, 16, False), (24, 8, True), (24, 16, True))
        yield Sample(f"int{bits}-qkv-1row", make((1,), 64, bits, 0, True, *layers))
        yield Sample(f"int{bits}-gate-up-odd", make((2, 3), 33, bits, 8, False, (41, 7, True), (41, 9, False)))
        yield Sample(f"int{bits}-many-rows", make((70,), 100, bits, 10, False, (50, 33, True), (40, 17, False)))
        yield Sample(f"int{bits}-0rows", make((0,), 33, bits, 0, True, (41, 7, True), (20, 3, False)))
        base = make((5,), 33, bits, 8, False, (41, 7, True), (41, 9, False))
        yield Sample(f"int{bits}-transposed", tuple(transposed(v) if isinstance(v, Tensor) else v for v in base))
        yield Sample(f"int{bits}-sliced", tuple(sliced(v) if isinstance(v, Tensor) else v for v in base))


_call = define_group("quant_lowrank_linears", "quant_lowrank_linear", _samples)
