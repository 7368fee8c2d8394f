"""What bench/ops.py runs: for every op of the registry, calls at benchmark sizes with the dense layer beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from torch import Tensor

from tinycomp import ops
from tinycomp.ops import Packed

FFN = {768: 3072, 2048: 8192, 4096: 14336}
Call = Callable[[], object]


@dataclass
class Case:
    """One row: an op at one size, and everything it is held against.

    `make()` gives the op's arguments; the driver copies them until `weights`, the bytes of one copy that must be cold,
    are more than any cache holds. `dense` is the weight of the dense layer, `peers` turn arguments into calls.
    """

    op: str
    label: str
    shape: str
    m: int
    dtype: torch.dtype
    make: Callable[[], tuple[Any, ...]]
    weights: int
    dense: Callable[[], Tensor] | None = None
    peers: dict[str, Callable[[tuple[Any, ...]], Call]] = field(default_factory=dict)
    compute: str = "fma"  # the ceiling its arithmetic has
    memory: str = "stream"  # the ceiling its bytes have: "stream" or "update"
    outside: tuple[int, int] | None = None  # (out, in) for peers that only run dense layers
    density: float = 1.0
    exact: bool = True  # whether the general tolerance applies; else outputs are held to 5 %

    @property
    def key(self) -> str:
        return f"{self.op}/{self.label}/{self.shape}/M{self.m}/{str(self.dtype).removeprefix('torch.')}"


def _random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).div_(math.sqrt(shape[-1])).to(dtype)


def _linear(
    op: str, label: str, n: int, k: int, m: int, dtype: torch.dtype, make: Any, weights: int, **more: Any
) -> Case:
    x = _random(1, m, k, dtype=dtype)

    def dense() -> Tensor:
        return _random(2, n, k, dtype=dtype)

    return Case(op, label, f"{n}x{k}", m, dtype, lambda: make(x), weights, dense, outside=(n, k), **more)


def low_rank(n: int, k: int, m: int, dtype: torch.dtype, divisor: int) -> Iterator[Case]:
    """Pivoted and plain storage, three factors, and rounded factors, all of rank min(n, k) / divisor."""
    rank, size = min(n, k) // divisor, torch.empty((), dtype=dtype).element_size()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).int()

    def plain(x: Tensor) -> tuple[Any, ...]:
        return x, _random(3, rank, k, dtype=dtype), _random(4, n, rank, dtype=dtype), None, None

    def pivoted(x: Tensor) -> tuple[Any, ...]:
        return x, _random(3, rank, k, dtype=dtype), _random(4, n - rank, rank, dtype=dtype), order, None

    def three(x: Tensor) -> tuple[Any, ...]:
        u = _random(5, rank, rank, dtype=dtype)
        return x, _random(3, rank, k, dtype=dtype), u, _random(4, n, rank, dtype=dtype), None

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

    def two(x: Tensor) -> tuple[Any, ...]:
        half = order[order < n // 2]
        parts = [_random(i, rank if i % 2 else n // 2 - rank, (k, rank)[i % 2 == 0], dtype=dtype) for i in (3, 4, 5, 6)]
        return x, *parts[:2], half, None, *parts[2:], half, None

    def apart(args: tuple[Any, ...]) -> Call:
        x, *both = args
        return lambda: torch.cat([ops.lowrank_linear(x, *both[:4]), ops.lowrank_linear(x, *both[4:8])], -1)

    if n // 2 > rank:
        both = 2 * rank * (k + n // 2 - rank) * size
        label, calls = f"two of d/{divisor} pivoted", {"one call each": apart}
        yield _linear("lowrank_linears", label, n, k, m, dtype, two, both, peers=calls)
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
        b, a = _random(4, rank, k, dtype=dtype), _random(5, n, rank, dtype=dtype)
        return x, _random(3, clusters, k, dtype=dtype), labels, b, a, None, None, 0

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
        return x, _random(3, n, k, dtype=dtype), None, k, n

    yield _linear("sliced_linear", "whole", n, k, m, dtype, whole, n * k * size)
    for bits, activation_bits in ((8, 0), (8, 8), (4, 0), (4, 8)):

        def rounded(x: Tensor, bits: int = bits, activation_bits: int = activation_bits) -> tuple[Any, ...]:
            group = 0 if bits == 8 else 128
            q = ops.quantize(_random(3, n, k, dtype=dtype), bits, group)
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
            w = _random(3, n, k, dtype=dtype)
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


def decoding(dtype: torch.dtype) -> Iterator[Case]:
    """What a decoding step takes beside its linear layers: attention and norms."""
    for heads, shared, d, keys in ((9, 3, 64, 256), (32, 8, 128, 2048)):

        def attend(sizes: tuple[int, ...] = (heads, shared, d, keys)) -> tuple[Any, ...]:
            heads, shared, d, keys = sizes
            k, v = (_random(i, 1, shared, keys, d, dtype=dtype) for i in (2, 3))
            return _random(1, 1, heads, 1, d, dtype=dtype), k, v, None, 1 / math.sqrt(d)

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
            return _random(1, m, 4096, dtype=dtype), _random(2, 4096, dtype=dtype), 1e-5

        yield Case("rms_norm", "", f"{m}x4096", m, dtype, norm, 0, peers={"transformers": chain})


def other() -> Iterator[Case]:
    """Ops that are not layers, in float32."""
    f32 = torch.float32

    def case(op: str, shape: str, make: Callable[[], tuple[Any, ...]], weights: int, **more: Any) -> Case:
        return Case(op, "", shape, 0, f32, make, weights, **more)

    n, d, k = 4096, 4096, 256
    points, centroids = _random(0, n, d), _random(1, k, d)
    labels = torch.randint(k, (n,), generator=torch.Generator().manual_seed(0)).int()

    def lloyd(args: tuple[Any, ...]) -> Call:
        x, c = args

        def run() -> Tensor:
            scores = torch.addmm(c.square().sum(1), x, c.t(), alpha=-2)
            return scores.min(1).indices

        return run

    yield case("kmeans_assign", "4096x4096 k256", lambda: (points, centroids), 0, peers={"torch gemm": lloyd})
    add = {"torch index_add": lambda args: lambda: torch.zeros(k, d).index_add_(0, labels.long(), args[0])}
    yield case("kmeans_update", "4096x4096 k256", lambda: (points, labels, k), 0, peers=add)
    norms = {"torch norm": lambda args: lambda: args[0].norm(dim=0)}
    yield case("column_norms", "4096x4096", lambda: (_random(3, n, d),), 4 * n * d, peers=norms)
    gram = {"torch addmm": lambda args: lambda: args[0].addmm_(args[1].t(), args[1])}
    yield case("gram_accumulate_", "512x2048", lambda: (torch.zeros(2048, 2048), _random(0, 512, 2048)), 0, peers=gram)
    basis = torch.linalg.qr(_random(2, 4096, 256))[0]
    yield case("select_pivots", "4096x256 lu", lambda: (basis, 256, "lu"), 0)
    yield case("select_pivots", "4096x256 qr", lambda: (basis, 256, "qr"), 0)
    weights = torch.rand(1 << 16, generator=torch.Generator().manual_seed(0))
    yield case("sample_without_replacement", "65536 k4096", lambda: (weights, 4096, 1), 0)
    units = 1 << 24

    def state() -> tuple[Any, ...]:
        one = _random(3, units // 4096, 4096).reshape(-1)
        entry = torch.full((units,), -1, dtype=torch.int32)
        return one, one * 2, one.clone(), entry, one / 3, None, 3, 0.1, 1.0, 10.0, 1.0, 0.0, True, False

    def recomputed() -> tuple[Any, ...]:
        first, second, _, *rest = state()
        bits = torch.zeros(units // 8, dtype=torch.uint8)
        return first, second, None, *rest, None, 0.999, 1e-8, 0, bits

    peers = {"torch.compile": _compiled_step}
    yield case("split_bregman_step_", "16M", state, 16 * units, memory="update", peers=peers, exact=False)
    yield case(
        "split_bregman_step_", "16M no gamma, bits", recomputed, 12 * units,
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


def cases(quick: bool) -> Iterator[Case]:
    """Every op x size x number of inputs x dtype; `quick` keeps one size of each."""
    dims = (2048,) if quick else tuple(FFN)
    rows = (1, 8, 128) if quick else (1, 8, 32, 128, 512)
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32):
        for d in dims:
            for n, k in ((d, d),) if quick else ((d, d), (FFN[d], d), (d, FFN[d])):
                for m in rows:
                    yield from low_rank(n, k, m, dtype, 8)
                    if not quick:
                        yield from low_rank(n, k, m, dtype, 4)
                    yield from shared(n, k, m, dtype)
                    yield from dense(n, k, m, dtype)
                    if n == k and (m == 1 or (m <= 128 and not quick)):
                        yield from masked(n, k, m, dtype)
        yield from decoding(dtype)
    yield from other()
