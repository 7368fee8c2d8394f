"""Every native op on every sample of its contract, held to the tolerance rule; prints the instruction set and "same".

Run by itself: `make sanitize` runs it with a checked library, test_ops_native.py with each instruction set.
"""

from __future__ import annotations

import torch
from test_ops import DTYPES, assert_close, fresh, run

from tinycomp import _C, ops
from tinycomp.ops._registry import Sample


def long_rows(dtype: torch.dtype) -> Sample:
    """A list of all columns of long rows, whose products must not be added in one chain."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 4096, generator=generator).to(dtype) for rows in (8, 8))
    packed = ops.pack_masked(weight, torch.ones(8, 4096, dtype=torch.bool), "index")
    return Sample("list of 4096 columns", (x, *packed, None, 8, "index"))


def main() -> None:
    print(_C.build_info()["instruction_set"])
    for name in sorted(_C.signatures()):
        for dtype in DTYPES:
            more = [long_rows(dtype)] if name == "masked_linear" else []
            for sample in (*ops.OPS[name].samples(dtype), *more):
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
