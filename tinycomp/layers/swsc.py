"""Shared weights for similar channels: clusters of channels share one centroid, a low-rank term corrects the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tinycomp.layers._base import CompressedLinear, check_size, linear, plain_weights, tensors
from tinycomp.layers.grouped import Grouped


class ChannelSharing(CompressedLinear):
    """What the exact and the rounded layer have in common: sizes, labels and gains."""

    labels: Tensor

    def __init__(
        self, in_features: int, out_features: int, clusters: int, rank: int, axis: int, bias: bool, scaled: bool,
        device: Any, dtype: Any,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        name, channels = type(self).__name__, in_features if axis else out_features
        check_size(name, "axis", axis, 0, 1)
        check_size(name, "clusters", clusters, 1, channels)
        check_size(name, "rank", rank, 0, min(in_features, out_features))
        self.clusters, self.rank, self.axis = clusters, rank, axis
        label_dtype = torch.uint8 if clusters <= 256 else torch.int32
        self.register_buffer("labels", torch.zeros(channels, dtype=label_dtype, device=device))
        self.scales = nn.Parameter(torch.ones(channels, device=device, dtype=dtype)) if scaled else None

    def extra_repr(self) -> str:
        more = f"clusters={self.clusters}, rank={self.rank}, axis={self.axis}, scaled={self.scales is not None}"
        return f"{super().extra_repr()}, {more}"


class SWSCLinear(Grouped, ChannelSharing):
    """Channels share centroids; the weight is never rebuilt.

    Axis 0, output channels:  y_i = scales_i centroids(x)[labels_i] + a(b(x))_i + bias_i
    Axis 1, input channels:   y = centroids(x') + a(b(x)) + bias,  x'_c = sum over labels_j = c of scales_j x_j

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        clusters: number of centroids, 1..number of channels.
        rank: rank of the correction; 0 leaves it out.
        axis: which channels share.
        bias: whether a bias is added.
        scaled: whether each channel has a gain.
        device: where the tensors are.
        dtype: dtype of centroids, factors and gains.
    """

    op, group_op = "swsc_linear", "swsc_linears"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        clusters: int,
        rank: int,
        axis: int = 0,
        bias: bool = True,
        scaled: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, clusters, rank, axis, bias, scaled, device, dtype)
        sizes = (clusters, out_features) if axis else (in_features, clusters)
        self.centroids = linear(*sizes, device, dtype)
        self.b = linear(in_features, rank, device, dtype) if rank else None
        self.a = linear(rank, out_features, device, dtype) if rank else None

    def group_tensors(self) -> tuple[Any, ...] | None:
        children = self._modules
        names = ("centroids", "b", "a") if self.rank else ("centroids",)
        weights = plain_weights(*(children[name] for name in names))  # type: ignore[arg-type]
        if weights is None:
            return None
        centroids, *factors = weights
        b, a = factors or (centroids.new_empty(0, self.in_features), centroids.new_empty(self.out_features, 0))
        labels, scales, bias = tensors(self, "labels", "scales", "bias")
        return centroids, labels, b, a, scales, bias

    def group_numbers(self) -> tuple[int, ...]:
        return (self.axis,)

    def in_parts(self, x: Tensor) -> Tensor:
        labels = self.labels.long()
        if self.axis == 0:
            y = self.centroids(x).index_select(-1, labels)
            y = y if self.scales is None else y * self.scales
        else:
            gained = x if self.scales is None else x * self.scales
            y = self.centroids(x.new_zeros(*x.shape[:-1], self.clusters).index_add(-1, labels, gained))
        if self.a is not None and self.b is not None:
            y = y + self.a(self.b(x))
        return y if self.bias is None else y + self.bias

    def dense_weight(self) -> Tensor:
        w = self.centroids.weight.index_select(self.axis, self.labels.long())
        if self.scales is not None:
            w = w * (self.scales if self.axis else self.scales[:, None])
        return w if self.a is None or self.b is None else w + self.a.weight @ self.b.weight
