"""L2 norm of each column of a matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinycomp.ops import _checks
from tinycomp.ops._registry import Cost, Op, Sample, define
from tinycomp.ops._sampling import Draw, sliced, transposed

_NAME = "column_norms"


def column_norms(w: Tensor) -> Tensor:
    """Norms of columns: sqrt(sum_i w_ij²), squares added in float64 (a 16-bit column can overflow float32's squares).

    Args:
        w: (m, n) floating.

    Returns:
        float32 (n,).

    Raises:
        ValueError: w is not a matrix.
        TypeError: its dtype is not supported.

    Cost: 2 m n FLOPs, one read of w. Not differentiable.
    """
    return _call(w)


def _check(w: Tensor) -> None:
    _checks.tensor(_NAME, "w", w)
    _checks.shaped(_NAME, "w", w, (None, None), w)


def _reference(w: Tensor) -> Tensor:
    wide = w.to(torch.float64)
    return (wide * wide).sum(0).sqrt().to(torch.float32)


def _fake(w: Tensor) -> Tensor:
    return w.new_empty(w.shape[1], dtype=torch.float32)


def _cost(w: Tensor) -> Cost:
    return Cost(2 * w.numel(), w.nbytes + 4 * w.shape[1])


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    draw = Draw(dtype)
    yield Sample("square", (draw(32, 32),))
    yield Sample("odd", (draw(7, 33),))
    yield Sample("1row", (draw(1, 9),))
    yield Sample("0rows", (draw(0, 9),))
    yield Sample("many", (draw(300, 700),))
    yield Sample("transposed", (transposed(draw(41, 33)),))
    yield Sample("sliced", (sliced(draw(41, 33)),))


_call = define(
    Op(
        name=_NAME,
        schema="(Tensor w) -> Tensor",
        check=_check,
        reference=_reference,
        fake=_fake,
        cost=_cost,
        samples=_samples,
    )
)
