"""Triton backend of `split_bregman_step_`: one pass over all state."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinycomp.triton_kernels._launch import kernel_op

STEP_BLOCK = 1024


@triton.jit
def split_bregman_kernel(
    mask_ptr,
    dual_ptr,
    gamma_ptr,
    entry_ptr,
    grad_ptr,
    momentum_ptr,
    count,
    step,
    lr,
    kappa,
    nu,
    threshold,
    beta,
    COUPLED: tl.constexpr,
    NONNEGATIVE: tl.constexpr,
    B: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = i < count
    direction = tl.load(grad_ptr + i, mask=inside, other=0.0)
    if momentum_ptr is not None:
        direction = beta * tl.load(momentum_ptr + i, mask=inside, other=0.0) + direction
        tl.store(momentum_ptr + i, direction, mask=inside)
    m = tl.load(mask_ptr + i, mask=inside, other=0.0)
    g = tl.load(gamma_ptr + i, mask=inside, other=0.0)
    gap = (m - g) / nu
    if COUPLED:
        m -= kappa * lr * (direction + gap)
    else:
        m -= lr * direction
        gap = (m - g) / nu
    v = tl.load(dual_ptr + i, mask=inside, other=0.0) + lr * gap
    size = tl.maximum(tl.abs(v) - threshold, 0.0)
    g = tl.where(v > 0, kappa * size, tl.where(v < 0, -kappa * size, 0.0))
    if NONNEGATIVE:
        g = tl.maximum(g, 0.0)
    entry = tl.load(entry_ptr + i, mask=inside, other=0)
    tl.store(mask_ptr + i, m, mask=inside)
    tl.store(dual_ptr + i, v, mask=inside)
    tl.store(gamma_ptr + i, g, mask=inside)
    tl.store(entry_ptr + i, tl.where((entry < 0) & (g != 0), step, entry), mask=inside)


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
    state = (mask, dual, gamma, entry, momentum)
    flat = [None if t is None else t.contiguous() for t in state]
    torch.library.wrap_triton(split_bregman_kernel)[(triton.cdiv(count, STEP_BLOCK),)](
        *flat[:4],
        grad.contiguous(),
        flat[4],
        count,
        step,
        lr,
        kappa,
        nu,
        threshold,
        beta,
        COUPLED=coupled,
        NONNEGATIVE=nonnegative,
        B=STEP_BLOCK,
    )
    for original, changed in zip(state, flat, strict=True):
        if original is not None and changed is not None and not original.is_contiguous():
            original.copy_(changed)
