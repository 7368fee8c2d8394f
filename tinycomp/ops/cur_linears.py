"""Two or three layers of three factors (CUR), of the same input, in one call."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinycomp.ops._group import Args, define_group
from tinycomp.ops._registry import Sample
from tinycomp.ops._sampling import Draw, sliced, transposed


def cur_linears(x: Tensor, *layers: Tensor | None) -> Tensor:
    """`cur_linear` of two or three layers, their outputs beside each other: q, k, v or gate, up.

        y = [cur_linear(x, r1, u1, c1, bias1), cur_linear(x, r2, u2, c2, bias2), ...]

    Args:
        x: (..., in_features) float32, bfloat16, float16 or float64.
        *layers: r1, u1, c1, bias1, the same of the second and, for three, of the third, each as for `cur_linear`; ranks
            and sizes may differ between layers.

    Returns:
        (..., sum of out_features) in the dtype of x.

    Raises:
        ValueError, TypeError: as `cur_linear`.

    Cost: that of the layers, x read once; on a GPU one launch (Triton in graphs: three) for at most 16 inputs.
    """
    return _call(x, *layers)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def make(lead: tuple[int, ...], k: int, *layers: tuple[int, int, int, bool]) -> Args:
        draw = Draw(dtype)
        args: Args = (draw(*lead, k),)
        for n, rank, rank_rows, bias in layers:
            args += draw(rank_rows, k), draw(rank, rank_rows), draw(n, rank), draw(n) if bias else None
        return args + (None,) * (13 - len(args))

    yield Sample("qkv-1row", make((1,), 64, (48, 16, 16, True), (24, 8, 9, True), (24, 16, 8, False)))
    yield Sample("gate-up-odd", make((2, 3), 33, (41, 7, 9, False), (41, 9, 7, True)))
    yield Sample("many-rows", make((70,), 100, (90, 33, 31, True), (50, 17, 17, False)))
    yield Sample("0rows", make((0,), 33, (41, 7, 7, True), (20, 3, 3, False)))
    yield Sample("vector", make((), 33, (41, 7, 7, True), (20, 3, 4, False), (7, 7, 7, True)))
    base = make((5,), 33, (41, 7, 9, True), (41, 9, 7, True))
    yield Sample("transposed", tuple(None if a is None else transposed(a) for a in base))
    yield Sample("sliced", tuple(None if a is None else sliced(a) for a in base))


_call = define_group("cur_linears", "cur_linear", _samples)
