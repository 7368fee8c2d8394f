"""Linear layer that uses a prefix of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tinycomp.ops import _checks
from tinycomp.ops._registry import Cost, Op, Sample, define
from tinycomp.ops._sampling import Draw, sliced, transposed

_NAME = "sliced_linear"


def sliced_linear(x: Tensor, w: Tensor, bias: Tensor | None, in_features: int, out_features: int) -> Tensor:
    """Multiply by the upper left corner of a weight: y = x[..., :in] w[:out, :in]ᵀ + bias[:out].

    Args:
        x: (..., at least in_features) float32, bfloat16, float16 or float64.
        w: (at least out_features, at least in_features), the dtype of x.
        bias: (rows of w,) or None.
        in_features: inputs used.
        out_features: outputs computed.

    Returns:
        (..., out_features) in the dtype of x.

    Raises:
        ValueError: a prefix is longer than what it is taken from.
        TypeError: dtypes differ or are not supported.

    Cost: 2 M in_features out_features FLOPs.
    """
    return _call(x, w, bias, in_features, out_features)


def _check(x: Tensor, w: Tensor, bias: Tensor | None, in_features: int, out_features: int) -> None:
    _checks.tensor(_NAME, "x", x)
    _checks.shaped(_NAME, "w", w, (None, None), x)
    for name, got, most in (
        ("in_features", in_features, min(x.shape[-1], w.shape[1])),
        ("out_features", out_features, w.shape[0]),
    ):
        if not 0 <= got <= most:
            raise ValueError(f"{_NAME}: {name} is {got}, allowed 0..{most}; take a shorter prefix")
    _checks.bias(_NAME, bias, w.shape[0], x)


def _reference(x: Tensor, w: Tensor, bias: Tensor | None, in_features: int, out_features: int) -> Tensor:
    cut = None if bias is None else bias[:out_features]
    return F.linear(x[..., :in_features], w[:out_features, :in_features], cut)


def _fake(x: Tensor, w: Tensor, bias: Tensor | None, in_features: int, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _backward(args: Sequence, needs: Sequence[bool], gy: Tensor) -> tuple[Tensor | None, ...]:
    x, w, bias, k, n = args
    gy2 = _checks.as_matrix(gy)
    gx, gw, gb = None, None, None
    if needs[0]:
        gx = F.pad(gy @ w[:n, :k], (0, x.shape[-1] - k))
    if needs[1]:
        gw = F.pad(gy2.t() @ _checks.as_matrix(x[..., :k]), (0, w.shape[1] - k, 0, w.shape[0] - n))
    if needs[2]:
        gb = F.pad(gy2.sum(0), (0, bias.shape[0] - n))
    return gx, gw, gb, None, None


def _cost(x: Tensor, w: Tensor, bias: Tensor | None, in_features: int, out_features: int) -> Cost:
    rows = x.numel() // max(x.shape[-1], 1)
    moved = rows * (in_features + out_features) + in_features * out_features + (0 if bias is None else out_features)
    return Cost(2 * rows * in_features * out_features, moved * x.element_size())


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    draw = Draw(dtype)
    yield Sample("whole", (draw(1, 64), draw(48, 64), draw(48), 64, 48))
    yield Sample("odd", (draw(2, 3, 33), draw(48, 64), None, 33, 41))
    yield Sample("narrower-than-x", (draw(5, 41), draw(48, 41), draw(48), 33, 7))
    yield Sample("2KiB-rows", (draw(20, 512), draw(48, 520), draw(48), 512, 41))
    yield Sample("hundreds-of-rows", (draw(260, 41), draw(48, 41), draw(48), 33, 7))
    yield Sample("no-inputs", (draw(260, 41), draw(48, 41), draw(48), 0, 41))
    yield Sample("no-inputs-1row", (draw(1, 41), draw(48, 41), None, 0, 41))
    yield Sample("no-outputs", (draw(5, 33), draw(48, 64), draw(48), 33, 0))
    yield Sample("0rows", (draw(0, 33), draw(48, 64), draw(48), 33, 41))
    yield Sample("transposed", (transposed(draw(5, 33)), transposed(draw(48, 64)), draw(48), 33, 41))
    yield Sample("sliced", (sliced(draw(5, 33)), sliced(draw(48, 64)), sliced(draw(48)), 33, 41))


_call = define(
    Op(
        name=_NAME,
        schema="(Tensor x, Tensor w, Tensor? bias, int in_features, int out_features) -> Tensor",
        check=_check,
        reference=_reference,
        fake=_fake,
        cost=_cost,
        samples=_samples,
        backward=_backward,
        autocast=(0, 1, 2),
    )
)
