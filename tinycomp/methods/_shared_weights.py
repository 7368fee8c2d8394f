"""The maths of SWSC: what a shared-weight matrix stores, and how it is fitted.

Everything works on channels as rows: X = W with output channels (axis 0), X = Wt with input channels (axis 1). The
error E of X costs tr(C E D Et)/2, where D is the second moment along a channel and C couples the channels with one
another: inputs S and output gradients G take these roles as (D, C) = (S, G) for axis 0 and (G, S) for axis 1; a missing
one is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tinycomp import linalg, ops
from tinycomp.methods._kmeans import Clusters, Lloyd, cluster, descend_labels, means
from tinycomp.methods._rounding import default_group, feedback, rounded, rounded_bits, spread_errors

REFINE_STEPS = 5


def stored_numbers(m: int, n: int, k: int, r: int, *, axis: int = 0, scaled: bool = False) -> int:
    """Centroids, labels, scales and the two factors of an (m, n) matrix, each label counted as one number.

    That is the paper's accounting, and what `ratio` and the records of a compression mean. `Size.parameters` and the
    layer's `stored_numbers` leave index tensors out: they are one number a channel less.
    """
    channels, length = (m, n) if axis == 0 else (n, m)
    return k * length + channels * (2 if scaled else 1) + r * (m + n)


def stored_bits(
    m: int, n: int, k: int, r: int, *, axis: int = 0, scaled: bool = False, number_bits: int = 16, factor_bits: int = 16
) -> int:
    """Bits on disk: numbers in the matrix's own dtype, labels as uint8 up to 256 clusters and int32 above.

    With 8 factor bits centroids and factors are int8, and each of their rows has a scale in the matrix's own dtype;
    with 4 two share a byte, and each group has a scale and a zero.
    """
    channels = m if axis == 0 else n
    labels = channels * (8 if k <= 256 else 32)
    gains = channels * number_bits if scaled else 0
    if factor_bits == 16:
        return (stored_numbers(m, n, k, r, axis=axis) - channels) * number_bits + gains + labels
    shapes = [(k, n) if axis == 0 else (m, k), *([(r, n), (m, r)] if r else [])]
    group = default_group(factor_bits)
    return sum(rounded_bits(*shape, factor_bits, group, number_bits) for shape in shapes) + gains + labels


def average_bits(m: int, n: int, k: int, r: int, *, axis: int = 0, scaled: bool = False) -> float:
    """The paper's average bits of one matrix: every stored number, labels included, at 16 bits, per weight.

    16 (k n + m + r (m + n)) / (m n); 16 (k + 1 + 2r) / m for a square matrix.
    """
    return 16 * stored_numbers(m, n, k, r, axis=axis, scaled=scaled) / (m * n)


def model_average_bits(matrices: list[tuple[int, float]], other_parameters: int, other_bits: float = 16.0) -> float:
    """Average bits per weight of a whole model, which "2 bits" of two projections is not.

    Args:
        matrices: (weights of the original matrix, its average bits after compression), one per compressed matrix.
        other_parameters: all parameters that were not compressed.
        other_bits: bits of each of those.
    """
    weights = sum(count for count, _ in matrices) + other_parameters
    return (sum(count * bits for count, bits in matrices) + other_parameters * other_bits) / weights


def paper_split(m: int, n: int, budget: float, *, axis: int = 0, clusters: int | None = None) -> tuple[int, int]:
    """(k, r) that give half of a budget of numbers to centroids and the rest to the factors; labels are not counted."""
    channels, length = (m, n) if axis == 0 else (n, m)
    k = clusters or min(max(int(budget / 2 / length), 1), channels)
    r = min(max(int((budget - k * length) / (m + n)), 0), min(m, n))
    return k, r


@dataclass(frozen=True)
class Metric:
    """Where errors are measured: `along` is the lower Cholesky factor of D, `across` that of C, `coupling` C itself."""

    along: Tensor | None = None
    across: Tensor | None = None
    coupling: Tensor | None = None

    @classmethod
    def of(
        cls,
        gram: Tensor | None,
        output_gram: Tensor | None,
        axis: int,
        damping: float,
        remember: linalg.Remember = linalg.made_anew,
    ) -> Metric:
        """From S (n, n) and G (m, m), damped by a fraction (at least 1e-6) of their mean diagonal."""
        damping = max(damping, 1e-6)
        sides = {"gram": gram, "output gram": output_gram}

        def factors() -> dict[str, Tensor]:
            return {name: linalg.cholesky(s, damping).float() for name, s in sides.items() if s is not None}

        lower = remember(f"metric {sorted(name for name, s in sides.items() if s is not None)} {damping}", factors)
        along, across = sides if axis == 0 else reversed(sides)
        coupling = sides[across]
        coupling = None if coupling is None else linalg.damped(coupling, damping, torch.float32)
        return cls(lower.get(along), lower.get(across), coupling)

    def whiten_along(self, x: Tensor) -> Tensor:
        return x if self.along is None else x @ self.along

    def restore_along(self, x: Tensor) -> Tensor:
        """In float64: the triangular factor may be ill-conditioned."""
        if self.along is None:
            return x
        return torch.linalg.solve_triangular(self.along.double(), x.double(), upper=False, left=False).float()

    def whiten_across(self, x: Tensor) -> Tensor:
        return x if self.across is None else self.across.T @ x

    def restore_across(self, x: Tensor) -> Tensor:
        if self.across is None:
            return x
        return torch.linalg.solve_triangular(self.across.double().T, x.double(), upper=True).float()


@dataclass
class Factors:
    """W' = shared + a b. labels int32; centroids (k, n) or, axis 1, (m, k); scales or None; a (m, r), b (r, n)."""

    labels: Tensor
    centroids: Tensor
    scales: Tensor | None
    a: Tensor
    b: Tensor
    axis: int

    def dense(self) -> Tensor:
        """W' (m, n)."""
        index = self.labels.long()
        rows = self.centroids[index] if self.axis == 0 else self.centroids[:, index].T
        rows = rows if self.scales is None else self.scales[:, None] * rows
        return (rows if self.axis == 0 else rows.T) + self.a @ self.b

    def rounded(
        self, dtype: torch.dtype, bits: int = 8, inputs: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Factors, dict[str, Tensor]]:
        """What centroids and factors in `bits` with scales in `dtype` stand for, and their tensors by name.

        Args:
            dtype: of scales and zeros.
            bits: 8 by row, or 4 by group.
            inputs: second moment (n, n) of the inputs and its `feedback`; then the errors of each input are spread over
                the later ones.
        """
        group = default_group(bits)
        packed: dict[str, Tensor] = {}
        exact: dict[str, Any] = {}
        for name in ("centroids", "b", "a"):
            factor = exact[name] = getattr(self, name)
            if not factor.numel():
                continue
            moment, upper = self._seen_by(name, exact.get("b"), inputs)
            importance = moment.diagonal().clamp_min(0.0) if bits == 4 and moment is not None else None
            q = rounded(factor.to(dtype), bits, group, importance)
            if moment is not None and upper is not None:
                q = spread_errors(factor, q, bits, group, upper, moment)
            tensors = {name: q.qweight, f"{name}_scales": q.scales, f"{name}_zeros": q.zeros}
            packed |= {key: tensor for key, tensor in tensors.items() if tensor is not None}
            exact[name] = ops.dequantize(*q, factor.shape[1], bits, group)
        scales = None if self.scales is None else self.scales.to(dtype)
        return replace(self, **exact, scales=scales), packed

    def _seen_by(
        self, name: str, b: Tensor | None, inputs: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Second moment of the inputs of centroids, b or a (after the rounded b), and its `feedback`."""
        if inputs is None:
            return None, None
        gram, _ = inputs
        if name == "b" or (name == "centroids" and self.axis == 0):
            return inputs
        if name == "a":
            assert b is not None
            moment = b @ gram @ b.T
        else:
            shares = torch.zeros(self.centroids.shape[1], len(self.labels)).to(gram)
            gains = torch.ones(len(self.labels)).to(gram) if self.scales is None else self.scales.to(gram)
            shares[self.labels.long(), torch.arange(len(self.labels))] = gains
            moment = shares @ gram @ shares.T
        return moment, feedback(moment)

    def to(self, dtype: torch.dtype) -> Factors:
        scales = None if self.scales is None else self.scales.to(dtype)
        return Factors(self.labels, self.centroids.to(dtype), scales, self.a.to(dtype), self.b.to(dtype), self.axis)


def fit(
    weight: Tensor,
    k: int,
    r: int,
    *,
    axis: int = 0,
    metric: Metric | None = None,
    iterations: int = 2,
    lloyd: Lloyd | None = None,
    start: Clusters | None = None,
    basis: Tensor | None = None,
) -> tuple[Factors, list[float]]:
    """Factors of an (m, n) fp32 weight, and the weighted |W - W'| after every half-step (never rising).

    Args:
        weight: (m, n).
        k: clusters.
        r: rank of the correction.
        axis: 0 clusters output channels (rows), 1 input channels (columns).
        metric: of that axis; the plain Frobenius norm when None.
        lloyd: settings of the first k-means; refinements take at most five steps from where they are.
        iterations: rounds of k-means on W - A B, then the low-rank step on W minus the shared part, after the first.
        start: the first clustering, where it is known.
        basis: `spectrum`'s of what that clustering leaves, where it is known.

    Raises:
        ValueError: more clusters than channels, or a rank above min(m, n).
    """
    require_fits(weight.shape[0], weight.shape[1], k, r, axis)
    metric, lloyd = metric or Metric(), lloyd or Lloyd()
    target = metric.whiten_along((weight if axis == 0 else weight.T).float())
    clusters = start or cluster_step(target, k, metric, lloyd)
    a, b = _correct(target - clusters.expand(), r, metric, basis)
    history = [_norm(target - clusters.expand() - a @ b, metric)]
    for _ in range(iterations):
        clusters = cluster_step(target - a @ b, k, metric, replace(lloyd, steps=REFINE_STEPS), clusters)
        residual = target - clusters.expand()
        history.append(_norm(residual - a @ b, metric))
        a, b = _correct(residual, r, metric)
        history.append(_norm(residual - a @ b, metric))
        if history[-3] - history[-1] <= lloyd.tolerance * history[-1]:
            break
    centroids, b = metric.restore_along(clusters.centroids), metric.restore_along(b)
    if axis == 0:
        return Factors(clusters.labels, centroids, clusters.scales, a, b, axis), history
    return Factors(clusters.labels, centroids.T, clusters.scales, b.T, a.T, axis), history


def require_fits(m: int, n: int, k: int, r: int, axis: int) -> None:
    """Raise ValueError unless 1 <= k <= channels and 0 <= r <= min(m, n)."""
    channels = m if axis == 0 else n
    if not 1 <= k <= channels or not 0 <= r <= min(m, n):
        raise ValueError(
            f"SWSC: got clusters={k}, rank={r} for a {m} x {n} matrix; allowed 1..{channels} clusters and ranks "
            f"0..{min(m, n)}: lower them, give a ratio instead, or put this matrix in ignore"
        )


def _norm(error: Tensor, metric: Metric) -> float:
    return float(metric.whiten_across(error).norm())


def _correct(residual: Tensor, r: int, metric: Metric, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
    a, b = low_rank(metric.whiten_across(residual), r, basis)
    return metric.restore_across(a), b


def low_rank(residual: Tensor, r: int, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Best rank-r a b of `residual`, singular values split evenly: a = P S^(1/2), b = S^(1/2) Qt.

    Through the eigenvectors of the smaller Gram matrix (`basis`, where they are known) and one exact projection onto
    them, several times faster than an SVD; the projection keeps the error optimal for the subspace found.
    """
    m, n = residual.shape
    if m < n:
        b, a = low_rank(residual.T, r, basis)
        return a.T, b.T
    basis = (spectrum(residual)[1] if basis is None else basis)[:, :r]
    a = residual @ basis
    root = a.norm(dim=0).sqrt()
    return a / root.clamp_min(1e-20), root[:, None] * basis.T


def spectrum(residual: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error (min(m, n) + 1,) float64 left at rank 0, 1, ..., and the singular vectors of the smaller side."""
    tall = (residual if residual.shape[0] >= residual.shape[1] else residual.T).double()
    values, vectors = linalg.eigh(tall.T @ tall)
    return _tail(values), vectors.flip(1).to(residual.dtype)


def squared_tail(residual: Tensor) -> Tensor:
    """The first result of `spectrum`, in half the time."""
    tall = (residual if residual.shape[0] >= residual.shape[1] else residual.T).double()
    return _tail(torch.linalg.eigvalsh(tall.T @ tall))


def _tail(smallest_first: Tensor) -> Tensor:
    rest = smallest_first.clamp_min(0.0).cumsum(0)
    return torch.cat([rest.new_zeros(1), rest]).flip(0)


def weighted_rest(target: Tensor, clusters: Clusters, metric: Metric) -> Tensor:
    """What the shared part leaves of `target`, in the metric's coordinates."""
    return metric.whiten_across(target - clusters.expand())


def cluster_step(target: Tensor, k: int, metric: Metric, lloyd: Lloyd, previous: Clusters | None = None) -> Clusters:
    """Shared part of `target` (channels, length); from `previous`, never worse than that.

    Uncoupled channels are plain k-means. Coupled ones start with k-means weighted by the diagonal of C; from
    `previous`, labels descend one channel at a time in the true metric. Centroids are the least squares fit in it.
    """
    if metric.coupling is None:
        start = (
            None if previous is None else means(target, previous.labels, k, None, previous.scales, previous.centroids)
        )
        return cluster(target, k, lloyd, start=start)
    found = previous or cluster(target, k, lloyd, weights=metric.coupling.diagonal())
    labels, scales = found.labels, found.scales
    centroids = coupled_means(target, metric.coupling, labels, scales, found.centroids)
    if previous is not None and not lloyd.balanced:  # single moves cannot keep the sizes equal
        error = target - Clusters(labels, centroids, scales).expand()
        labels, scales = descend_labels(error, metric.coupling, centroids, labels, scales)
        centroids = coupled_means(target, metric.coupling, labels, scales, centroids)
    return Clusters(labels, centroids, scales)


def coupled_means(target: Tensor, c: Tensor, labels: Tensor, scales: Tensor | None, previous: Tensor) -> Tensor:
    """Centroids (Pt C P)^-1 Pt C T minimising |C^(1/2) (T - P M)|, P the (scaled) one-hot labels, by Cholesky.

    A cluster without members keeps its previous centroid.
    """
    k, index = previous.shape[0], labels.long()
    gain = torch.ones_like(target[:, 0]) if scales is None else scales
    pc = c.new_zeros(k, len(index)).index_add_(0, index, gain[:, None] * c)
    system = pc.new_zeros(k, k).index_add_(1, index, pc * gain)
    norm = system.diagonal().clamp_min(0.0).sqrt()
    used = torch.nonzero(norm > 0).flatten()
    pc, norm = pc[used] / norm[used, None], norm[used]
    # A unit diagonal, whatever the sizes of C and of the scales; positive definite but for rounding, hence the damping.
    factor = linalg.cholesky(system[used][:, used] / norm / norm[:, None], 1e-7, "SWSC centroids")
    solved = torch.cholesky_solve((pc @ target).double(), factor) / norm[:, None]
    return previous.index_copy(0, used, solved.to(previous.dtype))
