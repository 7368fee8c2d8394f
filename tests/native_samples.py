"""Every native op on every sample of its contract, held to the tolerance rule; prints the instruction set and "same".

Run by itself: `make sanitize` runs it with a checked library, test_ops_native.py with each instruction set.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from test_ops import DTYPES, assert_close, fresh, run

from tinycomp import _C, ops
from tinycomp.ops._registry import Sample
from tinycomp.ops.quant_linear import quantize


def long_rows(dtype: torch.dtype) -> Sample:
    """A list of all columns of long rows, whose products must not be added in one chain."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 4096, generator=generator).to(dtype) for rows in (8, 8))
    packed = ops.pack_masked(weight, torch.ones(8, 4096, dtype=torch.bool), "index")
    return Sample("list of 4096 columns", (x, *packed, None, 8, "index"))


def many_inputs(dtype: torch.dtype) -> Iterator[Sample]:
    """Rounded weights without zeros, which many inputs meet rebuilt, in bfloat16 where that is fast."""
    generator = torch.Generator().manual_seed(0)
    for bits, group, inputs in ((8, 0, 6), (8, 32, 40), (4, 0, 9), (4, 64, 300)):
        weight, x = (torch.randn(rows, 201, generator=generator).to(dtype) for rows in (90, inputs))
        levels, scales, _ = quantize(weight, bits, group, True)
        yield Sample(f"int{bits}, groups of {group}, {inputs} inputs", (x, levels, scales, None, None, bits, group))


def long_dense_rows(dtype: torch.dtype) -> Iterator[Sample]:
    """Dense rows of 8,192 weights, whose products must not be added in one chain, and inputs for several threads."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(17, 8192, generator=generator).to(dtype)
    for inputs in (3, 8, 12, 32, 60, 70):
        x = torch.randn(inputs, 8192, generator=generator).to(dtype)
        yield Sample(f"rows of 8192, {inputs} inputs", (x, weight, None, 8192, 17))
    x, weight = (torch.randn(rows, 520, generator=generator).to(dtype) for rows in (390, 300))
    yield Sample("blocks of inputs", (x, weight, torch.linspace(-9, 9, 300).to(dtype), 520, 300))


def other_inputs(name: str, dtype: torch.dtype) -> Iterator[Sample]:
    """The contract's samples of linear layers with other numbers of inputs, which kernels arrange in other ways."""
    for sample in ops.OPS[name].samples(dtype):
        x = sample.args[0].reshape(-1, sample.args[0].size(-1))
        for inputs in (3, 8, 40, 70) if x.size(0) > 0 else ():
            repeated = x[torch.arange(inputs) % x.size(0)] * torch.linspace(0.5, 1.5, inputs).to(dtype)[:, None]
            yield Sample(f"{sample.id}, {inputs} inputs", (repeated, *sample.args[1:]))


def more(name: str, dtype: torch.dtype) -> Iterator[Sample]:
    """Samples beside the contract's, too large for emulated GPUs."""
    if name.endswith(("_linear", "_linears")):
        yield from other_inputs(name, dtype)
    large = {"masked_linear": lambda d: [long_rows(d)], "quant_linear": many_inputs, "sliced_linear": long_dense_rows}
    yield from large.get(name, lambda d: [])(dtype)


def check_sequence() -> None:
    """What programs have beside the ops: sums, views of heads, and a place in a larger tensor."""
    generator = torch.Generator().manual_seed(0)
    for batch, heads, d, dtype in ((2, 3, 7, torch.float32), (1, 2, 5, torch.bfloat16), (0, 1, 4, torch.float64)):
        x = torch.randn(batch, 1, heads * d, generator=generator).to(dtype)
        room = torch.zeros(batch, heads, 9, d, dtype=dtype)
        program = f"add %0 %0\nheads %2 {d}\nplace %3 %1\nreturn %2 %3"
        got, turned = ops.sequence([x, room[:, :, :6]], program)
        assert torch.equal(got, x + x)
        assert torch.equal(turned, (x + x).view(batch, 1, heads, d).transpose(1, 2))
        assert torch.equal(room[:, :, 5:6], turned)
        assert room[:, :, :5].count_nonzero() == room[:, :, 6:].count_nonzero() == 0


def check_not_finite() -> None:
    """What is not finite stays where it belongs, also where numbers are multiplied as sums of others."""
    generator = torch.Generator().manual_seed(0)
    for dtype, inputs in itertools.product(DTYPES, (1, 8, 20, 70)):
        largest = torch.finfo(dtype).max
        for value in (float("inf"), -float("inf"), float("nan"), largest):
            for inside in ("x", "weight"):
                x, weight = (torch.randn(n, 45, generator=generator).to(dtype) for n in (inputs, 19))
                (x if inside == "x" else weight)[0, 33] = value
                got = ops.sliced_linear(x, weight, None, 45, 19)
                exact = x.double() @ weight.double().T
                expected = exact.to(dtype)
                what = f"{value} in {inside}, {inputs} inputs, {dtype}"
                assert torch.equal(got.isnan(), expected.isnan()), what
                assert torch.equal(got.isinf(), expected.isinf()), what
                rest = expected.isfinite()
                assert_close(got[rest], expected[rest], exact[rest], what)


def check_unused_columns() -> None:
    """What a list does not keep is not multiplied by zero (but more inputs, and float64, meet it as a dense row)."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        keep = torch.rand(9, 45, generator=generator) < 0.4
        keep[:, 0] = False
        packed = ops.pack_masked(torch.randn(9, 45, generator=generator).to(dtype), keep, "index")
        x = torch.randn(1, 45, generator=generator).to(dtype)
        x[:, 0] = float("inf")
        assert ops.masked_linear(x, *packed, None, 9, "index").isfinite().all(), dtype


def main() -> None:
    print(_C.build_info()["instruction_set"])
    check_sequence()
    check_not_finite()
    check_unused_columns()
    for name in sorted(_C.signatures()):
        for dtype in DTYPES:
            for sample in (*ops.OPS[name].samples(dtype), *more(name, dtype)):
                got = run(name, fresh(sample.args))
                with ops.use_backend("torch"):
                    same = run(name, fresh(sample.args))
                    reference = run(name, fresh(sample.args, torch.float64))
                for g, s, r in zip(got, same, reference, strict=True):
                    what = f"{name} {sample.id} {dtype}"
                    if g.is_floating_point():
                        assert_close(g, s, r, what)
                    else:
                        assert torch.equal(g, r), what
    print("same")


if __name__ == "__main__":
    main()
