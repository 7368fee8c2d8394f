"""K-means as SWSC needs it: weighted, gain-shape, balanced, projected, warm-started, and in a non-diagonal metric.

Everything minimises  sum_i w_i |p_i - s_i mu_{label(i)}|^2  over labels, centroids mu and, when `scaled`, the scales s.
The nearest-centroid search and the segmented mean are `ops.kmeans_assign` and `ops.kmeans_update`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from tinycomp import ops

STEPS_AFTER_PROJECTION = 2
PART = 1 << 18  # numbers


@dataclass(frozen=True)
class Clusters:
    """labels (n,) int32; centroids (k, d) fp32; scales (n,) fp32 or None; inertia: the minimised sum; steps run."""

    labels: Tensor
    centroids: Tensor
    scales: Tensor | None
    inertia: float = 0.0
    steps: int = 0

    def expand(self) -> Tensor:
        """The approximation of every point, (n, d): s_i mu_{label(i)}."""
        shared = self.centroids[self.labels.long()]
        return shared if self.scales is None else self.scales[:, None] * shared


@dataclass(frozen=True)
class Lloyd:
    """Settings of one run.

    Args:
        steps: most assign-and-update steps of one start.
        tolerance: stop when the inertia falls by less than this fraction of itself in one step.
        init: "k-means++" or "random" (distinct points).
        restarts: independent starts, the best of which is kept.
        scaled: gain-shape, one scale per point.
        balanced: cluster sizes differ by at most one. Solved exactly by linear sum assignment, O(n^3) time and
            n^2 memory: meant for up to a few thousand points.
        projection: run on a seeded projection to this many dimensions, then take two steps in all of them; points and
            centroids are compared rounded to bfloat16, which processors multiply faster.
        seed: of every random choice.
    """

    steps: int = 25
    tolerance: float = 1e-3
    init: str = "k-means++"
    restarts: int = 1
    scaled: bool = False
    balanced: bool = False
    projection: int | None = None
    seed: int = 0


def seed_points(points: Tensor, k: int, lloyd: Lloyd, weights: Tensor | None = None, seed: int | None = None) -> Tensor:
    """Indices of k starting points, int64 (k,); those for a smaller k are a prefix of those for a larger one.

    "k-means++" draws each next point with probability proportional to w_i times its squared distance to the nearest
    point drawn so far (gain-shape: to the nearest line through one).

    Source: Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007.
    """
    n = points.shape[0]
    generator = torch.Generator().manual_seed(lloyd.seed if seed is None else seed)
    order = torch.randperm(n, generator=generator).to(points.device)
    draws = torch.rand(k, generator=generator, dtype=torch.float64).tolist()
    if lloyd.init == "random":
        return order[:k]
    norms = points.square().sum(1)
    chosen = order.new_zeros(k)
    taken = torch.zeros_like(order, dtype=torch.bool)
    nearest = torch.full_like(norms, torch.inf)
    for i in range(k):
        mass = (nearest if weights is None else nearest * weights).masked_fill(taken, 0.0)
        reach = mass.double().cumsum(0)
        if i > 0 and float(reach[-1]) > 0.0:
            pick = int(torch.searchsorted(reach, draws[i] * float(reach[-1]), right=True))
        else:  # the first draw, or every remaining point already coincides with a chosen one
            pick = int(order[~taken[order]][0])
        chosen[i], taken[pick] = pick, True
        inner = points @ points[pick]
        if lloyd.scaled:
            distance = norms - inner.square() / norms[pick].clamp_min(1e-30)
        else:
            distance = norms - 2 * inner + norms[pick]
        nearest = torch.minimum(nearest, distance.clamp_min(0.0))
    return chosen


def cluster(
    points: Tensor, k: int, lloyd: Lloyd, *, weights: Tensor | None = None, start: Tensor | None = None
) -> Clusters:
    """Cluster the rows of `points` (n, d) into k groups.

    Args:
        points: (n, d), any float dtype; computed in float32.
        k: number of clusters, 1 to n.
        lloyd: settings of the run.
        weights: (n,) non-negative weight of every point.
        start: (k, d) centroids to start from, instead of seeding (then `restarts` and `projection` do not apply).

    Raises:
        ValueError: k is not in 1..n, or points is not a finite matrix.
    """
    if points.ndim != 2 or not 1 <= k <= points.shape[0]:
        raise ValueError(
            f"k-means: got k={k} for points of shape {tuple(points.shape)}; allowed 1 to the number of rows: lower k"
        )
    if lloyd.projection is not None and lloyd.projection < 1:
        raise ValueError(f"k-means: got projection={lloyd.projection}; allowed 1 or more dimensions, or None: raise it")
    points = points.float()
    if points.numel() and not all(bool(v.isfinite()) for v in points.aminmax()):  # one pass, which NaN survives
        raise ValueError("k-means: got NaN or infinite points; only finite values can be clustered: check the weights")
    if start is not None:
        return _run(points, start.float(), lloyd, weights, lloyd.steps)
    runs = [_one_start(points, k, lloyd, weights, lloyd.seed + i) for i in range(max(lloyd.restarts, 1))]
    return min(runs, key=lambda run: run.inertia)


def _one_start(points: Tensor, k: int, lloyd: Lloyd, weights: Tensor | None, seed: int) -> Clusters:
    if lloyd.projection is None or lloyd.projection >= points.shape[1]:
        return _run(points, points[seed_points(points, k, lloyd, weights, seed)], lloyd, weights, lloyd.steps)
    small = _projected(points, lloyd.projection, seed)
    start = small[seed_points(small, k, lloyd, weights, seed)]
    rough = _run(small, start, lloyd, weights, lloyd.steps, rounded=True)
    start = means(points, rough.labels, k, weights, rough.scales, points.new_zeros(k, points.shape[1]))
    return _run(points, start, lloyd, weights, STEPS_AFTER_PROJECTION, rounded=True)


def _projected(points: Tensor, dimensions: int, seed: int) -> Tensor:
    """Sums of every `dimensions`-th column, each with a random sign, (n, dimensions): one pass over the points.

    Inner products are kept in expectation. Source: the sparse embedding of Clarkson and Woodruff, arXiv 1207.6365, with
    places taken in turn instead of drawn.
    """
    d = points.shape[1]
    signs = torch.randint(0, 2, (d,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    signs = signs.to(points)
    padded = (nn.functional.pad(part * signs, (0, -d % dimensions)) for part in _parts(points))
    return torch.cat([part.view(len(part), -1, dimensions).sum(1) for part in padded])


def _run(
    points: Tensor, centroids: Tensor, lloyd: Lloyd, weights: Tensor | None, steps: int, rounded: bool = False
) -> Clusters:
    """`rounded`: plain k-means compares points and centroids in bfloat16, less the mean of all points."""
    k = centroids.shape[0]
    middle = compared = None
    if rounded and not (lloyd.scaled or lloyd.balanced):
        middle = points.mean(0)
        compared = torch.cat([(part - middle).bfloat16() for part in _parts(points)])
    previous, step = float("inf"), 0
    for step in range(1, max(steps, 1) + 1):  # noqa: B007 - the number of steps is reported
        labels, scales, cost = _assign(points, centroids, lloyd, weights, middle, compared)
        if not lloyd.balanced:
            _fill_empty(labels, cost, scales, k)
        centroids = means(points, labels, k, weights, scales, centroids)
        inertia = float(cost.double().sum())
        if previous - inertia <= lloyd.tolerance * inertia:
            break
        previous = inertia
    if lloyd.scaled:
        scales = best_scales(points, centroids[labels.long()])
    found = Clusters(labels.int(), centroids, scales)
    error = _errors(points, found).double()
    inertia = float((error if weights is None else error * weights).sum())
    return Clusters(found.labels, centroids, scales, inertia, step)


def _parts(points: Tensor) -> tuple[Tensor, ...]:
    """Rows that the caches hold."""
    return points.split(max(1, PART // max(points.shape[1], 1)))


def _errors(points: Tensor, found: Clusters) -> Tensor:
    """Squared distance of each point from its approximation, (n,)."""
    parts = _parts(points)
    rows = [len(part) for part in parts]
    scales = [None] * len(parts) if found.scales is None else found.scales.split(rows)
    each = zip(parts, found.labels.split(rows), scales, strict=True)
    return torch.cat([(p - Clusters(c, found.centroids, s).expand()).square().sum(1) for p, c, s in each])


def best_scales(points: Tensor, shared: Tensor) -> Tensor:
    """s_i = <p_i, mu> / <mu, mu>, the closed-form gain of every point against its own centroid (n, d)."""
    return (points * shared).sum(1) / shared.square().sum(1).clamp_min(1e-30)


def means(
    points: Tensor, labels: Tensor, k: int, weights: Tensor | None, scales: Tensor | None, previous: Tensor
) -> Tensor:
    """mu_c = sum w s p / sum w s^2 over the members of c; a cluster without (weighted) members keeps `previous`."""
    if weights is None and scales is None:
        centroids, counts = ops.kmeans_update(points, labels, k)
        return torch.where(counts[:, None] > 0, centroids, previous)
    gain = points.new_ones(points.shape[0]) if scales is None else scales
    mass = gain if weights is None else gain * weights
    top, _ = ops.kmeans_update(points * mass[:, None], labels, k)
    bottom, _ = ops.kmeans_update((mass * gain)[:, None], labels, k)
    return torch.where(bottom > 0, top / bottom.clamp_min(1e-30), previous)


def _assign(
    points: Tensor, centroids: Tensor, lloyd: Lloyd, weights: Tensor | None, middle: Tensor | None, compared: Any
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Labels, scales and the weighted cost of every point."""
    if not (lloyd.balanced or lloyd.scaled):
        if middle is None:
            labels, cost = ops.kmeans_assign(points, centroids)
        else:
            labels, cost = ops.kmeans_assign(compared, (centroids - middle).to(compared.dtype))
        return labels, None, cost if weights is None else cost * weights
    norms = points.square().sum(1)
    if lloyd.balanced:
        inner = points @ centroids.T
        squares = centroids.square().sum(1)
        gain = inner.square() / squares.clamp_min(1e-30) if lloyd.scaled else 2 * inner - squares
        table = norms[:, None] - gain
        labels = _balanced_labels(table if weights is None else table * weights[:, None])
        cost = table.gather(1, labels.long()[:, None])[:, 0].clamp_min(0.0)
    else:
        # |p - s mu|^2 is least for the largest |<p, mu>| / |mu|: the nearest of +-mu/|mu| to p/|p|.
        lines = centroids / centroids.norm(dim=1, keepdim=True).clamp_min(1e-30)
        directions = points / norms.sqrt().clamp_min(1e-30)[:, None]
        both, _ = ops.kmeans_assign(directions, torch.cat([lines, -lines]))
        labels = both % centroids.shape[0]
        inner = (points * lines[labels.long()]).sum(1)
        cost = (norms - inner.square()).clamp_min(0.0)
    scales = best_scales(points, centroids[labels.long()]) if lloyd.scaled else None
    return labels, scales, cost if weights is None else cost * weights


def _fill_empty(labels: Tensor, cost: Tensor, scales: Tensor | None, k: int) -> None:
    """Give every empty cluster the farthest point of the worst cluster, in place; that point then costs nothing."""
    counts = torch.bincount(labels.long(), minlength=k)
    for empty in torch.nonzero(counts == 0).flatten().tolist():
        inertia = cost.new_zeros(k).index_add_(0, labels.long(), cost)
        worst = int(torch.where(counts > 1, inertia, -1.0).argmax())
        if float(inertia[worst]) <= 0.0 or int(counts[worst]) < 2:
            return  # fewer distinct points than clusters: nothing left to split
        far = int(torch.where(labels == worst, cost, -1.0).argmax())
        labels[far], cost[far] = empty, 0.0
        if scales is not None:
            scales[far] = 1.0
        counts[worst] -= 1
        counts[empty] += 1


def _balanced_labels(table: Tensor) -> Tensor:
    """The assignment of least total cost whose cluster sizes differ by at most one. table: (n, k) costs."""
    n, k = table.shape
    small, extra = divmod(n, k)
    cost = table.double().cpu().numpy()
    columns = np.tile(np.arange(k), small + bool(extra))
    square = cost[:, columns]
    if extra:  # k - extra of the last k seats stay empty: rows that may sit only there
        idle = np.full((k - extra, columns.size), np.abs(cost).sum() + 1.0)
        idle[:, small * k :] = 0.0
        square = np.concatenate([square, idle])
    _, seats = linear_sum_assignment(square)
    return torch.from_numpy(columns[seats[:n]].astype(np.int32)).to(table.device)


def descend_labels(
    error: Tensor, metric: Tensor, centroids: Tensor, labels: Tensor, scales: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One sweep of exact coordinate descent over labels (and scales) when the points' errors are coupled.

    Minimises tr(Et C E), row j of E being p_j - s_j mu_{label(j)}, one point at a time with the others fixed. That
    optimum is the centroid nearest to  q_j = s_j mu_{label(j)} + (C E)_j / C_jj,  gain-shape: the one with the largest
    <q_j, mu>^2 / <mu, mu>. Everything runs on inner products with the k centroids, so a sweep costs O(n k) plus
    O(n k) for every point that moves.

    Args:
        error: (n, d) E for the given labels, scales and centroids.
        metric: (n, n) C, positive definite.
        centroids: (k, d).
        labels: (n,) int32.
        scales: (n,) or None.
    """
    gram = (centroids @ centroids.T).double().cpu().numpy()
    squares = np.maximum(np.diag(gram), 1e-30)
    c = metric.double().cpu().numpy()
    pull = (centroids @ (metric @ error).T).double().cpu().numpy()  # <mu_c, (C E)_j>
    label = labels.cpu().numpy().copy()
    gain = np.ones(len(label)) if scales is None else scales.double().cpu().numpy().copy()
    for j in np.flatnonzero(np.diag(c) > 0):
        inner = pull[:, j] / c[j, j] + gain[j] * gram[:, label[j]]
        cost = squares - 2 * inner if scales is None else -np.square(inner) / squares
        best = int(cost.argmin())
        weight = 1.0 if scales is None else inner[best] / squares[best]
        if best == label[j] and weight == gain[j]:
            continue
        pull += np.outer(gain[j] * gram[:, label[j]] - weight * gram[:, best], c[j])
        label[j], gain[j] = best, weight
    moved = torch.from_numpy(label).to(labels.device)
    return moved, None if scales is None else torch.from_numpy(gain).to(scales)
