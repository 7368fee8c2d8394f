"""Root mean square normalisation of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinycomp.ops import _checks
from tinycomp.ops._registry import Cost, Op, Sample, define
from tinycomp.ops._sampling import Draw, sliced, transposed

_NAME = "rms_norm"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) in float32 (float64 for float64 inputs), rounded, times the weight, rounded.

    The two roundings are those of transformers' Llama and most other models. It exists for the CPU, where they take
    eight calls for it; elsewhere the reference runs.

    Args:
        x: (..., n) floating.
        weight: (n,), dtype of x.
        eps: what is added to the mean.

    Returns:
        The shape and dtype of x, contiguous.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: dtypes do not fit.
        RuntimeError: a gradient would be recorded.

    Cost: 4 FLOPs a number, one read of x and weight. Not differentiable.
    Source: arXiv 1910.07467.
    """
    _checks.no_gradient(_NAME, x, weight)
    return _call(x, weight, eps)


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    _checks.tensor(_NAME, "x", x)
    _checks.shaped(_NAME, "weight", weight, (x.shape[-1],), x)


def _reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * normal.to(x.dtype)).contiguous()


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _cost(x: Tensor, weight: Tensor, eps: float) -> Cost:
    return Cost(4 * x.numel(), 2 * x.nbytes + weight.nbytes)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    draw = Draw(dtype)
    yield Sample("one token", (draw(1, 1, 576), draw(576), 1e-5))
    yield Sample("odd", (draw(3, 5, 33), draw(33), 1e-6))
    yield Sample("many", (draw(70, 1100), draw(1100), 1e-6))
    yield Sample("zeros", (torch.zeros(2, 16, dtype=dtype), draw(16), 1e-6))
    yield Sample("0rows", (draw(0, 9), draw(9), 1e-6))
    yield Sample("0columns", (draw(3, 0), draw(0), 1e-6))
    yield Sample("transposed", (transposed(draw(7, 33)), draw(33), 1e-6))
    yield Sample("sliced", (sliced(draw(7, 33)), sliced(draw(33)), 1e-6))


_call = define(
    Op(
        name=_NAME,
        schema="(Tensor x, Tensor weight, float eps) -> Tensor",
        check=_check,
        reference=_reference,
        fake=_fake,
        cost=_cost,
        samples=_samples,
    )
)
