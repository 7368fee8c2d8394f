"""Contracts of two or three layers that read the same input, made from the contract of one: q, k, v or gate, up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tinycomp.ops._registry import OPS, Cost, Op, Sample, define

Args = tuple[Any, ...]
LAYERS = 3


class _Signature:
    """Where the arguments of the single op stand among those of the group: x, each layer's tensors, the numbers."""

    def __init__(self, single: str) -> None:
        arguments = getattr(torch.ops.tinycomp, single).default._schema.arguments
        self.tensors = [a for a in arguments[1:] if "Tensor" in str(a.type)]
        self.numbers = [a for a in arguments if "Tensor" not in str(a.type)]

    @property
    def schema(self) -> str:
        words = ["Tensor x"]
        for layer in range(1, LAYERS + 1):
            for a in self.tensors:
                optional = layer == LAYERS or "Optional" in str(a.type)
                default = "=None" if layer == LAYERS else ""
                words.append(f"Tensor{'?' if optional else ''} {a.name}{layer}{default}")
        words += [f"int {a.name}={a.default_value}" for a in self.numbers]
        return f"({', '.join(words)}) -> Tensor"

    def split(self, args: Sequence[Any]) -> list[Args]:
        """Arguments of the single op for each layer that is there."""
        size, end = len(self.tensors), 1 + LAYERS * len(self.tensors)
        numbers = tuple(args[end:]) + tuple(a.default_value for a in self.numbers[len(args[end:]) :])
        tensors = tuple(args[1:end]) + (None,) * (end - len(args[:end]))
        layers = [tensors[i * size : (i + 1) * size] for i in range(LAYERS)]
        return [(args[0], *layer, *numbers) for layer in layers if layer[0] is not None]


def define_group(name: str, single: str, samples: Callable[[torch.dtype], Iterator[Sample]]) -> Callable[..., Tensor]:
    """Define op `name`: the outputs of layers of op `single`, one beside the other."""
    op, signature = OPS[single], _Signature(single)

    def check(*args: Any) -> None:
        for layer in signature.split(args):
            op.check(*layer)

    def reference(*args: Any) -> Tensor:
        return torch.cat([op.reference(*layer) for layer in signature.split(args)], -1)

    def fake(*args: Any) -> Tensor:
        x = args[0]
        return x.new_empty(*x.shape[:-1], sum(op.fake(*layer).shape[-1] for layer in signature.split(args)))

    def cost(*args: Any) -> Cost:
        found = [op.cost(*layer) for layer in signature.split(args)]
        again = (len(found) - 1) * args[0].nbytes
        return Cost(sum(c.flops for c in found), sum(c.bytes for c in found) - again)

    def backward(args: Sequence[Any], needs: Sequence[bool], gy: Tensor) -> tuple[Tensor | None, ...]:
        assert op.backward is not None
        size, first = len(signature.tensors), 0
        gx: Tensor | None = None
        gradients: list[Tensor | None] = []
        for i, layer in enumerate(signature.split(args)):
            features = op.fake(*layer).shape[-1]
            wanted = (needs[0], *needs[1 + i * size : 1 + (i + 1) * size], *(False for _ in signature.numbers))
            on_x, *rest = op.backward(layer, wanted, gy[..., first : first + features])
            if on_x is not None:
                gx = on_x if gx is None else gx + on_x
            gradients += rest[:size]
            first += features
        return gx, *gradients, *(None for _ in range(len(args) - 1 - len(gradients)))

    # Biases follow the autocast dtype with x, as the single op's do.
    follow = [i + layer * len(signature.tensors) for i in op.autocast[1:] for layer in range(LAYERS)]
    fields = {"check": check, "reference": reference, "fake": fake, "cost": cost, "backward": backward}
    return define(
        Op(name=name, schema=signature.schema, samples=samples, autocast=(0, *follow), **fields)  # type: ignore[arg-type]
    )
