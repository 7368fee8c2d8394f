"""Index selection: brute-force equality on small matrices, and every published bound as a property."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tinycomp import ops
from tinycomp.linalg import row_pivots
from tinycomp.selection import SELECTIONS, leverage_scores, orthonormalize, select, select_pair, singular_vectors
from tinycomp.selection._pivoting import dominant_rows
from tinycomp.selection._sampling import _log_symmetric_without_each

INFORMED = tuple(sorted(set(SELECTIONS) - {"uniform", "norm", "leverage", "uniform-rrqr"}))


def spectrum_matrix(m: int, n: int, seed: int, decay: float = 1.0, coherence: float = 0.0) -> Tensor:
    """(m, n) float64 with singular values i^-decay; coherence > 0 makes a few rows and columns matter much more."""
    g = torch.Generator().manual_seed(seed)
    k = min(m, n)
    bases = []
    for size in (m, n):
        scale = torch.exp(coherence * torch.randn(size, 1, generator=g, dtype=torch.float64))
        bases.append(torch.linalg.qr(scale * torch.randn(size, k, generator=g, dtype=torch.float64))[0])
    return bases[0] * torch.arange(1, k + 1, dtype=torch.float64) ** -decay @ bases[1].T


def row_error(a: Tensor, rows: Tensor) -> float:
    """|A - A R⁺ R|_F."""
    r = a[rows].double()
    return float((a.double() - a.double() @ torch.linalg.pinv(r, rcond=1e-10) @ r).norm())


def eta(vectors: Tensor, rows: Tensor) -> float:
    return 1.0 / float(torch.linalg.svdvals(vectors[rows])[-1])


def interpolation(vectors: Tensor, rows: Tensor) -> Tensor:
    return torch.linalg.solve(vectors[rows], vectors, left=False)


def textbook_deim(vectors: Tensor) -> list[int]:
    """Sorensen and Embree, algorithm 1, word for word."""
    chosen = [int(vectors[:, 0].abs().argmax())]
    for j in range(1, vectors.shape[1]):
        coefficients = torch.linalg.solve(vectors[chosen, :j], vectors[chosen, j])
        residual = vectors[:, j] - vectors[:, :j] @ coefficients
        chosen.append(int(residual.abs().argmax()))
    return chosen


@pytest.mark.parametrize("method", SELECTIONS)
@pytest.mark.parametrize("shape", [(33, 20), (20, 33), (1, 5), (17, 17)])
def test_indices_are_distinct_in_range_and_repeatable(method: str, shape: tuple[int, int]) -> None:
    a = spectrum_matrix(*shape, seed=1).float()
    for axis, rank in itertools.product((0, 1), {1, min(7, *shape), min(shape)}):
        chosen = select(a, rank, method, 3, axis)
        assert (chosen.dtype, chosen.shape) == (torch.int64, (rank,))
        assert len(set(chosen.tolist())) == rank
        assert 0 <= int(chosen.min()) <= int(chosen.max()) < shape[axis]
        assert torch.equal(chosen, select(a, rank, method, 3, axis))


@pytest.mark.parametrize("method", SELECTIONS)
def test_scale_of_the_matrix_does_not_matter(method: str) -> None:
    a = spectrum_matrix(24, 18, seed=2).float()
    expected = select(a, 6, method)
    for scale in (2.0**-100, 2.0**100):
        assert torch.equal(select(a * scale, 6, method), expected)


@pytest.mark.parametrize("method", SELECTIONS)
def test_rank_deficient_and_zero_matrices(method: str) -> None:
    low = spectrum_matrix(40, 4, seed=3) @ spectrum_matrix(4, 30, seed=4)
    for a in (low, low.float(), torch.zeros(20, 15)):
        for axis in (0, 1):
            chosen = select(a, 10, method, axis=axis)
            assert len(set(chosen.tolist())) == 10
            b = a if axis == 0 else a.T
            assert row_error(b, chosen) <= 1e-5 * float(b.norm())


@pytest.mark.parametrize("method", ["leverage", "norm", "uniform", "block-random"])
def test_random_methods_follow_the_seed(method: str) -> None:
    a = spectrum_matrix(60, 40, seed=5).float()
    assert len({tuple(select(a, 10, method, seed).tolist()) for seed in range(5)}) == 5


@pytest.mark.parametrize("method", INFORMED)
def test_informed_methods_beat_uniform_sampling(method: str) -> None:
    a = spectrum_matrix(120, 90, seed=6, coherence=1.5)
    uniform = np.mean([row_error(a, select(a, 15, "uniform", seed)) for seed in range(10)])
    assert row_error(a, select(a, 15, method)) < 0.8 * uniform


def test_columns_are_rows_of_the_transpose() -> None:
    a = spectrum_matrix(30, 20, seed=7)
    for method in ("deim", "qdeim", "strong-rrqr", "maxvol", "derandomised"):
        assert torch.equal(select(a, 5, method, axis=1, exact=True), select(a.T, 5, method, exact=True))


def test_pair_matches_the_single_axes_or_is_as_good() -> None:
    a = spectrum_matrix(90, 70, seed=8, coherence=0.5).float()
    for axis, chosen in enumerate(select_pair(a, 12, "qdeim", exact=True)):
        assert torch.equal(chosen, select(a, 12, "qdeim", axis=axis, exact=True))
    for method in ("sketch-qr", "sketch-lu"):
        rows, columns = select_pair(a, 12, method)
        assert torch.equal(rows, select(a, 12, method))
        assert row_error(a.T, columns) <= 1.1 * row_error(a.T, select(a, 12, method, axis=1))
        assert sorted(select_pair(a, 70, method)[1].tolist()) == list(range(70))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "best"}, "sketch-qr"),
        ({"rank": 0}, "1..4"),
        ({"rank": 5}, "1..4"),
        ({"axis": 2}, "0 (rows)"),
        ({"dimension": 9, "method": "leverage"}, "dimension is 9"),
        ({"a": torch.full((4, 6), float("nan"))}, "NaN"),
        ({"a": torch.ones(4)}, "shape"),
    ],
)
def test_bad_arguments_say_what_is_allowed(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match="select: ") as caught:
        select(**({"a": torch.ones(4, 6), "rank": 2} | arguments))
    assert words in str(caught.value)
    with pytest.raises(TypeError, match="int64"):
        select(torch.ones(4, 6, dtype=torch.int64), 2)


def test_randomized_svd_is_close_to_exact_and_orthonormal() -> None:
    a = spectrum_matrix(150, 110, seed=9).float()
    u, s, v = singular_vectors(a, 20)
    exact = singular_vectors(a, 20, exact=True)
    assert float(((s - exact[1]) / exact[1]).abs().max()) < 0.01
    for basis in (u, v):
        assert float((basis.T @ basis - torch.eye(20)).norm()) < 1e-4
    best, got = (float((a - (x[0] * x[1]) @ x[2].T).norm()) for x in (exact, (u, s, v)))
    assert got <= 1.01 * best
    assert float(leverage_scores(a, 20).sum()) == pytest.approx(20, abs=1e-3)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5, 1e7, 1e20])
def test_orthonormalize_survives_ill_conditioned_input(condition: float) -> None:
    u, _, v = torch.linalg.svd(torch.randn(80, 12, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    y = (u * torch.logspace(0, -math.log10(condition), 12)) @ v
    q = orthonormalize(y)
    assert float((q.T @ q - torch.eye(12)).norm()) < 1e-4
    assert float((y - q @ (q.T @ y)).norm()) < 1e-5 * float(y.norm())


@pytest.mark.parametrize("seed", range(6))
def test_deim_is_the_textbook_algorithm(seed: int) -> None:
    a = spectrum_matrix(45, 30, seed, decay=0.5 + 0.3 * seed)
    left, _, right = singular_vectors(a, 12, exact=True)
    assert select(a, 12, "deim", exact=True).tolist() == textbook_deim(left)
    assert select(a, 12, "deim", axis=1, exact=True).tolist() == textbook_deim(right)


@pytest.mark.parametrize("method", ["deim", "qdeim", "strong-rrqr", "maxvol", "block-deim"])
@pytest.mark.parametrize("seed", range(4))
def test_spectral_error_bound_of_interpolatory_selection(method: str, seed: int) -> None:
    a = spectrum_matrix(50 + 7 * seed, 40, seed, decay=0.3 + 0.5 * seed, coherence=0.5 * (seed % 2))
    k = 4 + 3 * seed
    left, _, right = singular_vectors(a, k, exact=True)
    rows, columns = select_pair(a, k, method, exact=True)
    eta_p, eta_q = eta(left, rows), eta(right, columns)
    assert math.isfinite(eta_p + eta_q)  # the interpolation blocks are non-singular
    c, r = a[:, columns], a[rows]
    residual = a - c @ torch.linalg.pinv(c) @ a @ torch.linalg.pinv(r) @ r
    sigma = float(torch.linalg.svdvals(a)[k])
    assert float(torch.linalg.matrix_norm(residual, 2)) <= (eta_p + eta_q) * sigma * (1 + 1e-9)
    assert eta_p < np.median([eta(left, select(a, k, "uniform", s)) for s in range(9)])


@pytest.mark.parametrize("seed", range(5))
def test_a_priori_bounds_on_eta(seed: int) -> None:
    m, k = 40, 2 + seed
    a = spectrum_matrix(m, 30, seed, coherence=1.0)
    left = singular_vectors(a, k, exact=True)[0]
    bounds = {
        "deim": math.sqrt(m * k / 3) * 2**k,
        "qdeim": math.sqrt(m - k + 1) * math.sqrt(4**k + 6 * k - 1) / 3,
        "strong-rrqr": math.sqrt(1 + 4 * k * (m - k)),
        "maxvol": math.sqrt(1 + 1.01**2 * k * (m - k)),
    }
    for method, bound in bounds.items():
        assert 1 - 1e-9 <= eta(left, select(a, k, method, exact=True)) <= bound, method


def test_pivots_are_those_of_the_op_and_qdeim_does_not_depend_on_the_basis() -> None:
    left = singular_vectors(spectrum_matrix(40, 30, seed=1), 8, exact=True)[0]
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    for method in ("qr", "lu"):
        assert torch.equal(row_pivots(left, 8, method), ops.select_pivots(left, 8, method))
    assert torch.equal(row_pivots(left, 8, "qr"), row_pivots(left @ rotation, 8, "qr"))


@pytest.mark.parametrize(("method", "bound"), [("strong-rrqr", 2.0), ("maxvol", 1.01)])
@pytest.mark.parametrize("seed", range(4))
def test_interpolation_matrix_is_bounded(method: str, bound: float, seed: int) -> None:
    a = spectrum_matrix(60, 45, seed, coherence=0.8)
    left = singular_vectors(a, 14, exact=True)[0]
    assert float(interpolation(left, select(a, 14, method, exact=True)).abs().max()) <= bound + 1e-9


@pytest.mark.parametrize("bound", [1.01, 2.0])
def test_swaps_leave_no_better_single_swap(bound: float) -> None:
    u = torch.linalg.qr(torch.randn(14, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64))[0]
    start = min(itertools.combinations(range(14), 4), key=lambda p: abs(float(torch.linalg.det(u[list(p)]))))
    start_rows = torch.tensor(start)
    assert float(interpolation(u, start_rows).abs().max()) > bound
    rows = dominant_rows(u, start_rows, bound)
    volume = abs(float(torch.linalg.det(u[rows])))
    for i, j in itertools.product(range(14), range(4)):
        swapped = rows.clone()
        swapped[j] = i
        assert abs(float(torch.linalg.det(u[swapped]))) <= bound * volume * (1 + 1e-9)


def test_strong_rrqr_repairs_pivoted_qr_on_kahans_matrix() -> None:
    k, zeta = 30, 0.99
    phi = math.sqrt(1 - zeta**2)
    diagonal = torch.tensor([zeta**i for i in range(k)], dtype=torch.float64)
    ones = torch.ones(k, k, dtype=torch.float64)
    kahan = diagonal[:, None] * (torch.eye(k, dtype=torch.float64) - phi * ones.triu(1))
    wide = torch.cat([kahan, diagonal[:, None] * -phi * torch.ones(k, 1, dtype=torch.float64)], 1)
    plain = torch.arange(k)  # pivoted QR in exact arithmetic keeps Kahan's order
    assert float(interpolation(wide.T, plain).abs().max()) > 2.0
    assert float(interpolation(wide.T, dominant_rows(wide.T, plain, 2.0)).abs().max()) <= 2.0 + 1e-9


def test_swap_limit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinycomp.selection._pivoting._SWAP_LIMIT", 0)
    u = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    with pytest.raises(RuntimeError, match="raise the bound"):
        dominant_rows(u, torch.tensor([0, 1]), 2.0)


def test_iterative_deim_reduces_the_residual_every_round() -> None:
    a = spectrum_matrix(80, 60, seed=2, coherence=0.7)
    chosen = select(a, 16, "iterative-deim", exact=True)
    errors = [row_error(a, chosen[: 4 * i]) for i in range(1, 5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] <= 1.1 * row_error(a, select(a, 16, "deim", exact=True))


def test_uniform_rrqr_is_exact_up_to_noise_on_incoherent_low_rank() -> None:
    low = spectrum_matrix(200, 6, seed=1, decay=0.0) @ spectrum_matrix(6, 150, seed=2, decay=0.0)
    noise = 1e-4 * torch.randn(200, 150, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 14
    rows = select(low + noise, 6, "uniform-rrqr")
    assert row_error(low + noise, rows) <= 10 * float(noise.norm())


def test_leverage_sampling_meets_its_bound_where_uniform_fails() -> None:
    """Mean over seeds of the relative error of the best rank-d approximation in the span, c = d log d / eps^2 rows."""
    d, eps = 5, 0.35
    c = math.ceil(d * math.log(d) / eps**2)
    g = torch.Generator().manual_seed(0)
    a = 0.01 * torch.randn(600, 80, generator=g, dtype=torch.float64)
    a[:d] += 3.0 * torch.randn(d, 80, generator=g, dtype=torch.float64)  # d rows carry the leading subspace
    best = float(torch.linalg.svdvals(a)[d:].norm())

    def ratio(method: str, seed: int) -> float:
        r = a[select(a, c, method, seed, exact=True, dimension=d)]
        basis = torch.linalg.qr(r.T)[0]
        u, s, vt = torch.linalg.svd(a @ basis, full_matrices=False)
        return float((a - (u[:, :d] * s[:d]) @ vt[:d] @ basis.T).norm()) / best

    assert np.mean([ratio("leverage", seed) for seed in range(20)]) <= 1 + eps
    assert np.mean([ratio("uniform", seed) for seed in range(20)]) > 1 + eps


def test_norm_sampling_meets_its_additive_bound() -> None:
    a = spectrum_matrix(200, 60, seed=3, decay=0.7, coherence=0.5)
    d, k = 4, 20
    best = float(torch.linalg.svdvals(a)[d:].square().sum())
    mean = np.mean([row_error(a, select(a, k, "norm", seed)) ** 2 for seed in range(20)])
    assert mean <= best + d / k * float(a.square().sum())


def test_zero_rows_are_drawn_only_when_nothing_else_is_left() -> None:
    a = torch.zeros(30, 10)
    a[[3, 8, 21]] = torch.eye(3, 10)
    for method in ("norm", "leverage", "block-random", "leverage-topk", "derandomised"):
        assert set(select(a, 3, method).tolist()) == {3, 8, 21}, method
        assert {3, 8, 21} < set(select(a, 5, method).tolist()), method


def test_block_random_keeps_one_row_of_each_cluster_of_duplicates() -> None:
    centres = torch.eye(10, 25)
    a = centres.repeat_interleave(40, 0)
    for seed in range(5):
        assert row_error(a, select(a, 10, "block-random", seed)) < 1e-5
    assert max(row_error(a, select(a, 10, "uniform", seed)) for seed in range(5)) > 1.0


@pytest.mark.parametrize("seed", range(6))
def test_derandomised_is_within_the_square_root_of_k_plus_1(seed: int) -> None:
    a = spectrum_matrix(40, 30, seed, decay=0.2 + 0.4 * seed, coherence=0.5 * (seed % 3))
    values = torch.linalg.svdvals(a)
    for k in (1, 3, 8, 20):
        assert row_error(a, select(a, k, "derandomised", exact=True)) <= math.sqrt(k + 1) * float(values[k:].norm()) * (
            1 + 1e-9
        )


def test_derandomised_bound_is_reached_on_the_worst_case() -> None:
    """k + 1 corners of a centred simplex, lifted a little: k of them miss the lift of the last by k + 1 times."""
    k = 5
    a = torch.eye(k + 1, dtype=torch.float64) - 1 / (k + 1) + 1e-4
    ratio = row_error(a, select(a, k, "derandomised", exact=True)) / float(torch.linalg.svdvals(a)[k:].norm())
    assert 0.99 * math.sqrt(k + 1) < ratio <= math.sqrt(k + 1) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_derandomised_choices_are_brute_force_conditional_expectations(seed: int) -> None:
    a = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    k = 3
    chosen: list[int] = []
    for _ in range(k):
        expected = {}
        for i in set(range(7)) - set(chosen):
            weight = total = 0.0
            for rest in itertools.combinations(sorted(set(range(7)) - {*chosen, i}), k - len(chosen) - 1):
                rows = torch.tensor([*chosen, i, *rest])
                volume = float(torch.linalg.det(a[rows] @ a[rows].T))
                weight += volume
                total += volume * row_error(a, rows) ** 2
            expected[i] = total / weight
        chosen.append(min(expected, key=lambda i: expected[i]))
    assert select(a, k, "derandomised", exact=True).tolist() == chosen


@pytest.mark.parametrize("order", [1, 2, 4])
def test_symmetric_polynomials_without_each_value(order: int) -> None:
    values = np.array([3.0, 1e-3, 0.5, 2e2, 1e-9, 7.0])
    got = np.exp(_log_symmetric_without_each(np.log(values), order))
    for c in range(len(values)):
        others = np.delete(values, c)
        for row, j in ((0, order), (1, order - 1)):
            want = sum(math.prod(t) for t in itertools.combinations(others, j))
            assert got[row, c] == pytest.approx(want, rel=1e-12)
