"""Every native op on every sample of its contract, held to the tolerance rule; prints the instruction set and "same".

Run by itself: `make sanitize` runs it with a checked library, test_ops_native.py with each instruction set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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


def more(name: str, dtype: torch.dtype) -> Iterable[Sample]:
    """Samples beside the contract's, too large for emulated GPUs."""
    return {"masked_linear": [long_rows(dtype)], "quant_linear": many_inputs(dtype)}.get(name, [])


def main() -> None:
    print(_C.build_info()["instruction_set"])
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
