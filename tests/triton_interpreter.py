"""Run in its own process with TRITON_INTERPRET=1: every Triton kernel on its contract's samples, one JSON line each.

The interpreter of Triton 3.8 keeps bfloat16 and fp8 numbers as raw bits and computes on those, truncates where a GPU
rounds, asks an absent driver in the autotuner, and reads 0 in masked-off lanes that a GPU leaves undefined.
`repair` puts that right.

    triton_interpreter.py [--awkward] [OP ...]      --awkward: tests/awkward_shapes.py instead, the dtypes in turn
    triton_interpreter.py --narrow                  what the repaired interpreter makes of bfloat16 and fp8 numbers
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import TensorHandle

# What the interpreter keeps as bits.
NARROW = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


def widened(bits: Any, kind: Any) -> np.ndarray:
    """Bits of narrow numbers -> float32."""
    bits = np.asarray(bits)
    return torch.from_numpy(np.ascontiguousarray(bits)).view(NARROW[kind]).float().numpy().reshape(bits.shape)


def rounded(values: Any, kind: Any) -> np.ndarray:
    """float32 -> bits, to nearest, ties to even, as a GPU does; fp8 ends at its largest number instead of infinity."""
    values = np.asarray(values, dtype=np.float32)
    wide = torch.from_numpy(np.ascontiguousarray(values))
    if kind != tl.bfloat16:
        largest = torch.finfo(NARROW[kind]).max
        wide = wide.clamp(-largest, largest)
    bits = wide.to(NARROW[kind]).view(torch.uint16 if kind == tl.bfloat16 else torch.uint8)
    return bits.numpy().reshape(values.shape)


def wide_handle(handle: TensorHandle) -> TensorHandle:
    kind = handle.dtype.scalar
    return TensorHandle(widened(handle.data, kind), tl.float32) if kind in NARROW else handle


def repair() -> None:
    """Make bfloat16, fp8, autotuning and masked loads behave as on a GPU."""
    builder = interpreter.InterpreterBuilder
    cast, dot, load = builder.cast_impl, builder.create_dot, builder.create_masked_load

    def cast_impl(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        wanted = target.scalar
        if source.dtype.scalar == wanted:
            return TensorHandle(source.data, wanted)
        source = wide_handle(source)
        if wanted in NARROW:
            return TensorHandle(rounded(source.data, wanted), wanted)
        return cast(self, source, target)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, c: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(self, wide_handle(a), wide_handle(b), c, *rest)

    def on_wide(operation: Any) -> Any:
        def call(self: Any, *args: Any) -> TensorHandle:
            narrow = [a.dtype.scalar for a in args if isinstance(a, TensorHandle) and a.dtype.scalar in NARROW]
            result = operation(self, *[wide_handle(a) if isinstance(a, TensorHandle) else a for a in args])
            if narrow and result.dtype.scalar == tl.float32:
                return TensorHandle(rounded(result.data, narrow[0]), narrow[0])
            return result

        return call

    def masked_load(self: Any, pointers: TensorHandle, mask: TensorHandle, other: Any, *rest: Any) -> TensorHandle:
        result = load(self, pointers, mask, other, *rest)
        if other is None and not mask.data.all():
            kind, data = result.dtype.scalar, result.data.copy()
            nan = 0x7FC1 if kind == tl.bfloat16 else 0x7F if kind in NARROW else np.nan
            poison = nan if kind.is_floating() else np.iinfo(data.dtype).max
            data[~np.broadcast_to(mask.data, data.shape)] = poison
            result = TensorHandle(data, kind)
        return result

    builder.cast_impl, builder.create_dot, builder.create_masked_load = cast_impl, create_dot, masked_load
    builder.create_fp_to_fp = lambda self, source, target, mode: cast_impl(self, source, target)
    builder.binary_op, builder.unary_op = on_wide(builder.binary_op), on_wide(builder.unary_op)
    builder.ternary_op = on_wide(builder.ternary_op)
    # Every configuration runs once, so every one of them is checked for faults.
    Autotuner.do_bench = property(lambda self: lambda call, quantiles: (call(), [1.0] * 3)[1], lambda self, value: None)


@triton.jit
def round_trip_kernel(wide, narrow, again, sums, count: tl.constexpr) -> None:
    """wide -> narrow -> again; sums = narrow + narrow, in its own type."""
    at = tl.arange(0, count)
    value = tl.load(wide + at).to(narrow.dtype.element_ty)
    tl.store(narrow + at, value)
    back = tl.load(narrow + at)
    tl.store(again + at, back.to(tl.float32))
    tl.store(sums + at, back + back)


@triton.jit
def product_kernel(a, b, y, poisoned, size: tl.constexpr) -> None:
    """y = a b, in float32; poisoned: what lanes behind a mask hold."""
    at = tl.arange(0, size)
    places = at[:, None] * size + at[None, :]
    tl.store(y + places, tl.dot(tl.load(a + places), tl.load(b + places)))
    tl.store(poisoned + at, tl.load(a + at, mask=at < 0).to(tl.float32))


def narrow_numbers() -> None:
    """A JSON line for each narrow type: how many results differ from torch's."""
    repair()
    generator = torch.Generator().manual_seed(0)
    for name, kind in (("bfloat16", torch.bfloat16), ("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        # All fp8 numbers, or some of bfloat16, the middles between each and its neighbour, others and those beyond.
        bits = torch.arange(-128, 128, dtype=torch.int8)
        bits = bits if kind.itemsize == 1 else bits.short() * 251
        numbers, next_ones = bits.view(kind).float(), (bits + 1).view(kind).float()
        others = 1e3 * torch.randn(510, generator=generator)
        wide = torch.cat([numbers, (numbers + next_ones) / 2, others, torch.tensor([torch.inf, torch.nan])])
        narrow, sums = torch.zeros(1024, dtype=kind), torch.zeros(1024, dtype=kind)
        again = torch.zeros(1024)
        round_trip_kernel[(1,)](wide, narrow, again, sums, 1024)
        limit = torch.finfo(kind).max if kind.itemsize == 1 else torch.inf
        wanted = wide.clamp(-limit, limit).to(kind).float()
        twice = (2 * wanted).clamp(-limit, limit).to(kind).float()
        a, b = (torch.randn(16, 16, generator=generator).to(kind) for _ in range(2))
        y, poisoned = torch.zeros(16, 16), torch.zeros(16)
        product_kernel[(1,)](a, b, y, poisoned, 16)
        same = {
            "narrow": torch.equal(narrow.float().nan_to_num(7), wanted.nan_to_num(7)),
            "again": torch.equal(again.nan_to_num(7), wanted.nan_to_num(7)),
            "sums": torch.equal(sums.float().nan_to_num(7), twice.nan_to_num(7)),
            "product": torch.allclose(y, a.float() @ b.float(), rtol=1e-5, atol=1e-5),
            "poisoned": bool(poisoned.isnan().all()),
        }
        print(json.dumps({"type": name, **same}), flush=True)


def main(words: list[str]) -> None:
    from awkward_shapes import AWKWARD, unaligned
    from test_ops import fresh, run
    from tolerance import assert_close

    from tinycomp import ops
    from tinycomp.kernels_dump import _cases
    from tinycomp.ops import _registry
    from tinycomp.ops._registry import Sample
    from tinycomp.triton_kernels import _stages

    repair()
    zeros_of, dtypes = _stages.zeros_of, (torch.float32, torch.bfloat16, torch.float16)
    awkward, names = "--awkward" in words, [word for word in words if not word.startswith("--")]
    for name in names or sorted(op for op, backend in _registry._LAUNCHERS if backend == "triton"):
        op = ops.OPS[name]
        for dtype in dtypes:
            # One dtype stands for graphs and compilers, where every stage is a launch of its own.
            _stages.zeros_of = (lambda device: None) if dtype == torch.float16 else zeros_of
            # Also the calls that kernels_dump writes down, in one dtype.
            dumped = torch.float32 if name == "split_bregman_step_" else torch.bfloat16
            shapes = _cases.DEFAULTS[name] if dtype == dumped else []
            calls = [Sample(f"dump-{i}", _cases.make(name, dtype, 0, shape)) for i, shape in enumerate(shapes)]
            calls = [*op.samples(dtype), *calls]
            if awkward:
                in_turn = [dumped] if name == "split_bregman_step_" else dtypes
                mine = [shape for i, shape in enumerate(AWKWARD[name]) if in_turn[i % len(in_turn)] == dtype]
                made = (_cases.make(name, dtype, 0, shape) for shape in mine)
                calls = [Sample(f"awkward-{i}", tuple(map(unaligned, args))) for i, args in enumerate(made)]
            for sample in calls:
                row = {"op": name, "dtype": str(dtype).removeprefix("torch."), "sample": sample.id}
                row["why_not"] = _registry.why_not(op, "triton", sample.args)
                if row["why_not"] is None:
                    try:
                        with ops.use_backend("triton"), torch.no_grad():
                            got = run(name, fresh(sample.args))
                        with ops.use_backend("torch"), torch.no_grad():
                            wanted = run(name, fresh(sample.args))
                            reference = run(name, fresh(sample.args, torch.float64))
                        for g, t, r in zip(got, wanted, reference, strict=True):
                            if g.is_floating_point():
                                assert_close(g, t, r, "")
                            else:
                                assert torch.equal(g, r), "discrete results differ"
                        row["error"] = None
                    except Exception as error:  # reported, and failed on, by the test that reads this
                        row["error"] = f"{type(error).__name__}: {error}"[-600:]
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    narrow_numbers() if sys.argv[1:] == ["--narrow"] else main(sys.argv[1:])
