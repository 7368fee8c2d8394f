"""Linear layer whose weight is a low-rank product, in plain or pivoted storage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tinycomp.ops import _checks
from tinycomp.ops._registry import Cost, Op, Sample, define
from tinycomp.ops._sampling import Draw, sliced, transposed

_NAME = "lowrank_linear"


def lowrank_linear(x: Tensor, r: Tensor, t: Tensor, order: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Multiply by a low-rank weight without building it.

    Plain storage:    y = (x rᵀ) tᵀ + bias
    Pivoted storage:  z = x rᵀ;  y[..., order[:rank]] = z;  y[..., order[rank:]] = z tᵀ;  y += bias

    Args:
        x: (..., in_features) float32, bfloat16, float16 or float64.
        r: (rank, in_features), the dtype of x; with `order`, rows that are kept as they are.
        t: (out_features, rank), or (out_features - rank, rank) with `order`.
        order: int32 (out_features,), output feature of row i of [r; t r], a permutation. None: plain storage.
        bias: (out_features,) or None.

    Returns:
        (..., out_features) in the dtype of x.

    Raises:
        ValueError: shapes do not fit, or `order` is not a permutation.
        TypeError: dtypes differ or are not supported.

    Cost: 2 M (K rank + rank rows(t)) FLOPs; at M = 1 the bytes of r and t.
    """
    return _call(x, r, t, order, bias)


def _check(x: Tensor, r: Tensor, t: Tensor, order: Tensor | None, bias: Tensor | None) -> None:
    _checks.tensor(_NAME, "x", x)
    _checks.shaped(_NAME, "r", r, (None, x.shape[-1]), x)
    _checks.shaped(_NAME, "t", t, (None, r.shape[0]), x)
    out_features = t.shape[0]
    if order is not None:
        out_features = out_features + r.shape[0]
        _checks.shaped(_NAME, "order", order, (out_features,), x, (torch.int32,))
        _checks.permutation(_NAME, "order", order)
    _checks.bias(_NAME, bias, out_features, x)


def _reference(x: Tensor, r: Tensor, t: Tensor, order: Tensor | None, bias: Tensor | None) -> Tensor:
    z = F.linear(x, r)
    if order is None:
        return F.linear(z, t, bias)
    y = torch.cat([z, F.linear(z, t)], -1)
    y = torch.zeros_like(y).index_copy(-1, order.long(), y)
    return y if bias is None else y + bias


def _fake(x: Tensor, r: Tensor, t: Tensor, order: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], t.shape[0] + (0 if order is None else r.shape[0]))


def _backward(args: Sequence[Tensor], needs: Sequence[bool], gy: Tensor) -> tuple[Tensor | None, ...]:
    x, r, t, order, _ = args
    rank = r.shape[0]
    x2, gy2 = _checks.as_matrix(x), _checks.as_matrix(gy)
    kept, rest = None, gy2
    if order is not None:
        rows = gy2.index_select(-1, order.long())
        kept, rest = rows[:, :rank], rows[:, rank:]
    gz = rest @ t if kept is None else rest @ t + kept
    gx = (gz @ r).reshape(x.shape) if needs[0] else None
    gr = gz.t() @ x2 if needs[1] else None
    gt = rest.t() @ (x2 @ r.t()) if needs[2] else None
    return gx, gr, gt, None, gy2.sum(0) if needs[4] else None


def _cost(x: Tensor, r: Tensor, t: Tensor, order: Tensor | None = None, bias: Tensor | None = None) -> Cost:
    rows = x.numel() // max(x.shape[-1], 1)
    moved = x.numel() + r.numel() + t.numel() + rows * (t.shape[0] + (0 if order is None else r.shape[0]))
    indices = 0 if order is None else order.nbytes
    return Cost(
        2 * rows * (r.numel() + t.numel()), moved * x.element_size() + indices + (0 if bias is None else bias.nbytes)
    )


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def make(
        lead: tuple[int, ...], k: int, n: int, rank: int, pivoted: bool, bias: bool = True
    ) -> tuple[Tensor | None, ...]:
        draw = Draw(dtype)
        order = draw.permutation(n) if pivoted else None
        t = draw(n - rank if pivoted else n, rank)
        return draw(*lead, k), draw(rank, k), t, order, draw(n) if bias else None

    yield Sample("plain-1row", make((1,), 64, 48, 16, False))
    yield Sample("pivoted-1row", make((1,), 64, 48, 16, True))
    yield Sample("plain-odd", make((2, 3), 33, 41, 7, False, bias=False))
    yield Sample("pivoted-odd", make((2, 3), 33, 41, 7, True, bias=False))
    yield Sample("rank-is-out", make((2,), 33, 7, 7, True))
    yield Sample("plain-many-rows", make((70,), 100, 90, 33, False))
    yield Sample("pivoted-many-rows", make((70,), 100, 90, 33, True))
    yield Sample("pivoted-hundreds-of-rows", make((260,), 33, 41, 7, True))
    yield Sample("2KiB-rows", make((20,), 512, 40, 12, True))
    yield Sample("0rows", make((0,), 33, 41, 7, True))
    yield Sample("vector", make((), 33, 41, 7, True))
    base = make((5,), 33, 41, 7, True)
    yield Sample("transposed", tuple(None if a is None else transposed(a) for a in base))
    yield Sample("sliced", tuple(None if a is None else sliced(a) for a in base))


_call = define(
    Op(
        name=_NAME,
        schema="(Tensor x, Tensor r, Tensor t, Tensor? order=None, Tensor? bias=None) -> Tensor",
        check=_check,
        reference=_reference,
        fake=_fake,
        cost=_cost,
        samples=_samples,
        backward=_backward,
        autocast=(0, 1, 2, 4),
    )
)
