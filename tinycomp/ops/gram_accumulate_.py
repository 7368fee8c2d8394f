"""Running second moment of the inputs of a layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinycomp.ops import _checks
from tinycomp.ops._registry import Cost, Op, Sample, define
from tinycomp.ops._sampling import Draw, sliced, transposed

_NAME = "gram_accumulate_"


def gram_accumulate_(gram: Tensor, x: Tensor) -> None:
    """Add xᵀ x to `gram` in place; x is widened to the dtype of `gram` first, so products and sums are in that dtype.

    Args:
        gram: (n, n) float32 or float64, changed in place.
        x: (..., n) float32, bfloat16, float16 or float64.

    Raises:
        ValueError: shapes do not fit.
        TypeError: dtypes are not supported.

    Cost: 2 M n² FLOPs. Not differentiable.
    """
    _call(gram, x)


def _check(gram: Tensor, x: Tensor) -> None:
    _checks.tensor(_NAME, "x", x)
    _checks.shaped(_NAME, "gram", gram, (x.shape[-1], x.shape[-1]), x, (torch.float32, torch.float64))


def _reference(gram: Tensor, x: Tensor) -> None:
    wide = _checks.as_matrix(x.detach()).to(gram.dtype)
    gram.addmm_(wide.t(), wide)


def _fake(gram: Tensor, x: Tensor) -> None:
    return None


def _cost(gram: Tensor, x: Tensor) -> Cost:
    return Cost(2 * x.numel() * x.shape[-1], x.nbytes + 2 * gram.nbytes)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    for wide in (torch.float32, torch.float64):
        name = str(wide).removeprefix("torch.")
        draw, start = Draw(dtype), Draw(wide)
        yield Sample(f"{name}-square", (start(32, 32), draw(4, 8, 32)))
        yield Sample(f"{name}-odd", (start(33, 33), draw(7, 33)))
        yield Sample(f"{name}-1row", (start(33, 33), draw(33)))
        yield Sample(f"{name}-0rows", (start(33, 33), draw(0, 33)))
        yield Sample(f"{name}-transposed", (transposed(start(33, 33)), transposed(draw(41, 33))))
        yield Sample(f"{name}-sliced", (sliced(start(33, 33)), sliced(draw(41, 33))))


_call = define(
    Op(
        name=_NAME,
        schema="(Tensor(a!) gram, Tensor x) -> ()",
        check=_check,
        reference=_reference,
        fake=_fake,
        cost=_cost,
        samples=_samples,
    )
)
