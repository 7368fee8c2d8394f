"""k-means and its descents: against brute force, scikit-learn and closed forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from matrices import moment, normal
from torch import Tensor

from tinycomp.methods._kmeans import Lloyd, _projected, cluster, descend_labels
from tinycomp.methods._shared_weights import (
    coupled_means,
)


def best_inertia(points: Tensor, k: int, sizes: set[int] | None = None) -> float:
    best = float("inf")
    for labels in itertools.product(range(k), repeat=len(points)):
        groups = [points[torch.tensor(labels) == c] for c in range(k)]
        if sizes is None or {len(g) for g in groups} <= sizes:
            best = min(best, sum(float((g - g.mean(0)).square().sum()) for g in groups if len(g)))
    return best


def test_restarted_kmeans_finds_the_global_optimum():
    points = normal(7, 2)
    found = cluster(points, 3, Lloyd(restarts=30))
    assert found.inertia == pytest.approx(best_inertia(points, 3), rel=1e-5)


@pytest.mark.parametrize("n", [5, 6, 7])
def test_balanced_clusters_have_equal_sizes_and_the_least_inertia(n):
    points = normal(n, 2, seed=n)
    found = cluster(points, 3, Lloyd(balanced=True, restarts=30))
    counts = torch.bincount(found.labels.long(), minlength=3)
    assert int(counts.max() - counts.min()) <= 1
    assert found.inertia == pytest.approx(best_inertia(points, 3, {n // 3, -(-n // 3)}), rel=1e-5)


def test_inertia_matches_scikit_learn():
    sklearn = pytest.importorskip("sklearn.cluster")
    points = normal(300, 20) + 2 * normal(12, 20, seed=5)[torch.arange(300) % 12]
    ours = cluster(points, 24, Lloyd(restarts=3, steps=100, tolerance=0.0))
    peer = sklearn.KMeans(24, n_init=3, random_state=0).fit(points.numpy())
    assert ours.inertia == pytest.approx(peer.inertia_, rel=0.02)
    given = sklearn.KMeans(24, init=points[:24].numpy(), n_init=1, max_iter=100, tol=0).fit(points.numpy())
    same_start = cluster(points, 24, Lloyd(steps=100, tolerance=0.0), start=points[:24])
    assert same_start.inertia == pytest.approx(given.inertia_, rel=1e-4)


def test_empty_clusters_are_refilled():
    points = torch.cat([normal(20, 3), normal(20, 3, seed=1) + 50])
    start = torch.cat([points[:1], torch.full((3, 3), 1e4)])
    found = cluster(points, 4, Lloyd(), start=start)
    assert len(found.labels.unique()) == 4
    assert found.inertia < cluster(points, 2, Lloyd(restarts=5)).inertia


def test_more_clusters_than_distinct_points_is_exact():
    points = normal(3, 4)[torch.tensor([0, 0, 1, 1, 2, 2])]
    assert cluster(points, 5, Lloyd()).inertia == pytest.approx(0.0, abs=1e-10)
    assert cluster(torch.zeros(4, 2), 3, Lloyd(scaled=True)).inertia == 0.0


def test_weights_act_as_repeated_points():
    points, times = normal(30, 4), torch.arange(30) % 4 + 1
    repeated = points.repeat_interleave(times, 0)
    start = points[:5]
    weighted = cluster(points, 5, Lloyd(), weights=times.float(), start=start)
    assert weighted.inertia == pytest.approx(cluster(repeated, 5, Lloyd(), start=start).inertia, rel=1e-4)


def test_gain_shape_merges_channels_of_one_direction():
    directions, gains = normal(4, 10), torch.linspace(-3, 3, 40)
    points = gains[:, None] * directions[torch.arange(40) % 4]
    found = cluster(points, 4, Lloyd(scaled=True, restarts=5))
    assert found.inertia == pytest.approx(0.0, abs=1e-6)
    assert cluster(points, 4, Lloyd(restarts=5)).inertia > 1.0


def test_projection_costs_little_and_random_start_works():
    points = normal(200, 64) + 3 * normal(8, 64, seed=2)[torch.arange(200) % 8]
    exact = cluster(points, 8, Lloyd(restarts=10)).inertia
    for dimensions in (16, 24):  # 24 is no divisor of 64
        assert cluster(points, 8, Lloyd(restarts=10, projection=dimensions)).inertia <= 1.05 * exact
    assert cluster(points, 8, Lloyd(restarts=10, projection=64)).inertia == pytest.approx(exact), "nothing to project"
    worst = cluster(points, 8, Lloyd(steps=1, init="random")).inertia
    assert exact <= cluster(points, 8, Lloyd(restarts=10, init="random")).inertia < worst


def test_a_projection_keeps_inner_products_in_expectation():
    points = normal(3, 40)
    grams = torch.stack([p @ p.T for p in (_projected(points, 16, seed) for seed in range(4000))])
    torch.testing.assert_close(
        grams.mean(0), points @ points.T, rtol=0, atol=0.05 * float(points.square().sum(1).max())
    )


def test_a_projection_bears_a_large_common_mean():
    """What is compared in bfloat16 are differences from the mean."""
    points = 0.1 * normal(400, 64) + normal(8, 64, seed=2)[torch.arange(400) % 8]
    near, far = (cluster(points + offset, 8, Lloyd(restarts=5, projection=32)).inertia for offset in (0.0, 1000.0))
    assert far == pytest.approx(near, rel=1e-2)
    with pytest.raises(ValueError, match="projection=0; allowed 1 or more"):
        cluster(points, 8, Lloyd(projection=0))


def test_the_seed_decides_everything():
    points = normal(60, 8)
    first, again, other = (cluster(points, 9, Lloyd(seed=s, steps=1)) for s in (3, 3, 4))
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first.centroids, again.centroids)
    assert not torch.equal(first.centroids, other.centroids)


def test_early_stop_needs_fewer_steps():
    points = normal(400, 6)
    loose, tight = (cluster(points, 20, Lloyd(steps=100, tolerance=t)) for t in (1e-2, 0.0))
    assert loose.steps < tight.steps
    assert loose.inertia >= tight.inertia


@pytest.mark.parametrize("k", [0, 6])
def test_impossible_cluster_counts_are_refused(k):
    with pytest.raises(ValueError, match=f"k={k}"):
        cluster(normal(5, 2), k, Lloyd())


def coupled_cost(points: Tensor, metric: Tensor, shared: Tensor) -> float:
    error = points - shared
    return float((error * (metric @ error)).sum())


def test_label_descent_takes_the_best_single_move_of_every_point():
    points, centroids, metric = normal(7, 5), normal(3, 5, seed=4), moment(7)
    labels = torch.zeros(7, dtype=torch.int32)
    moved, _ = descend_labels(points - centroids[labels.long()], metric, centroids, labels, None)
    expected = labels.clone()
    for j in range(7):
        costs = []
        for c in range(3):
            expected[j] = c
            costs.append(coupled_cost(points, metric, centroids[expected.long()]))
        expected[j] = int(np.argmin(costs))
    assert moved.tolist() == expected.tolist()


def test_label_descent_finds_the_closed_form_gain():
    points, centroids, metric = normal(6, 5), normal(2, 5, seed=4), moment(6)
    start = torch.zeros(6, dtype=torch.int32)
    before = coupled_cost(points, metric, centroids[start.long()])
    labels, scales = descend_labels(points - centroids[start.long()], metric, centroids, start, torch.ones(6))
    assert scales is not None
    cost = coupled_cost(points, metric, scales[:, None] * centroids[labels.long()])
    assert cost < before
    for nudge in (0.99, 1.01):  # the last point's gain is optimal given all others
        moved = scales.clone()
        moved[-1] *= nudge
        assert coupled_cost(points, metric, moved[:, None] * centroids[labels.long()]) > cost


def test_coupled_means_solve_the_least_squares_problem():
    points, metric, labels = normal(9, 4), moment(9), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 1], dtype=torch.int32)
    scales = normal(9, seed=8)
    means = coupled_means(points, metric, labels, scales, torch.zeros(4, 4))
    assert torch.equal(means[3], torch.zeros(4))  # no members: unchanged
    p = torch.zeros(9, 3).scatter_(1, labels.long()[:, None], scales[:, None])
    root = torch.linalg.cholesky(metric.double()).T
    expected = torch.linalg.lstsq(root @ p.double(), root @ points.double()).solution
    torch.testing.assert_close(means[:3].double(), expected, rtol=1e-4, atol=1e-5)
