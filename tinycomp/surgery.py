"""The only code that changes a model's modules: `apply_` runs the edits of a plan and assigns their tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tinycomp.edits import Drop, Edit, Plan, Replace, Set, Slice, Tie
from tinycomp.layers import LAYERS


def apply_(
    model: nn.Module, plan: Plan, tensors: dict[str, Tensor] | None = None, *, replay: bool = False
) -> Callable[[], None]:
    """Run the edits of a plan in order, then assign tensors. Everything is undone when any of it fails.

    A replaced layer keeps the device, dtype, training mode and bias of what it replaces. `Slice` counts features
    whatever the storage: dim 0 are outputs, dim 1 inputs.

    Args:
        model: changed in place; a model on meta stays there.
        plan: edits; a path names the module as it is numbered when its edit runs.
        tensors: new values under full parameter or buffer names after the edits, in the storage layout of the module
            they land in; cast to its device and dtype. On a real model they must fill all that the edits left empty.
        replay: skip the edits that the model's config already expresses.

    Returns:
        A function that undoes all of it.

    Raises:
        ValueError: a path, layer, field, shape or tensor does not fit; the message names it.
    """
    changes = _Changes(model)
    try:
        for edit in plan.edits:
            if not (replay and edit.in_config):
                _RUN[type(edit)](model, edit, changes)
        for name, value in (tensors or {}).items():
            _assign(model, name, value, changes)
        _check_filled(model, changes)
    except BaseException:
        changes.undo()
        raise
    return changes.undo


class _Changes:
    """What was done to a model, so that it can be undone, and which modules still wait for tensors."""

    def __init__(self, model: nn.Module) -> None:
        self._undo: list[Callable[[], None]] = []
        self.devices: dict[int, torch.device] = {}  # id of a new or resized module -> where its tensors belong
        self._kept: list[nn.Module] = []  # keeps those ids unique
        self.holders: dict[int, set[int]] = {}  # id of a parameter -> ids of the modules that hold it
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.holders.setdefault(id(parameter), set()).add(id(module))

    def undo(self) -> None:
        for step in reversed(self._undo):
            step()

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set a plain attribute of a module or config."""
        old = getattr(target, name)
        self._undo.append(lambda: setattr(target, name, old))
        setattr(target, name, value)

    def set_config(self, config: Any, fields: dict[str, Any], where: str) -> None:
        """Set fields of a config. Some are checked against one another, so all are put back at once."""
        unknown = [field for field in fields if not hasattr(config, field)]
        if unknown:
            raise ValueError(f"{where}: got config fields {', '.join(unknown)}, the config has none of that name")
        old = dict(config.__dict__)
        self._undo.append(lambda: config.__dict__.clear() or config.__dict__.update(old))
        for field, value in fields.items():
            setattr(config, field, value)

    def put(self, table: dict[str, Any], name: str, value: Any) -> None:
        """Replace one entry of a module's `_modules`, `_parameters` or `_buffers`."""
        old = table[name]
        self._undo.append(lambda: table.__setitem__(name, old))
        table[name] = value

    def remove(self, table: dict[str, nn.Module], index: str) -> None:
        """Remove one entry of the table of a list and renumber the others."""
        old = dict(table)

        def rewrite(items: dict[str, nn.Module]) -> None:
            table.clear()
            table.update(items)

        self._undo.append(lambda: rewrite(old))
        rewrite({str(i): m for i, m in enumerate(m for name, m in old.items() if name != index)})

    def expect(self, module: nn.Module, device: torch.device) -> None:
        """Remember that tensors of `module` are empty and belong on `device`."""
        self._kept.append(module)
        self.devices[id(module)] = device

    def shared(self, module: nn.Module) -> bool:
        """Whether another module holds one of this module's own parameters."""
        return any(len(self.holders.get(id(p), ())) > 1 for p in module._parameters.values() if p is not None)


def _module(model: nn.Module, path: str, where: str) -> nn.Module:
    module, done = model, type(model).__name__
    for part in path.split(".") if path else ():
        child = module._modules.get(part)
        if child is None:
            known = ", ".join(module._modules) or "no modules"
            raise ValueError(f"{where}: got path {path!r}, but {done} has no {part!r}; it has {known}")
        module, done = child, part
    return module


def _place(model: nn.Module, path: str, where: str) -> tuple[dict[str, Any], str, nn.Module]:
    """The table that holds the module at `path`, its key there, and the module."""
    module = _module(model, path, where)
    if module is model:
        raise ValueError(f"{where}: got the whole model, allowed is a module inside it; name one")
    head, _, name = path.rpartition(".")
    return _module(model, head, where)._modules, name, module


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _features(module: Any) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear layer, None for another module."""
    if _is_conv1d(module):
        return module.weight.shape[0], module.weight.shape[1]
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    return None


def _replace(model: nn.Module, edit: Replace, changes: _Changes) -> None:
    where = f"replace {edit.path}"
    table, name, old = _place(model, edit.path, where)
    sizes = _features(old)
    if sizes is None:
        raise ValueError(f"{where}: got a {type(old).__name__}, allowed are linear layers; choose another path")
    if changes.shared(old):
        raise ValueError(f"{where}: another module uses its weight too (tied embeddings); untie it or ignore the layer")
    weight = next(t for t in (*old.parameters(), *old.buffers()) if t.is_floating_point())
    new = _build(edit, sizes, weight.dtype, where)
    bias = getattr(old, "bias", None)
    if bias is not None:
        own = new._parameters.get("bias")
        if own is None:
            raise ValueError(f"{where}: got no bias, but the {type(old).__name__} there has one; set bias to true")
        if own.shape == bias.shape:  # a layer with fewer rows gets its bias as a tensor
            new._parameters["bias"] = bias
    trainable = [p.requires_grad for p in old.parameters()]
    if trainable and not any(trainable):
        new.requires_grad_(False)
    new.train(old.training)
    device = changes.devices.get(id(old), weight.device)  # a layer that was just resized is on meta
    if device.type != "meta":
        new._buffers["weight"] = weight.new_empty(0, device=device)
    for module in new.modules():
        changes.expect(module, device)
    changes.put(table, name, new)


def _build(edit: Replace, sizes: tuple[int, int], dtype: torch.dtype, where: str) -> nn.Module:
    """The new layer, on meta; its arguments are checked first."""
    if edit.layer not in LAYERS:
        raise ValueError(f"{where}: got layer {edit.layer!r}, allowed {', '.join(sorted(LAYERS))}")
    known = [p for p in inspect.signature(LAYERS[edit.layer]).parameters if p not in ("device", "dtype")]
    unknown = sorted(set(edit.kwargs) - set(known))
    if unknown:
        raise ValueError(f"{where}: got {', '.join(unknown)}, {edit.layer} takes {', '.join(known)}")
    wanted = edit.kwargs.get("in_features"), edit.kwargs.get("out_features")
    if wanted != sizes:
        raise ValueError(f"{where}: got in_features, out_features {wanted}, the layer there has {sizes}; use its sizes")
    try:
        return LAYERS[edit.layer](**edit.kwargs, device="meta", dtype=dtype)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def _slice(model: nn.Module, edit: Slice, changes: _Changes) -> None:
    where = f"slice {edit.path}"
    _, _, module = _place(model, edit.path, where)
    conv1d = _is_conv1d(module)
    if not (conv1d or isinstance(module, nn.Linear)):
        raise ValueError(
            f"{where}: got a {type(module).__name__}, allowed nn.Linear and Conv1D; slice before replacing"
        )
    if edit.dim not in (0, 1):
        raise ValueError(f"{where}: got dim {edit.dim!r}, allowed 0 (outputs) or 1 (inputs)")
    if changes.shared(module):
        raise ValueError(f"{where}: another module uses its weight too (tied embeddings); untie it or ignore the layer")
    inputs, outputs = _features(module) or (0, 0)
    size = inputs if edit.dim else outputs
    if not 1 <= edit.keep <= size:
        raise ValueError(f"{where}: got keep {edit.keep}, allowed 1..{size}; change it")
    weight = module._parameters["weight"]
    assert weight is not None
    changes.expect(module, changes.devices.get(id(module), weight.device))
    outputs, inputs = (outputs, edit.keep) if edit.dim else (edit.keep, inputs)
    resized = {"weight": (inputs, outputs) if conv1d else (outputs, inputs)}
    if edit.dim == 0 and module._parameters.get("bias") is not None:
        resized["bias"] = (outputs,)  # type: ignore[assignment]
    for name, shape in resized.items():
        old: Any = module._parameters[name]
        empty = torch.empty(shape, dtype=old.dtype, device="meta")
        changes.put(module._parameters, name, nn.Parameter(empty, requires_grad=old.requires_grad))
    for attribute in ("nx", "in_features") if edit.dim else ("nf", "out_features"):
        if hasattr(module, attribute):
            changes.set(module, attribute, edit.keep)


def _tie(model: nn.Module, edit: Tie, changes: _Changes) -> None:
    where = f"tie {edit.path}"
    table, name, old = _place(model, edit.path, where)
    _, _, target = _place(model, edit.to, where)
    if f"{edit.path}.".startswith(f"{edit.to}.") or f"{edit.to}.".startswith(f"{edit.path}."):
        raise ValueError(f"{where}: got {edit.to}, allowed is a module outside it; choose another one")
    if type(old) is not type(target):
        raise ValueError(
            f"{where}: got a {type(old).__name__} and a {type(target).__name__} at {edit.to}, allowed one class"
        )
    changes.put(table, name, target)


def _drop(model: nn.Module, edit: Drop, changes: _Changes) -> None:
    where = f"drop {edit.path}"
    table, name, _ = _place(model, edit.path, where)
    path = edit.path.rpartition(".")[0]
    blocks = _module(model, path, where)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) < 2:
        raise ValueError(
            f"{where}: got an entry of a {type(blocks).__name__} of {len(table)}, allowed a list of two or more"
        )
    depth = len(blocks)
    changes.remove(table, name)
    seen = set()
    for block in list(table.values())[int(name) :]:
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int) and id(module) not in seen:
                seen.add(id(module))
                changes.set(module, "layer_idx", module.layer_idx - 1)
    config = getattr(model, "config", None)
    if edit.config:
        changes.set_config(config, edit.config, where)
    own = getattr(_module(model, path.rpartition(".")[0], where), "config", None)
    if own is not None and own is not config and getattr(own, "num_hidden_layers", None) == depth:
        changes.set(own, "num_hidden_layers", depth - 1)  # an encoder-decoder gives each stack a copy of the config


def _set(model: nn.Module, edit: Set, changes: _Changes) -> None:
    where = f"set {edit.path}.{edit.attr}"
    module = _module(model, edit.path, where)
    if isinstance(getattr(module, edit.attr, None), nn.Module | Tensor) or not hasattr(module, edit.attr):
        raise ValueError(f"{where}: {type(module).__name__} has no plain attribute of that name; check the plan")
    if not isinstance(edit.value, bool | int | float | str | None):
        raise ValueError(f"{where}: got {edit.value!r}, allowed is a JSON scalar")
    changes.set(module, edit.attr, edit.value)


_RUN: dict[type[Edit], Callable[[nn.Module, Any, _Changes], None]] = {
    Replace: _replace,
    Slice: _slice,
    Tie: _tie,
    Drop: _drop,
    Set: _set,
}


def _assign(model: nn.Module, name: str, value: Tensor, changes: _Changes) -> None:
    where = f"tensor {name}"
    path, _, leaf = name.rpartition(".")
    module = _module(model, path, where)
    table: dict[str, Any] = module._buffers if leaf in module._buffers else module._parameters
    old = table.get(leaf)
    if old is None:
        known = ", ".join(n for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None)
        raise ValueError(f"{where}: {type(module).__name__} has no tensor {leaf!r}; it has {known or 'none'}")
    if old.shape != value.shape:
        raise ValueError(f"{where}: got shape {tuple(value.shape)}, allowed {tuple(old.shape)}; check the edit's sizes")
    if len(changes.holders.get(id(old), ())) > 1:
        raise ValueError(f"{where}: another module uses it too (tied embeddings); untie it first")
    if value.is_floating_point() != old.is_floating_point():
        raise ValueError(f"{where}: got {value.dtype}, allowed {old.dtype}; convert it")
    device = old.device if old.device.type != "meta" else changes.devices.get(id(module), old.device)
    if value.device.type == "meta" and device.type != "meta":
        raise ValueError(f"{where}: got a tensor without values (on meta), allowed are real ones")
    new = value.detach().to(device=device, dtype=old.dtype, copy=True).contiguous()
    if device.type != "meta":
        if value.is_floating_point() and not bool(torch.isfinite(new).all()):
            raise ValueError(f"{where}: got NaN, infinity or more than {old.dtype} holds; check the calibration data")
        if not value.is_floating_point() and not torch.equal(new.to(value), value):
            raise ValueError(f"{where}: got values that {old.dtype} cannot hold; check the edit's sizes")
    changes.put(table, leaf, nn.Parameter(new, requires_grad=old.requires_grad) if table is module._parameters else new)


def _check_filled(model: nn.Module, changes: _Changes) -> None:
    """Raise when a layer that the edits made or resized has no values yet."""
    empty = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if changes.devices.get(id(module), torch.device("meta")).type != "meta"
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if tensor.device.type == "meta"
    ]
    if empty:
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        raise ValueError(f"apply_: got no tensor for {', '.join(empty[:3])}{more}; pass values for all of them")
