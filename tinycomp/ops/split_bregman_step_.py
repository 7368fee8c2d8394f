"""One step of the split linearised Bregman iteration on masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinycomp.ops import _checks
from tinycomp.ops._registry import Cost, Op, Sample, define
from tinycomp.ops._sampling import Draw, sliced, transposed

_NAME = "split_bregman_step_"


def split_bregman_step_(
    mask: Tensor,
    dual: Tensor,
    gamma: Tensor | None,
    entry: Tensor,
    grad: Tensor,
    momentum: Tensor | None,
    step: int,
    lr: float,
    kappa: float = 1.0,
    nu: float = 1.0,
    threshold: float = 1.0,
    beta: float = 0.0,
    coupled: bool = True,
    nonnegative: bool = False,
    second: Tensor | None = None,
    beta2: float = 0.999,
    eps: float = 1e-8,
    group_size: int = 0,
    support: Tensor | None = None,
) -> None:
    """Move masks, dual variable and sparse twin by one step, in place, and note when each unit enters the support.

        g = grad;  with momentum: momentum = beta momentum + grad, g = momentum
        with second (Adam): momentum = beta momentum + (1 - beta) grad, second = beta2 second + (1 - beta2) grad²,
            t = step + 1, g = (momentum / (1 - beta^t)) / (sqrt(second / (1 - beta2^t)) + eps)
        coupled:   M' = M - kappa lr (g + (M - G) / nu);  V' = V + (lr / nu) (M - G)
        released:  M' = M - lr g;                         V' = V + (lr / nu) (M' - G)
        G' = kappa sign(V') max(|V'| - threshold, 0), then max(., 0) if nonnegative
        groups:    G' = kappa V' max(1 - threshold / |V'|, 0), |V'| over the group, V' = max(V', 0) if nonnegative
        entry = step where it was negative and G' is not zero

    "released" is what the SPP repository runs, with the Adam direction. Many masks move in one call when they are views
    of one flat buffer.

    Args:
        mask: M, float32 or float64, any shape; dual, gamma, grad, momentum and second are like it.
        dual: V.
        gamma: G. None: computed from V as G' is, and not stored; kappa, threshold, group_size and nonnegative stay.
        entry: int32, mask's shape; -1 for a unit that has not entered.
        grad: gradient of the loss with respect to the mask.
        momentum: buffer, or None.
        step: number of this step, at least 0.
        lr: step size alpha, positive.
        kappa: damping of the sparse twin, positive.
        nu: strength of the coupling (large is weak), positive.
        threshold: level lambda of the soft threshold, at least 0.
        beta: momentum coefficient in [0, 1).
        coupled: the published iteration, or the released one.
        nonnegative: project the sparse twin to be at least 0.
        second: Adam's buffer of squares, with momentum; or None.
        beta2: coefficient of second in [0, 1).
        eps: added to Adam's denominator, positive.
        group_size: adjacent units (row-major) that enter together, a divisor of their number; 0: each by itself.
        support: uint8 (ceil(units / 8),) that receives bit i % 8 of byte i // 8: whether G' of unit i is not zero.

    Raises:
        ValueError, TypeError: shapes differ or a number is out of range; dtypes are not supported.

    Cost: about 12 FLOPs and 9 numbers moved per unit, 7 without gamma. Not differentiable.
    Source: DessiLBI, arXiv 2007.02010, and SPP, arXiv 2501.03289.
    """
    more = (second, beta2, eps, group_size, support)
    _call(mask, dual, gamma, entry, grad, momentum, step, lr, kappa, nu, threshold, beta, coupled, nonnegative, *more)


def _check(*args: Any) -> None:
    mask, dual, gamma, entry, grad, momentum, step, lr, kappa, nu, threshold, beta, *_ = args
    second, beta2, eps, group_size, support = args[14:]
    _checks.tensor(_NAME, "mask", mask, (torch.float32, torch.float64), min_dim=0)
    state = {"dual": dual, "gamma": gamma, "grad": grad, "momentum": momentum, "second": second}
    for name, value in state.items():
        if value is not None:
            _checks.shaped(_NAME, name, value, tuple(mask.shape), mask)
    _checks.shaped(_NAME, "entry", entry, tuple(mask.shape), mask, (torch.int32,))
    if support is not None:
        _checks.shaped(_NAME, "support", support, (-(-mask.numel() // 8),), mask, (torch.uint8,))
    for name, number in (("lr", lr), ("kappa", kappa), ("nu", nu), ("eps", eps)):
        if not number > 0:
            raise ValueError(f"{_NAME}: {name} is {number}, allowed above 0; choose a positive number")
    if not 0 <= beta < 1 or not 0 <= beta2 < 1 or not threshold >= 0 or step < 0:
        got = f"beta {beta}, beta2 {beta2}, threshold {threshold}, step {step}"
        raise ValueError(f"{_NAME}: {got}, allowed 0 <= beta, beta2 < 1, threshold >= 0, step >= 0; correct them")
    if group_size < 0 or (group_size and mask.numel() % group_size):
        allowed = f"0 or a divisor of {mask.numel()}"
        raise ValueError(f"{_NAME}: group_size is {group_size}, allowed {allowed}; choose one")
    if second is not None and momentum is None:
        raise ValueError(f"{_NAME}: got second without momentum, allowed both (Adam) or neither; pass momentum")


def _direction(grad: Tensor, momentum: Tensor | None, second: Tensor | None, step: int, beta: float, beta2: float,
               eps: float) -> Tensor:  # fmt: skip
    """What the masks move against; the buffers are updated."""
    if momentum is None:
        return grad
    if second is None:
        return momentum.mul_(beta).add_(grad)
    momentum.mul_(beta).add_((1 - beta) * grad)
    second.mul_(beta2).add_((1 - beta2) * grad * grad)
    return momentum / (1 - beta ** (step + 1)) / ((second / (1 - beta2 ** (step + 1))).sqrt() + eps)


def _shrink(dual: Tensor, kappa: float, threshold: float, nonnegative: bool, group_size: int) -> Tensor:
    """The sparse twin of V."""
    if group_size == 0:
        twin = kappa * dual.sign() * (dual.abs() - threshold).clamp(min=0)
        return twin.clamp(min=0) if nonnegative else twin
    groups = dual.reshape(-1, group_size)
    groups = groups.clamp(min=0) if nonnegative else groups
    norms = groups.norm(dim=1, keepdim=True)
    return (groups * torch.where(norms <= threshold, 0.0, kappa * (1 - threshold / norms))).reshape(dual.shape)


def _reference(*args: Any) -> None:
    mask, dual, gamma, entry, grad, momentum, step, lr, kappa, nu, threshold, beta, coupled, nonnegative = args[:14]
    second, beta2, eps, group_size, support = args[14:]
    direction = _direction(grad, momentum, second, step, beta, beta2, eps)
    twin = _shrink(dual, kappa, threshold, nonnegative, group_size) if gamma is None else gamma
    gap = (mask - twin) / nu
    if coupled:
        mask.sub_(kappa * lr * (direction + gap))
    else:
        mask.sub_(lr * direction)
        gap = (mask - twin) / nu
    dual.add_(lr * gap)
    twin = _shrink(dual, kappa, threshold, nonnegative, group_size)
    if gamma is not None:
        gamma.copy_(twin)
    inside = twin != 0
    entry.copy_(torch.where((entry < 0) & inside, step, entry))
    if support is not None:
        bits = F.pad(inside.flatten(), (0, -inside.numel() % 8)).reshape(-1, 8)
        support.copy_((bits.to(torch.uint8) << torch.arange(8, device=bits.device)).sum(1))


def _fake(*args) -> None:
    return None


def _cost(mask: Tensor, *args) -> Cost:
    # The least that has to move, where nothing has entered: mask and dual both ways, the gradient, the twin if stored.
    least = 6 if args[1] is not None else 5
    return Cost(12 * mask.numel(), least * mask.nbytes)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    if dtype not in (torch.float32, torch.float64):
        return
    draw = Draw(dtype)

    def state(*shape: int) -> tuple[Tensor, ...]:
        entry = torch.full(shape, -1, dtype=torch.int32)
        return draw(*shape), 2 * draw(*shape), draw(*shape), entry, draw(*shape)

    yield Sample("coupled", (*state(33), None, 3, 0.1, 1.0, 10.0, 1.0, 0.0, True, False))
    yield Sample("momentum", (*state(4, 9), draw(4, 9), 3, 0.1, 2.0, 10.0, 0.5, 0.9, True, False))
    yield Sample("released", (*state(33), None, 3, 0.1, 1.0, 1.0, 1.0, 0.0, False, True))
    yield Sample("empty", (*state(0), None, 0, 0.1, 1.0, 1.0, 1.0, 0.0, True, False))
    yield Sample("transposed", (*map(transposed, state(4, 9)), None, 3, 0.1, 1.0, 10.0, 1.0, 0.0, True, False))
    adam = (*state(4, 9), draw(4, 9), 3, 0.1, 2.0, 10.0, 0.5, 0.9, True, False, draw(4, 9).abs(), 0.99, 1e-6)
    yield Sample("adam", (*adam, 0, None))
    yield Sample("groups", (*state(70, 9), None, 3, 0.1, 1.0, 10.0, 2.0, 0.0, True, False, None, 0.9, 1e-8, 9, None))
    mask, dual, _, entry, grad = state(33)
    recomputed = (mask, dual, None, entry, grad)
    bits = torch.full((5,), 255, dtype=torch.uint8)
    yield Sample("no-gamma", (*recomputed, None, 3, 0.1, 1.0, 10.0, 1.0, 0.0, True, True, None, 0.9, 1e-8, 0, bits))
    yield Sample(
        "no-gamma-groups",
        (*recomputed, None, 3, 0.1, 1.0, 10.0, 1.0, 0.0, False, True, None, 0.9, 1e-8, 3, sliced(bits)),
    )
    yield Sample("sliced", (*map(sliced, state(4, 9)), sliced(draw(4, 9)), 3, 0.1, 1.0, 10.0, 1.0, 0.9, True, False))


_call = define(
    Op(
        name=_NAME,
        schema=(
            "(Tensor(a!) mask, Tensor(b!) dual, Tensor(c!)? gamma, Tensor(d!) entry, Tensor grad, "
            "Tensor(e!)? momentum, int step, float lr, float kappa=1.0, float nu=1.0, float threshold=1.0, "
            "float beta=0.0, bool coupled=True, bool nonnegative=False, Tensor(f!)? second=None, float beta2=0.999, "
            "float eps=1e-08, int group_size=0, Tensor(g!)? support=None) -> ()"
        ),
        check=_check,
        reference=_reference,
        fake=_fake,
        cost=_cost,
        samples=_samples,
    )
)
