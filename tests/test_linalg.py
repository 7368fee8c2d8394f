"""Solves, truncation, pivoted storage and elimination against brute force in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from tinycomp import linalg


def problem(m: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W (m, n), S (n, n) and G (m, m), correlated, well conditioned, float64."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(m, n, generator=g, dtype=torch.float64)
    x = torch.randn(4 * n, n, generator=g, dtype=torch.float64) * torch.logspace(0, -1, n, dtype=torch.float64)
    y = torch.randn(4 * m, m, generator=g, dtype=torch.float64) * torch.logspace(0, -1, m, dtype=torch.float64)
    return w, x.T @ x / len(x), y.T @ y / len(y)


def loss(error: torch.Tensor, s: torch.Tensor, g: torch.Tensor) -> float:
    return 0.5 * float(torch.trace(g @ error @ s @ error.T))


def test_cholesky_of_a_singular_gram_falls_back_and_says_so() -> None:
    gram = torch.ones(3, 3) - 2 * torch.eye(3)  # indefinite: no Cholesky factor exists
    linalg.drain_fallbacks()
    factor = linalg.cholesky(gram, 0.0, "bad gram")
    assert torch.isfinite(factor).all()
    assert torch.equal(factor, factor.tril())
    (note,) = linalg.drain_fallbacks()
    assert "bad gram" in note
    assert linalg.drain_fallbacks() == []


def test_not_finite_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="layer 3: got 1 NaN"):
        linalg.require_finite("layer 3", torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize(("m", "n"), [(5, 9), (9, 5), (6, 6)])
def test_truncation_is_the_weighted_optimum(m: int, n: int) -> None:
    w, s, g = problem(m, n)
    best = linalg.Truncation(w, s, g, 0.0)
    generator = torch.Generator().manual_seed(1)
    for rank in range(min(m, n) + 1):
        left, right = best.factors(rank)
        reached = loss(w - left @ right, s, g)
        assert reached == pytest.approx(float(best.losses()[rank]), rel=1e-4, abs=1e-7)
        for _ in range(20):  # no perturbation of the factors does better
            other = (left + 1e-3 * torch.randn(left.shape, generator=generator, dtype=left.dtype)) @ (
                right + 1e-3 * torch.randn(right.shape, generator=generator, dtype=right.dtype)
            )
            assert loss(w - other, s, g) >= reached * (1 - 1e-6) - 1e-7


@pytest.mark.parametrize(("m", "n", "rank"), [(7, 5, 1), (7, 5, 5), (4, 9, 3), (4, 9, 4), (6, 6, 6)])
def test_pivoted_storage_is_exact_and_holds_the_degrees_of_freedom(m: int, n: int, rank: int) -> None:
    g = torch.Generator().manual_seed(0)
    left = torch.randn(m, rank, generator=g, dtype=torch.float64)
    right = torch.randn(rank, n, generator=g, dtype=torch.float64)
    rows, t, order = linalg.pivoted_factors(left, right)
    assert rows.numel() + t.numel() == rank * (m + n - rank)
    rebuilt = torch.empty(m, n)
    rebuilt[order.long()] = torch.cat([rows, t @ rows])
    assert torch.allclose(rebuilt.double(), left @ right, atol=1e-4)
    assert sorted(order.tolist()) == list(range(m))


@pytest.mark.parametrize(("m", "n"), [(8, 8), (5, 11), (11, 5), (1, 4)])
def test_pivoted_rank_is_the_largest_that_fits(m: int, n: int) -> None:
    for size in range(m * n + 1):
        rank = linalg.pivoted_rank(size, m, n)
        assert rank * (m + n - rank) <= size or rank == 0
        if rank < min(m, n):
            assert (rank + 1) * (m + n - rank - 1) > size


@pytest.mark.parametrize(("m", "n"), [(9, 5), (5, 9)])
def test_pivoted_interpolation_is_the_least_squares_one(m: int, n: int) -> None:
    w, s, _ = problem(m, n)
    moment = linalg.output_moment(w, s, 0.0)
    upper, order = linalg.pivoted_cholesky(moment, min(m, n))
    assert torch.allclose(upper.T @ upper, moment[order][:, order], atol=1e-8)
    for count in range(1, min(m, n) + 1):
        t = linalg.pivoted_interpolation(upper, order, count)
        _, expected, _ = linalg.interpolate(w, order[:count], s, 0.0)
        assert torch.allclose(t.float(), expected, atol=1e-4)


def test_pivoted_interpolation_leaves_rows_beyond_the_numerical_rank_out() -> None:
    w, s, _ = problem(8, 6)
    w = w[:, :2] @ w[:2]  # rank 2
    upper, order = linalg.pivoted_cholesky(linalg.output_moment(w, s, 0.0), 6)
    t = linalg.pivoted_interpolation(upper, order, 4)
    assert torch.isfinite(t).all()
    assert torch.allclose(t @ w[order[:4]], w[order[4:].sort().values], atol=1e-6)


def test_interpolation_keeps_pivots_and_solves_the_rest() -> None:
    w, s, _ = problem(7, 5)
    pivots = torch.tensor([4, 0, 2])
    rows, t, order = linalg.interpolate(w, pivots, s, 0.0)
    assert torch.equal(rows, w[pivots].float())
    root = torch.linalg.cholesky(s)
    rest = order[3:].long()
    expected = torch.linalg.lstsq((w[pivots] @ root).T, (w[rest] @ root).T).solution.T
    assert torch.allclose(t.double(), expected, atol=1e-5)


def test_refit_reproduces_outputs_on_new_inputs() -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(3, 6, generator=g)
    x = torch.randn(50, 6, generator=g)
    mix = torch.eye(6) + 0.2 * torch.randn(6, 6, generator=g)
    y = x @ mix.T  # the new inputs are a known linear map of the old ones
    fitted = linalg.refit(w, x.T @ y, y.T @ y, 0.0)
    assert torch.allclose(fitted, w @ torch.linalg.inv(mix), atol=1e-4)
    assert torch.allclose(linalg.refit(w, x.T @ y, y.T @ y, 1e8), w, atol=1e-4)  # heavy damping keeps the weight


@pytest.mark.parametrize("weighted", [True, False])
def test_elimination_predicts_what_its_refit_reaches(weighted: bool) -> None:
    w, s, g = problem(4, 12)
    g = g if weighted else torch.eye(4, dtype=torch.float64)
    found = linalg.Elimination(w.float(), s.float(), g.float() if weighted else None, 0.0, step=1)
    assert sorted(found.order.tolist()) == list(range(12))
    for kept_count in (11, 7, 3):
        kept = found.order[12 - kept_count :].sort().values
        new = torch.zeros_like(w)
        new[:, kept] = linalg.Elimination.solve(w.float(), s.float(), kept, 0.0).double()
        assert loss(w - new, s, g) == pytest.approx(float(found.loss[12 - kept_count]), rel=1e-3)


def test_first_elimination_is_the_cheapest_of_all() -> None:
    w, s, g = problem(4, 8)
    found = linalg.Elimination(w.float(), s.float(), g.float(), 0.0, step=1)
    losses = {}
    for gone in range(8):
        kept = torch.tensor([i for i in range(8) if i != gone])
        new = torch.zeros_like(w)
        new[:, kept] = linalg.Elimination.solve(w.float(), s.float(), kept, 0.0).double()
        losses[gone] = loss(w - new, s, g)
    assert min(losses, key=losses.__getitem__) == int(found.order[0])


def test_elimination_in_blocks_stays_near_the_exact_order() -> None:
    w, s, g = problem(6, 24)
    exact = linalg.Elimination(w.float(), s.float(), g.float(), 1e-4, step=1).loss
    blocks = linalg.Elimination(w.float(), s.float(), g.float(), 1e-4, step=4).loss
    assert all(b <= 1.5 * a + 1e-4 for a, b in itertools.islice(zip(exact[4:], blocks[4:], strict=True), 0, None, 4))


def test_elimination_leaves_a_transposed_weight_as_it_was():
    stored = torch.randn(12, 6)  # (in, out), as GPT-2 has it
    before, x = stored.clone(), torch.randn(40, 12)
    linalg.Elimination(stored.T, x.T @ x / 40, None, 1e-4, step=1)
    assert torch.equal(stored, before)
