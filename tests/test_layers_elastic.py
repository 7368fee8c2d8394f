"""Elastic layers that gather or scatter: the one call of inference is the operators of training, and never stale."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tinycomp.layers import ElasticLinear

IN, OUT = 33, 41


def build(side: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> ElasticLinear:
    sizes = {"stored_in": 20, "gather": True} if side == "gather" else {"stored_out": 24, "scatter": True}
    layer = ElasticLinear(IN, OUT, bias=bias, dtype=dtype, **sizes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in layer.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        if side == "gather":
            layer.inputs.copy_(torch.randperm(IN, generator=generator)[:20])
        else:
            layer.outputs.copy_(torch.randperm(OUT, generator=generator)[:24])
    return layer


def both(layer: ElasticLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Without and with gradients: one call, and the operators."""
    with torch.no_grad():
        fast = layer(x)
    return fast, layer(x).detach()


@pytest.mark.parametrize("side", ["gather", "scatter"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_the_dense_layer_with_zeros(side: str, bias: bool, dtype: torch.dtype) -> None:
    layer = build(side, dtype, bias)
    x = torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    for size in (20, 7, 0):
        layer.set_active_(**{"active_in" if side == "gather" else "active_out": size})
        shift = torch.zeros(OUT, dtype=torch.float64)
        if layer.bias is not None and side == "gather":
            shift += layer.bias.detach().double()
        elif layer.bias is not None:
            shift[layer.outputs[:size]] = layer.bias.detach()[:size].double()
        expected = x.double() @ layer.dense_weight().detach().double().T + shift
        for y in both(layer, x):
            assert (y.shape, y.dtype) == ((2, 3, OUT), dtype)
            assert (y.double() - expected).norm() <= 8 * torch.finfo(dtype).eps * expected.norm()


def _copy_weight(layer: ElasticLinear) -> None:
    with torch.no_grad():
        layer.full.weight.mul_(2)


def _copy_bias(layer: ElasticLinear) -> None:
    with torch.no_grad():
        layer.bias.add_(1)  # type: ignore[union-attr]


def _state(layer: ElasticLinear) -> dict[str, Tensor]:
    return {k: v.flip(0) if v.ndim == 1 else v.clone() for k, v in layer.state_dict().items()}


def _new_weight(layer: ElasticLinear) -> None:
    layer.full.weight = nn.Parameter(torch.ones_like(layer.full.weight))


CHANGES: dict[str, Callable[[ElasticLinear], object]] = {
    "fewer columns": lambda layer: layer.set_active_(active_in=11),
    "fewer rows": lambda layer: layer.set_active_(active_out=13),
    "weight in place": _copy_weight,
    "bias in place": _copy_bias,
    "new weight": _new_weight,
    "data": lambda layer: setattr(layer.full.weight, "data", torch.ones_like(layer.full.weight.data)),
    "loaded": lambda layer: layer.load_state_dict(_state(layer)),
    "assigned": lambda layer: layer.load_state_dict(_state(layer), assign=True),
    "cast": lambda layer: layer.double().float(),
}


@pytest.mark.parametrize("side", ["gather", "scatter"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_inference_prepared_is_never_stale(side: str, change: str) -> None:
    layer = build(side)
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(2))
    before, _ = both(layer, x)
    CHANGES[change](layer)
    after, expected = both(layer, x)
    torch.testing.assert_close(after, expected)
    assert (before.shape == after.shape and torch.equal(before, after)) == (change == "cast")


def test_copies_do_not_share_what_was_prepared() -> None:
    layer = build("scatter")
    x = torch.randn(3, IN)
    before, _ = both(layer, x)
    other = copy.deepcopy(layer)
    _copy_weight(other)
    assert torch.equal(both(layer, x)[0], before)
    assert not torch.equal(both(other, x)[0], before)


def test_hooks_and_gradients_reach_the_child() -> None:
    layer = build("scatter")
    x = torch.randn(3, IN)
    layer(x).sum().backward()
    assert layer.full.weight.grad is not None
    assert layer.bias.grad.tolist() == [3.0] * 24  # type: ignore[union-attr]
    layer.full.register_forward_hook(lambda _module, _args, y: y * 0)
    fast, slow = both(layer, x)
    assert torch.equal(fast, slow)
    assert float(fast.sum()) == pytest.approx(3 * float(layer.bias.detach().sum()))  # type: ignore[union-attr]
