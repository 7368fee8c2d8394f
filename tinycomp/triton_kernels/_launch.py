"""What every launcher shares: registration as a `torch.library.triton_op`, views of tensors, configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from tinycomp.ops import _gpu
from tinycomp.ops._registry import OPS, register

# Rows of y, rows of w and columns per program, warps, pipeline stages. Decode pads its few inputs to 16. Compiled for
# any GPU, no candidate spills registers (tests/test_gpu_triton.py): with 4 warps, 64 x 128 did on int4 weights, 64 x 32
# and 16 x 16 x 64 in float32, and steps of 64 columns of 64 x 64 on sm_120.
DECODE_INPUTS = 16
PRODUCT_CONFIGS: dict[str, list[tuple[int, int, int, int, int]]] = {
    "decode": [(16, 16, 128, 4, 4), (16, 32, 128, 4, 4), (16, 64, 64, 4, 4)],
    "tiles": [(64, 64, 32, 4, 4), (64, 128, 64, 8, 3), (128, 128, 64, 8, 3)],
    "decode-float32": [(16, 16, 64, 8, 3), (16, 32, 32, 4, 3)],
    "tiles-float32": [(32, 32, 32, 4, 2), (64, 32, 32, 8, 2)],
}


def configs(kind: str) -> list[triton.Config]:
    """The autotuner's candidates of one kind."""
    return [
        triton.Config({"BM": bm, "BN": bn, "BK": bk}, num_warps=warps, num_stages=stages)
        for bm, bn, bk, warps, stages in PRODUCT_CONFIGS[kind]
    ]


def kernel_op(
    name: str, mutates: tuple[str, ...] = (), why_not: Callable[..., str | None] = lambda *args: None
) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: the function becomes the Triton backend of op `name`, under the schema of its contract.

    Args:
        name: the op.
        mutates: names of the arguments it writes to.
        why_not: reason this kernel cannot take some arguments, beside what no Triton kernel takes.
    """

    def reason(*args: Any) -> str | None:
        return _gpu.why_not_triton(name, args) or why_not(*args)

    def add(launch: Callable[..., Any]) -> Any:
        op = torch.library.triton_op(f"tinycomp_triton::{name}", launch, mutates_args=mutates, schema=OPS[name].schema)
        return register(name, "triton", reason)(op)

    return add


def rows_of(t: Tensor) -> Tensor:
    """The tensor as a matrix whose rows have adjacent entries, copied only if it must be."""
    t = t if t.dim() == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def adjacent(t: Tensor | None) -> Tensor | None:
    """The vector with adjacent entries, copied only if it must be."""
    return None if t is None else t.contiguous()
