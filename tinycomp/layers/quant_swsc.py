"""Shared weights for similar channels, rounded to int8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tinycomp.layers._base import tensors
from tinycomp.layers.grouped import Grouped
from tinycomp.layers.swsc import ChannelSharing, SWSCLinear
from tinycomp.ops.quant_linear import check_activation_bits, dequantize

_ALWAYS = ("centroids", "centroids_scales", "centroids_zeros", "labels", "scales", "bias")
_FACTORS = ("b", "b_scales", "b_zeros", "a", "a_scales", "a_zeros")


class QuantSWSCLinear(Grouped, ChannelSharing):
    """`SWSCLinear` whose centroids and factors are rounded: a call of `ops.quant_swsc_linear`.

    Buffers centroids, b and a are the levels of `SWSCLinear`'s weights, beside them centroids_scales, b_scales and
    a_scales (rows, groups), with 4 bits also their zeros; gains (`scales`) keep the layer's dtype.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        clusters: number of centroids, 1..number of channels.
        rank: rank of the correction; 0 leaves it out.
        axis: which channels share: 0 outputs, 1 inputs.
        bias: whether a bias is added.
        scaled: whether each channel has a gain.
        activation_bits: 0, or 8 to round inputs by row and group.
        bits: 8, symmetric, or 4, packed and with zeros.
        group_size: inputs per scale, even; 0 for the whole row.
        device: where the tensors are.
        dtype: dtype of scales, gains and bias.
    """

    centroids: Tensor
    centroids_scales: Tensor
    b: Tensor
    b_scales: Tensor
    a: Tensor
    a_scales: Tensor
    centroids_zeros: Tensor | None
    b_zeros: Tensor | None
    a_zeros: Tensor | None

    op, group_op = "quant_swsc_linear", "quant_swsc_linears"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        clusters: int,
        rank: int,
        axis: int = 0,
        bias: bool = True,
        scaled: bool = False,
        activation_bits: int = 0,
        bits: int = 8,
        group_size: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, clusters, rank, axis, bias, scaled, device, dtype)
        check_activation_bits("QuantSWSCLinear", activation_bits)
        if bits not in (4, 8) or group_size < 0 or group_size % 2:
            got = f"bits {bits!r}, group_size {group_size}"
            raise ValueError(f"QuantSWSCLinear: {got}, allowed 4 or 8 and an even number from 0; change it")
        self.activation_bits, self.bits, self.group_size = activation_bits, bits, group_size
        self._shapes = {"centroids": (out_features, clusters) if axis else (clusters, in_features)}
        if rank:
            self._shapes |= {"b": (rank, in_features), "a": (out_features, rank)}
        for name, (rows, columns) in self._shapes.items():
            groups = -(-columns // group_size) if group_size else 1
            stored, integer = (columns, torch.int8) if bits == 8 else (-(-columns // 2), torch.uint8)
            self.register_buffer(name, torch.zeros(rows, stored, dtype=integer, device=device))
            self.register_buffer(f"{name}_scales", torch.ones(rows, groups, device=device, dtype=dtype))
            zeros = torch.zeros(rows, groups, device=device, dtype=dtype) if bits == 4 else None
            self.register_buffer(f"{name}_zeros", zeros)

    @property
    def stored_numbers(self) -> int:
        """Rounded centroids and factors, their scales and zeros, and gains; labels and bias are not counted.

        Two 4-bit numbers that share a byte count as two.
        """
        tensors = [*self.named_parameters(), *self.named_buffers()]
        others = sum(t.numel() for name, t in tensors if name not in ("bias", "labels", *self._shapes))
        return others + sum(rows * columns for rows, columns in self._shapes.values())

    def group_tensors(self) -> tuple[Any, ...]:
        centroids, c_scales, c_zeros, labels, scales, bias = tensors(self, *_ALWAYS)
        b, b_scales, b_zeros, a, a_scales, a_zeros = tensors(self, *_FACTORS) if self.rank else self._no_factors()
        return centroids, c_scales, labels, b, b_scales, a, a_scales, c_zeros, b_zeros, a_zeros, scales, bias

    def group_numbers(self) -> tuple[int, ...]:
        return self.axis, self.bits, self.group_size, self.activation_bits

    def _no_factors(self) -> list[Any]:
        """What rank 0 has in the place of _FACTORS."""
        in_features, out_features, size = self.in_features, self.out_features, self.group_size
        levels, scales = self.centroids, self.centroids_scales
        b = levels.new_empty(0, in_features if self.bits == 8 else -(-in_features // 2))
        b_scales = scales.new_empty(0, -(-in_features // size) if size else 1)
        a, a_scales = levels.new_empty(out_features, 0), scales.new_empty(out_features, 0 if size else 1)
        return [b, b_scales, None, a, a_scales, None]

    def dense_weight(self) -> Tensor:
        dtype = self.centroids_scales.dtype
        exact = SWSCLinear(
            *(self.in_features, self.out_features, self.clusters, self.rank, self.axis, False, self.scales is not None),
            device=self.labels.device,
            dtype=dtype,
        )
        children = {"centroids": exact.centroids, "b": exact.b, "a": exact.a}
        for name, child in children.items():
            if child is not None:
                q, scales, zeros = (getattr(self, name + part) for part in ("", "_scales", "_zeros"))
                columns = self._shapes[name][1]
                child.weight = nn.Parameter(dequantize(q, scales, zeros, columns, self.bits, self.group_size).to(dtype))
        exact.labels, exact.scales = self.labels, self.scales
        return exact.dense_weight().detach()

    def extra_repr(self) -> str:
        more = f"bits={self.bits}, group_size={self.group_size}, activation_bits={self.activation_bits}"
        return f"{super().extra_repr()}, {more}"
