"""Two or three layers with shared centroids, of the same input, in one call."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinycomp.ops._group import Args, define_group
from tinycomp.ops._registry import Sample
from tinycomp.ops._sampling import Draw, sliced, transposed


def swsc_linears(x: Tensor, *layers: Tensor | int | None) -> Tensor:
    """`swsc_linear` of two or three layers, their outputs beside each other: q, k, v or gate, up.

        y = [swsc_linear(x, centroids1, labels1, b1, a1, scales1, bias1, axis), ...]

    Args:
        x: (..., in_features) float32, bfloat16, float16 or float64.
        *layers: centroids1, labels1, b1, a1, scales1, bias1, the same of the second and, for three, of the third, each
            as for `swsc_linear`; then axis, 0 unless given, of all layers. Sizes may differ between layers.

    Returns:
        (..., sum of out_features) in the dtype of x.

    Raises:
        ValueError, TypeError: as `swsc_linear`.

    Cost: that of the layers, x read once; on a GPU one launch for at most 16 inputs (Triton: axis 0).
    """
    return _call(x, *layers)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def make(lead: tuple[int, ...], k: int, axis: int, *layers: tuple[int, int, int, bool]) -> Args:
        draw = Draw(dtype)
        args: Args = (draw(*lead, k),)
        for n, clusters, rank, full in layers:
            channels = k if axis else n
            args += (
                draw(n, clusters) if axis else draw(clusters, k),
                draw.labels(channels, clusters, torch.uint8 if full else torch.int32),
                *(draw(rank, k), draw(n, rank)),
                *((draw(channels), draw(n)) if full else (None, None)),
            )
        return args + (None,) * (19 - len(args)) + (axis,)

    yield Sample("qkv-1row", make((1,), 64, 0, (48, 16, 8, True), (24, 8, 8, True), (24, 16, 0, False)))
    yield Sample("gate-up-odd", make((2, 3), 33, 0, (41, 7, 3, True), (41, 9, 0, False)))
    yield Sample("rank0", make((3,), 33, 0, (41, 7, 0, True), (20, 9, 0, False), (7, 7, 0, True)))
    yield Sample("axis1", make((3,), 33, 1, (41, 7, 3, True), (20, 9, 0, False)))
    yield Sample("many-rows", make((70,), 100, 0, (90, 33, 7, True), (50, 17, 0, True)))
    yield Sample("0rows", make((0,), 33, 0, (41, 7, 3, True), (20, 3, 1, False)))
    yield Sample("vector", make((), 33, 0, (41, 7, 3, False), (20, 3, 1, True), (7, 7, 2, True)))
    base = make((5,), 33, 0, (41, 7, 3, True), (41, 9, 2, True))
    yield Sample("transposed", tuple(transposed(a) if isinstance(a, Tensor) else a for a in base))
    yield Sample("sliced", tuple(sliced(a) if isinstance(a, Tensor) else a for a in base))


_call = define_group("swsc_linears", "swsc_linear", _samples)
