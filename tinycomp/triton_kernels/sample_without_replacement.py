"""Triton backend of `sample_without_replacement`: finishing times, then torch's stable sort."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinycomp.triton_kernels._launch import kernel_op

RACE_BLOCK = 256


@triton.jit
def race_kernel(p_ptr, stride, finish_ptr, count, seed, B: tl.constexpr):
    """-log(u_i) / p_i, operation by operation as the reference; compiled without fused multiply-add."""
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    mask = 0xFFFFFFFF
    c0 = i.to(tl.uint64) & mask
    c1 = i.to(tl.uint64) >> 32
    c2 = tl.zeros((B,), tl.uint64)
    c3 = tl.zeros((B,), tl.uint64)
    k0 = tl.load(seed).to(tl.uint64) & mask
    k1 = tl.load(seed).to(tl.uint64) >> 32
    for _ in tl.static_range(10):
        first = c0 * 0xD2511F53
        second = c2 * 0xCD9E8D57
        c0 = (second >> 32) ^ c1 ^ k0
        c1 = second & mask
        c2 = (first >> 32) ^ c3 ^ k1
        c3 = first & mask
        k0 = (k0 + 0x9E3779B9) & mask
        k1 = (k1 + 0xBB67AE85) & mask
    bits = (c1 << 20) | (c0 >> 12)
    u = (bits.to(tl.int64).to(tl.float64) + 0.5) * 2.220446049250313e-16
    # u = m 2^e with m in [1/2, 1): the exponent field, and the number with that of 1/2 in its place.
    word = u.to(tl.int64, bitcast=True)
    e = ((word >> 52) - 1022).to(tl.float64)
    m = ((word & 0xFFFFFFFFFFFFF) | 0x3FE0000000000000).to(tl.float64, bitcast=True)
    small = m < 0.7071067811865476
    m = tl.where(small, m * 2.0, m)
    e = tl.where(small, e - 1.0, e)
    s = (m - 1.0) / (m + 1.0)
    square = s * s
    series = tl.zeros((B,), tl.float64)
    one = tl.full((B,), 1.0, tl.float64)
    for j in tl.static_range(13):
        series = (series + one / (27 - 2 * j)) * square
    log_m = 2.0 * s + 2.0 * s * series
    minus_log = -(e * 6.93147180369123816490e-01 + (log_m + e * 1.90821492927058770002e-10))
    p = tl.load(p_ptr + i * stride, mask=i < count, other=0.0).to(tl.float64)
    finish = tl.where(p > 0, minus_log / tl.where(p > 0, p, 1.0), float("inf"))
    tl.store(finish_ptr + i, finish, mask=i < count)


@kernel_op("sample_without_replacement")
def sample_without_replacement(probabilities: Tensor, k: int, seed: int) -> Tensor:
    count = probabilities.shape[0]
    finish = probabilities.new_empty(count, dtype=torch.float64)
    if count:
        key = torch.full((1,), seed, dtype=torch.int64, device=probabilities.device)
        torch.library.wrap_triton(race_kernel)[(triton.cdiv(count, RACE_BLOCK),)](
            probabilities, probabilities.stride(0), finish, count, key, B=RACE_BLOCK, enable_fp_fusion=False
        )
    return finish.sort(stable=True).indices[:k].clone()
