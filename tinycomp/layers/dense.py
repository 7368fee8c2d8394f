"""Dense linear layer on the library's own kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tinycomp import ops
from tinycomp.layers._base import tensors
from tinycomp.layers.grouped import Grouped


class DenseLinear(Grouped, nn.Linear):
    """`nn.Linear` multiplied by `ops.sliced_linear`: the same weight under the same name, shared or tied as before.

    Worth it for 16-bit weights on processors without 16-bit arithmetic, where they are widened on the way.
    """

    group_op = "sliced_linears"

    @classmethod
    def from_linear(cls, module: nn.Linear) -> DenseLinear:
        """A layer with the parameters of `module` themselves, so that ties hold."""
        layer = cls(module.in_features, module.out_features, module.bias is not None, device="meta")
        layer.weight, layer.bias = module.weight, module.bias
        return layer

    def group_tensors(self) -> list[Any]:
        return tensors(self, "weight", "bias")

    def forward(self, x: Tensor) -> Tensor:
        together = self.from_group(x)
        if together is not None:
            return together
        weight, bias = tensors(self, "weight", "bias")
        return ops.sliced_linear(x, weight, bias, self.in_features, self.out_features)
