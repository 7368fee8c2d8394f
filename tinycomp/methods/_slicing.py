"""Removing units physically: narrower linears, and a least-squares refit of what reads the units that stay.

Feed-forward linears become narrower plain ones. The linears of an attention sublayer become `ElasticLinear`s that
scatter into and gather from the full head geometry: scores, softmax scale and the model's own attention code stay as
they are, and the result equals the model with masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tinycomp.edits import Edit, Replace, Slice
from tinycomp.linalg import Elimination
from tinycomp.methods._base import Linear, Result, record
from tinycomp.models import Member, UnitGroup


@dataclass
class Cut:
    """Which rows and columns of one linear stay, and in which order; None is all of them as they are.

    Args:
        member: any member of this linear, for its sizes.
        indexed: the sizes around the linear stay, so it needs to know where its features belong.
        config_field: config attribute that holds the width, for a plain narrower linear.
        rows: int64 output features.
        columns: int64 input features.
        enters: ratios from which on rows and columns are active, for an elastic layer, by "rows" and "columns".
    """

    member: Member
    indexed: bool
    config_field: str | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    enters: dict[str, Tensor] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, int]:
        """(rows, columns) that stay."""
        outputs, inputs = self.member.shape
        return outputs if self.rows is None else len(self.rows), inputs if self.columns is None else len(self.columns)

    def edits(self) -> list[Edit]:
        path, (outputs, inputs) = self.member.path, self.member.shape
        rows, columns = self.sizes
        if self.rows is None and self.columns is None:
            return []
        if not self.indexed and not self.enters and rows and columns:
            kept = ((0, rows, self.rows), (1, columns, self.columns))
            return [
                Slice(path, dim=dim, keep=keep, config_field=self.config_field)
                for dim, keep, chosen in kept
                if chosen is not None
            ]
        kwargs: dict[str, Any] = {"in_features": inputs, "out_features": outputs, "bias": self.member.bias}
        kwargs |= {"stored_in": columns} if columns != inputs else {}
        kwargs |= {"stored_out": rows} if rows != outputs else {}
        flags = {
            "gather": self.indexed and self.columns is not None,
            "scatter": self.indexed and self.rows is not None,
            "ranked_in": "columns" in self.enters,
            "ranked_out": "rows" in self.enters,
        }
        return [Replace(path, layer="ElasticLinear", kwargs=kwargs | {name: True for name, on in flags.items() if on})]

    def tensors(self, linear: Linear, weight: Tensor | None = None) -> dict[str, Tensor]:
        """Values for what `edits` makes.

        Args:
            linear: dense.
            weight: (out, columns that stay), instead of the linear's own columns.
        """
        path = self.member.path
        if weight is None:
            weight = linear.weight if self.columns is None else linear.weight[:, self.columns]
        bias = linear.bias
        if self.rows is not None:
            weight, bias = weight[self.rows], None if bias is None else bias[self.rows]
        weight = weight.to(linear.dtype)
        plain = all(isinstance(edit, Slice) for edit in self.edits())
        stored = weight.T if plain and linear.transposed else weight
        found = {f"{path}.weight" if plain else f"{path}.full.weight": stored.contiguous()}
        if bias is not None:
            found[f"{path}.bias"] = bias.to(linear.dtype)
        if self.indexed and self.columns is not None:
            found[f"{path}.inputs"] = self.columns
        if self.indexed and self.rows is not None:
            found[f"{path}.outputs"] = self.rows
        for side, name in (("columns", "in_enters"), ("rows", "out_enters")):
            if side in self.enters:
                found[f"{path}.{name}"] = self.enters[side]
        return found


def cuts_of(groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> dict[str, Cut]:
    """The cuts that leave the kept units; linears that lose nothing have none.

    Args:
        groups: the groups that may lose units; features of other groups stay.
        kept: group name -> indices of the units that stay; a group without an entry stays whole.
    """
    gone: dict[tuple[str, int], Tensor] = {}
    cuts: dict[str, Cut] = {}
    for group in groups:
        removed = torch.ones(group.count, dtype=torch.bool)
        removed[kept.get(group.name, slice(None))] = False
        if not removed.any():
            continue
        for member in group.members:
            cuts.setdefault(member.path, Cut(member, group.kind != "ffn", group.config_field))
            mask = gone.setdefault((member.path, member.dim), torch.zeros(member.shape[member.dim], dtype=torch.bool))
            mask[member.features[removed].flatten()] = True
    for (path, dim), mask in gone.items():
        setattr(cuts[path], "columns" if dim else "rows", (~mask).nonzero().flatten())
    return cuts


def without_dead_heads(groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The kept units, less the queries and keys of key/value heads that keep no values.

    Such a head adds nothing to the sublayer whatever it attends to, so its rows of q and k go as well, those of every
    query head that shares it. The model's outputs are the same.
    """
    left = dict(kept)
    values = {g.name.removesuffix(".v"): g for g in groups if g.kind == "v" and g.name in kept}
    for group in groups:
        of_values = values.get(group.name.removesuffix(".qk"))
        if group.kind != "qk" or of_values is None or group.name not in kept:
            continue
        alive = torch.zeros(group.heads, dtype=torch.bool)
        alive[kept[of_values.name] // (of_values.count // of_values.heads)] = True
        units = kept[group.name]
        left[group.name] = units[alive[units // (group.count // group.heads)]]
    return left


def slice_edits(groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> list[Edit]:
    """The edits of `slice_units`, from shapes alone: what a plan needs."""
    return [edit for cut in cuts_of(groups, kept).values() for edit in cut.edits()]


def slice_units(
    linears: Mapping[str, Linear], groups: Sequence[UnitGroup], kept: Mapping[str, Tensor], *, refit: bool = True,
    damping: float = 1e-4, released_scale: bool = False, method: str = "SPP",
) -> Result:  # fmt: skip
    """Remove every unit that is not kept.

    A linear that reads units is refit on those that stay, W S[:, P] S[P, P]^-1, where its Gram matrix is known.

    Args:
        linears: path -> the linear, for every linear of `groups` that loses something.
        groups: of the model.
        kept: group name -> indices of the units that stay; any may be empty.
        refit: solve instead of selecting columns.
        damping: of the Gram matrix.
        released_scale: divide scores by the root of the kept instead of the whole head width, as the SPP repository
            does; the factor goes into the queries.
        method: name in the records.

    Raises:
        ValueError: a linear is missing.
    """
    scales = _released_scales(groups, kept) if released_scale else {}
    result = Result()
    for path, cut in cuts_of(groups, kept).items():
        if path not in linears:
            raise ValueError(f"slice_units: got no linear for {path}, allowed is one for each that loses units; add it")
        linear = linears[path]
        if path in scales:
            linear = _scaled(linear, scales[path])
        weight = _columns(linear, cut.columns, refit, damping)
        result.edits += cut.edits()
        result.tensors |= cut.tensors(linear, weight)
        error = torch.zeros_like(linear.weight, dtype=torch.float32)
        if cut.columns is not None:  # what a removed row costs is measured where it is read
            error += linear.weight.float()
            error[:, cut.columns] -= weight
        height, width = cut.sizes
        bits = height * width * 8 * linear.dtype.itemsize
        result.records.append(record(linear, method, height * width, bits, error, rows=height, columns=width))
    return result


def _columns(linear: Linear, kept: Tensor | None, refit: bool, damping: float) -> Tensor:
    """(out, |kept|) float32: the weight on the kept inputs."""
    weight = linear.weight.float()
    if kept is None:
        return weight
    if not refit or linear.gram is None or len(kept) == 0:
        return weight[:, kept]
    return Elimination.solve(weight, linear.gram, kept, damping)


def _released_scales(groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Path -> factor of each output of the query linears: sqrt(units of the head / kept units of the head)."""
    found: dict[str, Tensor] = {}
    for group in groups:
        if group.kind != "qk" or group.name not in kept:
            continue
        per_head = group.count // group.heads
        stay = torch.bincount(kept[group.name] // per_head, minlength=group.heads).clamp(min=1)
        query = group.members[0]
        factors = found.setdefault(query.path, torch.ones(query.shape[0]))
        factors[query.features] = (per_head / stay).sqrt().repeat_interleave(per_head)[:, None]
    return found


def _scaled(linear: Linear, factors: Tensor) -> Linear:
    bias = None if linear.bias is None else linear.bias * factors
    return Linear(
        linear.path, linear.weight * factors[:, None], bias, linear.gram, linear.output_gram, linear.transposed,
        linear.dtype,
    )  # fmt: skip
