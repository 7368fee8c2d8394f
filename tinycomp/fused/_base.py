"""What the fused modules of `tinycomp.fused` and `tinycomp.fused_layer` share."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_globals

from tinycomp.ops import _registry

MARK = "_tinycomp_fused"  # set on modules that are fused, and on their angles


def runs(op: str, x: Tensor) -> bool:
    """Whether the op has a kernel for this tensor, and nobody records or traces what is computed."""
    if not x.is_cpu or not _registry._FAST[op].cpu or torch.is_grad_enabled():
        return False
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or forward_ad._current_level >= 0)


class FusedModule(nn.Module):
    """Before a module's own class: its forward pass by an op, where that is the same."""

    counted_as: str  # a field of `Fused`

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, type(self).__bases__, self.__dict__


@cache
def fused_class(fused: type[FusedModule], kind: Any) -> type[nn.Module]:
    return type(f"Fused{kind.__name__}", (fused, kind), {})


def _empty(*bases: type[nn.Module]) -> nn.Module:
    """What copying and pickling fill: the fused class of a module's class has no name to be found under."""
    fused = fused_class(*bases)  # type: ignore[arg-type]
    return fused.__new__(fused)


def is_heard(*modules: nn.Module) -> bool:
    """Whether somebody listens to a module or has replaced its forward."""
    if module_globals._global_forward_hooks or module_globals._global_forward_pre_hooks:
        return True
    for module in modules:
        own = module.__dict__
        hooks = own["_forward_hooks"]
        if own["_forward_pre_hooks"] or "forward" in own or (hooks and not _asleep(hooks)):
            return True
    return False


def _asleep(hooks: dict[int, Any]) -> bool:
    """Whether all hooks are those that transformers leaves once outputs were asked for, and none are now."""
    recorder: Any = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(recorder, "_active_collector", None)
    left = all(getattr(hook, "__module__", None) == getattr(recorder, "__name__", "") for hook in hooks.values())
    return left and collector is not None and not collector.get()


class Shift(nn.Module):
    """Stands for a module while what calls it is tried."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(self.by, -1)
