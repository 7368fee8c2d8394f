"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinycomp.ops import _checks
from tinycomp.ops._registry import Cost, Op, Sample, define
from tinycomp.ops._sampling import Draw, sliced, transposed

_NAME = "rotary_embedding"


def rotary_embedding(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x cos + rotate(x) sin for the first r numbers of each head, each product and the sum rounded; the others stay.

    rotate(x) is (-x[r/2:r], x[:r/2]). The roundings are those of transformers' Llama and most other models. It exists
    for the CPU, where they take 14 calls for it; elsewhere the reference runs.

    Args:
        q: (batch, heads, tokens, d) floating.
        k: (batch, kv_heads, tokens, d), dtype of q.
        cos: (batch or 1, tokens, r), r even and at most d, dtype of q.
        sin: shape and dtype of cos.

    Returns:
        The shapes and the dtype of q and k, contiguous.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: dtypes do not fit.
        RuntimeError: a gradient would be recorded.

    Cost: 3 FLOPs for each of the first r numbers, one read of everything. Not differentiable.
    Source: arXiv 2104.09864, with halves instead of neighbours as in GPT-NeoX (arXiv 2204.06745).
    """
    _checks.no_gradient(_NAME, q, k, cos, sin)
    return _call(q, k, cos, sin)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    _checks.tensor(_NAME, "q", q)
    _checks.shaped(_NAME, "q", q, (None,) * 4, q)
    batch, _, tokens, d = q.shape
    _checks.shaped(_NAME, "k", k, (batch, None, tokens, d), q)
    _checks.shaped(_NAME, "cos", cos, (None, tokens, None), q)
    _checks.shaped(_NAME, "sin", sin, tuple(cos.shape), q)
    rows, _, r = cos.shape
    if rows not in (1, batch) or r % 2 or r > d:
        raise ValueError(
            f"{_NAME}: cos has shape {tuple(cos.shape)}, allowed ({batch} or 1, {tokens}, an even number up to {d}); "
            "check which is which"
        )


def _reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    r, c, s = cos.shape[-1], cos.unsqueeze(1), sin.unsqueeze(1)

    def turned(x: Tensor) -> Tensor:
        first, second, rest = x.split([r // 2, r // 2, x.shape[-1] - r], -1)
        ahead = torch.cat([first, second], -1) * c + torch.cat([-second, first], -1) * s
        return torch.cat([ahead, rest], -1).contiguous()

    return turned(q), turned(k)


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _cost(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Cost:
    heads, turned = q.shape[1] + k.shape[1], q.shape[0] * q.shape[2] * cos.shape[2]
    return Cost(3 * heads * turned, 2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    draw = Draw(dtype)
    yield Sample("one token", (draw(1, 9, 1, 64), draw(1, 3, 1, 64), draw(1, 1, 64), draw(1, 1, 64)))
    prompt = draw(2, 4, 21, 12), draw(2, 2, 21, 12), draw(1, 21, 12), draw(1, 21, 12)
    yield Sample("prompt", prompt)
    yield Sample("padded", (*prompt[:2], draw(2, 21, 12), draw(2, 21, 12)))
    part = draw(2, 3, 5, 7), draw(2, 1, 5, 7), draw(2, 5, 2), draw(2, 5, 2)
    yield Sample("part of a head", part)
    yield Sample("nothing turned", (*part[:2], draw(1, 5, 0), draw(1, 5, 0)))
    yield Sample("0tokens", (draw(2, 3, 0, 8), draw(2, 1, 0, 8), draw(1, 0, 8), draw(1, 0, 8)))
    yield Sample("0heads", (draw(2, 0, 3, 8), draw(2, 1, 3, 8), draw(1, 3, 8), draw(1, 3, 8)))
    heads_inside = tuple(draw(2, 21, h, 12).transpose(1, 2) for h in (4, 2))
    yield Sample("as models have it", (*heads_inside, *prompt[2:]))
    yield Sample("transposed", tuple(transposed(t) for t in prompt))
    yield Sample("sliced", tuple(sliced(t) for t in part))


_call = define(
    Op(
        name=_NAME,
        schema="(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
        check=_check,
        reference=_reference,
        fake=_fake,
        cost=_cost,
        samples=_samples,
    )
)
