"""The split linearised Bregman iteration against what is known in closed form."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from tinycomp import ops
from tinycomp.train.bregman import SplitBregman, lipschitz, step_size

CURVATURES = torch.logspace(-2, 1, 40, dtype=torch.float64)[torch.randperm(40, generator=torch.manual_seed(0))]


def run(gradient, start, steps, **options):
    """The optimiser after `steps`, and the objectives |M - G|²/(2 nu) + L on the way where L is returned too."""
    mask = start.clone()
    optimiser = SplitBregman([mask], **options)
    objectives = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss, grad = gradient(mask)
        mask.grad.copy_(grad)
        objectives.append(optimiser.objective(float(loss)))
        optimiser.step()
    return optimiser, objectives


def quadratic(mask):
    return 0.5 * (CURVATURES * (mask - 1) ** 2).sum(), CURVATURES * (mask - 1)


def ones():
    return torch.ones(len(CURVATURES), dtype=torch.float64)


@pytest.mark.parametrize("nu", [0.3, 3.0])
def test_separable_quadratic_entry_times(nu):
    """Closed form in continuous time, and its limit t_j = lambda (1 + nu a_j) / a_j for a large kappa."""
    kappa, a = 50.0, CURVATURES
    chosen = a > 1
    alpha = 0.3 * step_size(float(a.max()), nu, kappa)
    steps = int(1.1 * (1 + nu) / alpha)
    optimiser, _ = run(quadratic, ones(), steps, lr=alpha, kappa=kappa, nu=nu)
    found = optimiser.entry[chosen].double() * alpha
    limit = (1 + nu * a[chosen]) / a[chosen]
    assert bool((optimiser.entry[chosen] > 0).all())
    assert torch.allclose(found, limit, rtol=0.05)
    transient = 1 / (kappa * (1 + nu * a[chosen]) ** 2)
    assert torch.allclose(found, (1 - transient) * limit, rtol=2e-3)


def test_orthogonal_least_squares_enters_by_correlation():
    """nu -> 0: units enter in the order of |x_j . y|, at t = lambda / |x_j . y|."""
    generator = torch.Generator().manual_seed(1)
    x = torch.linalg.qr(torch.randn(30, 12, generator=generator, dtype=torch.float64)).Q
    sizes = torch.linspace(0.6, 2, 12, dtype=torch.float64)[torch.randperm(12, generator=generator)]
    y = x @ (sizes * torch.randn(12, generator=generator).sign())
    correlation = (x.T @ y).abs()
    nu, kappa = 0.02, 20.0
    alpha = 0.5 * step_size(1.0, nu, kappa)

    def gradient(mask):
        residual = x @ mask - y
        return 0.5 * residual.square().sum(), x.T @ residual

    steps = int(1.1 / float(correlation.min()) / alpha)
    optimiser, _ = run(gradient, torch.zeros(12, dtype=torch.float64), steps, lr=alpha, kappa=kappa, nu=nu)
    assert optimiser.entry.argsort().tolist() == correlation.argsort(descending=True).tolist()
    assert torch.allclose(optimiser.entry.double() * alpha, 1 / correlation, rtol=0.05)


@pytest.mark.parametrize("kappa", [1.0, 10.0])
@pytest.mark.parametrize("nu", [0.1, 1.0, 10.0])
def test_objective_decreases_under_the_step_size_condition(nu, kappa):
    generator = torch.Generator().manual_seed(2)
    root = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    hessian = root @ root.T / 20
    target = torch.randn(20, generator=generator, dtype=torch.float64)

    def gradient(mask):
        difference = mask - target
        return 0.5 * difference @ hessian @ difference, hessian @ difference

    def objectives(alpha, start):
        return run(gradient, start, 300, lr=alpha, nu=nu, kappa=kappa, nonnegative=False)[1]

    start = torch.ones(20, dtype=torch.float64)
    largest = float(torch.linalg.eigvalsh(hessian).max())
    alpha = step_size(largest, nu, kappa)
    good = objectives(alpha, start)
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(good))
    bad = objectives(2.6 * alpha, start)
    assert any(after > before for before, after in itertools.pairwise(bad))


def test_lipschitz_is_the_largest_eigenvalue():
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    hessian = root @ root.T
    largest = float(torch.linalg.eigvalsh(hessian).max())
    found = lipschitz(lambda m: hessian @ (m - 1), torch.ones(40, dtype=torch.float64), iterations=60)
    assert found == pytest.approx(largest, rel=0.01)
    with pytest.raises(ValueError, match="NaN or infinite; give lr="):
        lipschitz(lambda m: m * math.nan, torch.ones(4), iterations=2)


def brute_force(a, start, steps, lr, kappa, nu, threshold):
    """The coupled iteration, number by number."""
    m, v, g = list(start), [0.0] * len(a), [0.0] * len(a)
    entry = [-1] * len(a)
    for k in range(1, steps + 1):
        for j in range(len(a)):
            gap = (m[j] - g[j]) / nu
            m[j] -= kappa * lr * (a[j] * (m[j] - 1) + gap)
            v[j] += lr * gap
            g[j] = kappa * math.copysign(max(abs(v[j]) - threshold, 0.0), v[j])
            if g[j] and entry[j] < 0:
                entry[j] = k
    return entry, v


def test_entry_steps_are_exact_and_v_breaks_the_ties():
    lr, kappa, nu, steps = 0.05, 1.5, 2.0, 60
    optimiser, _ = run(quadratic, ones(), steps, lr=lr, kappa=kappa, nu=nu, threshold=1.0)
    entry, v = brute_force(CURVATURES.tolist(), ones().tolist(), steps, lr, kappa, nu, 1.0)
    assert optimiser.entry.tolist() == entry
    assert -1 in entry
    assert max(entry) > 0
    assert np.allclose(optimiser.dual.numpy(), v)
    never = optimiser.entry < 0
    assert CURVATURES[never][optimiser.dual[never].argsort()].tolist() == CURVATURES[never].sort().values.tolist()


def noisy(seed):
    generator = torch.Generator().manual_seed(seed)

    def gradient(mask):
        noise = 0.3 * CURVATURES.sqrt() * torch.randn(len(mask), generator=generator, dtype=torch.float64)
        return 0.0, CURVATURES * (mask - 1) + noise

    return gradient


def order_quality(optimiser):
    """Kendall's tau between importance and (earlier entry, then larger |V|)."""
    keys = list(zip(optimiser.entry.tolist(), optimiser.dual.abs().tolist(), strict=True))
    score = sorted(range(len(keys)), key=lambda i: (keys[i][0] if keys[i][0] > 0 else 10**9, -keys[i][1]))
    place = np.empty(len(keys))
    place[score] = np.arange(len(keys))
    return kendalltau(-place, CURVATURES.numpy()).statistic


@pytest.mark.parametrize(
    "options",
    [
        {"lr": step_size(10.0, 1.0, 1.0), "threshold": 1.5},
        {"lr": 0.2 * step_size(10.0, 1.0, 1.0), "threshold": 1.5, "beta": 0.9},
        {"lr": 0.02, "direction": "adam", "beta": 0.9},
        {"lr": 0.01, "threshold": 1.5, "dual": "nesterov"},
        {"lr": 0.02, "threshold": 1.5, "nonnegative": True},
    ],
    ids=["sgd", "momentum", "adam", "nesterov", "nonnegative"],
)
def test_coupled_order_follows_importance_and_the_released_form_does_not(options):
    coupled, _ = run(noisy(0), ones(), 400, **options)
    released, _ = run(noisy(0), ones(), 400, **(options | {"coupled": False}))
    assert order_quality(coupled) > 0.8
    assert order_quality(released) < 0.5


def test_the_released_form_is_the_repositorys_optimiser():
    """Its loop, written out: Adam without coupling, the new M in Z, Z's step divided by 1 - 0.9^t, eps 1e-4."""
    lr, threshold = 0.05, 0.4
    optimiser, _ = run(
        noisy(1), ones(), 50, lr=lr, threshold=threshold, direction="adam", beta=0.9, coupled=False, nonnegative=True
    )
    gradient, mask = noisy(1), ones()
    m, v, z, gamma = (torch.zeros_like(mask) for _ in range(4))
    entry = torch.full(mask.shape, -1)
    for t in range(1, 51):
        g = gradient(mask)[1]
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        mask = mask - lr / (1 - 0.9**t) * m / ((v / (1 - 0.999**t)).sqrt() + 1e-4)
        z = z + lr / (1 - 0.9**t) * (mask - gamma)
        gamma = torch.relu((1 - threshold / z.abs()).clamp(min=0) * z)
        entry = torch.where((entry < 0) & (gamma > 0), t, entry)
    assert optimiser.entry.tolist() == entry.tolist()
    assert torch.allclose(optimiser.mask, mask)
    assert torch.allclose(optimiser.gamma, gamma)


@pytest.mark.parametrize("nonnegative", [False, True])
def test_group_prox_lets_a_group_enter_as_one(nonnegative):
    """Each group is pulled to 1, but the last, to -1: a twin that stays at least 0 leaves it out."""
    groups, target = torch.arange(40) // 8, ones().where(torch.arange(40) < 32, -1.0)
    optimiser, _ = run(
        lambda mask: (0.0, CURVATURES * (mask - target)), target, 200, lr=0.05, threshold=3.0, groups=groups,
        nonnegative=nonnegative,
    )  # fmt: skip
    duals = (optimiser.dual.clamp(min=0) if nonnegative else optimiser.dual).split(8)
    expected = torch.cat([p * max(0.0, 1 - 3.0 / max(float(p.norm()), 1e-9)) for p in duals])
    assert torch.allclose(optimiser.gamma, expected)
    for part in optimiser.entry.split(8):
        assert len(set(part.tolist())) == 1
    assert len({int(part[0]) for part in optimiser.entry.split(8)}) > 1
    assert bool((optimiser.entry[32:] < 0).all()) == nonnegative


def test_group_prox_is_that_of_the_op():
    """A group's norm leaves out what the projection takes away."""
    dual = 3 * torch.randn(40, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    dual[:8] *= 0.1
    for nonnegative in (False, True):
        optimiser = SplitBregman([ones()], lr=0.1, threshold=5.0, groups=torch.arange(40) // 8, nonnegative=nonnegative)
        optimiser.dual.copy_(dual)
        state = [t.clone() for t in (optimiser.mask, optimiser.dual, optimiser.gamma, optimiser.entry, optimiser.grad)]
        optimiser.step()
        ops.split_bregman_step_(*state, None, 1, 0.1, 1.0, 1.0, 5.0, 0.0, True, nonnegative, group_size=8)
        assert torch.allclose(optimiser.gamma, state[2])
        assert torch.equal(optimiser.entry, state[3])
        assert 0 < int((optimiser.entry > 0).sum()) < 40


def test_kicking_skips_waiting_and_keeps_entry_times():
    a = torch.tensor([4.0, 1.0, 0.5, 0.004], dtype=torch.float64)

    def gradient(mask):
        return 0.0, a * (mask - 1)

    options = {"lr": 0.1, "nu": 1.0, "threshold": 1.5}
    slow, _ = run(gradient, torch.ones(4, dtype=torch.float64), 5000, **options)
    fast, _ = run(gradient, torch.ones(4, dtype=torch.float64), 250, **options, kick=1e-3)
    assert bool((fast.entry > 0).all())
    assert int(slow.entry.max()) > 2 * fast.calls
    assert torch.allclose(fast.entry.double(), slow.entry.double(), rtol=0.05)


def test_dual_adam_moves_v_by_adams_direction():
    optimiser, _ = run(quadratic, ones(), 40, lr=0.01, threshold=0.2, dual="adam")
    mask, v, gamma, m1, m2 = ones(), *(torch.zeros(40, dtype=torch.float64) for _ in range(4))
    for t in range(1, 41):
        gap = mask - gamma
        mask = mask - 0.01 * (CURVATURES * (mask - 1) + gap)
        m1, m2 = 0.9 * m1 + 0.1 * gap, 0.999 * m2 + 0.001 * gap * gap
        v = v + 0.01 * m1 / (1 - 0.9**t) / ((m2 / (1 - 0.999**t)).sqrt() + 1e-8)
        gamma = v.sign() * (v.abs() - 0.2).clamp(min=0)
    assert torch.allclose(optimiser.dual, v)
    assert torch.allclose(optimiser.gamma, gamma)


def test_masks_are_views_of_one_buffer_and_state_continues_exactly():
    def fresh():
        masks = [torch.ones(3, 4), torch.ones(5)]
        options = {"lr": 0.05, "direction": "adam", "beta": 0.9, "dual": "nesterov"}
        return masks, SplitBregman(masks, **options)

    def go(masks, optimiser, steps):
        for _ in range(steps):
            for number, mask in enumerate(masks):
                mask.grad.copy_((number + 1) * (mask - 1) + 0.1)
            optimiser.step()

    masks, optimiser = fresh()
    go(masks, optimiser, 5)
    assert masks[1].data_ptr() == optimiser.mask[12:].data_ptr()
    saved = {name: t.clone() for name, t in optimiser.state_dict().items()}
    go(masks, optimiser, 20)
    again, second = fresh()
    second.load_state_dict(saved)
    go(again, second, 20)
    assert all(torch.equal(second.state_dict()[k], v) for k, v in optimiser.state_dict().items())
    with pytest.raises(ValueError, match="another search"):
        SplitBregman(again, lr=0.1).load_state_dict(saved)


def test_options_that_exclude_one_another():
    with pytest.raises(ValueError, match="got kick with"):
        SplitBregman([torch.ones(2)], lr=0.1, kick=0.1, beta=0.9)
