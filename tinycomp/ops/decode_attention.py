"""Attention of a decoding step: a few queries against the keys and values of all tokens so far."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinycomp.ops import _checks
from tinycomp.ops._registry import Cost, Op, Sample, define
from tinycomp.ops._sampling import Draw, sliced, transposed

_NAME = "decode_attention"


def decode_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q kᵀ) v for each head, in float32 (float64 for float64 inputs) and rounded once.

    It exists for the CPU, where torch's fused attention in bfloat16 takes 11 to 17 times as long for one query (`python
    bench/ops.py --filter decode_attention`). Elsewhere the reference runs; `tc.fuse_` leaves GPUs to torch's attention.

    Args:
        q: (batch, heads, queries, d) floating.
        k: (batch, kv_heads, keys, d), dtype of q; heads is a multiple of kv_heads, neighbouring heads share one.
        v: (batch, kv_heads, keys, e), dtype of q.
        mask: bool (batch, 1, queries, keys), true where a query sees a key; None: everywhere. A query that sees no key,
            or whose scores are all -inf, gives zeros, as in torch.
        scale: what the products are multiplied by, usually 1 / sqrt(d).

    Returns:
        (batch, queries, heads, e) in the dtype of q: heads next to each other, as the output projection reads them.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: dtypes do not fit.
        RuntimeError: a gradient would be recorded.

    Cost: 2 batch heads queries keys (d + e) FLOPs, one read of q, k, v, and e + 2 numbers kept for each query of a head
    and 64 keys. Not differentiable.
    Source: attention as in arXiv 1706.03762, shared key heads as in arXiv 2305.13245, and keys read in parts of which
    each keeps its own largest score, as in arXiv 1805.02867.
    """
    _checks.no_gradient(_NAME, q, k, v)
    return _call(q, k, v, mask, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> None:
    _checks.tensor(_NAME, "q", q)
    _checks.shaped(_NAME, "q", q, (None,) * 4, q)
    batch, heads, queries, d = q.shape
    _checks.shaped(_NAME, "k", k, (batch, None, None, d), q)
    kv_heads, keys = k.shape[1:3]
    _checks.shaped(_NAME, "v", v, (batch, kv_heads, keys, None), q)
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"{_NAME}: q has {heads} heads and k {kv_heads}, allowed a multiple of those of k; check which is which"
        )
    if mask is not None:
        _checks.shaped(_NAME, "mask", mask, (batch, 1, queries, keys), q, (torch.bool,))


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, heads, queries, d = q.shape
    kv_heads, keys, e = v.shape[1:]
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).reshape(batch, kv_heads, heads // kv_heads, queries, d)
    scores = grouped @ k.to(wide).unsqueeze(2).transpose(-1, -2) * scale
    weights = scores.new_zeros(scores.shape)
    if keys > 0:
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(2), float("-inf"))
        nothing = (scores == float("-inf")).all(-1, keepdim=True)
        weights = scores.softmax(-1).masked_fill(nothing, 0.0)
    out = weights @ v.to(wide).unsqueeze(2)
    return out.reshape(batch, heads, queries, e).transpose(1, 2).to(q.dtype, memory_format=torch.contiguous_format)


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _cost(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Cost:
    batch, heads, queries, d = q.shape
    keys, e = v.shape[2:]
    out = batch * heads * queries * e * q.element_size()
    read = q.nbytes + k.nbytes + v.nbytes + (0 if mask is None else mask.nbytes)
    return Cost(2 * batch * heads * queries * keys * (d + e), read + out)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    draw = Draw(dtype)

    def seen(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw.generator) > 0.3

    yield Sample("one query", (draw(1, 4, 1, 16), draw(1, 4, 9, 16), draw(1, 4, 9, 16), None, 0.25))
    shared = draw(2, 6, 1, 64), draw(2, 2, 150, 64), draw(2, 2, 150, 64)
    yield Sample("shared heads", (*shared, None, 0.125))
    yield Sample("mask", (*shared, seen(2, 1, 1, 150), 0.125))
    odd = draw(2, 3, 3, 7), draw(2, 1, 131, 7), draw(2, 1, 131, 5)
    yield Sample("odd", (*odd, seen(2, 1, 3, 131), 0.4))
    nothing = torch.zeros(2, 1, 3, 131, dtype=torch.bool)
    nothing[0, 0, 1, 100] = True
    yield Sample("sees nothing", (*odd, nothing, 0.4))
    yield Sample("large scores", (shared[0] * 50, *shared[1:], None, 1.0))
    yield Sample("0keys", (draw(1, 2, 1, 8), draw(1, 2, 0, 8), draw(1, 2, 0, 8), None, 1.0))
    yield Sample("0queries", (draw(1, 2, 0, 8), draw(1, 2, 5, 8), draw(1, 2, 5, 8), None, 1.0))
    yield Sample("0batch", (draw(0, 2, 1, 8), draw(0, 2, 5, 8), draw(0, 2, 5, 8), None, 1.0))
    yield Sample("transposed", (*(transposed(t) for t in odd), None, 0.4))
    yield Sample("sliced", (*(sliced(t) for t in odd), sliced(seen(2, 1, 3, 131)), 0.4))


_call = define(
    Op(
        name=_NAME,
        schema="(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor",
        check=_check,
        reference=_reference,
        fake=_fake,
        cost=_cost,
        samples=_samples,
        autocast=(0, 1, 2),
    )
)
