"""Estimators behind the signals: mutual information by nearest neighbours, CKA, entropies, stable rank. All seeded."""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.special import digamma
from torch import Tensor

NEIGHBOURS, COMPONENTS, BINS = 3, 8, 64
POWER_STEPS = 30


def principal(points: Tensor) -> np.ndarray:
    """(n, at most 8) float64: principal components, scaled by the first one's spread; zeros for constant points."""
    x = points.double() - points.double().mean(0)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    if not len(s) or float(s[0]) <= 1e-12 * max(float(points.double().norm()), 1e-300):
        return np.zeros((len(points), 1))
    keep = int((s[:COMPONENTS] > 1e-6 * s[0]).sum())
    return (u[:, :keep] * (s[:keep] / s[0]) * len(x) ** 0.5).cpu().numpy()


def _counts(x: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Points strictly nearer than `radius` in the maximum norm, the point itself included."""
    return cKDTree(x).query_ball_point(x, np.nextafter(radius, 0), p=np.inf, return_length=True)


def information(x: np.ndarray, y: np.ndarray) -> float:
    """I(x; y) in nats of two continuous samples (n, a) and (n, b); not below 0.

    Source: Kraskov, Stoegbauer, Grassberger 2004, first estimator, k = 3, maximum norm.
    """
    n = len(x)
    if n <= NEIGHBOURS + 1 or not x.any() or not y.any():
        return 0.0
    radius = cKDTree(np.hstack([x, y])).query(np.hstack([x, y]), NEIGHBOURS + 1, p=np.inf)[0][:, -1]
    nx, ny = _counts(x, radius), _counts(y, radius)
    value = digamma(NEIGHBOURS) + digamma(n) - np.mean(digamma(np.maximum(nx, 1)) + digamma(np.maximum(ny, 1)))
    return max(float(value), 0.0)


def class_information(x: np.ndarray, labels: np.ndarray) -> float:
    """I(x; label) in nats of a continuous sample (n, a) and classes (n,); not below 0.

    Source: Ross 2014, k = 3, maximum norm; classes with too few members are left out.
    """
    sizes = {c: int((labels == c).sum()) for c in np.unique(labels)}
    keep = np.array([sizes[c] > NEIGHBOURS for c in labels], dtype=bool)
    x, labels = x[keep], labels[keep]
    if len(np.unique(labels)) < 2 or not x.any():
        return 0.0
    radius = np.empty(len(x))
    for c in np.unique(labels):
        mine = labels == c
        radius[mine] = cKDTree(x[mine]).query(x[mine], NEIGHBOURS + 1, p=np.inf)[0][:, -1]
    near = _counts(x, radius)
    of_class = np.array([sizes[c] for c in labels])
    value = digamma(len(x)) + digamma(NEIGHBOURS) - np.mean(digamma(of_class)) - np.mean(digamma(np.maximum(near, 1)))
    return max(float(value), 0.0)


def linear_cka(x: Tensor, y: Tensor) -> float:
    """<K, L> / (|K| |L|) of the centred Gram matrices of two samples (n, d): 1 for equal ones.

    Source: Kornblith et al. 2019.
    """
    k, m = (torch.mm(z - z.mean(0), (z - z.mean(0)).T) for z in (x.double(), y.double()))
    return float((k * m).sum() / (k.norm() * m.norm()).clamp(min=1e-300))


def histogram_entropy(values: Tensor) -> float:
    """-sum q log q of a histogram of the values with 64 equal bins from their least to their largest, in nats."""
    counts = torch.histc(values.float(), BINS)
    q = counts / counts.sum()
    return float(torch.special.entr(q).sum())


def stable_rank(weight: Tensor, seed: int) -> float:
    """|W|_F² / |W|_2², the norm by a power iteration from a seeded vector; 0 for a zero matrix."""
    w = weight.detach().float()
    v = torch.randn(w.shape[1], generator=torch.Generator().manual_seed(seed)).to(w)
    top = w.new_zeros(())
    for _ in range(POWER_STEPS):
        u = w @ v
        top = u.norm() / v.norm().clamp(min=1e-30)
        v = w.T @ u
        v = v / v.norm().clamp(min=1e-30)
    return float(w.pow(2).sum() / top.pow(2)) if float(top) > 0 else 0.0
