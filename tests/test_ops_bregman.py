"""The split Bregman step: known answers by hand, an independent Adam, closed-form entry times."""

from __future__ import annotations

import pytest
import torch

from tinycomp import ops


def test_split_bregman_step_by_hand() -> None:
    mask, dual, gamma = torch.tensor([1.0, 1.0]), torch.tensor([0.95, 0.0]), torch.zeros(2)
    entry, grad = torch.full((2,), -1, dtype=torch.int32), torch.tensor([0.5, -0.5])
    ops.split_bregman_step_(mask, dual, gamma, entry, grad, None, 7, 0.1, 2.0, 1.0, 1.0)
    assert torch.allclose(mask, torch.tensor([1 - 0.2 * 1.5, 1 - 0.2 * 0.5]))
    assert torch.allclose(dual, torch.tensor([1.05, 0.1]))
    assert torch.allclose(gamma, torch.tensor([0.1, 0.0]), atol=1e-6)
    assert entry.tolist() == [7, -1]


def test_released_split_bregman_step_by_hand() -> None:
    mask, dual, gamma = torch.tensor([1.0]), torch.tensor([-2.0]), torch.zeros(1)
    entry, grad = torch.full((1,), -1, dtype=torch.int32), torch.tensor([2.0])
    ops.split_bregman_step_(mask, dual, gamma, entry, grad, None, 3, 0.1, 1.0, 1.0, 1.0, 0.0, False, True)
    assert torch.allclose(mask, torch.tensor([0.8]))
    assert torch.allclose(dual, torch.tensor([-1.92]))
    assert (gamma.item(), entry.item()) == (0, -1)


def bregman_state(*shape: int, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    mask, dual, gamma, grad = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(4))
    return [mask, 2 * dual, gamma, torch.full(shape, -1, dtype=torch.int32), grad]


def test_the_adam_step_is_that_of_torch() -> None:
    mask, dual, gamma, entry, grad = bregman_state(9)
    parameter = torch.nn.Parameter(mask.clone())
    optimizer = torch.optim.Adam([parameter], lr=0.1, betas=(0.8, 0.95), eps=1e-6)
    mean, square = torch.zeros_like(mask), torch.zeros_like(mask)
    for step in range(4):
        parameter.grad = grad * (step + 1)
        optimizer.step()
        ops.split_bregman_step_(
            *(mask, dual, gamma, entry, grad * (step + 1), mean, step, 0.1, 1.0, 1.0, 1.0, 0.8, False, False),
            *(square, 0.95, 1e-6),
        )
    assert torch.allclose(mask, parameter.detach())


def test_groups_enter_together_at_their_norm() -> None:
    mask, dual, gamma, entry = torch.zeros(4), torch.tensor([3.0, 4.0, 0.6, 0.8]), torch.zeros(4), torch.full((4,), -1)
    ops.split_bregman_step_(mask, dual, gamma, entry.int(), torch.zeros(4), None, 2, 0.1, 2.0, 1.0, 2.5, group_size=2)
    assert torch.allclose(gamma, torch.tensor([3.0, 4.0, 0.0, 0.0]))


@pytest.mark.parametrize("group_size", [0, 3])
@pytest.mark.parametrize("nonnegative", [False, True])
def test_a_twin_that_is_not_stored_is_the_same(group_size: int, nonnegative: bool) -> None:
    with_twin, without = bregman_state(5, 9), bregman_state(5, 9)
    with_twin[1].zero_(), without[1].zero_(), with_twin[2].zero_()
    support = torch.zeros(6, dtype=torch.uint8)
    for step in range(6):
        for state, gamma in ((with_twin, with_twin[2]), (without, None)):
            mask, dual, _, entry, grad = state
            bits = support if gamma is None else None
            ops.split_bregman_step_(
                *(mask, dual, gamma, entry, grad, None, step, 0.2, 1.0, 1.0, 1.5, 0.0, True, nonnegative),
                *(None, 0.999, 1e-8, group_size, bits),
            )
    assert all(torch.equal(with_twin[i], without[i]) for i in (0, 1, 3))
    inside = with_twin[2].flatten() != 0
    assert 0 < int(inside.sum()) < 45
    assert [bool(support[i // 8] >> (i % 8) & 1) for i in range(48)] == [*inside.tolist(), False, False, False]


def test_views_of_one_flat_buffer_move_in_one_call() -> None:
    apart = [bregman_state(4, 5, seed=1), bregman_state(3, seed=2)]
    flat = [torch.cat([a.flatten(), b.flatten()]) for a, b in zip(*apart, strict=True)]
    for state in (*apart, flat):
        ops.split_bregman_step_(*state, None, 1, 0.1)
    for whole, a, b in zip(flat, *apart, strict=True):
        assert torch.equal(whole, torch.cat([a.flatten(), b.flatten()]))


def test_entry_order_is_by_curvature() -> None:
    """Separable quadratic a (M - 1)²/2: unit j enters near threshold (1 + nu a_j) / a_j in iteration time."""
    a = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    mask, dual, gamma = torch.ones_like(a), torch.zeros_like(a), torch.zeros_like(a)
    entry = torch.full((3,), -1, dtype=torch.int32)
    for step in range(1000):
        ops.split_bregman_step_(mask, dual, gamma, entry, a * (mask - 1), None, step, 0.02, 1.0, 1.0, 1.0)
    expected = (1 + a) / a / 0.02
    assert torch.allclose(entry[1:].double(), expected[1:], rtol=0.3)
    assert entry[2] < entry[1] < entry[0]
