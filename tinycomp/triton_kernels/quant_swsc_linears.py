"""Triton backend of `quant_swsc_linears`: every layer as `quant_swsc_linear`, their outputs put beside each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinycomp.triton_kernels._group import with_signature
from tinycomp.triton_kernels._launch import kernel_op
from tinycomp.triton_kernels.quant_swsc_linear import rounded_shared


@kernel_op("quant_swsc_linears")
@with_signature("quant_swsc_linears")
def quant_swsc_linears(x: Tensor, *args: Any) -> Tensor:
    layers = [args[i : i + 12] for i in (0, 12, 24) if args[i] is not None]
    return torch.cat([rounded_shared(x, *layer, *args[36:]) for layer in layers], -1)
