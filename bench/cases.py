"""What bench/ops.py runs: for every op of the registry, calls at benchmark sizes with the dense layer beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from case import Call, Case, random_values
from other_cases import decoding, other
from scipy.sparse import csr_matrix
from torch import Tensor

from tinycomp import ops
from tinycomp.ops import Packed

FFN = {768: 3072, 2048: 8192, 4096: 14336}


def _linear(
    op: str, label: str, n: int, k: int, m: int, dtype: torch.dtype, make: Any, weights: int, **more: Any
) -> Case:
    x = random_values(1, m, k, dtype=dtype)

    def dense() -> Tensor:
        return random_values(2, n, k, dtype=dtype)

    return Case(op, label, f"{n}x{k}", m, dtype, lambda: make(x), weights, dense, outside=(n, k), **more)


def beside(case: Case) -> Iterator[Case]:
    """Two such layers with one input (gate, up; k, v) in one call, against a call for each; none if no op does that."""
    op = ops.OPS.get(case.op + "s")
    if op is None or case.outside is None:
        return
    names = [a.name for a in getattr(torch.ops.tinycomp, op.name).default._schema.arguments]
    own, common = sum(name.endswith("1") for name in names), sum(not name[-1].isdigit() for name in names) - 1

    def make() -> tuple[Any, ...]:
        x, *rest = case.make()
        again = [a.clone() if isinstance(a, Tensor) else a for a in rest[:own]]
        return x, *rest[:own], *again, *[None] * own, *rest[own : own + common]

    def apart(args: tuple[Any, ...]) -> Call:
        x, layers, more = args[0], (args[1 : 1 + own], args[1 + own : 1 + 2 * own]), args[1 + 3 * own :]
        if case.op == "sliced_linear":  # a whole weight
            more = case.outside[::-1]  # type: ignore[index]
        single = getattr(ops, case.op)
        return lambda: torch.cat([single(x, *layer, *more) for layer in layers], -1)

    n, k = case.outside
    more = {"compute": case.compute, "density": case.density, "exact": case.exact, "peers": {"one call each": apart}}
    sizes: Any = f"two of {n}x{k}", case.m, case.dtype, make, 2 * case.weights
    yield Case(
        op.name, case.label, *sizes, lambda: random_values(2, 2 * n, k, dtype=case.dtype), outside=(2 * n, k), **more
    )


def low_rank(n: int, k: int, m: int, dtype: torch.dtype, divisor: int) -> Iterator[Case]:
    """Pivoted and plain storage, three factors, and rounded factors, all of rank min(n, k) / divisor."""
    rank, size = min(n, k) // divisor, torch.empty((), dtype=dtype).element_size()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).int()

    def plain(x: Tensor) -> tuple[Any, ...]:
        return x, random_values(3, rank, k, dtype=dtype), random_values(4, n, rank, dtype=dtype), None, None

    def pivoted(x: Tensor) -> tuple[Any, ...]:
        return x, random_values(3, rank, k, dtype=dtype), random_values(4, n - rank, rank, dtype=dtype), order, None

    def three(x: Tensor) -> tuple[Any, ...]:
        u = random_values(5, rank, rank, dtype=dtype)
        return x, random_values(3, rank, k, dtype=dtype), u, random_values(4, n, rank, dtype=dtype), None

    def folded(args: tuple[Any, ...]) -> Call:
        x, r, t = args[:3]
        return lambda: F.linear(F.linear(x, r), t)

    def folded_fp32(args: tuple[Any, ...]) -> Call:
        return folded(tuple(a.float() for a in args[:3]))

    def chained(args: tuple[Any, ...]) -> Call:
        x, r, u, c = args[:4]
        return lambda: F.linear(F.linear(F.linear(x, r), u), c)

    peers = {"torch folded": folded} | ({"torch fp32 folded": folded_fp32} if dtype != torch.float32 else {})
    numbers = rank * (n + k)
    yield _linear("lowrank_linear", f"d/{divisor}", n, k, m, dtype, plain, numbers * size, peers=peers)
    pivots = numbers - rank * rank
    yield _linear("lowrank_linear", f"d/{divisor} pivoted", n, k, m, dtype, pivoted, pivots * size)

    chain = {"torch chain": chained}
    yield _linear("cur_linear", f"d/{divisor}", n, k, m, dtype, three, (numbers + rank * rank) * size, peers=chain)
    for bits in (8, 4):

        def rounded(x: Tensor, bits: int = bits) -> tuple[Any, ...]:
            _, r, t, _, _ = pivoted(x)
            group = 0 if bits == 8 else 128
            a, b = ops.quantize(r, bits, group), ops.quantize(t, bits, group)
            return x, a.qweight, a.scales, b.qweight, b.scales, order, None, None, None, bits, group, 8

        label = f"d/{divisor} pivoted int{bits}"
        more = {"compute": "vnni", "exact": False}
        yield _linear("quant_lowrank_linear", label, n, k, m, dtype, rounded, pivots * bits // 8, **more)


def shared(n: int, k: int, m: int, dtype: torch.dtype) -> Iterator[Case]:
    clusters, rank = n // 16, 32
    labels = torch.randint(clusters, (n,), generator=torch.Generator().manual_seed(0)).int()

    def make(x: Tensor) -> tuple[Any, ...]:
        b, a = random_values(4, rank, k, dtype=dtype), random_values(5, n, rank, dtype=dtype)
        return x, random_values(3, clusters, k, dtype=dtype), labels, b, a, None, None, 0

    def composite(args: tuple[Any, ...]) -> Call:
        x, centroids, _, b, a = args[:5]
        index = labels.long()
        return lambda: F.linear(x, centroids).index_select(-1, index) + F.linear(F.linear(x, b), a)

    def composite_fp32(args: tuple[Any, ...]) -> Call:
        return composite(tuple(a.float() if a is not None and a.is_floating_point() else a for a in args[:5]))

    numbers = clusters * k + rank * (n + k)
    size = torch.empty((), dtype=dtype).element_size() * numbers
    peers = {"torch composite": composite, "torch fp32 composite": composite_fp32}
    yield _linear("swsc_linear", "n/16+r32", n, k, m, dtype, make, size, peers=peers)

    def rounded(x: Tensor) -> tuple[Any, ...]:
        _, shared, _, *factors = make(x)[:5]
        c, b, a = (ops.quantize(w) for w in (shared, *factors))
        levels = (c.qweight, c.scales, labels, b.qweight, b.scales, a.qweight, a.scales)
        return x, *levels, *[None] * 5, 0, 8, 0, 8

    more = {"compute": "vnni", "exact": False}
    yield _linear("quant_swsc_linear", "n/16+r32 int8", n, k, m, dtype, rounded, numbers, **more)


def dense(n: int, k: int, m: int, dtype: torch.dtype) -> Iterator[Case]:
    size = torch.empty((), dtype=dtype).element_size()

    def whole(x: Tensor) -> tuple[Any, ...]:
        return x, random_values(3, n, k, dtype=dtype), None, k, n

    yield _linear("sliced_linear", "whole", n, k, m, dtype, whole, n * k * size)
    for bits, activation_bits in ((8, 0), (8, 8), (4, 0), (4, 8)):

        def rounded(x: Tensor, bits: int = bits, activation_bits: int = activation_bits) -> tuple[Any, ...]:
            group = 0 if bits == 8 else 128
            q = ops.quantize(random_values(3, n, k, dtype=dtype), bits, group)
            return x, *q, None, bits, group, activation_bits

        label = f"int{bits}" + (" rounded inputs" if activation_bits else "")
        more = {"compute": "vnni" if activation_bits else "fma", "exact": False}
        yield _linear("quant_linear", label, n, k, m, dtype, rounded, n * k * bits // 8, **more)


def masked(n: int, k: int, m: int, dtype: torch.dtype) -> Iterator[Case]:
    size = torch.empty((), dtype=dtype).element_size()
    for format, removed, bits in (
        *(("bitmask", 0.5, b) for b in (0, 8, 4)),
        ("bitmask", 0.75, 0),
        *(("index", 0.9, b) for b in (0, 8)),
        ("2:4", 0.5, 0),
        ("block32", 0.9, 0),
    ):

        def make(x: Tensor, format: str = format, removed: float = removed, bits: int = bits) -> tuple[Any, ...]:
            w = random_values(3, n, k, dtype=dtype)
            g = torch.Generator().manual_seed(3)
            if format == "2:4":
                keep = torch.rand(n, k // 4, 4, generator=g).argsort(2).argsort(2).lt(2).reshape(n, k)
            elif format == "block32":
                keep = (torch.rand(n // 32, k // 32, generator=g) > removed).repeat_interleave(32, 0)
                keep = keep.repeat_interleave(32, 1)
            else:
                keep = torch.rand(n, k, generator=g) > removed
            return x, *ops.pack_masked(w, keep, format, bits), None, n, format, bits

        def unpacked(args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
            w = ops.unpack_masked(Packed(*args[1:5]), n, k, args[7], args[8]).float()
            return w, args[0].float().t().contiguous()

        def csr(args: tuple[Any, ...]) -> Call:
            w, x = unpacked(args)
            sparse = w.to_sparse_csr()
            narrow = torch.sparse_csr_tensor(
                sparse.crow_indices().int(), sparse.col_indices().int(), sparse.values(), sparse.shape
            )
            return lambda: narrow @ x

        def scipy_csr(args: tuple[Any, ...]) -> Call:
            w, x = unpacked(args)
            sparse, columns = csr_matrix(w.numpy()), x.numpy()
            return lambda: sparse @ columns

        def bsr(args: tuple[Any, ...]) -> Call:
            w, x = unpacked(args)
            sparse = w.to_sparse_bsr((32, 32))
            return lambda: sparse @ x

        kept = round(n * k * (1 - removed))
        values = kept * (bits / 8 if bits else size)
        positions = {"bitmask": n * k / 8, "index": 2 * kept, "2:4": n * k / 8, "block32": 0}[format]
        label = f"{format} {removed:.0%}" + (f" int{bits}" if bits else "")
        peers = {"torch csr fp32": csr, "scipy csr fp32": scipy_csr} | (
            {"torch bsr fp32": bsr} if "block" in format else {}
        )
        more: dict[str, Any] = {"peers": peers, "exact": bits == 0, "density": 1 - removed}
        yield _linear("masked_linear", label, n, k, m, dtype, make, int(values + positions), **more)


def cases(quick: bool) -> Iterator[Case]:
    """Every op x size x number of inputs x dtype; `quick` keeps one size of each."""
    dims = (2048,) if quick else tuple(FFN)
    rows = (1, 8, 128) if quick else (1, 8, 32, 128, 512)
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32):
        for d in dims:
            for n, k in ((d, d),) if quick else ((d, d), (FFN[d], d), (d, FFN[d])):
                for m in rows:
                    some = [*low_rank(n, k, m, dtype, 8), *shared(n, k, m, dtype), *dense(n, k, m, dtype)]
                    if n == k and (m == 1 or (m <= 128 and not quick)):
                        some += masked(n, k, m, dtype)
                    yield from some
                    if not quick:
                        yield from low_rank(n, k, m, dtype, 4)
                    # Many inputs gain nothing from a shared call.
                    if m == 1 or (m == 8 and not quick and n > k):
                        for case in some:
                            yield from beside(case)
        yield from decoding(dtype)
    yield from other()
