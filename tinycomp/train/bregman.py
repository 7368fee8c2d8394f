"""Split linearised Bregman iteration: masks, their sparse twins, and the step at which every unit enters.

Minimises L(M) + |M - G|² / (2 nu) by mirror descent that starts with the twin G = 0. Units enter G's support one after
another, the important ones first: a separable L = sum a_j (M_j - 1)² / 2 lets unit j enter at the time
t_j = lambda (1 + nu a_j) / a_j (steps times step size, large kappa).

Source: DessiLBI, arXiv 2007.02010; SPP, arXiv 2501.03289 and its repository ("released"); dual extrapolation: Huang,
Ma, Goldfarb 2013; AdaBreg: Bungert et al., JMLR 2022; kicking: Osher et al. 2010.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tinycomp import ops

ADAM = {"sgd": 1e-8, "released": 1e-4}  # eps of the repository's Adam is 1e-4
Direction = Literal["sgd", "adam"]
Dual = Literal["plain", "nesterov", "adam"]


def step_size(lipschitz: float, nu: float, kappa: float) -> float:
    """alpha = 0.5 · 2 / (kappa (Lip + 1/nu)): half of the largest step for which the objective must decrease.

    Args:
        lipschitz: of the gradient of L with respect to the masks.
        nu: strength of the coupling.
        kappa: damping of the sparse twin.
    """
    return 1.0 / (kappa * (lipschitz + 1.0 / nu))


def lipschitz(gradient: Callable[[Tensor], Tensor], at: Tensor, iterations: int = 6, seed: int = 0) -> float:
    """Largest |eigenvalue| of the Hessian of L at `at`, by power iteration on central differences of its gradient.

    H v ~ (g(M + e v) - g(M - e v)) / (2 e). An estimate from below, as power iteration is.

    Args:
        gradient: from masks, float (n,), to the gradient there; deterministic.
        at: (n,).
        iterations: two gradients each.
        seed: of the start vector.

    Raises:
        ValueError: the gradient is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(len(at), generator=generator).to(at)
    vector /= vector.norm()
    difference = 0.01 * max(float(at.norm()), 1e-3)
    largest = 0.0
    for _ in range(iterations):
        product = (gradient(at + difference * vector) - gradient(at - difference * vector)) / (2 * difference)
        largest = float(product.norm())
        if not math.isfinite(largest):
            raise ValueError("Lipschitz estimate: the gradient of the loss is NaN or infinite; give lr= instead")
        if largest == 0.0:
            break
        vector = product / largest
    return largest


class SplitBregman:
    """The optimiser: one call of `ops.split_bregman_step_` moves all masks, which become views of one flat buffer.

        coupled:   M' = M - kappa lr (d + (M - G)/nu);  V' = V + (lr/nu)(M - G);   G' = kappa shrink(V', lambda)
        released:  M' = M - lr d;                       V' = V + (lr/nu)(M' - G);  G' = kappa shrink(V', lambda)

    d is the gradient ("sgd", with momentum beta), or Adam's direction. Adam with the coupled form normalises the whole
    g + (M - G)/nu, so that its resting point is that of the gradient; with the released form it is the repository's.

    Args:
        masks: leaf tensors, all of one floating dtype; their storage moves into the flat buffer, their `grad` too.
        lr: step size alpha; see `step_size`.
        kappa: damping of the twin: G = kappa shrink(V).
        nu: strength of the coupling, large is weak.
        threshold: lambda. Units of no importance at all gather 1/kappa, so it must be above that to leave them out.
        direction: "sgd" or "adam".
        beta: momentum in [0, 1), of both directions.
        coupled: the published iteration, or the released one.
        nonnegative: keep G at least 0.
        groups: int64 (n,), numbers of groups that enter together: G = kappa V max(0, 1 - lambda / |V_group|_2).
        dual: "plain"; "nesterov" extrapolates V by (k - 1)/(k + 2) of its last change; "adam" (AdaBreg) moves V by
            Adam's direction of (M - G)/nu, which makes the V of all units equally fast at first.
        kick: when no mask and no twin moved by more than this, V jumps to just before the next entry, and the step
            number with it; 0 never does.

    Raises:
        ValueError: numbers out of range, or options that exclude one another.
    """

    def __init__(
        self, masks: Sequence[Tensor], *, lr: float, kappa: float = 1.0, nu: float = 1.0, threshold: float = 1.0,
        direction: Direction = "sgd", beta: float = 0.0, coupled: bool = True, nonnegative: bool = False,
        groups: Tensor | None = None, dual: Dual = "plain", kick: float = 0.0,
    ):  # fmt: skip
        if kick and (groups is not None or dual != "plain" or beta or direction != "sgd"):
            raise ValueError("SplitBregman: got kick with groups, momentum, adam or another dual; allowed without them")
        self.lr, self.kappa, self.nu, self.threshold, self.beta = lr, kappa, nu, threshold, beta
        self.direction, self.dual_rule, self.coupled, self.nonnegative = direction, dual, coupled, nonnegative
        self.groups, self.kick, self.steps, self.calls = groups, kick, 0, 0
        self.mask = torch.cat([m.detach().flatten() for m in masks])
        self.grad, self.dual, self.gamma = (torch.zeros_like(self.mask) for _ in range(3))
        self.entry = torch.full_like(self.mask, -1, dtype=torch.int32)
        moments = {"first": direction == "adam" or beta > 0, "second": direction == "adam"}
        moments |= {"dual_first": dual != "plain", "dual_second": dual == "adam"}
        self.moments = {name: torch.zeros_like(self.mask) for name, there in moments.items() if there}
        place = 0
        for m in masks:
            m.data = self.mask[place : place + m.numel()].view(m.shape)
            m.grad = self.grad[place : place + m.numel()].view(m.shape)
            place += m.numel()

    def zero_grad(self) -> None:
        self.grad.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """One step from the masks' gradients; entry steps count from 1."""
        self.steps += 1
        self.calls += 1
        direction, lr, buffer = self._direction()
        plain = self.groups is None and self.dual_rule == "plain"
        before = [t.clone() for t in (self.mask, self.gamma)] if self.kick else []
        old = None if plain else self.dual.clone()
        ops.split_bregman_step_(
            self.mask, self.dual, self.gamma, self.entry, direction, buffer, self.steps, lr, self.kappa, self.nu,
            self.threshold if plain else math.inf, self.beta if buffer is not None else 0.0, self.coupled,
            self.nonnegative,
        )  # fmt: skip
        if old is not None:
            self._move_dual(old, lr)
            self._shrink()
        if self.kick:
            self._jump(*before)

    def _direction(self) -> tuple[Tensor, float, Tensor | None]:
        """(direction, step size, the op's momentum buffer)."""
        if self.direction == "sgd":
            return self.grad, self.lr, self.moments.get("first")
        gap = (self.mask - self.gamma) / self.nu
        total = self.grad + gap if self.coupled else self.grad
        first, second = self.moments["first"], self.moments["second"]
        first.lerp_(total, 1 - self.beta)
        second.mul_(0.999).addcmul_(total, total, value=1 - 0.999)
        unbiased = (second / (1 - 0.999**self.calls)).sqrt()
        correction = 1 - self.beta**self.calls
        if self.coupled:
            return first / correction / unbiased.add_(ADAM["sgd"]) - gap, self.lr, None
        return first / unbiased.add_(ADAM["released"]), self.lr / correction, None

    def _move_dual(self, old: Tensor, lr: float) -> None:
        """Replace the op's plain change of V by the accelerated one."""
        if self.dual_rule == "nesterov":  # `old` is the extrapolated V; dual_first holds the V behind it
            new = self.dual.clone()
            self.dual.add_(new - self.moments["dual_first"], alpha=(self.calls - 1) / (self.calls + 2))
            self.moments["dual_first"].copy_(new)
        elif self.dual_rule == "adam":
            change = (self.dual - old) / lr
            first, second = self.moments["dual_first"], self.moments["dual_second"]
            first.lerp_(change, 0.1)
            second.mul_(0.999).addcmul_(change, change, value=1 - 0.999)
            speed = (second / (1 - 0.999**self.calls)).sqrt_().add_(1e-8)
            self.dual.copy_(old).addcdiv_(first, speed, value=lr / (1 - 0.9**self.calls))

    def _shrink(self) -> None:
        """G and the entry steps from V, for what the op does not know: groups, and a V moved after it."""
        dual = self.dual.clamp(min=0) if self.nonnegative else self.dual  # negative ones do not let their group enter
        if self.groups is None:
            size = dual.abs()
        else:
            squares = torch.zeros(int(self.groups.max()) + 1, dtype=dual.dtype, device=dual.device)
            size = squares.index_add_(0, self.groups, dual.square()).sqrt_()[self.groups]
        factor = (1 - self.threshold / size.clamp(min=1e-30)).clamp_(min=0)
        torch.mul(dual, self.kappa * factor, out=self.gamma)
        self.entry.masked_fill_((self.entry < 0) & (self.gamma != 0), self.steps)

    def _jump(self, mask: Tensor, gamma: Tensor) -> None:
        if max(float((self.mask - mask).abs().max()), float((self.gamma - gamma).abs().max())) > self.kick:
            return
        rate = (self.lr / self.nu) * (self.mask - self.gamma)
        outside = (self.gamma == 0) & (rate != 0)
        if self.nonnegative:
            outside &= rate > 0
        left = (self.threshold - rate.sign() * self.dual) / rate.abs()
        steps = math.floor(float(left[outside].min())) if bool(outside.any()) else 0
        if steps > 0:
            self.dual.add_(rate.masked_fill(~outside, 0.0), alpha=steps)
            self.steps += steps

    def objective(self, loss: float) -> float:
        """L + |M - G|² / (2 nu)."""
        return loss + float((self.mask - self.gamma).square().sum()) / (2 * self.nu)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, as tensors."""
        counts = torch.tensor([self.steps, self.calls])
        state = {"mask": self.mask, "dual": self.dual, "gamma": self.gamma, "entry": self.entry, "counts": counts}
        return state | self.moments

    def load_state_dict(self, state: dict[str, Any]) -> None:
        mine = self.state_dict()
        if state.keys() != mine.keys() or any(state[k].shape != mine[k].shape for k in mine):
            raise ValueError("SplitBregman: got the state of another search, allowed one of the same masks and options")
        for name, tensor in mine.items():
            tensor.copy_(state[name])
        self.steps, self.calls = (int(n) for n in state["counts"])
