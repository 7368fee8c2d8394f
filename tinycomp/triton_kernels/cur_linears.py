"""Triton backend of `cur_linears`: for few inputs one launch for all layers."""

from __future__ import annotations

from torch import Tensor

from tinycomp.triton_kernels._group import with_signature
from tinycomp.triton_kernels._launch import adjacent, kernel_op, rows_of
from tinycomp.triton_kernels._stages import Part, run_stages


@kernel_op("cur_linears")
@with_signature("cur_linears")
def cur_linears(x: Tensor, *tensors: Tensor | None) -> Tensor:
    layers = [(r, u, c, bias) for r, u, c, bias in zip(*[iter(tensors)] * 4, strict=True) if r is not None]
    flat, features = rows_of(x), [c.shape[0] for _, _, c, _ in layers]
    inputs = flat.shape[0]
    y = x.new_empty(*x.shape[:-1], sum(features))
    stages: tuple[list[Part], list[Part], list[Part]] = ([], [], [])
    for (r, u, c, bias), out in zip(layers, y.view(inputs, sum(features)).split(features, 1), strict=True):
        z, linked = x.new_empty(inputs, r.shape[0]), x.new_empty(inputs, u.shape[0])
        stages[0].append(Part(flat, r, kept=z))
        stages[1].append(Part(z, u, kept=linked))
        stages[2].append(Part(linked, c, out, bias=adjacent(bias)))
    run_stages(*stages)
    return y
