"""Greedy choice of rows: pivots of a column-pivoted QR or of an LU factorisation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinycomp.ops import _checks
from tinycomp.ops._registry import Cost, Op, Sample, define
from tinycomp.ops._sampling import Draw, sliced, transposed

_NAME = "select_pivots"


def select_pivots(a: Tensor, k: int, method: str = "qr") -> Tensor:
    """Row pivots of `a`, in the order in which they are chosen, computed in float64; the lowest index wins a tie.

    "qr": the first k pivots of the column-pivoted Householder QR of aᵀ: each step takes the row with the largest norm
        and removes its direction from all rows.
    "lu": the row pivots of LU with partial pivoting of the first k columns: step j takes the row with the largest
        entry in column j and eliminates with it. On a matrix of singular vectors these are DEIM's indices.

    Args:
        a: (m, n) floating, without NaN or infinity.
        k: number of rows, at most m; at most n too for "lu".
        method: "qr" or "lu".

    Returns:
        int64 (k,), distinct. Once the remaining rows are zero, the lowest unused indices follow.

    Raises:
        ValueError: k out of range, unknown method, or NaN or infinity in a.
        TypeError: the dtype is not supported.

    Cost: 2 m n k FLOPs ("qr"), m k² ("lu"). Not differentiable.
    Source: Chaturantabut and Sorensen, DEIM, 2010; Drmac and Gugercin, Q-DEIM, 2016.
    """
    return _call(a, k, method)


def _check(a: Tensor, k: int, method: str) -> None:
    _checks.tensor(_NAME, "a", a)
    _checks.shaped(_NAME, "a", a, (None, None), a)
    if method not in ("qr", "lu"):
        raise ValueError(f"{_NAME}: method is {method!r}, allowed 'qr' or 'lu'; choose one")
    most = a.shape[0] if method == "qr" else min(a.shape)
    if not 0 <= k <= most:
        raise ValueError(f"{_NAME}: k is {k}, allowed 0..{most} for method {method!r} on {tuple(a.shape)}; lower k")
    if _checks.concrete(a) and not bool(torch.isfinite(a).all()):
        raise ValueError(f"{_NAME}: a holds NaN or infinity, allowed are finite numbers; repair the matrix first")


def _reference(a: Tensor, k: int, method: str) -> Tensor:
    rest = a.to(torch.float64, copy=True)
    # Chosen rows get a score of -1, below every other.
    taken = torch.zeros(a.shape[0], dtype=torch.bool, device=a.device)
    pivots = []
    for j in range(k):
        score = rest.square().sum(1) if method == "qr" else rest[:, j].abs()
        pivot = torch.where(taken, -1.0, score).argmax().view(1)
        row = rest.index_select(0, pivot)
        if method == "qr":
            row = row / row.norm().clamp(min=torch.finfo(torch.float64).tiny)
            rest = rest - (rest @ row.t()) * row
        else:
            entry = row[:, j]
            entry = torch.where(entry == 0, 1.0, entry)
            rest = rest - (rest[:, j] / entry).unsqueeze(1) * row
        taken = taken.index_fill(0, pivot, True)
        pivots.append(pivot)
    return torch.cat(pivots) if pivots else torch.empty(0, dtype=torch.int64, device=a.device)


def _fake(a: Tensor, k: int, method: str) -> Tensor:
    return a.new_empty(k, dtype=torch.int64)


def _cost(a: Tensor, k: int, method: str = "qr") -> Cost:
    m, n = a.shape
    return Cost(2 * m * n * k if method == "qr" else m * k * k, a.nbytes + 8 * k)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    draw = Draw(dtype)
    for method in ("qr", "lu"):
        yield Sample(f"{method}-square", (draw(32, 32), 16, method))
        yield Sample(f"{method}-tall-odd", (draw(41, 33), 7, method))
        yield Sample(f"{method}-all", (draw(9, 9), 9, method))
        yield Sample(f"{method}-none", (draw(5, 4), 0, method))
        yield Sample(f"{method}-0rows", (draw(0, 4), 0, method))
        yield Sample(f"{method}-transposed", (transposed(draw(41, 33)), 7, method))
        yield Sample(f"{method}-sliced", (sliced(draw(41, 33)), 7, method))
    yield Sample("qr-wide", (draw(7, 100), 7, "qr"))


_call = define(
    Op(
        name=_NAME,
        schema='(Tensor a, int k, str method="qr") -> Tensor',
        check=_check,
        reference=_reference,
        fake=_fake,
        cost=_cost,
        samples=_samples,
    )
)
