"""Triton backend of `quant_swsc_linear`: for few inputs one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinycomp.triton_kernels._group import with_signature
from tinycomp.triton_kernels._launch import adjacent, kernel_op, rows_of
from tinycomp.triton_kernels._product import Base, Rounded
from tinycomp.triton_kernels._stages import OneHot, Part, run_stages
from tinycomp.triton_kernels.swsc_linear import shared_inputs


def rounded_shared(
    x: Tensor,
    out: Tensor,
    centroids: Tensor,
    centroid_scales: Tensor,
    labels: Tensor,
    b: Tensor,
    b_scales: Tensor,
    a: Tensor,
    a_scales: Tensor,
    centroid_zeros: Tensor | None,
    b_zeros: Tensor | None,
    a_zeros: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    axis: int,
    bits: int,
    group_size: int,
    activation_bits: int,
) -> None:
    """One layer into (inputs, out_features), whose rows may be apart."""
    on_centroids, on_b, on_a = (
        Rounded(bits, s, z, group_size)
        for s, z in ((centroid_scales, centroid_zeros), (b_scales, b_zeros), (a_scales, a_zeros))
    )
    # Packed columns are an even number of clusters, the last of which may be one that no label names.
    flat, clusters = rows_of(x), centroids.shape[axis] * (2 if axis == 1 and bits == 4 else 1)
    inputs, features = flat.shape[0], a.shape[0]
    shared, z = x.new_empty(inputs, clusters), x.new_empty(inputs, b.shape[0])
    labels, scales, bias = labels.contiguous(), adjacent(scales), adjacent(bias)
    down = Part(flat, b, None, on_b, kept=z)
    apart = x.dtype == torch.float32  # all stages in one kernel spill registers on sm_80
    if axis == 0:
        up = Part(z, a, out, on_a, bias=bias, base=Base(shared, labels, scales))
        readers = [down, Part(flat, centroids, None, on_centroids, kept=shared)]
        if apart:
            run_stages(readers)
            run_stages([up])
        else:
            run_stages(readers, [up])
        return
    outputs = x.new_empty(inputs, features)
    centres = Part(shared, centroids, None, on_centroids, kept=outputs)
    up = Part(z, a, out, on_a, bias=bias, base=Base(outputs))
    shared_inputs(Part(flat, OneHot(labels, scales, clusters), kept=shared), down, centres, up, apart)


@kernel_op("quant_swsc_linear")
@with_signature("quant_swsc_linear")
def quant_swsc_linear(x: Tensor, *args: Any) -> Tensor:
    y = x.new_empty(*x.shape[:-1], args[5].shape[0])
    rounded_shared(x, y.view(x.shape[:-1].numel(), y.shape[-1]), *args)
    return y
