"""Which rows or columns of a matrix to keep: every published index selection, behind one function.

`select` picks rows (axis 0) or columns (axis 1); a strategy always picks rows of the matrix it is given. In the
strategies' docstrings A is (m, n), k is the number of indices, sigma_i the singular values of A, P (m, k) its k leading
left singular vectors, p the chosen rows and eta = |P[p, :]⁻¹|_2. Costs count multiply-adds.

Singular vectors come from a randomized SVD (2 power steps) unless `exact=True`; a-priori bounds that speak about
singular vectors hold for the vectors that were used, so for A itself with `exact=True`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinycomp.linalg import row_pivots
from tinycomp.selection._pivoting import (
    block_deim,
    deim,
    iterative_deim,
    maxvol,
    qdeim,
    sketch_lu,
    sketch_qr,
    strong_rrqr,
    uniform_rrqr,
)
from tinycomp.selection._sampling import block_random, derandomised, leverage, leverage_topk, norm, uniform
from tinycomp.selection._subspaces import (
    Options,
    Strategy,
    leverage_scores,
    orthonormalize,
    oversampling,
    singular_vectors,
    sketch,
)

__all__ = [
    "DEFAULT",
    "SELECTIONS",
    "leverage_scores",
    "orthonormalize",
    "select",
    "select_pair",
    "singular_vectors",
]

DEFAULT = "sketch-qr"

SELECTIONS: dict[str, Strategy] = {
    "leverage": leverage,
    "norm": norm,
    "uniform": uniform,
    "leverage-topk": leverage_topk,
    "deim": deim,
    "qdeim": qdeim,
    "strong-rrqr": strong_rrqr,
    "derandomised": derandomised,
    "sketch-qr": sketch_qr,
    "sketch-lu": sketch_lu,
    "block-random": block_random,
    "maxvol": maxvol,
    "block-deim": block_deim,
    "iterative-deim": iterative_deim,
    "uniform-rrqr": uniform_rrqr,
}
_PIVOTS_OF_SKETCH = {"sketch-qr": "qr", "sketch-lu": "lu"}


def select(
    a: Tensor,
    rank: int,
    method: str = DEFAULT,
    seed: int = 0,
    axis: int = 0,
    *,
    exact: bool = False,
    dimension: int | None = None,
) -> Tensor:
    """Choose `rank` different rows (axis 0) or columns (axis 1) of `a` by one of `SELECTIONS`.

    Args:
        a: (m, n), any floating dtype; computed in float32, or float64 if `a` is.
        rank: how many indices, 1..min(m, n).
        method: a name in `SELECTIONS`.
        seed: of every random draw; the two axes draw differently.
        axis: 0 rows, 1 columns.
        exact: exact instead of randomized SVD, for the methods that use singular vectors.
        dimension: dimension of the subspace whose leverage scores are used, default `rank`.

    Returns:
        (rank,) int64 without duplicates, in the order of choice.

    Raises:
        TypeError: `a` is not floating point.
        ValueError: unknown method, bad axis, rank or dimension out of range, NaN or Inf in `a`.
    """
    _check(a, rank, method, axis, dimension)
    a = _scaled(a)
    options = Options(2 * seed + axis, exact, rank if dimension is None else dimension)
    return SELECTIONS[method](a if axis == 0 else a.T, rank, options)


def select_pair(
    a: Tensor, rank: int, method: str = DEFAULT, seed: int = 0, *, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """Choose rows and columns of one matrix: `(rows, columns)`, each (rank,) int64; arguments as in `select`.

    "sketch-qr" and "sketch-lu" share one sketch: Y = A Omega gives the rows, Aᵀ Y the columns, which costs what two
    independent sketches cost and is a half power step better for the columns. Other methods run once per axis.
    """
    _check(a, rank, method, 0, None)
    if method not in _PIVOTS_OF_SKETCH:
        rows, columns = (select(a, rank, method, seed, axis, exact=exact) for axis in (0, 1))
        return rows, columns
    a = _scaled(a)
    pivots = _PIVOTS_OF_SKETCH[method]
    y = sketch(a, rank + oversampling(rank), 2 * seed)
    z = a.T if y is a else a.T @ y
    return row_pivots(y, rank, pivots), row_pivots(z, rank, pivots)


def _check(a: Tensor, rank: int, method: str, axis: int, dimension: int | None) -> None:
    if not a.is_floating_point():
        raise TypeError(f"select: a has dtype {a.dtype}, allowed are floating dtypes; convert it first")
    if a.ndim != 2:
        raise ValueError(f"select: a has shape {tuple(a.shape)}, allowed are matrices; reshape it first")
    if method not in SELECTIONS:
        raise ValueError(f"select: method is {method!r}, allowed are {', '.join(SELECTIONS)}; pick one of these")
    if axis not in (0, 1):
        raise ValueError(f"select: axis is {axis}, allowed are 0 (rows) and 1 (columns)")
    for name, value in (("rank", rank), ("dimension", 1 if dimension is None else dimension)):
        if not 1 <= value <= min(a.shape):
            raise ValueError(f"select: {name} is {value}, allowed is 1..{min(a.shape)} for shape {tuple(a.shape)}")
    if not bool(torch.isfinite(a).all()):
        raise ValueError("select: a holds NaN or Inf, allowed are finite numbers; repair or skip this matrix")


def _scaled(a: Tensor) -> Tensor:
    """`a` in float32 or float64 with largest entry 1, so that squares neither overflow nor vanish; choices keep."""
    a = a.detach() if a.dtype == torch.float64 else a.detach().float()
    largest = float(a.abs().max())
    return a / largest if largest > 0 else a
