"""Run in its own process with TRITON_INTERPRET=1: every Triton kernel on its contract's samples, one JSON line each.

The interpreter of Triton 3.8 keeps bfloat16 and fp8 numbers as raw bits and computes on those, truncates where a GPU
rounds, asks an absent driver in the autotuner, and reads 0 in masked-off lanes that a GPU leaves undefined.
`repair` puts that right, but for fp8, which no kernel uses.

    triton_interpreter.py [--awkward] [OP ...]      --awkward: tests/awkward_shapes.py instead, the dtypes in turn
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import TensorHandle

BF16 = tl.bfloat16


def widened(bits: Any) -> np.ndarray:
    """bfloat16 bits -> float32."""
    bits = np.asarray(bits)
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)


def rounded(values: Any) -> np.ndarray:
    """float32 -> bfloat16 bits, to nearest, ties to even, as a GPU does."""
    values = np.asarray(values, dtype=np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, np.uint16(0x7FFF), nearest)


def wide_handle(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widened(handle.data), tl.float32) if handle.dtype.scalar == BF16 else handle


def repair() -> None:
    """Make bfloat16, autotuning and masked loads behave as on a GPU."""
    builder = interpreter.InterpreterBuilder
    cast, dot, load = builder.cast_impl, builder.create_dot, builder.create_masked_load

    def cast_impl(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        wanted = target.scalar
        if source.dtype.scalar == wanted:
            return TensorHandle(source.data, wanted)
        source = wide_handle(source)
        if wanted == BF16:
            return TensorHandle(rounded(source.data), wanted)
        return cast(self, source, target)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, c: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(self, wide_handle(a), wide_handle(b), c, *rest)

    def on_wide(operation: Any) -> Any:
        def call(self: Any, *args: Any) -> TensorHandle:
            narrow = any(isinstance(a, TensorHandle) and a.dtype.scalar == BF16 for a in args)
            result = operation(self, *[wide_handle(a) if isinstance(a, TensorHandle) else a for a in args])
            if narrow and result.dtype.scalar == tl.float32:
                return TensorHandle(rounded(result.data), BF16)
            return result

        return call

    def masked_load(self: Any, pointers: TensorHandle, mask: TensorHandle, other: Any, *rest: Any) -> TensorHandle:
        result = load(self, pointers, mask, other, *rest)
        if other is None and not mask.data.all():
            kind, data = result.dtype.scalar, result.data.copy()
            poison = 0x7FC1 if kind == BF16 else np.nan if kind.is_floating() else np.iinfo(data.dtype).max
            data[~np.broadcast_to(mask.data, data.shape)] = poison
            result = TensorHandle(data, kind)
        return result

    builder.cast_impl, builder.create_dot, builder.create_masked_load = cast_impl, create_dot, masked_load
    builder.create_fp_to_fp = lambda self, source, target, mode: cast_impl(self, source, target)
    builder.binary_op, builder.unary_op = on_wide(builder.binary_op), on_wide(builder.unary_op)
    builder.ternary_op = on_wide(builder.ternary_op)
    # Every configuration runs once, so every one of them is checked for faults.
    Autotuner.do_bench = property(lambda self: lambda call, quantiles: (call(), [1.0] * 3)[1], lambda self, value: None)


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
    main(sys.argv[1:])
