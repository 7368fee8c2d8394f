"""What every compressed linear layer shares."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn


class CompressedLinear(nn.Module):
    """A linear layer stored as something smaller than its (out_features, in_features) weight.

    The buffer `weight` has no elements. It is the guard of a saved model: a reader that does not know this layer finds
    a tensor of the wrong shape under the name of the dense weight and raises instead of starting from random values.
    Models that look at `linear.weight.dtype` (T5) get the layer's dtype from it.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether a bias is added.
        device: where the tensors are; "meta" for a layer that is filled later.
        dtype: floating dtype of the layer.
    """

    is_tinycomp_layer = True
    frozen: tuple[str, ...] = ()  # children or parameters that do not train

    def __init__(self, in_features: int, out_features: int, bias: bool, device: Any, dtype: Any) -> None:
        super().__init__()
        name = type(self).__name__
        for field, value in (("in_features", in_features), ("out_features", out_features)):
            check_size(name, field, value, 1)
        self.in_features, self.out_features = in_features, out_features
        zeros = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", zeros)
        self.bias: nn.Parameter | None
        self.weight: Tensor
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))

    @property
    def stored_numbers(self) -> int:
        """Numbers that replace the weight's out_features * in_features; index tensors and bias are not counted."""
        tensors = [*self.named_parameters(), *self.named_buffers()]
        return sum(t.numel() for name, t in tensors if name != "bias" and t.is_floating_point())

    def dense_weight(self) -> Tensor:
        """The (out_features, in_features) matrix this layer multiplies by."""
        raise NotImplementedError(f"{type(self).__name__}.dense_weight")

    def freeze_(self) -> None:
        """Switch off gradients of the parts that do not train; loading switches them all on."""
        for name in self.frozen:
            self.get_submodule(name).requires_grad_(False)

    def extra_repr(self) -> str:
        fields = ("in_features", "out_features")
        return ", ".join(f"{f}={getattr(self, f)}" for f in fields) + f", bias={self.bias is not None}"


def check_size(where: str, field: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise unless `value` is an int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}: {field} is {value!r}, allowed is an integer; pass one")
    if value < low or (high is not None and value > high):
        allowed = f"{low}..{high}" if high is not None else f"{low} or more"
        raise ValueError(f"{where}: {field} is {value}, allowed {allowed}; change it")


def linear(in_features: int, out_features: int, device: Any, dtype: Any) -> nn.Linear:
    """An nn.Linear without bias; either size may be 0."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        return nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype)


def tensors(module: nn.Module, *names: str) -> list[Any]:
    """Parameters and buffers, None where one is absent: `getattr` without the detours of `nn.Module`.

    A call of one row asks for up to eight of them, and each detour takes as long as a kernel needs for a few kilobytes.
    """
    parameters, buffers = module._parameters, module._buffers
    return [
        parameters[name] if name in parameters else buffers[name] if name in buffers else getattr(module, name)
        for name in names
    ]


def buffers_and_bias(module: nn.Module, names: tuple[str, ...]) -> list[Any]:
    """What `tensors` gives for buffers and the bias, faster still: one look-up each.

    Between two calls of a layer a model touches more memory than the caches hold, so each look-up waits for some.
    """
    buffers = module._buffers
    try:
        return [*[buffers[name] for name in names], module._parameters["bias"]]
    except KeyError:  # somebody made a parameter of a buffer
        return tensors(module, *names, "bias")


def plain_weights(*children: nn.Module) -> list[Any] | None:
    """Weights of children which a fused op may stand in for calling: None where anything is attached to one of them.

    Adapters and parametrisations change the class; hooks and replaced forwards show in the instance.
    """
    return [child._parameters["weight"] for child in children] if all(map(is_plain, children)) else None


def is_plain(child: nn.Module) -> bool:
    """Whether nothing is attached to a child: see `plain_weights`."""
    return not (
        type(child) is not nn.Linear
        or child._forward_hooks
        or child._forward_pre_hooks
        or child._backward_hooks
        or child._backward_pre_hooks
        or "forward" in child.__dict__
    )


def filled(target: nn.Linear, value: Tensor) -> None:
    """Make `value` the weight of `target`."""
    target.weight = nn.Parameter(value.detach().contiguous(), requires_grad=target.weight.requires_grad)
