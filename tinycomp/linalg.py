"""Damped solves, whitening, pivoted rank-r storage and column elimination: the maths that methods share.

Legend: W (m, n) a weight, S (n, n) the raw second moment of its inputs, G (m, m) the second moment of the loss
gradient at its outputs. The loss that an error E costs is tr(G E S Eᵀ)/2 (K-FAC), so both sides are weighted.
Everything factors in float64 on the tensor's device and returns float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from tinycomp import ops

ONE_THREAD_SIZE = 1024
_FALLBACKS: list[str] = []

Remember = Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]


def made_anew(key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """A `Remember` without a memory."""
    return make()


def drain_fallbacks() -> list[str]:
    """The fallbacks taken since the last call, for the report; clears the list."""
    taken = list(_FALLBACKS)
    _FALLBACKS.clear()
    return taken


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of floats holds neither NaN nor infinity."""
    # One sum sees any NaN or infinity and is ten times cheaper than isfinite; only a sum that overflows needs that.
    return math.isfinite(float(tensor.detach().sum())) or bool(torch.isfinite(tensor).all())


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError naming the tensor when it holds NaN or infinity."""
    if not is_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{name}: got {bad} NaN or infinite of {tensor.numel()} values, allowed finite values only; "
            "repair or reload the checkpoint"
        )


def damped(gram: Tensor, damping: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """S + damping * mean(diag S) * I in `dtype`; the identity's scale is 1 when S is zero."""
    s = gram.to(dtype, copy=True)
    mean = float(s.diagonal().mean())
    s.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return s


def output_moment(weight: Tensor, gram: Tensor | None, damping: float, remember: Remember = made_anew) -> Tensor:
    """W S Wᵀ (m, m) in float64 with S damped; methods that pass the same `remember` share it."""

    def make() -> dict[str, Tensor]:
        w = weight.double()
        return {"moment": (w if gram is None else w @ damped(gram, damping)) @ w.T}

    return remember(f"output moment {gram is None} {damping}", make)["moment"]


def cholesky(gram: Tensor, damping: float, name: str = "gram") -> Tensor:
    """Lower L (float64) with L Lᵀ = damped S; falls back to an eigendecomposition, recorded, when that fails."""
    require_finite(name, gram)
    s = damped(gram, damping)
    factor, info = torch.linalg.cholesky_ex(s)
    if int(info) == 0:
        return factor
    values, vectors = eigh(s)
    floor = float(values[-1]) * 1e-10
    _FALLBACKS.append(f"{name}: Cholesky failed, eigenvalues floored at {floor:.1e}")
    # QR of (V sqrt(l))ᵀ turns the symmetric root into the triangular one that callers expect.
    root = (vectors * values.clamp(min=floor).sqrt()).T
    upper = torch.linalg.qr(root, mode="r").R
    return (upper * upper.diagonal().sign()[:, None]).T.contiguous()


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch uses one thread.

    For factorisations of a few hundred columns: they consist of many short parallel regions, and every region waits
    for the slowest core. Measured on two busy cores, eigh at 576 x 576: 59 ms with one thread, 1.5 s with two.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues and eigenvectors of a symmetric matrix."""
    with one_thread() if len(a) <= ONE_THREAD_SIZE else nullcontext():
        return torch.linalg.eigh(a)  # type: ignore[return-value]


class Truncation:
    """The best rank-r approximations of W for every r, in the norm tr(G E S Eᵀ).

    A = Lgᵀ W Ls with G = Lg Lgᵀ and S = Ls Lsᵀ turns that norm into the plain Frobenius norm, so the answer is the
    truncated SVD of A mapped back. Singular vectors come from the Gram matrix of A's smaller side, in float64, which
    takes the Cholesky factor of that side's weighting only.

    Args:
        weight: (m, n).
        gram: S (n, n), or None for the identity.
        output_gram: G (m, m), or None for the identity.
        damping: fraction of the mean diagonal added to S and G; G, and the side that is factored, get at least 1e-6.
        remember: see `Linear.remember`.
    """

    def __init__(
        self, weight: Tensor, gram: Tensor | None, output_gram: Tensor | None, damping: float,
        remember: Remember = made_anew,
    ):  # fmt: skip
        self.weight = weight.double()
        self.by_rows = weight.shape[0] <= weight.shape[1]
        near, far = (output_gram, gram) if self.by_rows else (gram, output_gram)
        self.near = None if near is None else cholesky(near, max(damping, 1e-6), "gram of the smaller side")
        far_damping = damping if self.by_rows else max(damping, 1e-6)
        key = f"truncation {gram is None} {output_gram is None} {damping}"
        found = remember(key, lambda: self._spectrum(far, far_damping, remember))
        self.squares, self.vectors = found["squares"], found["vectors"].double()

    def _spectrum(self, far: Tensor | None, damping: float, remember: Remember) -> dict[str, Tensor]:
        if far is not None:
            require_finite("gram of the larger side", far)
        if self.by_rows:  # of W itself, which other methods want too
            product = output_moment(self.weight, far, damping, remember)
        else:
            product = output_moment(self.weight.T, far, damping)
        if self.near is not None:
            product = self.near.T @ product @ self.near
        values, vectors = eigh(product)
        return {"squares": values.flip(0).clamp(min=0), "vectors": vectors.flip(1).float()}

    def losses(self) -> Tensor:
        """(min(m, n) + 1,) float64: tr(G E S Eᵀ)/2 left over at rank 0, 1, ..., min(m, n)."""
        tail = self.squares.flip(0).cumsum(0).flip(0)
        return 0.5 * torch.cat([tail, tail.new_zeros(1)])

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """L (m, r), R (r, n) in float64 with L R the best rank-r approximation."""
        v = self.vectors[:, :rank]
        back = v if self.near is None else torch.linalg.solve_triangular(self.near.T, v, upper=True)
        forward = v if self.near is None else self.near @ v
        if self.by_rows:
            return back, forward.T @ self.weight
        return self.weight @ forward, back.T


def pivoted_rank(size: float, m: int, n: int) -> int:
    """Largest r with r (m + n - r) <= size: a rank-r matrix has that many degrees of freedom."""
    total = m + n
    rank = int((total - max(total * total - 4.0 * size, 0.0) ** 0.5) / 2 + 1e-9)
    return max(min(rank, m, n), 0)


def pivoted_factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Store L Rt (m, r) x (r, n) as r of its own rows and the map to the others.

    The rows are the pivots of L's LU factorisation, so that |T| stays moderate.

    Returns:
        rows (r, n), t (m - r, r), order int32 (m,): output index of row i of [rows; t rows].
    """
    m, rank = left.shape
    with one_thread() if m <= 4 * ONE_THREAD_SIZE else nullcontext():
        packed, swaps = torch.linalg.lu_factor(left.double())
    places = torch.arange(m, device=left.device)
    for i, swap in enumerate((swaps - 1).tolist()):
        places[[i, swap]] = places[[swap, i]]
    pivots = places[:rank]
    order, _ = row_order(pivots, m)
    # left[places] = [L1; L2] U, so T = L2 L1^-1; its rows are brought into the order of `order`.
    t = torch.linalg.solve_triangular(packed[:rank], packed[rank:], upper=False, left=False, unitriangular=True)
    return (left[pivots] @ right).float(), t[places[rank:].argsort()].float(), order


def row_pivots(a: Tensor, count: int, method: str) -> Tensor:
    """`ops.select_pivots`; on CPU by LAPACK in a's own precision, several times faster than the op at r = 512.

    Args:
        a: (m, n) float32 or float64.
        count: number of rows; for "lu" at most n.
        method: "qr": pivots of the column-pivoted QR of aᵀ; "lu": row pivots of LU of the first `count` columns.
    """
    if a.device.type != "cpu":
        return ops.select_pivots(a, count, method)
    values = a.detach().numpy()
    if method == "qr":
        order = scipy.linalg.qr(values.T, mode="r", pivoting=True, check_finite=False)[1]
    else:
        # getrf itself: scipy's wrappers warn about a zero pivot, which is harmless here.
        (getrf,) = scipy.linalg.get_lapack_funcs(("getrf",), (values,))
        order = np.arange(len(values))
        for i, pivot in enumerate(getrf(values[:, :count])[1]):
            order[[i, pivot]] = order[[pivot, i]]
    return torch.from_numpy(order[:count].astype(np.int64))


def pivoted_cholesky(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """U (count, m) upper trapezoidal and the order (m,) int64 with gram[order][:, order] ~ Uᵀ U, pivots descending.

    Of A Aᵀ these are the pivots and the R of the column-pivoted QR of Aᵀ, several times faster. Column i of U holds
    the coefficients of row order[i] of A on the rows before it, orthonormalised. Rows of U below the numerical rank
    are zero.
    """
    upper, places, rank, _ = scipy.linalg.lapack.dpstrf(gram.double().cpu().numpy().T, lower=0)
    rows = torch.from_numpy(upper[:count]).triu()
    rows[rank:] = 0.0
    order = torch.from_numpy(places.astype(np.int64) - 1)
    return rows.to(gram.device), order.to(gram.device)


def pivoted_interpolation(upper: Tensor, order: Tensor, count: int) -> Tensor:
    """T (m - count, count) by which the rows order[count:], ascending, are closest to T times the rows order[:count].

    Args:
        upper: from `pivoted_cholesky`, at least `count` rows of it; pivots below the numerical rank get no weight.
        order: from the same call.
        count: number of kept rows.
    """
    known = min(count, int((upper.diagonal() != 0).sum()))
    t = upper.new_zeros(len(order) - count, count)
    t[:, :known] = torch.linalg.solve_triangular(upper[:known, :known], upper[:known, count:], upper=True).T
    return t[order[count:].argsort()]


def row_order(pivots: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(order int32 (m,): pivots first, then the others ascending; rest: those others)."""
    mask = torch.ones(m, dtype=torch.bool, device=pivots.device)
    mask[pivots] = False
    rest = mask.nonzero().flatten()
    return torch.cat([pivots, rest]).to(torch.int32), rest


def solve_rows(weight: Tensor, rows: Tensor, gram: Tensor | None, damping: float) -> Tensor:
    """T (m, r) minimising |(W - T R) S^(1/2)|_F: W S Rᵀ (R S Rᵀ)^-1 by a damped Cholesky solve."""
    w, r = weight.double(), rows.double()
    rs = r if gram is None else r @ damped(gram, damping)
    factor = cholesky(rs @ r.T, 1e-10, "rows")
    return torch.cholesky_solve(rs @ w.T, factor).T


def interpolate(weight: Tensor, pivots: Tensor, gram: Tensor | None, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Identity-aware row interpolation: the pivot rows stay exact, the others are the best T times them.

    Returns: rows (r, n), t (m - r, r), order int32 (m,), as in `pivoted_factors`.
    """
    order, rest = row_order(pivots, weight.shape[0])
    rows = weight[pivots].float()
    if len(rest) == 0 or len(pivots) == 0:
        return rows, weight.new_zeros(len(rest), len(pivots)).float(), order
    return rows, solve_rows(weight[rest], rows, gram, damping).float(), order


def refit(weight: Tensor, cross: Tensor, gram: Tensor, damping: float) -> Tensor:
    """W' minimising |W X - W' Y|_F + damping |W - W'|: the weight that reproduces the original outputs on new inputs.

    W' = W (C + d I)(S + d I)^-1 with C = X Yᵀ and S = Y Yᵀ (both (n, n)), d = damping * mean(diag S).
    """
    s = gram.double()
    shift = damping * float(s.diagonal().mean())
    eye = torch.eye(s.shape[0], dtype=s.dtype, device=s.device)
    factor = cholesky(s + shift * eye, 0.0)
    return torch.cholesky_solve(((cross.double() + shift * eye).T @ weight.double().T), factor).T.float()


class Elimination:
    """Columns of W removed one after another, the cheapest first, the others refit (structured optimal brain surgeon).

    For the error tr(G (W - W') S (W - W')ᵀ)/2 with W' supported on the kept columns P, the best W' is
    W S[:, P] S[P, P]^-1 and removing column j of the current solution costs (w'_jᵀ G w'_j) / (2 [S[P,P]^-1]_jj).
    `step` columns go at once (default n / 96, at least 1): the order is exact for step=1 and approximate otherwise,
    the loss is exact at multiples of `step` and linear between, the weights of a refit are always exact.

    Source: Hassibi and Stork 1993 (optimal brain surgeon); Kurtic et al. 2023 (ZipLM), structured form.
    """

    def __init__(
        self, weight: Tensor, gram: Tensor, output_gram: Tensor | None, damping: float, step: int | None = None
    ):
        n = weight.shape[1]
        step = step or max(n // 96, 1)
        h = torch.cholesky_inverse(cholesky(gram, damping, "hidden gram")).float()
        w = weight.float().T.clone(memory_format=torch.contiguous_format)  # it is changed in place
        gw = w.clone() if output_gram is None else w @ output_gram.float().T
        left = torch.arange(n)  # the columns that w, gw (as rows) and h still have
        order: list[int] = []
        costs: list[float] = []
        with one_thread():
            while len(order) < n:
                score = (w * gw).sum(1) / (2 * h.diagonal().clamp(min=1e-30))
                score[left < 0] = float("inf")
                picked = torch.topk(score, min(step, n - len(order)), largest=False).indices
                costs += [_remove(w, gw, h, picked) / len(picked)] * len(picked)
                order += left[picked].tolist()
                left[picked] = -1
                kept = (left >= 0).nonzero().flatten()
                if len(kept) < 0.8 * len(left):  # what is gone costs nothing any more
                    left, w, gw, h = left[kept], w[kept], gw[kept], h[kept].index_select(1, kept)
        self.order = torch.tensor(order)
        self.loss = torch.cat([torch.zeros(1), torch.tensor(costs).clamp(min=0).cumsum(0)])

    @staticmethod
    def solve(weight: Tensor, gram: Tensor, kept: Tensor, damping: float) -> Tensor:
        """The refit W S[:, P] S[P, P]^-1 (m, |P|), float32."""
        s = damped(gram, damping)
        factor = cholesky(s[kept][:, kept], 0.0, "kept gram")
        return torch.cholesky_solve((weight.double() @ s[:, kept]).T, factor).T.float()


def _remove(w: Tensor, gw: Tensor, h: Tensor, picked: Tensor) -> float:
    """Take rows out of the solution w (n, m), and of gw = w Gᵀ and h = the inverse of S, in place; what it costs."""
    rows = h[picked]
    block = torch.linalg.pinv(rows[:, picked].double(), hermitian=True).float()
    removed, pulled = w[picked], gw[picked]
    spread = block @ rows
    total = 0.5 * float(((block @ removed) * pulled).sum())
    w.addmm_(spread.T, removed, alpha=-1)
    gw.addmm_(spread.T, pulled, alpha=-1)
    h.addmm_(rows.T, spread, alpha=-1)
    w[picked] = 0
    gw[picked] = 0
    return total
