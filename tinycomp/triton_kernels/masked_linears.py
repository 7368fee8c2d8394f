"""Triton backend of `masked_linears`: one launch for all layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tinycomp.triton_kernels._group import with_signature
from tinycomp.triton_kernels._launch import kernel_op
from tinycomp.triton_kernels.masked_linear import SparseLayer, packed_layers


@kernel_op("masked_linears")
@with_signature("masked_linears")
def masked_linears(x: Tensor, *args: Any) -> Tensor:
    layers = [SparseLayer(*args[i : i + 6]) for i in (0, 6, 12) if args[i] is not None]
    return packed_layers(x, layers, *args[18:])
