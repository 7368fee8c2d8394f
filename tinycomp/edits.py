"""The closed vocabulary of model edits, and the plan that holds them. Standard library only.

A plan is what `config.json` stores: compressing and loading both replay it through `surgery.apply_`. Tensor
values never live here; they are in the safetensors file under the parameter names the edited model has.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Edit:
    """One change to one module. `path` names the module as it is numbered when the edit runs.

    in_config: the saved config already expresses this edit (fewer layers, a uniform width), so a skeleton
        built from that config has it and a replay skips it.
    """

    op: ClassVar[str] = ""
    path: str
    in_config: bool = field(default=False, kw_only=True)

    def to_dict(self) -> dict[str, Any]:
        out = {"op": self.op, **asdict(self)}
        if not self.in_config:
            del out["in_config"]
        return out


@dataclass(frozen=True)
class Replace(Edit):
    """The module at `path` becomes `LAYERS[layer](**kwargs)`."""

    op: ClassVar[str] = "replace"
    layer: str = ""
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tie(Edit):
    """The module at `path` becomes the same object as the one at `to`; its tensors are stored once."""

    op: ClassVar[str] = "tie"
    to: str = ""


@dataclass(frozen=True)
class Drop(Edit):
    """Remove a block from its list and renumber `layer_idx`.

    config: per-layer config fields with their values *after* the removal (`num_hidden_layers`, `layer_types`, ...).
    """

    op: ClassVar[str] = "drop"
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Slice(Edit):
    """The linear at `path` keeps `keep` output (`dim=0`) or input (`dim=1`) features; values arrive as tensors.

    config_field: config attribute that holds this width when it is the same in every block.
    """

    op: ClassVar[str] = "slice"
    dim: int = 0
    keep: int = 0
    config_field: str | None = None


@dataclass(frozen=True)
class Set(Edit):
    """Set the JSON scalar attribute `attr` of the module at `path`."""

    op: ClassVar[str] = "set"
    attr: str = ""
    value: Any = None


EDITS: dict[str, type[Edit]] = {cls.op: cls for cls in (Replace, Tie, Drop, Slice, Set)}


def edit_from_dict(data: dict[str, Any]) -> Edit:
    """Inverse of `Edit.to_dict`. Raises ValueError on an unknown operation or field."""
    data = dict(data)
    op = data.pop("op", None)
    if op not in EDITS:
        raise ValueError(f"plan: got edit {op!r}, allowed {sorted(EDITS)}; a newer tinycomp may have written this file")
    try:
        return EDITS[op](**data)
    except TypeError as error:
        raise ValueError(f"plan: bad fields for edit {op!r}: {error}") from error


@dataclass
class Plan:
    """Edits in the order they run, and one provenance record per method that contributed.

    Args:
        edits: the edits, paths as numbered when each runs.
        methods: JSON records `{"method", "config", "seed", "version", "achieved_ratio", ...}`.
    """

    edits: list[Edit] = field(default_factory=list)
    methods: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "edits": [edit.to_dict() for edit in self.edits],
            "methods": self.methods,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"plan: got format_version {version!r}, this tinycomp reads {FORMAT_VERSION}; install a tinycomp that "
                "matches the checkpoint"
            )
        edits, methods = data.get("edits", []), data.get("methods", [])
        if not all(isinstance(part, list) and all(isinstance(e, dict) for e in part) for part in (edits, methods)):
            raise ValueError(
                "plan: edits and methods must be lists of objects; the checkpoint's config.json is damaged"
            )
        return cls([edit_from_dict(e) for e in edits], list(methods))

    def extended(self, later: Plan) -> Plan:
        """This plan followed by `later`, rewritten so that a skeleton built from the final config replays it.

        A `Drop` is expressed by the config, so a replay starts from the shorter model: earlier edits inside the
        dropped block vanish and those behind it are renumbered.
        """
        edits = list(self.edits)
        for edit in later.edits:
            if isinstance(edit, Drop):
                edits = [moved for e in edits if (moved := _after_drop(e, edit.path)) is not None]
            edits.append(edit)
        return Plan(edits, self.methods + later.methods)


def _renumber(path: str, dropped: str) -> str | None:
    """`path` after the block `dropped` (`list.path.INDEX`) is gone; None when it lies inside that block."""
    prefix, index = dropped.rsplit(".", 1)
    if not path.startswith(prefix + "."):
        return path
    head, _, rest = path[len(prefix) + 1 :].partition(".")
    if not head.isdigit() or int(head) < int(index):
        return path
    if int(head) == int(index):
        return None
    return f"{prefix}.{int(head) - 1}" + (f".{rest}" if rest else "")


def _after_drop(edit: Edit, dropped: str) -> Edit | None:
    if isinstance(edit, Drop):  # earlier removals are already expressed by the config
        return edit
    path = _renumber(edit.path, dropped)
    if path is None:
        return None
    if isinstance(edit, Tie):
        to = _renumber(edit.to, dropped)
        if to is None:
            raise ValueError(f"plan: {dropped} holds the shared weights of {edit.path}; drop the tied block instead")
        return replace(edit, path=path, to=to)
    return replace(edit, path=path)
