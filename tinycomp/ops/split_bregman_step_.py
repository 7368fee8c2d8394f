"""One step of the split linearised Bregman iteration on masks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinycomp.ops import _checks
from tinycomp.ops._registry import Cost, Op, Sample, define
from tinycomp.ops._sampling import Draw, sliced, transposed

_NAME = "split_bregman_step_"


def split_bregman_step_(
    mask: Tensor,
    dual: Tensor,
    gamma: Tensor,
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
) -> None:
    """Move masks, dual variable and sparse twin by one step, in place, and note when each unit enters the support.

        g = grad;  with momentum: momentum = beta momentum + grad, g = momentum
        coupled:   M' = M - kappa lr (g + (M - G) / nu);  V' = V + (lr / nu) (M - G)
        released:  M' = M - lr g;                         V' = V + (lr / nu) (M' - G)
        G' = kappa sign(V') max(|V'| - threshold, 0), then max(., 0) if nonnegative
        entry = step where it was negative and G' is not zero

    "released" is what the SPP repository runs (no coupling term in M, the new M in V), with grad the Adam direction.

    Args:
        mask: M, float32 or float64, any shape.
        dual: V, as mask.
        gamma: G, as mask.
        entry: int32, as mask in shape; -1 for a unit that has not entered.
        grad: gradient of the loss with respect to the mask, as mask.
        momentum: buffer as mask, or None.
        step: number of this step, at least 0.
        lr: step size alpha, positive.
        kappa: damping of the sparse twin, positive.
        nu: strength of the coupling (large is weak), positive.
        threshold: level lambda of the soft threshold, at least 0.
        beta: momentum coefficient in [0, 1).
        coupled: the published iteration, or the released one.
        nonnegative: project the sparse twin to be at least 0.

    Raises:
        ValueError: shapes differ or a number is out of range.
        TypeError: dtypes are not supported.

    Cost: about 12 FLOPs and 9 numbers moved per unit. Not differentiable.
    Source: DessiLBI, arXiv 2007.02010, and SPP, arXiv 2501.03289.
    """
    _call(
        mask, dual, gamma, entry, grad, momentum, step, lr, kappa, nu, threshold, beta, coupled, nonnegative
    )  # fmt: skip


def _check(
    mask: Tensor,
    dual: Tensor,
    gamma: Tensor,
    entry: Tensor,
    grad: Tensor,
    momentum: Tensor | None,
    step: int,
    lr: float,
    kappa: float,
    nu: float,
    threshold: float,
    beta: float,
    coupled: bool,
    nonnegative: bool,
) -> None:
    _checks.tensor(_NAME, "mask", mask, (torch.float32, torch.float64), min_dim=0)
    for name, value in (("dual", dual), ("gamma", gamma), ("grad", grad), ("momentum", momentum)):
        if value is not None:
            _checks.shaped(_NAME, name, value, tuple(mask.shape), mask)
    _checks.shaped(_NAME, "entry", entry, tuple(mask.shape), mask, (torch.int32,))
    for name, number in (("lr", lr), ("kappa", kappa), ("nu", nu)):
        if not number > 0:
            raise ValueError(f"{_NAME}: {name} is {number}, allowed above 0; choose a positive number")
    if not 0 <= beta < 1 or not threshold >= 0 or step < 0:
        got = f"beta {beta}, threshold {threshold}, step {step}"
        raise ValueError(f"{_NAME}: {got}, allowed 0 <= beta < 1, threshold >= 0, step >= 0; correct them")


def _reference(
    mask: Tensor,
    dual: Tensor,
    gamma: Tensor,
    entry: Tensor,
    grad: Tensor,
    momentum: Tensor | None,
    step: int,
    lr: float,
    kappa: float,
    nu: float,
    threshold: float,
    beta: float,
    coupled: bool,
    nonnegative: bool,
) -> None:
    direction = grad
    if momentum is not None:
        momentum.mul_(beta).add_(grad)
        direction = momentum
    gap = (mask - gamma) / nu
    if coupled:
        mask.sub_(kappa * lr * (direction + gap))
    else:
        mask.sub_(lr * direction)
        gap = (mask - gamma) / nu
    dual.add_(lr * gap)
    gamma.copy_(kappa * dual.sign() * (dual.abs() - threshold).clamp(min=0))
    if nonnegative:
        gamma.clamp_(min=0)
    entry.copy_(torch.where((entry < 0) & (gamma != 0), step, entry))


def _fake(*args) -> None:
    return None


def _cost(mask: Tensor, *args) -> Cost:
    return Cost(12 * mask.numel(), 9 * mask.nbytes)


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
    yield Sample("sliced", (*map(sliced, state(4, 9)), sliced(draw(4, 9)), 3, 0.1, 1.0, 10.0, 1.0, 0.9, True, False))


_call = define(
    Op(
        name=_NAME,
        schema=(
            "(Tensor(a!) mask, Tensor(b!) dual, Tensor(c!) gamma, Tensor(d!) entry, Tensor grad, "
            "Tensor(e!)? momentum, int step, float lr, float kappa=1.0, float nu=1.0, float threshold=1.0, "
            "float beta=0.0, bool coupled=True, bool nonnegative=False) -> ()"
        ),
        check=_check,
        reference=_reference,
        fake=_fake,
        cost=_cost,
        samples=_samples,
    )
)
