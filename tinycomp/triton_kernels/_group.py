"""Layers that read the same input, and low-rank layers alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tinycomp.triton_kernels._launch import adjacent, rows_of
from tinycomp.triton_kernels._product import PLAIN, Rounded
from tinycomp.triton_kernels._stages import Part, run_stages


class Layer(NamedTuple):
    """z = x rᵀ, then t zᵀ, with an order both are outputs; the factors may be rounded."""

    r: Tensor
    t: Tensor
    order: Tensor | None
    bias: Tensor | None
    rounded_r: Rounded = PLAIN
    rounded_t: Rounded = PLAIN


def with_signature(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator: a launcher of all arguments of op `name` gets those left out, and the signature `triton_op` reads."""
    types = {"Tensor": Tensor, "Optional[Tensor]": Tensor | None, "int": int, "Optional[int]": int | None, "str": str}
    parameters = [
        inspect.Parameter(
            a.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=a.default_value if a.has_default_value() else inspect.Parameter.empty,
            annotation=types[str(a.type)],
        )
        for a in getattr(torch.ops.tinycomp, name).default._schema.arguments
    ]

    signature = inspect.Signature(parameters, return_annotation=Tensor)

    def add(launch: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Tensor | int | str | None) -> Tensor:
            bound = signature.bind(*args)
            bound.apply_defaults()
            return launch(*bound.args)

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return add


class Single(NamedTuple):
    """y = x wᵀ + bias; the weight may be rounded."""

    w: Tensor
    bias: Tensor | None
    rounded: Rounded = PLAIN


def singles(x: Tensor, layers: list[Single]) -> Tensor:
    """The outputs of one to three layers of one product beside each other."""
    flat, features = rows_of(x), [layer.w.shape[0] for layer in layers]
    y = x.new_empty(*x.shape[:-1], sum(features))
    outputs = y.view(flat.shape[0], sum(features)).split(features, 1)
    run_stages(
        [
            Part(flat, layer.w, out, layer.rounded, bias=adjacent(layer.bias))
            for layer, out in zip(layers, outputs, strict=True)
        ]
    )
    return y


def low_rank(x: Tensor, layers: list[Layer]) -> Tensor:
    """The outputs of one to three layers beside each other."""
    flat = rows_of(x)
    features = [layer.t.shape[0] + (0 if layer.order is None else layer.r.shape[0]) for layer in layers]
    y = x.new_empty(*x.shape[:-1], sum(features))
    first, second = [], []
    for layer, out in zip(layers, y.view(flat.shape[0], sum(features)).split(features, 1), strict=True):
        rank, bias = layer.r.shape[0], adjacent(layer.bias)
        z = x.new_empty(flat.shape[0], rank)
        if layer.order is None:
            first.append(Part(flat, layer.r, None, layer.rounded_r, z))
            second.append(Part(z, layer.t, out, layer.rounded_t, bias=bias))
        else:
            order = layer.order.contiguous()
            first.append(Part(flat, layer.r, out, layer.rounded_r, z, order[:rank], bias))
            second.append(Part(z, layer.t, out, layer.rounded_t, order=order[rank:], bias=bias))
    run_stages(first, second)
    return y
