"""CURing as released in January 2025, as pure functions; each step that was shown to be improvable is a switch.

Legend: W (m, n) = (out_features, in_features), a (n,) root mean square of each input feature, S the raw second moment
(n, n) of the inputs, p rows, q columns, C = W[:, q] (m, r), R = W[p, :] (r, n), W' = C U R.

Source: Park, Moon, "CURing Large Models: Compression via CUR Decomposition", arXiv 2501.04211, January 2025, and its
released code. The release's greedy step is not DEIM (`greedy_released`); `tinycomp.selection` has the real one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from tinycomp import selection

Shape = tuple[int, int]
Link = Literal["pinv", "qr", "fast", "weighted"]
R_MAX = 256
NUM_LAYERS = 10
TARGETS = ("q_proj", "k_proj", "gate_proj")
_SINGULAR = 1e-12  # a triangle with a diagonal ratio below this is rank deficient in float64 ...
_SINGULAR_FP32 = 1e-6  # ... or when it was computed in float32


# Sizes


def stored_numbers(m: int, n: int, rank: int) -> int:
    """Numbers in C, U and R: r (m + n) + r^2."""
    return rank * (m + n + rank)


def break_even_rank(m: int, n: int) -> int:
    """Largest r at which C, U, R hold no more numbers than W: floor((sqrt(m^2 + 6 m n + n^2) - (m + n)) / 2)."""
    return (math.isqrt(m * m + 6 * m * n + n * n) - (m + n)) // 2


def rank_rule(m: int, n: int, r_max: int = R_MAX) -> int:
    """The release's rank: min(break-even, r_max), no rounding; at least 1."""
    return max(1, min(break_even_rank(m, n), r_max))


def size_rule(layers: Sequence[Sequence[Shape]], kept: int, r_max: int = R_MAX) -> tuple[int, int]:
    """`(num_layers, r_max)` that brings the candidate layers to at most `kept` numbers.

    The paper's rank stays until all layers are used: the fewest layers that suffice at `r_max`; only when none
    suffices, all layers and the largest smaller rank.

    Args:
        layers: shapes of the targeted matrices of each candidate layer, in the order in which layers are chosen.
        kept: numbers that may remain in these matrices, compressed or not.
        r_max: rank to start from.

    Raises:
        ValueError: no candidate layer, or `kept` is out of reach at rank 1.
    """
    if not layers:
        raise ValueError("size_rule: got no candidate layer, allowed at least 1; the model needs 3 layers or more")

    def saving(layer: Sequence[Shape], limit: int) -> int:
        return sum(m * n - stored_numbers(m, n, rank_rule(m, n, limit)) for m, n in layer)

    dense = sum(m * n for layer in layers for m, n in layer)
    size = dense
    for count, layer in enumerate(layers, 1):
        size -= saving(layer, r_max)
        if size <= kept:
            return count, r_max
    for limit in range(r_max - 1, 0, -1):
        size = dense - sum(saving(layer, limit) for layer in layers)
        if size <= kept:
            return len(layers), limit
    raise ValueError(
        f"size_rule: {kept} numbers asked of {len(layers)} layers with {dense}, allowed {size} (rank 1) or more; "
        "raise ratio or target more matrices"
    )


# Calibration and layer choice


def input_rms(gram: Tensor) -> Tensor:
    """a_j = sqrt(mean_t x_tj^2) from the mean of x xᵀ."""
    return gram.diagonal().clamp_min(0).sqrt()


def layer_scores(hidden: Sequence[Tensor]) -> dict[int, float]:
    """Mean angular distance arccos(cos(h_(l-1), h_l)) / pi of each candidate layer l = 1..L-2.

    Args:
        hidden: for each of the L layers, its last-token outputs (documents, d), the embedding output not among them.

    Raises:
        ValueError: fewer than 3 layers.
    """
    if len(hidden) < 3:
        raise ValueError(
            f"layer_scores: got {len(hidden)} layers, allowed 3 or more (the first and last are never taken)"
        )
    scores = {}
    for layer in range(1, len(hidden) - 1):
        before, after = hidden[layer - 1].float(), hidden[layer].float()
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1)).clamp_min(1e-30)
        scores[layer] = float((cosine.clamp(-1.0, 1.0).arccos() / math.pi).mean())
    return scores


def choose_layers(
    scores: Mapping[int, float],
    count: int = NUM_LAYERS,
    order: Literal["angular", "last", "random"] = "angular",
    seed: int = 0,
) -> list[int]:
    """The first `count` candidates: ascending score, from the end of the model, or shuffled; all if there are fewer."""
    candidates = sorted(scores)
    if order == "angular":
        candidates.sort(key=lambda layer: scores[layer])
    elif order == "last":
        candidates.reverse()
    elif order == "random":
        shuffled = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed)).tolist()
        candidates = [candidates[i] for i in shuffled]
    else:
        raise ValueError(f"choose_layers: order is {order!r}, allowed 'angular', 'last' and 'random'; pick one")
    return candidates[:count]


# Index choice


def selection_matrix(w: Tensor, rms: Tensor, signed: bool = False) -> Tensor:
    """|W| diag(a) as released, or W diag(a), whose singular vectors span W's weighted row and column spaces."""
    return (w if signed else w.abs()) * rms


def greedy_released(vectors: Tensor) -> Tensor:
    """The release's greedy choice on singular vectors (m, r), as a literal loop: (r,) int64.

    Step i takes the largest |P[:, i]| not taken before, then P[:, i+1:] -= (P[:, :i+1] pinv(P[p_i, :i+1]))
    P[p_i, i+1:], the pinv of a row being its transpose over its squared norm. Later steps refill the rows taken
    earlier, so this is not DEIM, and only the guard prevents duplicates.

    Cost: 2 m r^2 multiply-adds in rank-one updates. Source: the release of 8 January 2025.
    """
    p = vectors.clone()
    chosen: list[int] = []
    for i in range(p.shape[1]):
        chosen.append(_largest_unused(p[:, i], chosen))
        row = p[chosen[i], : i + 1]
        coefficients = p[:, : i + 1] @ (row / row.square().sum().clamp_min(torch.finfo(p.dtype).tiny))
        p[:, i + 1 :] -= torch.outer(coefficients, p[chosen[i], i + 1 :].clone())
    return torch.tensor(chosen, dtype=torch.int64, device=vectors.device)


def greedy_fast(vectors: Tensor, block: int = 32) -> Tensor:
    """`greedy_released` with the trailing updates of `block` steps gathered in one matrix product; same indices.

    With D the coefficient vectors and p the rows of a block, the j-th row of factors is that of the step-j matrix:
    F = (I + strict lower D[p])^-1 P[p, later], and P[:, later] -= D F.
    """
    p = vectors.clone()
    count, chosen = p.shape[1], list[int]()
    for start in range(0, count, block):
        stop = min(start + block, count)
        coefficients = p.new_empty(len(p), stop - start)
        for i in range(start, stop):
            chosen.append(_largest_unused(p[:, i], chosen))
            row = p[chosen[i], : i + 1]
            step = p[:, : i + 1] @ (row / row.square().sum().clamp_min(torch.finfo(p.dtype).tiny))
            coefficients[:, i - start] = step
            p[:, i + 1 : stop] -= torch.outer(step, p[chosen[i], i + 1 : stop].clone())
        rows = torch.tensor(chosen[start:], device=p.device)
        lower = coefficients[rows].tril(-1)
        factors = torch.linalg.solve_triangular(lower, p[rows, stop:], upper=False, unitriangular=True)
        p[:, stop:] -= coefficients @ factors
    return torch.tensor(chosen, dtype=torch.int64, device=vectors.device)


def _largest_unused(column: Tensor, chosen: list[int]) -> int:
    magnitude = column.abs()
    magnitude[chosen] = -1.0
    return int(magnitude.argmax())


GREEDY: dict[str, Callable[[Tensor], Tensor]] = {"released": greedy_fast, "released-loop": greedy_released}


def choose_indices(
    s: Tensor, rank: int, method: str = "released", seed: int = 0, exact: bool = True
) -> tuple[Tensor, Tensor]:
    """Rows and columns of the selection matrix: "released", "released-loop" or any name in `selection.SELECTIONS`."""
    if method not in GREEDY:
        if method not in selection.SELECTIONS:
            allowed = ", ".join([*GREEDY, *selection.SELECTIONS])
            raise ValueError(f"choose_indices: method is {method!r}, allowed are {allowed}; pick one of these")
        return selection.select_pair(s, rank, method, seed, exact=exact)
    left, _, right = selection.singular_vectors(s, rank, seed, exact)
    return GREEDY[method](left), GREEDY[method](right)


# The link U


def link_pinv(c: Tensor, w: Tensor, r: Tensor, notes: list[str] | None = None) -> Tensor:
    """U = C⁺ W R⁺ with float32 pseudo-inverses, as released: Frobenius-optimal for these C and R."""
    return torch.linalg.pinv(c) @ w @ torch.linalg.pinv(r)


def link_qr(c: Tensor, w: Tensor, r: Tensor, notes: list[str] | None = None) -> Tensor:
    """U = C⁺ W R⁺ in float64 through QR of C and Rᵀ: R_C⁻¹ (Q_Cᵀ W Q_R) R_R⁻ᵀ. Cost: m n r + 2 (m + n) r^2."""
    return _left_solve(c, _left_solve(r.T, w.double().T, notes).T, notes)


def link_fast(c: Tensor, w: Tensor, r: Tensor, notes: list[str] | None = None) -> Tensor:
    """U = C⁺ W R⁺ with the large products in w's dtype (CholeskyQR2 bases) and the r x r systems in float64.

    Cost: m n r + 6 (m + n) r^2, all in matrix products.
    """
    left, right = selection.orthonormalize(c), selection.orthonormalize(r.T)
    u = _left_solve(left.T @ c, left.T @ (w @ right), notes, _SINGULAR_FP32)
    return _left_solve(right.T @ r.T, u.T, notes, _SINGULAR_FP32).T


def link_weighted(
    c: Tensor, w: Tensor, r: Tensor, gram: Tensor, damping: float = 1e-4, notes: list[str] | None = None
) -> Tensor:
    """U* = C⁺ W S Rᵀ (R S Rᵀ)⁻¹ in float64: minimises |(W - C U R) S^(1/2)|_F over U.

    S is damped as a whole, S + damping mean(diag S) I. The minimiser then lies between the undamped one and C⁺ W R⁺
    (the limit of heavy damping), so it is never worse than C⁺ W R⁺ in the norm of the undamped S, and equal for S = I.
    """
    s, rows = gram.double(), r.double()
    mean = float(s.diagonal().mean())
    rs = rows @ s + (damping * mean if mean > 0 else 1.0) * rows
    moment = rs @ rows.T
    factor, info = torch.linalg.cholesky_ex(moment)
    if int(info) or float(factor.diagonal().min()) <= math.sqrt(_SINGULAR) * float(factor.diagonal().max()):
        _note(notes, "R S Rᵀ is not positive definite: pseudo-inverse from eigenvalues")
        solved = torch.linalg.pinv(moment, rcond=_SINGULAR, hermitian=True) @ (rs @ w.double().T)
    else:
        solved = torch.cholesky_solve(rs @ w.double().T, factor)
    return _left_solve(c, solved.T, notes)


def _left_solve(c: Tensor, b: Tensor, notes: list[str] | None, singular: float = _SINGULAR) -> Tensor:
    """C⁺ B in float64 for a tall C: QR, or the SVD when C is rank deficient."""
    q, triangle = torch.linalg.qr(c.double())
    diagonal = triangle.diagonal().abs()
    if float(diagonal.min()) <= singular * float(diagonal.max()):
        _note(notes, "dependent rows or columns: pseudo-inverse from the SVD")
        return torch.linalg.pinv(c.double(), rcond=singular) @ b.double()
    return torch.linalg.solve_triangular(triangle, q.T @ b.double(), upper=True)


def _note(notes: list[str] | None, text: str) -> None:
    if notes is not None:
        notes.append(f"CURing: {text}")


_LINKS = {"pinv": link_pinv, "qr": link_qr, "fast": link_fast}


def decompose(
    w: Tensor,
    rms: Tensor,
    rank: int,
    *,
    signed: bool = False,
    method: str = "released",
    link: Link = "pinv",
    gram: Tensor | None = None,
    damping: float = 1e-4,
    exact: bool = True,
    seed: int = 0,
    notes: list[str] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Steps 5 to 8 for one matrix: W ~ C U R with real columns and rows of W.

    Args:
        w: (m, n) float32 or float64.
        rms: (n,) root mean square of the inputs.
        rank: 1..min(m, n); the release's is `rank_rule(m, n)`.
        signed: select on W diag(a) instead of |W| diag(a).
        method: index choice, see `choose_indices`.
        link: "pinv" as released, "qr" the same U stably, "fast" the same U quickly, "weighted" the activation-optimal
            U* (needs `gram`).
        gram: (n, n) raw second moment of the inputs.
        damping: of `gram`, as a fraction of its mean diagonal.
        exact: exact SVD as released, else randomized.
        seed: of sketches and samples.
        notes: fallbacks taken are appended here.

    Returns:
        c (m, r), u (r, r), r (r, n) in w's dtype, rows (r,) and columns (r,) int64.

    Raises:
        ValueError: shapes that do not fit, rank out of range, NaN or Inf, unknown link, or no gram for "weighted".
    """
    if rms.shape != w.shape[1:]:
        raise ValueError(f"decompose: rms has shape {tuple(rms.shape)}, allowed is {tuple(w.shape[1:])}; one per input")
    if not 1 <= rank <= min(w.shape):
        raise ValueError(f"decompose: rank is {rank}, allowed is 1..{min(w.shape)} for {tuple(w.shape)}; lower it")
    if link not in (*_LINKS, "weighted"):
        raise ValueError(
            f"decompose: link is {link!r}, allowed are {', '.join(_LINKS)} and weighted; pick one of these"
        )
    if link == "weighted" and gram is None:
        raise ValueError("decompose: link 'weighted' got no gram, allowed is (n, n); collect it or use 'qr'")
    s = selection_matrix(w, rms, signed)
    if not bool(torch.isfinite(s).all()):
        raise ValueError("decompose: w or rms holds NaN or Inf, allowed are finite numbers; repair or skip this matrix")
    rows, columns = choose_indices(s, rank, method, seed, exact)
    c, r = w[:, columns], w[rows]
    if link == "weighted" and gram is not None:
        u = link_weighted(c, w, r, gram, damping, notes)
    else:
        u = _LINKS[link](c, w, r, notes)
    return c, u.to(w.dtype), r, rows, columns
