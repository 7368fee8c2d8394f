"""Triton backend of `quant_swsc_linear`: for few inputs one launch."""

from __future__ import annotations

from torch import Tensor

from tinycomp.triton_kernels._launch import adjacent, kernel_op, rows_of
from tinycomp.triton_kernels._product import Base, Rounded
from tinycomp.triton_kernels._stages import Part, run_stages


@kernel_op("quant_swsc_linear")
def quant_swsc_linear(
    x: Tensor,
    centroids: Tensor,
    centroid_scales: Tensor,
    labels: Tensor,
    b: Tensor,
    b_scales: Tensor,
    a: Tensor,
    a_scales: Tensor,
    centroid_zeros: Tensor | None = None,
    b_zeros: Tensor | None = None,
    a_zeros: Tensor | None = None,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    axis: int = 0,
    bits: int = 8,
    group_size: int = 0,
    activation_bits: int = 0,
) -> Tensor:
    on_centroids, on_b, on_a = (
        Rounded(bits, s, z, group_size)
        for s, z in ((centroid_scales, centroid_zeros), (b_scales, b_zeros), (a_scales, a_zeros))
    )
    flat = rows_of(x)
    inputs = flat.shape[0]
    y = x.new_empty(*x.shape[:-1], a.shape[0])
    shared, z = (x.new_empty(inputs, w.shape[0]) for w in (centroids, b))
    base = Base(shared, labels.contiguous(), adjacent(scales))
    up = Part(z, a, y.view(inputs, a.shape[0]), on_a, bias=adjacent(bias), base=base)
    run_stages([Part(flat, b, None, on_b, kept=z), Part(flat, centroids, None, on_centroids, kept=shared)], [up])
    return y
