"""Seeded successive sampling without replacement, the same on every backend."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinycomp.ops import _checks
from tinycomp.ops._registry import Cost, Op, Sample, define
from tinycomp.ops._sampling import Draw, sliced

_NAME = "sample_without_replacement"
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_LOG_TERMS = 14


def sample_without_replacement(probabilities: Tensor, k: int, seed: int) -> Tensor:
    """Draw k distinct items, each next one with probability proportional to its weight among those left.

    Exponential races: item i finishes at -log(u_i) / p_i, and the first k to finish are drawn, in that order. u_i comes
    from Philox4x32-10 with key `seed` and counter i. Only IEEE additions, products and quotients in float64 are used,
    the logarithm included, so that every backend draws the same items.

    Args:
        probabilities: (n,) floating, at least 0, of any positive sum (only ratios matter).
        k: number of items; at most the number of positive probabilities.
        seed: any 64-bit integer.

    Returns:
        int64 (k,) in the order of drawing.

    Raises:
        ValueError: NaN, infinite or negative probabilities, or k above the number of positive ones.
        TypeError: the dtype is not supported.

    Cost: about 100 n operations and one sort. Not differentiable.
    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011; Efraimidis and Spirakis, 2006.
    """
    return _call(probabilities, k, seed)


def _check(probabilities: Tensor, k: int, seed: int) -> None:
    _checks.tensor(_NAME, "probabilities", probabilities)
    _checks.shaped(_NAME, "probabilities", probabilities, (None,), probabilities)
    most = probabilities.shape[0]
    if _checks.concrete(probabilities):
        if not bool((probabilities.isfinite() & (probabilities >= 0)).all()):
            raise ValueError(
                f"{_NAME}: probabilities hold NaN, infinite or negative values, allowed at least 0; repair them"
            )
        most = int((probabilities > 0).sum())
    if not 0 <= k <= most:
        raise ValueError(f"{_NAME}: k is {k}, allowed 0..{most} (the number of positive probabilities); lower k")


def _philox(counter: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Words 0 and 1 of Philox4x32-10 at counter (counter, 0, 0) and key `seed`, as int64 holding 32 bits."""
    c0, c1 = counter & _MASK, counter >> 32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(c0, _PHILOX_MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & _MASK, (k1 + _PHILOX_KEY_STEPS[1]) & _MASK
    return c0, c1


def _multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 by 32 bit product, by halves so that int64 never overflows."""
    low, high = a * (constant & 0xFFFF), a * (constant >> 16)
    carry = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (carry >> 16), ((carry & 0xFFFF) << 16) | (low & 0xFFFF)


def _minus_log(u: Tensor) -> Tensor:
    """-log(u) for u in (0, 1) from 2 atanh((m - 1) / (m + 1)), u = m 2^e, sqrt(1/2) <= m < sqrt(2)."""
    mantissa, exponent = torch.frexp(u)
    small = mantissa < 0.70710678118654752440
    mantissa = torch.where(small, mantissa * 2.0, mantissa)
    exponent = torch.where(small, exponent - 1, exponent).to(torch.float64)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    series = torch.zeros_like(s)
    for i in range(_LOG_TERMS - 1, 0, -1):
        series = (series + 1.0 / (2 * i + 1)) * square
    log_m = 2.0 * s + 2.0 * s * series
    return -(exponent * _LN2_HIGH + (log_m + exponent * _LN2_LOW))


def finishing_times(probabilities: Tensor, seed: int) -> Tensor:
    """float64 (n,): when each item finishes its race, infinity for those of probability zero."""
    index = torch.arange(probabilities.shape[0], device=probabilities.device)
    word0, word1 = _philox(index, seed)
    uniform = (((word1 << 20) | (word0 >> 12)).to(torch.float64) + 0.5) * 2.0**-52
    p = probabilities.to(torch.float64)
    return torch.where(p > 0, _minus_log(uniform) / p, float("inf"))


def _reference(probabilities: Tensor, k: int, seed: int) -> Tensor:
    return finishing_times(probabilities, seed).sort(stable=True).indices[:k]


def _fake(probabilities: Tensor, k: int, seed: int) -> Tensor:
    return probabilities.new_empty(k, dtype=torch.int64)


def _cost(probabilities: Tensor, k: int, seed: int) -> Cost:
    return Cost(100 * probabilities.numel(), probabilities.nbytes + 8 * k)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    draw = Draw(dtype)
    yield Sample("some", (draw.positive(64), 10, 0))
    yield Sample("all", (draw.positive(33), 33, 2**63 - 1))
    yield Sample("with-zeros", (torch.cat([draw.positive(20), torch.zeros(13, dtype=dtype)]), 20, 7))
    yield Sample("none", (draw.positive(5), 0, 1))
    yield Sample("empty", (draw.positive(0), 0, 1))
    yield Sample("sliced", (sliced(draw.positive(41)), 7, -1))


_call = define(
    Op(
        name=_NAME,
        schema="(Tensor probabilities, int k, int seed) -> Tensor",
        check=_check,
        reference=_reference,
        fake=_fake,
        cost=_cost,
        samples=_samples,
    )
)
