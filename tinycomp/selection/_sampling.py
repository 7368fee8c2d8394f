"""Random sampling and its derandomisation. Notation: see the package's docstring."""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor

from tinycomp import ops
from tinycomp.linalg import eigh, row_pivots
from tinycomp.selection._subspaces import Options, fill, leverage_scores, singular_vectors, unused

_NEGLIGIBLE = 1e-12  # energy below this fraction of the total is rounding


def _sample(weights: Tensor, count: int, seed: int) -> Tensor:
    """Indices drawn one after another in proportion to `weights`; zero weights only when nothing else is left."""
    weights = weights.double()
    floor = _NEGLIGIBLE * float(weights.max())
    weights = weights.clamp_min(floor if floor > 0 else 1.0)
    return ops.sample_without_replacement(weights / weights.sum(), count, seed)


def leverage(a: Tensor, rank: int, options: Options) -> Tensor:
    """Sampling by leverage scores of the best subspace of dimension d (`dimension` of `select`).

    Guarantee: with k = O(d log d / eps^2) rows R, |A - A R⁺ R|_F <= (1 + eps) |A - A_d|_F with constant probability,
    also for the best approximation of rank d inside the span of the rows. Nothing is guaranteed at k = d.
    Cost: singular vectors + m d.
    Source: Drineas, Mahoney, Muthukrishnan, SIMAX 2008; Mahoney, Drineas, PNAS 2009. Here without replacement.
    """
    return _sample(leverage_scores(a, options.dimension, options.seed, options.exact), rank, options.seed)


def norm(a: Tensor, rank: int, options: Options) -> Tensor:
    """Sampling by squared row norms.

    Guarantee: additive, |A - A R⁺ R|_F^2 <= |A - A_d|_F^2 + eps |A|_F^2 in expectation with k = O(d / eps). Cost: m n.
    Source: Frieze, Kannan, Vempala, JACM 2004. Here without replacement.
    """
    return _sample(a.square().sum(1), rank, options.seed)


def uniform(a: Tensor, rank: int, options: Options) -> Tensor:
    """Uniform sampling, the control. Guarantee: only for incoherent matrices. Cost: m."""
    return _sample(torch.ones(len(a), device=a.device), rank, options.seed)


def leverage_topk(a: Tensor, rank: int, options: Options) -> Tensor:
    """The k largest leverage scores. Guarantee: none in general. Cost: singular vectors + m d.

    Source: Papailiopoulos, Kyrillidis, Boutsidis, KDD 2014 (bounds for steeply decaying scores).
    """
    return leverage_scores(a, options.dimension, options.seed, options.exact).topk(rank).indices


def block_random(a: Tensor, rank: int, options: Options) -> Tensor:
    """Robust blockwise random pivoting: sample a block by residual norms, filter it by pivoted QR, project, repeat.

    The filter keeps the leading pivots of a block until the energy left in the block is at most 1 / b of it, so
    near-duplicates inside a block are not kept.

    Guarantee: that of sequential random pivoting up to the filter, k = O(d / eps + log) rows for (1 + eps) of the best
    squared rank-d error in expectation; robust to blocks of duplicates. Cost: m n k + m k^2; b = max(8, k / 8).
    Source: Dong, Chen, Martinsson, Pearce, "Robust blockwise random pivoting", 2023, algorithm 3.1, tau_b = 1 / b.
    """
    block = max(8, rank // 8)
    energy = a.double().square().sum(1)
    total, remaining = float(energy.sum()), energy.clone()
    chosen = torch.empty(0, dtype=torch.int64, device=a.device)
    basis = a.new_empty(a.shape[1], 0)
    while len(chosen) < rank:
        free = unused(chosen, len(a))
        free = free[remaining[free] > _NEGLIGIBLE * total]
        if len(free) == 0:
            return fill(chosen, rank, len(a))
        candidates = free[_sample(remaining[free], min(block, len(free)), options.seed + len(chosen))]
        v = a[candidates].T
        v = v - basis @ (basis.T @ v)
        v = v - basis @ (basis.T @ v)  # twice is enough: the first pass leaves rounding of the size of A
        pivots = row_pivots(v.T, min(v.shape), "qr")
        q, r = torch.linalg.qr(v[:, pivots])
        left = r.double().square().sum(1).flip(0).cumsum(0).flip(0)  # energy of the block outside the first i pivots
        keep = min(max(1, int((left > left[0] / block).sum())), rank - len(chosen))
        chosen = torch.cat([chosen, candidates[pivots[:keep]]])
        basis = torch.cat([basis, q[:, :keep]], 1)
        remaining = (remaining - (a @ q[:, :keep]).double().square().sum(1)).clamp_min(0)
    return chosen


def derandomised(a: Tensor, rank: int, options: Options) -> Tensor:
    """Volume sampling derandomised by conditional expectations: deterministic, near-optimal in the Frobenius norm.

    With t rows chosen and residual B, the next row i minimises the expected squared error of completing the choice by
    volume sampling, (k - t) e_(k-t)(B_i) / e_(k-t-1)(B_i), where B_i is B with the direction w of row i projected out
    and e_j is the elementary symmetric polynomial of the squared singular values l. In the eigenbasis of Bᵀ B,
    e_j(B_i) = sum_c w_c^2 e_j(l without l_c): all rows cost one matrix-vector product.

    Guarantee: |A - A R⁺ R|_F <= sqrt(k + 1) |A - A_k|_F, with `exact=True`; otherwise for A projected on the leading
    subspace of dimension k + max(8, k / 4).
    Cost: SVD + k (m d^2 + 9 d^3), d = min(m, n) or that dimension: minutes at k = 512.
    Source: Deshpande, Rademacher, FOCS 2010; Cortinovis, Kressner, SISC 2020 (whose update of the SVD is an eigh here).
    """
    size = min(min(a.shape), rank + max(8, rank // 4))
    u, s, _ = singular_vectors(a, min(a.shape) if options.exact else size, options.seed, options.exact)
    b = (u * s).double()
    total, chosen = float(b.square().sum()), torch.empty(0, dtype=torch.int64, device=a.device)
    while len(chosen) < rank:
        norms = b.square().sum(1)
        norms[chosen] = 0.0
        eligible = norms > _NEGLIGIBLE * total
        if not bool(eligible.any()):
            return fill(chosen, rank, len(a))
        best = _least_expected_error(b, norms, eligible, rank - len(chosen))
        chosen = torch.cat([chosen, best.reshape(1)])
        w = b[best] / b[best].norm()
        b = b - torch.outer(b @ w, w)
    return chosen


def _least_expected_error(b: Tensor, norms: Tensor, eligible: Tensor, left: int) -> Tensor:
    """Row of b (m, d) that minimises e_left(B_i) / e_(left-1)(B_i); the longest row if `left` rows span all of b."""
    squares, vectors = eigh(b.T @ b)
    kept = squares > _NEGLIGIBLE * squares[-1]
    if int(kept.sum()) <= left:
        return norms.argmax()
    weights = (b @ vectors[:, kept]).square()
    logs = _log_symmetric_without_each(squares[kept].log().cpu().numpy(), left)
    scaled = torch.from_numpy(np.exp(logs - logs.max(axis=1, keepdims=True))).to(b)
    ratio = (weights @ scaled[0]) / (weights @ scaled[1])
    return torch.where(eligible, ratio, torch.inf).argmin()


def _log_symmetric_without_each(log_values: np.ndarray, order: int) -> np.ndarray:
    """Logs of e_order and e_(order-1) of the values without the c-th, for each c: (2, d).

    From prefix and suffix tables: every term is positive, so nothing cancels; logs because e_order may leave float64.
    """
    count = len(log_values)
    prefix = np.full((count + 1, order + 1), -np.inf)
    prefix[:, 0] = 0.0
    suffix = prefix.copy()
    for i, value in enumerate(log_values):
        prefix[i + 1, 1:] = np.logaddexp(prefix[i, 1:], prefix[i, :-1] + value)
    for i, value in reversed(list(enumerate(log_values))):
        suffix[i, 1:] = np.logaddexp(suffix[i + 1, 1:], suffix[i + 1, :-1] + value)
    return np.stack([logsumexp(prefix[:-1, : j + 1] + suffix[1:, j::-1], axis=1) for j in (order, order - 1)])
