"""Triton backend of `split_bregman_step_`: one pass over all state, two where units enter in groups."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinycomp.triton_kernels._launch import kernel_op

# Units per program of the step; units per step of the program that sums a group.
STEP_BLOCK = 1024
GROUP_BLOCK = 128


@triton.jit
def group_factors_kernel(
    dual_ptr, factors_ptr, group_size, kappa, threshold, NONNEGATIVE: tl.constexpr, B: tl.constexpr
):
    """kappa max(1 - threshold / |V|, 0) of one group."""
    group = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((B,), tl.float32)
    for start in range(0, group_size, B):
        i = start + tl.arange(0, B)
        v = tl.load(dual_ptr + group * group_size + i, mask=i < group_size, other=0.0)
        if NONNEGATIVE:
            v = tl.maximum(v, 0.0)
        squares += v * v
    norm = tl.sqrt(tl.sum(squares, 0))
    factor = tl.where(norm <= threshold, 0.0, kappa * (1.0 - threshold / tl.where(norm > 0, norm, 1.0)))
    tl.store(factors_ptr + group, factor)


@triton.jit
def twin_of(v, factors_ptr, group_size, i, inside, kappa, threshold, NONNEGATIVE: tl.constexpr):
    """The sparse twin of V; a unit by itself has no factors."""
    if factors_ptr is None:
        size = tl.maximum(tl.abs(v) - threshold, 0.0)
        twin = tl.where(v > 0, kappa * size, tl.where(v < 0, -kappa * size, 0.0))
    else:
        twin = v * tl.load(factors_ptr + i // group_size, mask=inside, other=0.0)
    if NONNEGATIVE:
        twin = tl.maximum(twin, 0.0)
    return twin


@triton.jit
def split_bregman_kernel(
    mask_ptr,
    dual_ptr,
    gamma_ptr,
    entry_ptr,
    grad_ptr,
    momentum_ptr,
    second_ptr,
    support_ptr,
    factors_ptr,
    count,
    group_size,
    step,
    lr,
    kappa,
    nu,
    threshold,
    beta,
    mix,
    first_correction,
    beta2,
    mix2,
    second_correction,
    eps,
    COUPLED: tl.constexpr,
    NONNEGATIVE: tl.constexpr,
    MOVE: tl.constexpr,
    FINISH: tl.constexpr,
    B: tl.constexpr,
):
    """MOVE changes masks and dual variable, FINISH leaves the twin: groups need their new norms between the two."""
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = i < count
    v = tl.load(dual_ptr + i, mask=inside, other=0.0)
    if MOVE:
        grad = tl.load(grad_ptr + i, mask=inside, other=0.0)
        direction = grad
        if momentum_ptr is not None:
            direction = beta * tl.load(momentum_ptr + i, mask=inside, other=0.0) + mix * grad
            tl.store(momentum_ptr + i, direction, mask=inside)
        if second_ptr is not None:
            squares = beta2 * tl.load(second_ptr + i, mask=inside, other=0.0) + mix2 * grad * grad
            tl.store(second_ptr + i, squares, mask=inside)
            direction = direction * first_correction / (tl.sqrt(squares * second_correction) + eps)
        m = tl.load(mask_ptr + i, mask=inside, other=0.0)
        if gamma_ptr is None:
            g = twin_of(v, factors_ptr, group_size, i, inside, kappa, threshold, NONNEGATIVE)
        else:
            g = tl.load(gamma_ptr + i, mask=inside, other=0.0)
        gap = (m - g) / nu
        if COUPLED:
            m -= kappa * lr * (direction + gap)
        else:
            m -= lr * direction
            gap = (m - g) / nu
        v += lr * gap
        tl.store(mask_ptr + i, m, mask=inside)
        tl.store(dual_ptr + i, v, mask=inside)
    if FINISH:
        g = twin_of(v, factors_ptr, group_size, i, inside, kappa, threshold, NONNEGATIVE)
        if gamma_ptr is not None:
            tl.store(gamma_ptr + i, g, mask=inside)
        entry = tl.load(entry_ptr + i, mask=inside, other=0)
        tl.store(entry_ptr + i, tl.where((entry < 0) & (g != 0), step, entry), mask=inside)
        if support_ptr is not None:
            bits = ((g != 0) & inside).to(tl.int32).reshape(B // 8, 8) << tl.arange(0, 8)[None, :]
            byte = tl.program_id(0).to(tl.int64) * (B // 8) + tl.arange(0, B // 8)
            tl.store(support_ptr + byte, tl.sum(bits, 1).to(tl.uint8), mask=byte * 8 < count)


@kernel_op("split_bregman_step_", mutates=("mask", "dual", "gamma", "entry", "momentum", "second", "support"))
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
    count = mask.numel()
    if count == 0:
        return
    state = (mask, dual, gamma, entry, momentum, second, support)
    flat = [None if t is None else t.contiguous() for t in state]
    _, v, g, *_ = flat
    factors = mask.new_empty(count // group_size) if group_size else None
    adam, after = second is not None, step + 1

    def set_factors() -> None:
        torch.library.wrap_triton(group_factors_kernel)[(count // group_size,)](
            v, factors, group_size, kappa, threshold, NONNEGATIVE=nonnegative, B=GROUP_BLOCK
        )

    def run(move: bool, finish: bool) -> None:
        torch.library.wrap_triton(split_bregman_kernel)[(triton.cdiv(count, STEP_BLOCK),)](
            *flat[:4],
            grad.contiguous(),
            *flat[4:],
            factors,
            count,
            group_size,
            step,
            lr,
            kappa,
            nu,
            threshold,
            beta,
            1 - beta if adam else 1.0,
            1 / (1 - beta**after),
            beta2,
            1 - beta2,
            1 / (1 - beta2**after),
            eps,
            COUPLED=coupled,
            NONNEGATIVE=nonnegative,
            MOVE=move,
            FINISH=finish,
            B=STEP_BLOCK,
        )

    if group_size:
        if g is None:
            set_factors()
        run(True, False)
        set_factors()
        run(False, True)
    else:
        run(True, True)
    for original, changed in zip(state, flat, strict=True):
        if original is not None and changed is not None and not original.is_contiguous():
            original.copy_(changed)
