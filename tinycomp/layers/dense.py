"""Dense linear layer on the library's own kernel."""

from __future__ import annotations

from typing import Any

from torch import nn

from tinycomp.layers._base import tensors
from tinycomp.layers.grouped import Grouped


class DenseLinear(Grouped, nn.Linear):
    """`nn.Linear` multiplied by `ops.sliced_linear`: the same weight under the same name, shared or tied as before.

    Worth it for 16-bit weights on processors without 16-bit arithmetic, where they are widened on the way.
    """

    op, group_op = "sliced_linear", "sliced_linears"

    @classmethod
    def from_linear(cls, module: nn.Linear) -> DenseLinear:
        """A layer with the parameters of `module` themselves, so that ties hold."""
        layer = cls(module.in_features, module.out_features, module.bias is not None, device="meta")
        layer.weight, layer.bias = module.weight, module.bias
        return layer

    def group_tensors(self) -> list[Any]:
        return tensors(self, "weight", "bias")

    def as_call(self) -> tuple[str, list[Any], tuple[int, int]]:
        return self.op, self.group_tensors(), (self.in_features, self.out_features)
