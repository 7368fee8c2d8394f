"""The dense layer on the library's own kernel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tinycomp.layers import DenseLinear


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
