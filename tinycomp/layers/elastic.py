"""Linear layer whose first inputs and outputs form a smaller layer of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tinycomp import ops
from tinycomp.layers._base import CompressedLinear, check_size, is_plain, linear


class ElasticLinear(CompressedLinear):
    """A dense layer that runs as any of its prefixes: y = x full[:active_out, :active_in]ᵀ + bias[:active_out].

    Args:
        in_features: largest size of the input.
        out_features: largest size of the output.
        bias: whether a bias is added.
        device: where the tensors are.
        dtype: dtype of weight and bias.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.full = linear(in_features, out_features, device, dtype)
        self.active_in, self.active_out = in_features, out_features

    def set_active_(self, active_in: int | None = None, active_out: int | None = None) -> None:
        """Choose how many inputs and outputs are used from now on; None leaves a size as it is."""
        active_in = self.active_in if active_in is None else active_in
        active_out = self.active_out if active_out is None else active_out
        check_size("ElasticLinear", "active_in", active_in, 1, self.in_features)
        check_size("ElasticLinear", "active_out", active_out, 1, self.out_features)
        self.active_in, self.active_out = active_in, active_out

    def forward(self, x: Tensor) -> Tensor:
        if not is_plain(self.full):
            if (self.active_in, self.active_out) != (self.in_features, self.out_features):
                raise RuntimeError(
                    "ElasticLinear: `full` has an adapter or a hook and only a part of it is active, "
                    "allowed is the whole layer; merge the adapter or call set_active_ with the full sizes"
                )
            y = self.full(x)
            return y if self.bias is None else y + self.bias
        return ops.sliced_linear(x, self.full.weight, self.bias, self.active_in, self.active_out)

    def dense_weight(self) -> Tensor:
        return self.full.weight[: self.active_out, : self.active_in]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, active_in={self.active_in}, active_out={self.active_out}"
