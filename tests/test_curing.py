"""CURing's January 2025 algorithm: published numbers, brute-force equality, and optimality of the link U."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tinycomp.methods import _curing as curing

LLAMA = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "gate_proj": (14336, 4096)}
LLAMA_2 = {"q_proj": (4096, 4096), "k_proj": (4096, 4096), "gate_proj": (11008, 4096)}
LINKS = ("pinv", "qr", "fast", "weighted")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def correlated_gram(n: int, seed: int = 1) -> Tensor:
    """Second moment of inputs with a strong mean on some features, as language models have."""
    x = normal(4 * n, n, seed=seed) @ normal(n, n, seed=seed + 1)
    x[:, : n // 10 + 1] += 20.0
    return x.T @ x / len(x)


def sigma_norm(error: Tensor, gram: Tensor) -> float:
    return float(((error.double() @ gram) * error.double()).sum().clamp_min(0).sqrt())


# Sizes


@pytest.mark.parametrize(
    ("m", "n", "rank"), [(4096, 4096, 1696), (1024, 4096, 718), (14336, 4096, 2769), (11008, 4096, 2553)]
)
def test_break_even_ranks_of_the_paper(m: int, n: int, rank: int) -> None:
    assert curing.break_even_rank(m, n) == rank
    assert curing.break_even_rank(n, m) == rank
    assert curing.rank_rule(m, n) == 256
    assert curing.rank_rule(m, n, 4000) == rank


def test_break_even_rank_is_the_largest_that_does_not_grow() -> None:
    for m, n in itertools.product(range(1, 60), repeat=2):
        rank = curing.break_even_rank(m, n)
        assert curing.stored_numbers(m, n, rank) <= m * n < curing.stored_numbers(m, n, rank + 1)
        assert 1 <= curing.rank_rule(m, n) <= min(m, n)


def saved(shapes: dict[str, tuple[int, int]], layers: int) -> int:
    """Numbers that the published rule saves when these matrices of so many layers are compressed."""
    return layers * sum(m * n - curing.stored_numbers(m, n, curing.rank_rule(m, n)) for m, n in shapes.values())


def test_stored_numbers_and_model_size_of_the_paper() -> None:
    assert {name: curing.rank_rule(m, n) for name, (m, n) in LLAMA.items()} == dict.fromkeys(LLAMA, 256)
    stored = {name: curing.stored_numbers(m, n, 256) for name, (m, n) in LLAMA.items()}
    assert stored == {"q_proj": 2_162_688, "k_proj": 1_376_256, "gate_proj": 4_784_128}
    assert round((8_030_261_248 - saved(LLAMA, curing.NUM_LAYERS)) / 1e9, 3) == 7.317
    assert round((6_738_415_616 - saved(LLAMA_2, curing.NUM_LAYERS)) / 1e9, 3) == 6.035


def test_size_rule_uses_layers_before_it_lowers_the_rank() -> None:
    layers = [list(LLAMA.values())] * 30
    dense = 30 * sum(m * n for m, n in LLAMA.values())
    assert curing.size_rule(layers, dense - saved(LLAMA, 10)) == (10, 256)
    assert curing.size_rule(layers, dense - saved(LLAMA, 10) - 1) == (11, 256)
    assert curing.size_rule(layers, dense - saved(LLAMA, 30)) == (30, 256)
    count, limit = curing.size_rule(layers, dense - saved(LLAMA, 30) - 1)
    assert count == 30
    assert limit == 255
    assert curing.size_rule(layers, dense) == (1, 256)


@pytest.mark.parametrize("kept", [400, 700, 1000, 1500, 2200, 2700])
def test_size_rule_is_the_brute_force_choice(kept: int) -> None:
    layers = [[(20, 30), (10, 30)], [(20, 30)], [(25, 30), (7, 9)], [(4, 60)]]

    def size(count: int, limit: int) -> int:
        return sum(
            curing.stored_numbers(m, n, curing.rank_rule(m, n, limit)) if i < count else m * n
            for i, layer in enumerate(layers)
            for m, n in layer
        )

    fits = [(count, 6) for count in range(1, 5) if size(count, 6) <= kept]
    fits += [(4, limit) for limit in range(5, 0, -1) if size(4, limit) <= kept]
    if fits:
        assert curing.size_rule(layers, kept, 6) == fits[0]
    else:
        with pytest.raises(ValueError, match="rank 1"):
            curing.size_rule(layers, kept, 6)


def test_size_rule_without_layers() -> None:
    with pytest.raises(ValueError, match="no candidate layer"):
        curing.size_rule([], 10)


# Layer choice


def test_layer_scores_are_mean_angles_of_the_inner_layers() -> None:
    def at(*degrees: float) -> Tensor:
        return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])

    hidden = [at(0, 0), 3 * at(90, 0), 0.1 * at(90, 36), at(0, 0)]
    scores = curing.layer_scores(hidden)
    assert set(scores) == {1, 2}
    assert scores[1] == pytest.approx(0.25, abs=1e-6)
    assert scores[2] == pytest.approx(0.1, abs=1e-6)


def test_layer_scores_clamp_the_cosine() -> None:
    h = normal(50, 64, dtype=torch.float32)
    scores = curing.layer_scores([h, 7 * h, -h, h])
    assert 0 <= scores[1] < 1e-3
    assert 1 - 1e-3 < scores[2] <= 1
    with pytest.raises(ValueError, match="3 or more"):
        curing.layer_scores([h, h])


def test_layer_orders() -> None:
    scores = {1: 0.3, 2: 0.1, 3: 0.2, 4: 0.05}
    assert curing.choose_layers(scores, 3) == [4, 2, 3]
    assert curing.choose_layers(scores, 2, "last") == [4, 3]
    shuffles = {tuple(curing.choose_layers(scores, 4, "random", seed)) for seed in range(6)}
    assert len(shuffles) > 1
    assert all(sorted(s) == [1, 2, 3, 4] for s in shuffles)
    assert curing.choose_layers(scores) == [4, 2, 3, 1]
    with pytest.raises(ValueError, match="'first'"):
        curing.choose_layers(scores, 2, "first")  # type: ignore[arg-type]


def test_rms_and_selection_matrix() -> None:
    x = normal(100, 5, seed=3)
    rms = curing.input_rms(x.T @ x / 100)
    assert torch.allclose(rms, x.square().mean(0).sqrt())
    w = normal(4, 5, seed=4)
    assert torch.equal(curing.selection_matrix(w, rms), w.abs() @ torch.diag(rms))
    assert torch.equal(curing.selection_matrix(w, rms, signed=True), w @ torch.diag(rms))


# Greedy choice


def released_step_in_numpy(vectors: np.ndarray) -> list[int]:
    """Section 7 of the release word for word, with a real pseudo-inverse and a sort."""
    p, chosen = vectors.copy(), list[int]()
    for i in range(p.shape[1]):
        order = np.argsort(-np.abs(p[:, i]), kind="stable")
        chosen.append(next(int(j) for j in order if int(j) not in chosen))
        head = p[chosen[i] : chosen[i] + 1, : i + 1]
        p[:, i + 1 :] -= (p[:, : i + 1] @ np.linalg.pinv(head)) @ p[chosen[i] : chosen[i] + 1, i + 1 :]
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_released_greedy_is_the_literal_algorithm(seed: int) -> None:
    vectors = torch.linalg.qr(normal(70, 40, seed=seed))[0]
    chosen = curing.greedy_released(vectors)
    assert chosen.tolist() == released_step_in_numpy(vectors.numpy())
    assert len(set(chosen.tolist())) == 40


@pytest.mark.parametrize("shape", [(70, 40), (70, 70), (65, 33), (5, 1), (200, 64)])
@pytest.mark.parametrize("block", [1, 8, 32])
def test_fast_greedy_takes_the_same_indices(shape: tuple[int, int], block: int) -> None:
    vectors = torch.linalg.qr(normal(*shape, seed=shape[0]))[0]
    kept = vectors.clone()
    assert torch.equal(curing.greedy_fast(vectors, block), curing.greedy_released(vectors))
    assert torch.equal(vectors, kept)


def test_released_greedy_is_not_deim() -> None:
    vectors = torch.linalg.qr(normal(70, 40, seed=1))[0]
    left = vectors * torch.arange(40, 0, -1)
    deim, released = (
        curing.choose_indices(left @ vectors.T, 40, method)[0].tolist() for method in ("deim", "released")
    )
    assert set(deim) != set(released)


# The link


def brute_force_link(c: Tensor, w: Tensor, r: Tensor, root: Tensor) -> Tensor:
    """argmin_U |(W - C U R) root|_F as one least-squares problem in vec(U)."""
    system = torch.kron(c.contiguous(), (r @ root).T.contiguous())
    return torch.linalg.lstsq(system, (w @ root).reshape(-1, 1), driver="gelsd").solution.reshape(
        c.shape[1], r.shape[0]
    )


@pytest.mark.parametrize("seed", range(3))
def test_links_are_least_squares_solutions(seed: int) -> None:
    w, gram = normal(9, 8, seed=seed), correlated_gram(8, seed)
    c, r = w[:, [1, 4, 6]], w[[0, 2, 5]]
    plain = brute_force_link(c, w, r, torch.eye(8, dtype=torch.float64))
    for link in (curing.link_pinv, curing.link_qr):
        assert torch.allclose(link(c, w, r), plain, rtol=1e-9, atol=1e-11)
    assert torch.allclose(curing.link_fast(c, w, r), plain, rtol=1e-7, atol=1e-9)
    root = torch.linalg.cholesky(gram)
    assert torch.allclose(
        curing.link_weighted(c, w, r, gram, 0.0), brute_force_link(c, w, r, root), rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("damping", [0.0, 1e-4, 1e-1, 1e3])
@pytest.mark.parametrize("seed", range(4))
def test_weighted_link_is_never_worse_in_the_sigma_norm(seed: int, damping: float) -> None:
    w, gram = normal(60, 48, seed=seed), correlated_gram(48, seed)
    rms = curing.input_rms(gram)
    c, plain, r, rows, columns = curing.decompose(w, rms, 12, link="qr")
    weighted = curing.decompose(w, rms, 12, link="weighted", gram=gram, damping=damping)
    assert torch.equal(weighted[3], rows)
    assert torch.equal(weighted[4], columns)
    before, after = (sigma_norm(w - c @ u @ r, gram) for u in (plain, weighted[1]))
    assert after <= before * (1 + 1e-10)
    if damping < 1:
        assert after < 0.98 * before


@pytest.mark.parametrize("damping", [0.0, 1e-4, 1.0])
def test_weighted_link_equals_the_plain_one_for_white_inputs(damping: float) -> None:
    w, one = normal(30, 24, seed=2), torch.eye(24, dtype=torch.float64)
    plain = curing.decompose(w, torch.ones(24, dtype=torch.float64), 7, link="qr")[1]
    weighted = curing.decompose(w, torch.ones(24, dtype=torch.float64), 7, link="weighted", gram=one, damping=damping)[
        1
    ]
    assert float((weighted - plain).norm()) <= 1e-10 * float(plain.norm())


def test_qr_link_stays_accurate_where_the_float32_pseudo_inverse_does_not() -> None:
    w = normal(60, 50, seed=7) * torch.logspace(0, -6, 50, dtype=torch.float64)
    columns, rows = torch.arange(0, 50, 2), torch.arange(25)
    c, r = w[:, columns], w[rows]
    q, p = torch.linalg.qr(c)[0], torch.linalg.qr(r.T)[0]
    projected = q @ (q.T @ w @ p) @ p.T
    exact = float((c @ curing.link_qr(c, w, r) @ r - projected).norm() / projected.norm())
    released = curing.link_pinv(c.float(), w.float(), r.float()).double()
    assert exact < 1e-12
    assert float((c @ released @ r - projected).norm() / projected.norm()) > 1e-7


# The whole decomposition


@pytest.mark.parametrize("method", ["released", "released-loop", "deim", "qdeim", "sketch-qr", "leverage"])
@pytest.mark.parametrize("link", LINKS)
def test_factors_are_real_columns_and_rows(method: str, link: curing.Link) -> None:
    w, gram = normal(40, 33, dtype=torch.float32), correlated_gram(33).float()
    c, u, r, rows, columns = curing.decompose(w, curing.input_rms(gram), 7, method=method, link=link, gram=gram)
    assert torch.equal(c, w[:, columns])
    assert torch.equal(r, w[rows])
    assert u.shape == (7, 7)
    assert u.dtype == torch.float32
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == 7


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("m", "n"), [(20, 30), (30, 20), (16, 16), (1, 9)])
def test_exact_at_full_rank(link: curing.Link, m: int, n: int) -> None:
    w, gram = normal(m, n, seed=m), correlated_gram(n)
    c, u, r, _, _ = curing.decompose(w, curing.input_rms(gram), min(m, n), link=link, gram=gram)
    assert float((c @ u @ r - w).norm()) <= 1e-8 * float(w.norm())


@pytest.mark.parametrize("method", ["released", "deim", "sketch-qr", "uniform"])
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("rank", [5, 12])
def test_exact_when_the_matrix_has_no_higher_rank(link: curing.Link, method: str, rank: int) -> None:
    w, gram, notes = normal(40, 5, seed=1) @ normal(5, 33, seed=2), correlated_gram(33), list[str]()
    rms = curing.input_rms(gram)
    c, u, r, _, _ = curing.decompose(w, rms, rank, signed=True, method=method, link=link, gram=gram, notes=notes)
    assert float((c @ u @ r - w).norm()) <= 1e-6 * float(w.norm())
    assert bool(notes) == (rank > 5 and link != "pinv")


def test_fast_link_in_float32_reaches_the_optimal_error() -> None:
    w = normal(120, 100, seed=3) * torch.arange(1, 101) ** -1.0
    rms = torch.ones(100, dtype=torch.float64)
    best = curing.decompose(w, rms, 20, link="qr")
    fast = curing.decompose(w.float(), rms.float(), 20, link="fast")
    assert torch.equal(best[3], fast[3])
    errors = [float((w - c.double() @ u.double() @ r.double()).norm()) for c, u, r, _, _ in (best, fast)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-5)


def test_decompose_is_steps_five_to_eight() -> None:
    w, gram = normal(50, 40, seed=9), correlated_gram(40)
    rms = gram.diagonal().sqrt()
    left, _, right_t = np.linalg.svd(np.abs(w.numpy()) * rms.numpy(), full_matrices=True)
    c, u, r, rows, columns = curing.decompose(w, rms, 10, method="released-loop")
    assert rows.tolist() == released_step_in_numpy(left[:, :10])
    assert columns.tolist() == released_step_in_numpy(right_t[:10].T)
    assert np.allclose(u.numpy(), np.linalg.pinv(c.numpy()) @ w.numpy() @ np.linalg.pinv(r.numpy()))


def test_silent_features_and_a_singular_moment() -> None:
    w, gram, notes = normal(30, 24, seed=5), correlated_gram(24), list[str]()
    gram[:6] = gram[:, :6] = 0.0
    c, u, r, _, _ = curing.decompose(
        w, curing.input_rms(gram), 20, link="weighted", gram=gram, damping=0.0, notes=notes
    )
    assert notes == ["CURing: R S Rᵀ is not positive definite: pseudo-inverse from eigenvalues"]
    assert bool(torch.isfinite(u).all())
    plain = curing.link_qr(c, w, r)
    assert sigma_norm(w - c @ u @ r, gram) <= sigma_norm(w - c @ plain @ r, gram) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rms": torch.ones(3)}, "(6,)"),
        ({"rank": 0}, "1..4"),
        ({"rank": 5}, "1..4"),
        ({"link": "best"}, "weighted"),
        ({"link": "weighted"}, "gram"),
        ({"method": "best"}, "released"),
        ({"w": torch.full((4, 6), float("inf"))}, "NaN or Inf"),
    ],
)
def test_bad_arguments_say_what_is_allowed(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=r"^(decompose|choose_indices): ") as caught:
        curing.decompose(**({"w": torch.ones(4, 6), "rms": torch.ones(6), "rank": 2} | change))
    assert words in str(caught.value)
