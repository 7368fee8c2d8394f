"""Triton backend of `sliced_linears`: for few inputs one launch for all layers."""

from __future__ import annotations

from torch import Tensor

from tinycomp.triton_kernels._group import Single, singles, with_signature
from tinycomp.triton_kernels._launch import kernel_op


@kernel_op("sliced_linears")
@with_signature("sliced_linears")
def sliced_linears(x: Tensor, *tensors: Tensor | None) -> Tensor:
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return singles(x, [Single(w, bias) for w, bias in pairs if w is not None])
