"""Subspaces that index selections work on: sketches, orthonormal bases, randomized SVD, leverage scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tinycomp.linalg import eigh

_POWER_STEPS = 2


@dataclass(frozen=True)
class Options:
    """What a strategy may need besides the matrix: seed, exact SVD or not, dimension of the leverage subspace."""

    seed: int
    exact: bool
    dimension: int


Strategy = Callable[[Tensor, int, Options], Tensor]


def oversampling(rank: int) -> int:
    """Extra sketch columns, a quarter of the rank: measured, that brings sketched pivoting to DEIM's error."""
    return max(8, rank // 4)


def sketch(a: Tensor, size: int, seed: int) -> Tensor:
    """Y = A Omega, Omega (n, size) Gaussian; A itself when that is not larger. Cost m n size."""
    if size >= a.shape[1]:
        return a
    generator = torch.Generator().manual_seed(seed)
    return a @ torch.randn(a.shape[1], size, generator=generator, dtype=a.dtype).to(a.device)


def orthonormalize(y: Tensor) -> Tensor:
    """Orthonormal basis (m, k) of the columns of a tall y, by CholeskyQR2, small factors in float64.

    Falls back to Householder QR when y is too ill-conditioned for the Gram matrix to tell (first factorisation
    fails, or the first pass is far from orthonormal).

    Cost: 4 m k^2. Source: Yamamoto, Nakatsukasa, Yanagisawa, Fukaya, "Roundoff error analysis of the CholeskyQR2
    algorithm", ETNA 2015.
    """
    q = y
    for passes in range(2):
        gram = (q.T @ q).double()
        if passes == 1 and bool((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).norm() > 0.1):
            return torch.linalg.qr(y)[0]
        factor, info = torch.linalg.cholesky_ex(gram, upper=True)
        if int(info):
            return torch.linalg.qr(y)[0]
        q = torch.linalg.solve_triangular(factor.to(q.dtype), q, upper=True, left=False)
    return q


def singular_vectors(a: Tensor, rank: int, seed: int = 0, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets (U (m, rank), s (rank,), V (n, rank)) of a.

    Randomized: Q = orth((A Aᵀ)^2 A Omega), then the eigenvectors of (Qᵀ A)(Qᵀ A)ᵀ in float64. Exact: LAPACK.

    Cost: randomized 6 m n l with l = rank + oversampling; exact O(m n min(m, n)).
    Source: Halko, Martinsson, Tropp, SIAM Review 2011, algorithms 4.4 and 5.1 (Gram form of the small SVD).
    """
    size = rank + oversampling(rank)
    if exact or size >= min(a.shape):
        u, s, vt = torch.linalg.svd(a, full_matrices=False)
        return u[:, :rank].contiguous(), s[:rank], vt[:rank].T.contiguous()
    q = orthonormalize(sketch(a, size, seed))
    for _ in range(_POWER_STEPS):
        q = orthonormalize(a @ orthonormalize(a.T @ q))
    small = (q.T @ a).double()
    squares, vectors = eigh(small @ small.T)
    vectors = vectors.flip(1)[:, :rank]
    s = squares.flip(0)[:rank].clamp_min(0).sqrt()
    v = orthonormalize((vectors.T @ small).T / s.clamp_min(torch.finfo(a.dtype).tiny))
    return q @ vectors.to(a.dtype), s.to(a.dtype), v.to(a.dtype)


def leverage_scores(a: Tensor, dimension: int, seed: int = 0, exact: bool = False) -> Tensor:
    """Squared row norms of the `dimension` leading left singular vectors: (m,), summing to `dimension`."""
    return singular_vectors(a, dimension, seed, exact)[0].square().sum(1)


def fill(chosen: Tensor, rank: int, rows: int) -> Tensor:
    """Lowest unused indices appended: for when the chosen rows already span the matrix and any choice is exact."""
    return torch.cat([chosen, unused(chosen, rows)[: rank - len(chosen)]])


def unused(chosen: Tensor, rows: int) -> Tensor:
    """Indices in 0..rows-1 that are not in `chosen`, ascending."""
    free = torch.ones(rows, dtype=torch.bool, device=chosen.device)
    free[chosen] = False
    return free.nonzero().flatten()
