"""Linear layer whose weight is a CUR product of three factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tinycomp.ops import _checks
from tinycomp.ops._registry import Cost, Op, Sample, define
from tinycomp.ops._sampling import Draw, sliced, transposed

_NAME = "cur_linear"


def cur_linear(x: Tensor, r: Tensor, u: Tensor, c: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by C U R without building it: y = ((x rᵀ) uᵀ) cᵀ + bias.

    Args:
        x: (..., in_features) float32, bfloat16, float16 or float64.
        r: (rank_rows, in_features) rows of the weight, the dtype of x.
        u: (rank, rank_rows) link.
        c: (out_features, rank) columns of the weight.
        bias: (out_features,) or None.

    Returns:
        (..., out_features) in the dtype of x.

    Raises:
        ValueError: shapes do not fit.
        TypeError: dtypes differ or are not supported.

    Cost: 2 M (numbers in r, u and c) FLOPs; at M = 1 their bytes.
    Source: CURing Large Models, arXiv 2501.04211.
    """
    return _call(x, r, u, c, bias)


def _check(x: Tensor, r: Tensor, u: Tensor, c: Tensor, bias: Tensor | None) -> None:
    _checks.tensor(_NAME, "x", x)
    _checks.shaped(_NAME, "r", r, (None, x.shape[-1]), x)
    _checks.shaped(_NAME, "u", u, (None, r.shape[0]), x)
    _checks.shaped(_NAME, "c", c, (None, u.shape[0]), x)
    _checks.bias(_NAME, bias, c.shape[0], x)


def _reference(x: Tensor, r: Tensor, u: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(F.linear(F.linear(x, r), u), c, bias)


def _fake(x: Tensor, r: Tensor, u: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], c.shape[0])


def _backward(args: Sequence[Tensor], needs: Sequence[bool], gy: Tensor) -> tuple[Tensor | None, ...]:
    x, r, u, c, _ = args
    x2, gy2 = _checks.as_matrix(x), _checks.as_matrix(gy)
    gzu = gy2 @ c
    gz = gzu @ u
    z = x2 @ r.t()
    return (
        (gz @ r).reshape(x.shape) if needs[0] else None,
        gz.t() @ x2 if needs[1] else None,
        gzu.t() @ z if needs[2] else None,
        gy2.t() @ (z @ u.t()) if needs[3] else None,
        gy2.sum(0) if needs[4] else None,
    )


def _cost(x: Tensor, r: Tensor, u: Tensor, c: Tensor, bias: Tensor | None = None) -> Cost:
    rows = x.numel() // max(x.shape[-1], 1)
    weights = r.numel() + u.numel() + c.numel()
    moved = x.numel() + weights + rows * c.shape[0] + (0 if bias is None else bias.numel())
    return Cost(2 * rows * weights, moved * x.element_size())


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def make(
        lead: tuple[int, ...], k: int, n: int, rank: int, rank_rows: int, bias: bool = True
    ) -> tuple[Tensor | None, ...]:
        draw = Draw(dtype)
        return draw(*lead, k), draw(rank_rows, k), draw(rank, rank_rows), draw(n, rank), draw(n) if bias else None

    yield Sample("1row", make((1,), 64, 48, 16, 16))
    yield Sample("odd", make((2, 3), 33, 41, 7, 9, bias=False))
    yield Sample("many-rows", make((70,), 100, 90, 33, 31))
    yield Sample("hundreds-of-rows", make((260,), 33, 41, 7, 9))
    yield Sample("2KiB-rows", make((20,), 512, 40, 7, 9))
    yield Sample("0rows", make((0,), 33, 41, 7, 7))
    yield Sample("vector", make((), 33, 41, 7, 7))
    base = make((5,), 33, 41, 7, 9)
    yield Sample("transposed", tuple(None if a is None else transposed(a) for a in base))
    yield Sample("sliced", tuple(None if a is None else sliced(a) for a in base))


_call = define(
    Op(
        name=_NAME,
        schema="(Tensor x, Tensor r, Tensor u, Tensor c, Tensor? bias=None) -> Tensor",
        check=_check,
        reference=_reference,
        fake=_fake,
        cost=_cost,
        samples=_samples,
        backward=_backward,
        autocast=(0, 1, 2, 3, 4),
    )
)
