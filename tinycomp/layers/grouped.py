"""Layers that read the same input (q, k, v; gate, up): on a GPU, the first one's call computes all for few inputs.

It saves launches, which bound a GPU's decoding. A CPU has nothing to gain: the op for all took as long as one for each
(low-rank q, k, v and gate, up of SmolLM2 at half rank: 90 against 92 and 210 against 221 microseconds on two cores;
elastic q, k, v on a core where calls are slow: 223 against 202), and keeping the results for the others costs more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from tinycomp import ops
from tinycomp.ops import _registry
from tinycomp.ops._group import LAYERS, gpu_backends
from tinycomp.ops._registry import OPS, why_not

MOST_INPUTS = 16  # above, reading the input again costs nothing beside the products
MOST_MISSES = 3


class Grouped:
    """What a layer says so that it may be computed together with others, and its forward pass."""

    group: Group | None = None
    op: str  # of `tinycomp.ops`, for this layer
    group_op: str  # for all layers
    in_features: int
    out_features: int

    def group_tensors(self) -> Sequence[Any] | None:
        """The layer's own arguments of that op; None while it has to compute its output itself."""
        raise NotImplementedError(f"{type(self).__name__}.group_tensors")

    def group_numbers(self) -> tuple[int | str, ...]:
        """The op's last arguments, the same for all layers of a group."""
        return ()

    def as_call(self) -> tuple[str, Sequence[Any], tuple[int | str, ...]] | None:
        """The op, tensors and numbers that give the layer's output from its input; None while it takes several ops."""
        held = self.group_tensors()
        return None if held is None else (self.op, held, self.group_numbers())

    def group_features(self) -> int:
        """Outputs."""
        return self.out_features

    def in_parts(self, x: Tensor) -> Tensor:
        """The layer's output while `group_tensors` gives None."""
        raise NotImplementedError(f"{type(self).__name__}.in_parts")

    def forward(self, x: Tensor) -> Tensor:
        together = self.from_group(x)
        if together is not None:
            return together
        call = self.as_call()
        if call is None:
            return self.in_parts(x)
        op, held, numbers = call
        return getattr(ops, op)(*(x, *held, *numbers))

    def from_group(self, x: Tensor) -> Tensor | None:
        """The layer's output if the call of another one made it, or makes it now."""
        if (x.is_cpu and _registry._forced is None) or self.group is None:  # the former for the sake of time
            return None
        return self.group.output(self, x)


class Group:
    """Two or three layers of one class that a model calls in order with the very same tensor.

    The first one's call computes the outputs of all; the others take theirs when they are called with that tensor, and
    compute it themselves otherwise. A model whose calls turn out to differ stops being computed this way.

    Args:
        members: in the order in which the model calls them.
    """

    def __init__(self, members: list[Grouped]) -> None:
        self.members = members
        self._kept: tuple[Tensor, tuple[Tensor, ...]] | None = None
        self._misses = 0

    def output(self, layer: Grouped, x: Tensor) -> Tensor | None:
        """What `layer` gives for `x`; None if it has to compute that itself."""
        kept = self._kept
        if layer is self.members[0]:
            self._misses += kept is not None
            self._kept = None
            return self._first(x) if self._misses < MOST_MISSES else None
        if kept is None or kept[0] is not x:
            return None
        if layer is self.members[-1]:
            self._kept, self._misses = None, 0
            return kept[1][-1]
        return kept[1][1]

    def _first(self, x: Tensor) -> Tensor | None:
        members = self.members
        first = members[0]
        backends = gpu_backends(x)
        if not backends or x.numel() > MOST_INPUTS * first.in_features:
            return None
        args: list[Any] = [x]
        for layer in members:
            tensors = layer.group_tensors()
            if tensors is None or layer.group_op != first.group_op:
                return None
            args += tensors
        args += [None] * ((len(args) - 1) // len(members) * (LAYERS - len(members)))
        args += first.group_numbers()
        if all(why_not(OPS[first.group_op], backend, tuple(args)) for backend in backends):
            return None
        outputs = getattr(ops, first.group_op)(*args).split([layer.group_features() for layer in members], -1)
        self._kept = x, outputs
        return outputs[0]


def group_(model: nn.Module, shared: Iterable[Sequence[str]]) -> None:
    """Let compressed layers that share their input be computed together; earlier groups are dissolved.

    Nothing else changes: modules, parameters and their names stay as they are.

    Args:
        model: its layers of one class, and rounded alike, become groups.
        shared: paths of linears that a sublayer calls with one tensor, in that order.
    """
    layers = dict(model.named_modules())
    for layer in layers.values():
        if isinstance(layer, Grouped):
            layer.group = None
    for paths in shared:
        members: list[Any] = [layers.get(path) for path in paths]
        known = all(isinstance(m, Grouped) for m in members)
        if known and len(members) > 1 and len({(type(m), m.in_features, m.group_numbers()) for m in members}) == 1:
            group = Group(members)
            for member in members:
                member.group = group
