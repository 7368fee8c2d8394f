"""Two or three low-rank linear layers of the same input in one call."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinycomp.ops._group import Args, define_group
from tinycomp.ops._registry import Sample
from tinycomp.ops._sampling import Draw, sliced, transposed


def lowrank_linears(x: Tensor, *layers: Tensor | None) -> Tensor:
    """`lowrank_linear` of two or three layers, their outputs beside each other: q, k, v or gate, up.

        y = [lowrank_linear(x, r1, t1, order1, bias1), lowrank_linear(x, r2, t2, order2, bias2), ...]

    Args:
        x: (..., in_features) float32, bfloat16, float16 or float64.
        *layers: r1, t1, order1, bias1, r2, t2, order2, bias2 and, for three, r3, t3, order3, bias3, each as for
            `lowrank_linear`; ranks and sizes may differ between layers.

    Returns:
        (..., sum of out_features) in the dtype of x.

    Raises:
        ValueError, TypeError: as `lowrank_linear`.

    Cost: that of the layers, x read once; on a GPU one launch (Triton in graphs: two) for at most 16 inputs.
    """
    return _call(x, *layers)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def make(lead: tuple[int, ...], k: int, *layers: tuple[int, int, bool, bool]) -> Args:
        draw = Draw(dtype)
        args: Args = (draw(*lead, k),)
        for n, rank, pivoted, bias in layers:
            order = draw.permutation(n) if pivoted else None
            args += draw(rank, k), draw(n - rank if pivoted else n, rank), order, draw(n) if bias else None
        return args + (None,) * (13 - len(args))

    yield Sample("qkv-1row", make((1,), 64, (48, 16, True, True), (24, 8, True, True), (24, 16, False, False)))
    yield Sample("gate-up-odd", make((2, 3), 33, (41, 7, True, False), (41, 9, True, False)))
    yield Sample("many-rows", make((70,), 100, (90, 33, False, True), (50, 17, True, True)))
    yield Sample("0rows", make((0,), 33, (41, 7, True, False), (20, 3, False, True)))
    yield Sample("vector", make((), 33, (41, 7, True, False), (20, 3, False, True), (7, 7, True, True)))
    base = make((5,), 33, (41, 7, True, True), (41, 9, False, True))
    yield Sample("transposed", tuple(None if a is None else transposed(a) for a in base))
    yield Sample("sliced", tuple(None if a is None else sliced(a) for a in base))


_call = define_group("lowrank_linears", "lowrank_linear", _samples)
