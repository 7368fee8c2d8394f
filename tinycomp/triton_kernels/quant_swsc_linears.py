"""Triton backend of `quant_swsc_linears`: for few inputs one launch for all layers, in float32 two for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tinycomp.triton_kernels._group import with_signature
from tinycomp.triton_kernels._launch import kernel_op
from tinycomp.triton_kernels._product import Rounded
from tinycomp.triton_kernels.swsc_linears import Layer, shared_group


def layer_of(tensors: Sequence[Tensor], bits: int, group_size: int) -> Layer:
    """From a layer's own arguments of the op."""
    c, c_scales, labels, b, b_scales, a, a_scales, c_zeros, b_zeros, a_zeros, scales, bias = tensors
    rounding = ((c_scales, c_zeros), (b_scales, b_zeros), (a_scales, a_zeros))
    on_c, on_b, on_a = (Rounded(bits, scale, zero, group_size) for scale, zero in rounding)
    return Layer(c, labels, b, a, scales, bias, (on_c, on_b, on_a))


@kernel_op("quant_swsc_linears")
@with_signature("quant_swsc_linears")
def quant_swsc_linears(x: Tensor, *args: Any) -> Tensor:
    _axis, bits, group_size, _activation_bits = args[36:]
    layers = [args[i : i + 12] for i in (0, 12, 24) if args[i] is not None]
    return shared_group(x, [layer_of(layer, bits, group_size) for layer in layers])
