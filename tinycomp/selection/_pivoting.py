"""Deterministic pivoting, on singular vectors or on a sketch. Notation: see the package's docstring."""

from __future__ import annotations

import torch
from torch import Tensor

from tinycomp.linalg import row_pivots
from tinycomp.selection._subspaces import Options, fill, oversampling, singular_vectors, sketch, unused

_SWAP_LIMIT = 10_000
_NEGLIGIBLE = 1e-12  # energy below this fraction of the total is rounding
_ROUNDS = 4


def _left(a: Tensor, rank: int, options: Options) -> Tensor:
    return singular_vectors(a, rank, options.seed, options.exact)[0]


def deim(a: Tensor, rank: int, options: Options) -> Tensor:
    """DEIM, computed as the row pivots of LU of P, which are the same indices.

    Guarantee: |A - C U R|_2 <= (eta_p + eta_q) sigma_(k+1); eta <= sqrt(m k / 3) 2^k a priori.
    Cost: singular vectors + m k^2. Source: Sorensen, Embree, SISC 2016, algorithm 1 and theorem 4.1.
    """
    return row_pivots(_left(a, rank, options), rank, "lu")


def qdeim(a: Tensor, rank: int, options: Options) -> Tensor:
    """Q-DEIM: column-pivoted QR of Pᵀ; does not depend on the basis chosen for the subspace.

    Guarantee: DEIM's, with eta <= sqrt(m - k + 1) sqrt(4^k + 6 k - 1) / 3 a priori.
    Cost: singular vectors + 2 m k^2. Source: Drmac, Gugercin, SISC 2016, theorem 2.1.
    """
    return row_pivots(_left(a, rank, options), rank, "qr")


def strong_rrqr(a: Tensor, rank: int, options: Options) -> Tensor:
    """Strong rank-revealing QR of Pᵀ, f = 2: Q-DEIM's pivots, then Gu-Eisenstat swaps.

    Guarantee: |P P[p]⁻¹| <= 2 entrywise, so eta <= sqrt(1 + 4 k (m - k)). Cost: Q-DEIM + m k per swap.
    Source: Gu, Eisenstat, SISC 1996, algorithm 4; for DEIM: Drmac, Saibaba, SIMAX 2018.
    """
    u = _left(a, rank, options)
    return dominant_rows(u, row_pivots(u, rank, "qr"), 2.0)


def maxvol(a: Tensor, rank: int, options: Options) -> Tensor:
    """MaxVol: DEIM's pivots, then swaps to a block of locally largest volume (bound 1.01).

    Guarantee: |P P[p]⁻¹| <= 1.01 entrywise, so eta <= sqrt(1 + 1.0201 k (m - k)). Cost: DEIM + m k per swap.
    Source: Goreinov, Oseledets, Savostyanov, Tyrtyshnikov, Zamarashkin, "How to find a good submatrix", 2010.
    """
    return _maxvol_rows(_left(a, rank, options))


def block_deim(a: Tensor, rank: int, options: Options) -> Tensor:
    """Block DEIM: blocks of b singular vectors, MaxVol rows of each block's interpolation residual.

    Guarantee: DEIM's bound with the eta of the chosen rows. Cost: singular vectors + m k^2 in BLAS-3 + m b per swap.
    Source: Gidisu, Hochstenbach, "Block discrete empirical interpolation methods", 2022 (B-DEIM-MaxVol); here
    b = max(4, k / 8).
    """
    u = _left(a, rank, options).double()
    block, chosen = max(4, rank // 8), torch.empty(0, dtype=torch.int64, device=a.device)
    for start in range(0, rank, block):
        residual, done = u[:, start : min(start + block, rank)], u[:, :start]
        residual = residual - done @ torch.linalg.solve(done[chosen], residual[chosen])
        free = unused(chosen, len(u))
        chosen = torch.cat([chosen, free[_maxvol_rows(torch.linalg.qr(residual[free])[0])]])
    return chosen


def iterative_deim(a: Tensor, rank: int, options: Options) -> Tensor:
    """DEIM in four rounds, each on the singular vectors of the residual A (I - R⁺ R) of the rows R chosen so far.

    Guarantee: DEIM's, per round, on its residual; usually better than one round. Cost: four SVDs of k / 4 vectors.
    Source: Gidisu, Hochstenbach, "A DEIM-CUR factorization with iterative SVDs", 2023 (one-sided form).
    """
    residual, chosen = a, torch.empty(0, dtype=torch.int64, device=a.device)
    while len(chosen) < rank:
        count = min(-(-rank // _ROUNDS), rank - len(chosen))
        if float(residual.square().sum()) <= _NEGLIGIBLE * float(a.square().sum()):
            return fill(chosen, rank, len(a))
        free = unused(chosen, len(a))
        u = singular_vectors(residual[free], count, options.seed + len(chosen), options.exact)[0]
        chosen = torch.cat([chosen, free[row_pivots(u, count, "lu")]])
        basis = torch.linalg.qr(a[chosen].T)[0]
        residual = a - (a @ basis) @ basis.T
    return chosen


def sketch_qr(a: Tensor, rank: int, options: Options) -> Tensor:
    """Column-pivoted QR of the sketch (A Omega)ᵀ, no singular vectors; the default.

    Guarantee: a posteriori only (the error is cheap to estimate); measured, within 0.5 % of DEIM's Frobenius error.
    Cost: 1.25 m n k + 2 m k^2. Source: Voronin, Martinsson, 2017; Dong, Martinsson, "Simpler is better", 2023.
    """
    return row_pivots(sketch(a, rank + oversampling(rank), options.seed), rank, "qr")


def sketch_lu(a: Tensor, rank: int, options: Options) -> Tensor:
    """Row pivots of LU of the sketch A Omega; cheaper than QR, errors up to about 2 % larger.

    Guarantee: a posteriori only. Cost: 1.25 m n k + m k^2. Source: Dong, Martinsson, "Simpler is better", 2023.
    """
    return row_pivots(sketch(a, rank + oversampling(rank), options.seed), rank, "lu")


def uniform_rrqr(a: Tensor, rank: int, options: Options) -> Tensor:
    """Uniform columns refined by strong rank-revealing QR: rows of 2 k columns, then columns of those rows, then rows.

    Guarantee: for a low-rank matrix with incoherent factors plus noise E, an error of order |E| with high probability;
    |A[:, q] A[p, q]⁻¹| <= 2 entrywise. Cost: (m + n) k^2, sublinear in the size of A.
    Source: Cortinovis, Ying, "A sublinear-time randomized algorithm for column and row subset selection ...", 2024; the
    first selection, which the later ones replace, is plain pivoted QR here.
    """
    count = min(2 * rank, a.shape[1])
    generator = torch.Generator().manual_seed(options.seed)
    columns = torch.randperm(a.shape[1], generator=generator)[:count].to(a.device)
    rows = row_pivots(a[:, columns].contiguous(), rank, "qr")
    columns = _strong_rows(a[rows].T)
    return _strong_rows(a[:, columns])


def _strong_rows(a: Tensor) -> Tensor:
    """Strong rank-revealing choice of as many rows as tall `a` has columns."""
    # On an orthonormal basis: the same T, and harmless when `a` is rank deficient.
    basis = torch.linalg.qr(a.double())[0]
    return dominant_rows(basis, row_pivots(basis, a.shape[1], "qr"), 2.0)


def _maxvol_rows(u: Tensor) -> Tensor:
    return dominant_rows(u, row_pivots(u, u.shape[1], "lu"), 1.01)


def dominant_rows(u: Tensor, rows: Tensor, bound: float) -> Tensor:
    """Swap rows until every entry of T = u u[rows]⁻¹ is at most `bound` in absolute value.

    A swap multiplies |det u[rows]| by more than `bound`, so this ends. Rank-one updates of T; a fresh T confirms.

    Args:
        u: (m, k) of full column rank.
        rows: (k,) int64 start, u[rows] non-singular.
        bound: f > 1.

    Raises:
        RuntimeError: no dominant block within 10,000 swaps.

    Cost: m k^2 + m k per swap. Source: Gu, Eisenstat, SISC 1996 (with no trailing block their criterion is |T| <= f).
    """
    u, rows = u.double(), rows.clone()
    t, swaps, fresh = torch.linalg.solve(u[rows], u, left=False), 0, True
    while swaps <= _SWAP_LIMIT:
        i, j = divmod(int(t.abs().argmax()), t.shape[1])
        if float(t[i, j].abs()) > bound:
            rows[j] = i
            row = t[i].clone()
            row[j] -= 1.0
            t = t - torch.outer(t[:, j] / t[i, j], row)
            swaps, fresh = swaps + 1, False
        elif fresh:
            return rows
        else:
            t, fresh = torch.linalg.solve(u[rows], u, left=False), True
    raise RuntimeError(f"dominant_rows: {swaps} swaps with bound {bound}, allowed {_SWAP_LIMIT}; raise the bound")
