"""Contracts of two or three layers that read the same input, made from the contract of one: q, k, v or gate, up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tinycomp.ops import _registry
from tinycomp.ops._registry import OPS, Cost, Op, Sample, define

Args = tuple[Any, ...]
LAYERS = 3


def _is_tensor(argument: Any) -> bool:
    return "Tensor" in str(argument.type)


def _schema(own: Sequence[Any], common: Sequence[Any]) -> str:
    words = ["Tensor x"]
    for layer in range(1, LAYERS + 1):
        for a in own:
            kind = "Tensor" if _is_tensor(a) else str(a.type)
            optional = layer == LAYERS or "Optional" in str(a.type)
            default = "=None" if layer == LAYERS else ""
            words.append(f"{kind}{'?' if optional else ''} {a.name}{layer}{default}")
    words += [f"{a.type} {a.name}={json.dumps(a.default_value)}" for a in common]
    return f"({', '.join(words)}) -> Tensor"


def _backward(
    one: Callable[..., Sequence[Tensor | None]],
    layers: Sequence[Args],
    size: int,
    needs: Sequence[bool],
    on_outputs: Sequence[Tensor],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients on x and on the `size` own arguments of each layer; `one` gives those of one layer."""
    gx: Tensor | None = None
    gradients: list[Tensor | None] = []
    for i, (layer, gy) in enumerate(zip(layers, on_outputs, strict=True)):
        own = needs[1 + i * size : 1 + (i + 1) * size]
        on_x, *rest = one(layer, (needs[0], *own, *(False for _ in layer[1 + size :])), gy)
        if on_x is not None:
            gx = on_x if gx is None else gx + on_x
        gradients += rest[:size]
    return gx, gradients


def define_group(
    name: str,
    single: str,
    samples: Callable[[torch.dtype], Iterator[Sample]],
    numbers_of: Callable[[Args], Args] | None = None,
) -> Callable[..., Tensor]:
    """Define op `name`: the outputs of layers of op `single`, one beside the other.

    Its arguments: x; tensors and, of the other arguments, those without a default, for each layer; then what has a
    default, the same for all layers.

    Args:
        name: the op of all layers.
        single: the op of one.
        samples: as an `Op` has them.
        numbers_of: a layer's tensors -> the numbers of its call of `single`; with it the group's op takes none.
    """
    op = OPS[single]
    arguments = getattr(torch.ops.tinycomp, single).default._schema.arguments
    own = [a for a in arguments[1:] if _is_tensor(a) or not (numbers_of or a.has_default_value())]
    common = [] if numbers_of else [a for a in arguments if not _is_tensor(a) and a.has_default_value()]
    # Plain functions and numbers alone below: torch.compile builds the closures of a backward pass anew.
    one_check, one_reference, one_fake, one_cost, one_backward = op.check, op.reference, op.fake, op.cost, op.backward
    size, defaults = len(own), tuple(a.default_value for a in common)
    end = 1 + LAYERS * size

    def split(args: Sequence[Any]) -> list[Args]:
        """Arguments of the single op for each layer that is there."""
        rest = tuple(args[end:]) + defaults[len(args[end:]) :]
        given = tuple(args[1:end]) + (None,) * (end - len(args[:end]))
        there = [given[i : i + size] for i in range(0, end - 1, size) if given[i] is not None]
        return [(args[0], *layer, *(numbers_of(layer) if numbers_of else rest)) for layer in there]

    def check(*args: Any) -> None:
        for layer in split(args):
            one_check(*layer)

    def reference(*args: Any) -> Tensor:
        return torch.cat([one_reference(*layer) for layer in split(args)], -1)

    def fake(*args: Any) -> Tensor:
        x = args[0]
        return x.new_empty(*x.shape[:-1], sum(one_fake(*layer).shape[-1] for layer in split(args)))

    def cost(*args: Any) -> Cost:
        found = [one_cost(*layer) for layer in split(args)]
        again = (len(found) - 1) * args[0].nbytes
        return Cost(sum(c.flops for c in found), sum(c.bytes for c in found) - again)

    def backward(args: Sequence[Any], needs: Sequence[bool], gy: Tensor) -> tuple[Tensor | None, ...]:
        assert one_backward is not None
        features = [one_fake(*layer).shape[-1] for layer in split(args)]
        gx, gradients = _backward(one_backward, split(args), size, needs, gy.split(features, -1))
        return gx, *gradients, *(None for _ in range(len(args) - 1 - len(gradients)))

    # Biases follow the autocast dtype with x, as the single op's do.
    follow = [i + layer * size for i in op.autocast[1:] for layer in range(LAYERS)]
    schema, autocast = _schema(own, common), (0, *follow)
    return define(Op(name, schema, check, reference, fake, cost, samples, backward, autocast))


def gpu_backends(x: Tensor) -> tuple[str, ...]:
    """The GPU backends that a call with input `x` may run."""
    allowed = (_registry._forced,) if _registry._forced else () if x.is_cpu else _registry.ORDER.get(x.device.type, ())
    return tuple(b for b in allowed if b not in ("cpu", "torch"))
