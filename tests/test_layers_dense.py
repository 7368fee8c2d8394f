"""The dense layer on the library's own kernel."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from tinycomp.layers import DenseLinear, LowRankLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_linear_keeps_the_parameters_and_the_result(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(50, 33, dtype=dtype)
    module = nn.Linear(33, 50, dtype=dtype)
    module.weight = embedding.weight
    layer = DenseLinear.from_linear(module)
    assert layer.weight is embedding.weight
    x = torch.randn(2, 3, 33, dtype=dtype)
    wanted = nn.functional.linear(x.double(), module.weight.double(), module.bias.double())
    assert torch.allclose(layer(x).double(), wanted, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    layer(x).sum().backward()
    assert embedding.weight.grad is not None
    assert layer.state_dict().keys() == module.state_dict().keys()


def test_tensors_that_torch_tools_put_elsewhere_are_found() -> None:
    """Pruned and parametrised weights are no parameters any more; a functional call exchanges them for one call."""
    torch.manual_seed(0)
    x = torch.randn(4, 16)
    for change in (lambda m: prune.random_unstructured(m, "weight", 0.5), parametrizations.weight_norm):
        module = nn.Linear(16, 12)
        layer = DenseLinear.from_linear(module)
        change(layer)
        with torch.no_grad():
            layer.bias.mul_(2)
            wanted = nn.functional.linear(x, layer.weight, layer.bias)
            assert torch.allclose(layer(x), wanted, atol=1e-5)
    compressed = LowRankLinear.from_factors(torch.randn(4, 16), torch.randn(12, 4), bias=torch.randn(12))
    prune.l1_unstructured(compressed, "bias", 0.5)
    with torch.no_grad():
        wanted = nn.functional.linear(x, compressed.dense_weight(), compressed.bias)
        assert torch.allclose(compressed(x), wanted, atol=1e-4)
        other = {"up.weight": torch.randn(12, 4)}
        exchanged = torch.func.functional_call(compressed, other, (x,))
        wanted = nn.functional.linear(x, other["up.weight"] @ compressed.down.weight, compressed.bias)
        assert torch.allclose(exchanged, wanted, atol=1e-4)
