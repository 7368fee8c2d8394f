"""Triton backend of `quant_swsc_linear`: as `swsc_linear`, with weights rebuilt in registers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tinycomp.triton_kernels._group import with_signature
from tinycomp.triton_kernels._launch import kernel_op
from tinycomp.triton_kernels.quant_swsc_linears import layer_of
from tinycomp.triton_kernels.swsc_linear import shared_inputs
from tinycomp.triton_kernels.swsc_linears import shared_group


@kernel_op("quant_swsc_linear")
@with_signature("quant_swsc_linear")
def quant_swsc_linear(x: Tensor, *args: Any) -> Tensor:
    axis, bits, group_size, _activation_bits = args[12:]
    layer = layer_of(args[:12], bits, group_size)
    return shared_inputs(x, layer) if axis else shared_group(x, [layer])
