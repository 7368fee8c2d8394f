"""Argument checks that the contracts share: each raises `where: what was got, what is allowed, what to do`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABELS = (torch.uint8, torch.int32, torch.int64)


def tensor(where: str, name: str, value: Any, dtypes: tuple[torch.dtype, ...] = FLOATS, min_dim: int = 1) -> None:
    """Raise unless `value` is a tensor of an allowed dtype with at least `min_dim` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} is a {type(value).__name__}, allowed is a tensor; pass one")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{where}: {name} has dtype {value.dtype}, allowed {allowed}; convert it")
    if value.dim() < min_dim:
        raise ValueError(
            f"{where}: {name} has {value.dim()} dimensions, allowed at least {min_dim}; add the missing ones"
        )


def shaped(
    where: str, name: str, value: Any, shape: tuple[int | None, ...], like: Tensor, dtypes: tuple[torch.dtype, ...] = ()
) -> None:
    """Raise unless `value` has `shape` (None: any size), the device of `like` and its dtype (or one of `dtypes`)."""
    tensor(where, name, value, dtypes or FLOATS, min_dim=0)
    if not dtypes and value.dtype != like.dtype:
        raise TypeError(
            f"{where}: {name} has dtype {value.dtype}, allowed {like.dtype} as the input; convert one of them"
        )
    if value.device != like.device:
        raise ValueError(f"{where}: {name} is on {value.device}, allowed {like.device} as the input; move it")
    if value.dim() != len(shape) or any(w is not None and g != w for g, w in zip(value.shape, shape, strict=True)):
        wanted = "(" + ", ".join("any" if s is None else str(s) for s in shape) + ")"
        raise ValueError(
            f"{where}: {name} has shape {tuple(value.shape)}, allowed {wanted}; check the factor and its order"
        )


def bias(where: str, value: Tensor | None, out_features: int, like: Tensor) -> None:
    """Raise unless `value` is None or a vector of `out_features` in the dtype and device of `like`."""
    if value is not None:
        shaped(where, "bias", value, (out_features,), like)


def no_gradient(where: str, *tensors: Any) -> None:
    """Raise if a gradient would be recorded: of an op that has none, its result would be cut off in silence."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        raise RuntimeError(f"{where}: an input requires a gradient, allowed are none; call it under torch.no_grad()")


def concrete(value: Tensor) -> bool:
    """Whether the contents of a tensor can be read here without a wait: on CPU, outside tracing."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(value, FakeTensor)


def indices(where: str, name: str, value: Tensor, size: int) -> None:
    """Raise if a readable index tensor points outside `range(size)`."""
    if not concrete(value) or value.numel() == 0:
        return
    low, high = (int(v) for v in value.aminmax())
    if low < 0 or high >= size:
        raise ValueError(f"{where}: {name} holds indices {low}..{high}, allowed 0..{size - 1}; rebuild it")


def permutation(where: str, name: str, value: Tensor) -> None:
    """Raise if a readable index vector is not a permutation of its own range."""
    indices(where, name, value, value.numel())
    if concrete(value) and value.numel() and int(torch.bincount(value.long(), minlength=value.numel()).amax()) > 1:
        raise ValueError(f"{where}: {name} repeats an index, allowed each of 0..{value.numel() - 1} once; rebuild it")


def as_matrix(x: Tensor) -> Tensor:
    """(product of the leading dimensions, last dimension), also where either is 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])
