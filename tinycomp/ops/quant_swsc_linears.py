"""Two or three layers with shared centroids, all weights rounded, of the same input in one call."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinycomp.ops._group import Args, define_group
from tinycomp.ops._registry import Sample
from tinycomp.ops._sampling import Draw, sliced, transposed
from tinycomp.ops.quant_linear import quantize


def quant_swsc_linears(x: Tensor, *layers: Tensor | int | None) -> Tensor:
    """`quant_swsc_linear` of two or three layers, their outputs beside each other: q, k, v or gate, up.

        y = [quant_swsc_linear(x, centroids1, ..., bias1, axis, ...), quant_swsc_linear(x, centroids2, ...), ...]

    Args:
        x: (..., in_features) float32, bfloat16, float16 or float64.
        *layers: centroids, centroid_scales, labels, b, b_scales, a, a_scales, centroid_zeros, b_zeros, a_zeros, scales,
            bias of each of three layers, as for `quant_swsc_linear` (None throughout for a third that is not there),
            then axis, bits, group_size and activation_bits of all.

    Returns:
        (..., sum of out_features) in the dtype of x.

    Raises:
        ValueError, TypeError: as `quant_swsc_linear`.

    Cost: that of the layers, x read once; on a GPU one launch for at most 16 inputs (Triton: axis 0, 16 bits).
    """
    return _call(x, *layers)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def make(lead: tuple[int, ...], k: int, bits: int, group: int, *layers: tuple[int, int, int, bool]) -> Args:
        draw = Draw(dtype)
        args: Args = (draw(*lead, k),)
        for n, clusters, rank, full in layers:
            c, b, a = (quantize(draw(*size), bits, group, not full) for size in ((clusters, k), (rank, k), (n, rank)))
            labels, gains = draw.labels(n, clusters), (draw(n), draw(n)) if full else (None, None)
            args += (
                c.qweight,
                c.scales,
                labels,
                b.qweight,
                b.scales,
                a.qweight,
                a.scales,
                c.zeros,
                b.zeros,
                a.zeros,
                *gains,
            )
        return args + (None,) * (37 - len(args)) + (0, bits, group, 0)

    for bits in (8, 4):
        yield Sample(
            f"int{bits}-qkv-1row", make((1,), 64, bits, 0, (48, 16, 8, True), (24, 8, 8, False), (24, 9, 2, True))
        )
        yield Sample(f"int{bits}-gate-up-odd", make((2, 3), 33, bits, 8, (41, 7, 3, True), (41, 9, 8, False)))
        yield Sample(f"int{bits}-many-rows", make((70,), 100, bits, 10, (90, 33, 7, True), (50, 17, 21, False)))
        yield Sample(f"int{bits}-0rows", make((0,), 33, bits, 0, (41, 7, 3, True), (20, 3, 1, False)))
        base = make((5,), 33, bits, 8, (41, 7, 3, True), (41, 9, 2, True))
        yield Sample(f"int{bits}-transposed", tuple(transposed(v) if isinstance(v, Tensor) else v for v in base))
        yield Sample(f"int{bits}-sliced", tuple(sliced(v) if isinstance(v, Tensor) else v for v in base))


_call = define_group("quant_swsc_linears", "quant_swsc_linear", _samples)
