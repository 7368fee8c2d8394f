"""Shared weights for similar channels, rounded to int8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tinycomp import ops
from tinycomp.layers.swsc import ChannelSharing, SWSCLinear
from tinycomp.ops.quant_linear import check_activation_bits, dequantize


class QuantSWSCLinear(ChannelSharing):
    """`SWSCLinear` whose centroids and factors are int8 with one scale per row: one `ops.quant_linear` for the
    centroids, one `ops.quant_lowrank_linear` for the correction.

    Buffers centroids, b and a are int8 in the shapes of `SWSCLinear`'s weights, beside them centroids_scales, b_scales
    and a_scales (rows, 1); gains (`scales`) keep the layer's dtype.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        clusters: number of centroids, 1..number of channels.
        rank: rank of the correction; 0 leaves it out.
        axis: which channels share: 0 outputs, 1 inputs.
        bias: whether a bias is added.
        scaled: whether each channel has a gain.
        activation_bits: 0, or 8 to round inputs by row and group.
        device: where the tensors are.
        dtype: dtype of scales, gains and bias.
    """

    centroids: Tensor
    centroids_scales: Tensor
    b: Tensor
    b_scales: Tensor
    a: Tensor
    a_scales: Tensor

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
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, clusters, rank, axis, bias, scaled, device, dtype)
        check_activation_bits("QuantSWSCLinear", activation_bits)
        self.activation_bits = activation_bits
        shapes = {"centroids": (out_features, clusters) if axis else (clusters, in_features)}
        if rank:
            shapes |= {"b": (rank, in_features), "a": (out_features, rank)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int8, device=device))
            self.register_buffer(f"{name}_scales", torch.ones(shape[0], 1, device=device, dtype=dtype))

    @property
    def stored_numbers(self) -> int:
        """Rounded centroids and factors, their scales, and gains; labels and bias are not counted."""
        tensors = [*self.named_parameters(), *self.named_buffers()]
        return sum(t.numel() for name, t in tensors if name not in ("bias", "labels"))

    def forward(self, x: Tensor) -> Tensor:
        labels = self.labels.long()
        if self.axis == 0:
            y = self._shared(x).index_select(-1, labels)
            y = y if self.scales is None else y * self.scales
        else:
            gained = x if self.scales is None else x * self.scales
            y = self._shared(x.new_zeros(*x.shape[:-1], self.clusters).index_add(-1, labels, gained))
        if self.rank:
            y = y + ops.quant_lowrank_linear(
                x, self.b, self.b_scales, self.a, self.a_scales, activation_bits=self.activation_bits
            )
        return y if self.bias is None else y + self.bias

    def _shared(self, x: Tensor) -> Tensor:
        return ops.quant_linear(x, self.centroids, self.centroids_scales, activation_bits=self.activation_bits)

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
                q, scales = getattr(self, name), getattr(self, f"{name}_scales")
                child.weight = nn.Parameter(dequantize(q, scales, None, q.shape[1]).to(dtype))
        exact.labels, exact.scales = self.labels, self.scales
        return exact.dense_weight().detach()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation_bits={self.activation_bits}"
