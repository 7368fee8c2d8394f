"""Triton backend of `quant_swsc_linears`: every layer as in `quant_swsc_linear`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tinycomp.triton_kernels._group import with_signature
from tinycomp.triton_kernels._launch import kernel_op
from tinycomp.triton_kernels.quant_swsc_linear import rounded_shared


@kernel_op("quant_swsc_linears")
@with_signature("quant_swsc_linears")
def quant_swsc_linears(x: Tensor, *args: Any) -> Tensor:
    layers = [args[i : i + 12] for i in (0, 12, 24) if args[i] is not None]
    features = [layer[5].shape[0] for layer in layers]
    y = x.new_empty(*x.shape[:-1], sum(features))
    outputs = y.view(x.shape[:-1].numel(), sum(features)).split(features, 1)
    for layer, out in zip(layers, outputs, strict=True):
        rounded_shared(x, out, *layer, *args[36:])
    return y
