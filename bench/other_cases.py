"""What bench/ops.py runs beside linear layers: the ops of a decoding step, of clustering, selection and training."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from case import Call, Case, random_values
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def decoding(dtype: torch.dtype) -> Iterator[Case]:
    """What a decoding step takes beside its linear layers."""
    for heads, shared, d, keys in ((9, 3, 64, 256), (32, 8, 128, 2048)):

        def attend(sizes: tuple[int, ...] = (heads, shared, d, keys)) -> tuple[Any, ...]:
            heads, shared, d, keys = sizes
            k, v = (random_values(i, 1, shared, keys, d, dtype=dtype) for i in (2, 3))
            return random_values(1, 1, heads, 1, d, dtype=dtype), k, v, None, 1 / math.sqrt(d)

        def torchs(args: tuple[Any, ...]) -> Call:
            q, k, v, _, scale = args
            # As many heads next to each other as the op's result has them.
            return lambda: F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).transpose(1, 2)

        size = 2 * shared * keys * d * torch.empty((), dtype=dtype).element_size()
        shape = f"{heads} heads of {d}, {keys} keys of {shared}"
        yield Case("decode_attention", "", shape, 1, dtype, attend, size, peers={"torch sdpa": torchs})

    def chain(args: tuple[Any, ...]) -> Call:
        x, weight, eps = args

        def run() -> Tensor:
            wide = x.to(torch.float32)
            return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

        return run

    for m in (1, 512):

        def norm(m: int = m) -> tuple[Any, ...]:
            return random_values(1, m, 4096, dtype=dtype), random_values(2, 4096, dtype=dtype), 1e-5

        yield Case("rms_norm", "", f"{m}x4096", m, dtype, norm, 0, peers={"transformers": chain})

        def turn(m: int = m) -> tuple[Any, ...]:
            # As models have them: heads inside tokens.
            q, k = (random_values(i, 1, m, h, 128, dtype=dtype).transpose(1, 2) for i, h in ((1, 32), (2, 8)))
            return q, k, *(random_values(i, 1, m, 128, dtype=dtype) for i in (3, 4))

        def gated(m: int = m) -> tuple[Any, ...]:
            return random_values(1, 1, m, 14336, dtype=dtype), random_values(2, 1, m, 14336, dtype=dtype)

        peers = {"transformers": lambda args: lambda: apply_rotary_pos_emb(*args)}
        yield Case("rotary_embedding", "", f"32 and 8 heads of 128, {m}", m, dtype, turn, 0, peers=peers)
        two = {"torch": lambda args: lambda: F.silu(args[0]) * args[1]}
        yield Case("silu_and_mul", "", f"{m}x14336", m, dtype, gated, 0, peers=two)


def other() -> Iterator[Case]:
    """Ops that are not layers, in float32; one in bfloat16, too."""
    f32 = torch.float32

    def case(op: str, shape: str, make: Callable[[], tuple[Any, ...]], weights: int, **more: Any) -> Case:
        return Case(op, "", shape, 0, f32, make, weights, **more)

    n, d, k = 4096, 4096, 256
    points, centroids = random_values(0, n, d), random_values(1, k, d)
    labels = torch.randint(k, (n,), generator=torch.Generator().manual_seed(0)).int()

    def lloyd(args: tuple[Any, ...]) -> Call:
        x, c = args

        def run() -> Tensor:
            scores = torch.addmm(c.square().sum(1), x, c.t(), alpha=-2)
            return scores.min(1).indices

        return run

    yield case("kmeans_assign", "4096x4096 k256", lambda: (points, centroids), 0, peers={"torch gemm": lloyd})
    bf16 = torch.bfloat16
    narrow = points.to(bf16), centroids.to(bf16)
    # Its own products in bfloat16 are rounded: one label in ten is another.
    wide = {"torch fp32 gemm": lambda args: lloyd(tuple(a.float() for a in args)), "torch bf16 gemm": lloyd}
    yield Case("kmeans_assign", "", "4096x4096 k256", 0, bf16, lambda: narrow, 0, peers=wide)
    add = {"torch index_add": lambda args: lambda: torch.zeros(k, d).index_add_(0, labels.long(), args[0])}
    yield case("kmeans_update", "4096x4096 k256", lambda: (points, labels, k), 0, peers=add)
    norms = {"torch norm": lambda args: lambda: args[0].norm(dim=0)}
    yield case("column_norms", "4096x4096", lambda: (random_values(3, n, d),), 4 * n * d, peers=norms)
    gram = {"torch addmm": lambda args: lambda: args[0].addmm_(args[1].t(), args[1])}
    yield case(
        "gram_accumulate_", "512x2048", lambda: (torch.zeros(2048, 2048), random_values(0, 512, 2048)), 0, peers=gram
    )
    basis = torch.linalg.qr(random_values(2, 4096, 256))[0]
    yield case("select_pivots", "4096x256 lu", lambda: (basis, 256, "lu"), 0)
    yield case("select_pivots", "4096x256 qr", lambda: (basis, 256, "qr"), 0)
    weights = torch.rand(1 << 16, generator=torch.Generator().manual_seed(0))
    yield case("sample_without_replacement", "65536 k4096", lambda: (weights, 4096, 1), 0)
    units = 1 << 24

    def state(entered: float = 0.0) -> tuple[Any, ...]:
        """The beginning of a path, or later: duals of `entered` of the units, at random, are beyond the threshold."""
        one = random_values(3, units // 4096, 4096).reshape(-1)
        chosen = torch.rand(units, generator=torch.Generator().manual_seed(0)) < entered
        dual, entry = one * 2 + 3 * chosen, chosen.int() * 3 - 1
        return one, dual, F.softshrink(dual, 1.0), entry, one / 3, None, 3, 0.1, 1.0, 10.0, 1.0, 0.0, True, False

    def recomputed(entered: float = 0.0) -> tuple[Any, ...]:
        first, second, _, *rest = state(entered)
        bits = torch.zeros(units // 8, dtype=torch.uint8)
        return first, second, None, *rest, None, 0.999, 1e-8, 0, bits

    peers = {"torch.compile": _compiled_step}
    for label, share in (("16M", 0.0), ("16M half entered", 0.5)):
        for more, make, size in (("", state, 16), (" no gamma, bits", recomputed, 12)):
            yield case(
                "split_bregman_step_", label + more, functools.partial(make, share), size * units,
                memory="update", peers=peers, exact=False,
            )  # fmt: skip


def _compiled_step(args: tuple[Any, ...]) -> Call:
    """The coupled step, its twin stored, as a user would write it for torch.compile: one expression per result."""
    mask, dual, entry, grad = (a.clone() for a in (args[0], args[1], args[3], args[4]))
    gamma = F.softshrink(dual, 1.0)

    def step(mask: Tensor, dual: Tensor, gamma: Tensor, entry: Tensor, grad: Tensor) -> None:
        gap = (mask - gamma) / 10.0
        mask.sub_(0.1 * (grad + gap))
        dual.add_(0.1 * gap)
        gamma.copy_(F.softshrink(dual, 1.0))
        entry.copy_(torch.where((entry < 0) & (gamma != 0), 3, entry))

    compiled = torch.compile(step)
    return lambda: compiled(mask, dual, gamma, entry, grad)
