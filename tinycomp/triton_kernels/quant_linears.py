"""Triton backend of `quant_linears`: for few inputs one launch for all layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tinycomp.triton_kernels._group import Single, singles, with_signature
from tinycomp.triton_kernels._launch import kernel_op
from tinycomp.triton_kernels._product import Rounded


@kernel_op("quant_linears")
@with_signature("quant_linears")
def quant_linears(x: Tensor, *args: Any) -> Tensor:
    bits, group_size, _ = args[12:]
    layers = [args[i : i + 4] for i in (0, 4, 8)]
    return singles(
        x,
        [
            Single(q, bias, Rounded(bits, scales, zeros, group_size))
            for q, scales, zeros, bias in layers
            if q is not None
        ],
    )
