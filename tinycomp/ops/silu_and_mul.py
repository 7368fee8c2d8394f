"""The activation of a gated feed-forward sublayer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tinycomp.ops import _checks
from tinycomp.ops._registry import Cost, Op, Sample, define
from tinycomp.ops._sampling import Draw, sliced, transposed

_NAME = "silu_and_mul"


def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate sigmoid(gate) in float32 (float64 for float64 inputs), rounded, times `up`, rounded.

    The two roundings are those of transformers' models. It exists for the CPU, where it saves calls and a pass over
    memory; elsewhere the reference runs.

    Args:
        gate: (..., n) floating.
        up: shape and dtype of gate.

    Returns:
        The shape and dtype of gate, contiguous.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: dtypes do not fit.
        RuntimeError: a gradient would be recorded.

    Cost: 5 FLOPs a number (exponential, sum, quotient, two products), one read of both. Not differentiable.
    Source: SwiGLU, arXiv 2002.05202.
    """
    _checks.no_gradient(_NAME, gate, up)
    return _call(gate, up)


def _check(gate: Tensor, up: Tensor) -> None:
    _checks.tensor(_NAME, "gate", gate)
    _checks.shaped(_NAME, "up", up, tuple(gate.shape), gate)


def _reference(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate) * up).contiguous()


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _cost(gate: Tensor, up: Tensor) -> Cost:
    return Cost(5 * gate.numel(), 3 * gate.nbytes)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    draw = Draw(dtype)
    yield Sample("one token", (draw(1, 1, 1536), draw(1, 1, 1536)))
    yield Sample("odd", (draw(3, 5, 33), draw(3, 5, 33)))
    yield Sample("many", (draw(70, 1100), draw(70, 1100)))
    yield Sample("large", (draw(2, 40) * 60, draw(2, 40)))
    yield Sample("vector", (draw(5), draw(5)))
    yield Sample("0rows", (draw(0, 9), draw(0, 9)))
    yield Sample("0columns", (draw(3, 0), draw(3, 0)))
    yield Sample("transposed", (transposed(draw(7, 33)), draw(7, 33)))
    yield Sample("sliced", (sliced(draw(7, 33)), sliced(draw(7, 33))))


_call = define(
    Op(
        name=_NAME,
        schema="(Tensor gate, Tensor up) -> Tensor",
        check=_check,
        reference=_reference,
        fake=_fake,
        cost=_cost,
        samples=_samples,
    )
)
