"""Which modules a config means, and the units that methods decide on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from tinycomp.calib import StatsStore
from tinycomp.errors import UsageError
from tinycomp.linalg import is_finite, made_anew
from tinycomp.methods import Linear, MethodConfig, Unit
from tinycomp.models import BlockSpec, ModelSpec


@dataclass
class Targets:
    """What a config selects: linear paths in model order, and everything left alone with the reason."""

    paths: list[str]
    skipped: list[dict[str, Any]] = field(default_factory=list)


def matches(pattern: str, path: str, module: nn.Module) -> bool:
    """Exact name, `re:` regular expression on the whole name, or class name."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], path) is not None
    return pattern in (path, type(module).__name__)


def find_targets(model: nn.Module, spec: ModelSpec, config: MethodConfig) -> Targets:
    """The linears of the repeated blocks that `config` targets.

    Raises:
        UsageError: nothing matches; the message lists what there is.
    """
    _check_patterns(model, (*config.targets, *config.ignore))
    paths, skipped = [], [{"path": p, "reason": r, "parameters": n} for p, n, r in spec.uncovered]
    inside = set(spec.linears)
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if any(True for _ in module.children()) or not isinstance(weight, Tensor):
            continue
        reason = None
        if path not in inside:
            reason = f"{type(module).__name__} outside the linears of the repeated blocks"
        elif any(matches(p, path, module) for p in config.ignore):
            reason = "in ignore"
        elif config.targets and not any(matches(p, path, module) for p in config.targets):
            reason = "not in targets"
        if reason:
            skipped.append({"path": path, "reason": reason, "parameters": weight.numel()})
        else:
            paths.append(path)
    if not paths:
        sample = ", ".join(spec.linears[:3]) or "none"
        raise UsageError(
            f"targets: got {list(config.targets) or 'the default'} and ignore {list(config.ignore)}, which match no "
            f"linear; allowed are exact names, re: expressions or class names of the {len(spec.linears)} linears in "
            f"repeated blocks, such as {sample}"
        )
    order = {p: i for i, p in enumerate(spec.linears)}
    return Targets(sorted(set(paths), key=order.__getitem__), skipped)


def _check_patterns(model: nn.Module, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise UsageError(f"targets: {pattern!r} is no regular expression ({error}); correct it") from error


@dataclass(frozen=True)
class UnitSpec:
    """A unit before its tensors are gathered."""

    name: str
    kind: Literal["linear", "ffn"]
    paths: tuple[str, ...]
    block: BlockSpec
    index: int


def unit_specs(spec: ModelSpec, paths: Iterable[str], kinds: set[str], method: str) -> list[UnitSpec]:
    """Every unit of the wanted kinds, block by block; "linear" and "ffn" units may overlap.

    Raises:
        UsageError: feed-forward units are wanted but none is known or wholly targeted.
    """
    wanted = set(paths)
    found = []
    for index, block in enumerate(spec.blocks):
        if "ffn" in kinds and block.ffn is not None:
            members = (*block.ffn.inputs, block.ffn.down)
            if set(members) <= wanted:
                found.append(UnitSpec(block.ffn.path + "#ffn", "ffn", members, block, index))
        if "linear" in kinds:
            found += [UnitSpec(p, "linear", (p,), block, index) for p in block.linears if p in wanted]
    if not found:
        why = spec.note or "no block has a feed-forward sublayer whose linears are all targeted"
        raise UsageError(f"{method}: got no feed-forward sublayer to prune, allowed models that have one; {why}")
    return found


def gather(
    model: nn.Module, spec: UnitSpec, store: StatsStore | None, stats: dict[str, Any] | None = None,
    weights: dict[str, Tensor] | None = None,
) -> Unit:  # fmt: skip
    """The unit's linears with their statistics; `stats` and `weights` replace the stored and the model's own ones."""
    linears = []
    stats = stats or (store.get(spec.paths) if store else {})
    for path in spec.paths:
        module = model.get_submodule(path)
        weight: Tensor = module.weight.detach()  # type: ignore[union-attr, operator]
        transposed = not isinstance(module, nn.Linear)
        entry = stats.get(path)
        linears.append(
            Linear(
                path=path,
                weight=(weights or {}).get(path, (weight.T if transposed else weight).float()),
                bias=None if getattr(module, "bias", None) is None else module.bias.detach().float(),  # type: ignore[union-attr, operator]
                gram=None if entry is None else entry.gram,
                output_gram=None if entry is None else entry.output_gram,
                transposed=transposed,
                dtype=weight.dtype,
                remember=made_anew if store is None or weights else partial(store.remember, path),
            )
        )
    return Unit(spec.name, spec.kind, tuple(linears), spec.index, spec.block.ffn if spec.kind == "ffn" else None)


def shapes(model: nn.Module, paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of each linear, whatever its storage."""
    found = {}
    for path in paths:
        module = model.get_submodule(path)
        a, b = module.weight.shape  # type: ignore[union-attr, misc]
        found[path] = (a, b) if isinstance(module, nn.Linear) else (b, a)
    return found


def check_finite(model: nn.Module, paths: Iterable[str]) -> None:
    """Raise ValueError naming the first targeted weight that holds NaN or infinity, before any work."""
    for path in paths:
        weight = model.get_submodule(path).weight
        if not weight.is_meta and not is_finite(weight):  # type: ignore[union-attr, operator, arg-type]
            raise ValueError(
                f"{path}.weight: got NaN or infinite values, allowed finite ones only; repair or reload the checkpoint"
            )
