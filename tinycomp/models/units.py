"""Which units of a model can be removed one by one, and the order in which they are kept.

A unit is the smallest set of weights whose removal equals a zero of a mask: one hidden neuron of a feed-forward
sublayer, one query/key index (with rotary positions, the pair that rotates together) of one key/value head, one value
index of one key/value head. `unit_groups` lists them; a `UnitPath` ranks them, so that every ratio is a prefix.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tinycomp.models.find import is_linear, spec_of
from tinycomp.models.spec import AttentionSpec, ModelSpec

DIGITS = 9  # of a ratio; checkpoints store ratios in billionths
_METADATA = "tinycomp_path"


@dataclass(frozen=True, eq=False)
class Member:
    """The part of one linear that belongs to the units of a group.

    Args:
        path: the linear.
        dim: 0 when the units are outputs of it, 1 when they are inputs.
        features: int64 (count, features per unit): which outputs or inputs belong to unit i.
        shape: (out_features, in_features) of the linear.
        bias: whether it has one.
    """

    path: str
    dim: int
    features: Tensor
    shape: tuple[int, int]
    bias: bool

    @property
    def parameters(self) -> int:
        """Weights and biases that go with one of those features."""
        return self.shape[0] if self.dim else self.shape[1] + self.bias


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units of one kind in one sublayer.

    Unit i of a "qk" or "v" group belongs to key/value head i // (count // heads).

    Args:
        name: `model.layers.3.ffn`, `.qk`, `.v`; with `.cross` before the kind for cross attention.
        kind: "ffn", "qk" or "v".
        block: path of the block.
        count: number of units.
        heads: key/value heads; 1 for "ffn".
        members: "ffn": the input linears, then down; "qk": q, then k; "v": v, then o.
        config_field: config attribute with the width of all "ffn" groups of the stack, where there is one.
    """

    name: str
    kind: Literal["ffn", "qk", "v"]
    block: str
    count: int
    heads: int
    members: tuple[Member, ...]
    config_field: str | None = None

    @property
    def parameters_per_unit(self) -> int:
        """Weights and biases that one unit removes."""
        return sum(member.features.shape[1] * member.parameters for member in self.members)

    @property
    def mask_at(self) -> tuple[tuple[str, Literal["input", "output"], Tensor], ...]:
        """(linear, side, features (count, n)): multiplying there by the mask is the removal, exactly."""
        if self.kind == "ffn":
            return ((self.members[-1].path, "input", self.members[-1].features),)
        return tuple((m.path, "output", m.features) for m in self.members if m.dim == 0)

    def step(self, round_to: int) -> int:
        """Units by which the width changes, so that every width of its linears is a multiple of `round_to`."""
        fewest = min(member.features.shape[1] for member in self.members)
        return round_to // math.gcd(round_to, fewest)


def unit_groups(model: nn.Module, spec: ModelSpec | None = None) -> tuple[UnitGroup, ...]:
    """The groups of a model, in the order its blocks run; also on meta.

    A sublayer with a linear that is compressed already has none. Attention that normalises its queries or keys over
    the head (Qwen3) has no "qk" group: the norm ties all indices together.

    Args:
        model: a model of the architecture table.
        spec: its `spec_of`, when the caller has it.

    Raises:
        ValueError: the architecture has no row.
    """
    spec = spec or spec_of(model)
    if not spec.has_row:
        raise ValueError(f"units: {spec.note}")
    groups: list[UnitGroup] = []
    for block in spec.blocks:
        for attention in block.attention:
            groups += _attention_groups(model, block.path, attention)
        if block.ffn is not None and _dense(model, (*block.ffn.inputs, block.ffn.down)):
            units = torch.arange(block.ffn.width)[:, None]
            members = [_member(model, path, 0, units) for path in block.ffn.inputs]
            members.append(_member(model, block.ffn.down, 1, units))
            name, field = f"{block.path}.ffn", block.ffn.config_field
            groups.append(UnitGroup(name, "ffn", block.path, block.ffn.width, 1, tuple(members), field))
    return tuple(groups)


def _dense(model: nn.Module, paths: Sequence[str]) -> bool:
    return all(is_linear(model.get_submodule(path)) for path in paths)


def _member(model: nn.Module, path: str, dim: int, features: Tensor) -> Member:
    module: Any = model.get_submodule(path)
    outputs, inputs = module.weight.T.shape if hasattr(module, "nf") else module.weight.shape
    return Member(path, dim, features, (outputs, inputs), module.bias is not None)


def _attention_groups(model: nn.Module, block: str, a: AttentionSpec) -> list[UnitGroup]:
    if not _dense(model, (a.q, a.k, a.v, a.o)):
        return []
    d, kv = a.head_dim, a.num_kv_heads
    repeats = a.num_heads // kv
    # where queries, keys and values start among the outputs of a linear that makes several of them
    k_start = a.num_heads * d if a.k == a.q else 0
    v_start = k_start + kv * d if a.v == a.k else 0
    prefix = f"{block}.cross" if a.kind == "cross" else block
    groups = []
    if not _normalised(model.get_submodule(a.path)):
        together = _together(d, _rotary_dim(model))
        q = _head_features(together, kv, repeats, d)
        k = _head_features(together, kv, 1, d) + k_start
        members = (_member(model, a.q, 0, q), _member(model, a.k, 0, k))
        groups.append(UnitGroup(f"{prefix}.qk", "qk", block, kv * len(together), kv, members))
    single = torch.arange(d)[:, None]
    v, o = _head_features(single, kv, 1, d) + v_start, _head_features(single, kv, repeats, d)
    members = (_member(model, a.v, 0, v), _member(model, a.o, 1, o))
    groups.append(UnitGroup(f"{prefix}.v", "v", block, kv * d, kv, members))
    return groups


def _normalised(attention: nn.Module) -> bool:
    return any("norm" in name and name[0] in "qk" for name, _ in attention.named_children())


def _rotary_dim(model: nn.Module) -> int:
    """Features of a head that rotate with the position; the frequencies are a buffer of the model."""
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] == "inv_freq":
            return 2 * buffer.numel()
    return 0


def _together(head_dim: int, rotary: int) -> Tensor:
    """(units, features): indices of one head that must go together.

    Rotary index j < r/2 rotates with j + r/2. Where only a part of the head rotates, the rest goes in pairs, too.
    """
    if rotary == 0:
        return torch.arange(head_dim)[:, None]
    half, rest = rotary // 2, (head_dim - rotary) // 2
    turning = torch.stack([torch.arange(half), torch.arange(half) + half], 1)
    still = torch.stack([torch.arange(rest), torch.arange(rest) + rest], 1) + rotary
    return torch.cat([turning, still])


def _head_features(together: Tensor, kv_heads: int, repeats: int, head_dim: int) -> Tensor:
    """(kv_heads * units, repeats * features): the features of each unit in all heads that share a key/value head."""
    starts = torch.arange(kv_heads * repeats).view(kv_heads, 1, repeats, 1) * head_dim
    return (starts + together[None, :, None, :]).reshape(kv_heads * len(together), -1)


@dataclass(frozen=True, eq=False)
class Chunk:
    """Units of one group that come and go together, and the ratio from which on they are there.

    Args:
        group: name of the group.
        units: int64, most important first.
        enters: smallest ratio that keeps them, a multiple of one billionth.
    """

    group: str
    units: Tensor
    enters: float


@dataclass
class UnitPath:
    """An importance order of all units: what a search leaves behind.

    Args:
        entry: group name -> int32 (count,) step at which the unit entered, -1 for never.
        tie: group name -> float32 (count,); larger is better among units of equal entry. A path with all entries -1
            is ranked by it alone, so any score makes a path (`from_scores`).
        curve: one dict per point of the search (step, loss, ...), for the report.
        config: what made the path.
    """

    entry: dict[str, Tensor]
    tie: dict[str, Tensor]
    curve: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_scores(cls, scores: Mapping[str, Tensor], config: dict[str, Any] | None = None) -> UnitPath:
        """A path that keeps units of larger score first; group name -> (count,) scores."""
        entry = {name: torch.full((len(score),), -1, dtype=torch.int32) for name, score in scores.items()}
        return cls(entry, {name: score.detach().float().cpu() for name, score in scores.items()}, [], config or {})

    def order(self, name: str) -> Tensor:
        """int64 (count,): the units of one group, the most important first; as `ranking` inside the group."""
        entry, tie = self.entry[name].tolist(), self.tie[name].tolist()
        late = max(entry) + 1
        return torch.tensor(sorted(range(len(entry)), key=lambda u: (entry[u] if entry[u] >= 0 else late, -tie[u])))

    def ranking(
        self, groups: Sequence[UnitGroup], cost: Literal["parameters"] | Mapping[str, float] | None = "parameters",
        uniform: bool = False,
    ) -> list[tuple[str, int]]:  # fmt: skip
        """Every unit, the most important first: earlier entry, then larger tie.

        A unit's entry step and tie are taken per unit of cost: (step + 1) * cost ascending; units that never entered
        follow, tie / cost descending (tie * cost where it is negative: of two equal ties the cheaper unit is first).

        Args:
            groups: of the model.
            cost: "parameters", a measured cost of one unit by kind ("ffn", "qk", "v"), or None for equal costs.
            uniform: units are compared inside their group only, and all groups are traversed at one pace.
        """
        self._check(groups)
        rows: list[tuple[tuple[float, ...], str, int]] = []
        for group in groups:
            price = 1.0 if cost is None else group.parameters_per_unit if cost == "parameters" else cost[group.kind]
            entry, tie = self.entry[group.name].tolist(), self.tie[group.name].tolist()
            keys = [
                (0.0, (step + 1) * price, -score)
                if step >= 0
                else (1.0, -score / price if score > 0 else -score * price, 0.0)
                for step, score in zip(entry, tie, strict=True)
            ]
            if uniform:
                order = sorted(range(group.count), key=keys.__getitem__)
                for place, unit in enumerate(order):
                    rows.append(((place / group.count,), group.name, unit))
            else:
                rows += [(key, group.name, unit) for unit, key in enumerate(keys)]
        rows.sort(key=lambda row: row[0])  # stable: equal keys in the order of the model
        return [(name, unit) for _, name, unit in rows]

    def chunks(
        self, groups: Sequence[UnitGroup], round_to: int = 8,
        cost: Literal["parameters"] | Mapping[str, float] | None = "parameters", uniform: bool = False,
    ) -> list[Chunk]:  # fmt: skip
        """The ranking in pieces that keep widths multiples of `round_to`, in the order in which they are kept.

        The units of a group are cut, in their order, into pieces of `group.step(round_to)`; a piece stands where its
        median unit stands, so that cutting the ranking anywhere rounds every width to the nearest multiple. With
        `uniform`, pieces of equal relative place stay together, so that groups of equal size keep equal widths. A
        piece is there from the ratio on that is nearer to the size with it than to the size without it.
        """
        places: dict[str, list[tuple[int, int]]] = {group.name: [] for group in groups}
        for place, (name, unit) in enumerate(self.ranking(groups, cost, uniform)):
            places[name].append((place, unit))
        pieces: list[tuple[float, int, str, Tensor]] = []
        for group in groups:
            own, step = places[group.name], group.step(round_to)
            for start in range(0, group.count, step):
                piece = own[start : start + step]
                middle = (len(piece) - 1) // 2
                key = (start + middle) / group.count if uniform else float(piece[middle][0])
                units = torch.tensor([unit for _, unit in piece])
                pieces.append((key, len(piece) * group.parameters_per_unit, group.name, units))
        pieces.sort(key=lambda piece: piece[0])
        total = sum(piece[1] for piece in pieces)
        found: list[Chunk] = []
        before = 0
        start = 0
        while start < len(pieces):
            stop = start
            while stop < len(pieces) and pieces[stop][0] == pieces[start][0]:
                stop += 1
            after = before + sum(piece[1] for piece in pieces[start:stop])
            enters = round((before + after) / (2 * total), DIGITS)
            found += [Chunk(name, units, enters) for _, _, name, units in pieces[start:stop]]
            before, start = after, stop
        return found

    def kept(
        self, groups: Sequence[UnitGroup], ratio: float, round_to: int = 8, uniform: bool = False,
        cost: Literal["parameters"] | Mapping[str, float] | None = "parameters",
    ) -> dict[str, Tensor]:  # fmt: skip
        """Group name -> ascending indices of the units that are kept at `ratio` of the groups' parameters."""
        if not 0.0 < ratio <= 1.0:
            raise ValueError(f"units: got ratio {ratio}, allowed above 0 up to 1; change it")
        kept: dict[str, list[Tensor]] = {group.name: [torch.zeros(0, dtype=torch.int64)] for group in groups}
        for chunk in self.chunks(groups, round_to, cost, uniform):
            if chunk.enters <= round(ratio, DIGITS):
                kept[chunk.group].append(chunk.units)
        return {name: torch.cat(units).sort().values for name, units in kept.items()}

    def _check(self, groups: Sequence[UnitGroup]) -> None:
        for group in groups:
            sizes = [len(part[group.name]) if group.name in part else None for part in (self.entry, self.tie)]
            if sizes != [group.count, group.count]:
                raise ValueError(
                    f"units: the path has {sizes} entries and ties for {group.name}, allowed {group.count} of each; "
                    "use the path of this model"
                )

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write one safetensors file; curve and config are its JSON metadata."""
        parts = (("entry", self.entry), ("tie", self.tie))
        tensors = {f"{kind}/{name}": t.contiguous() for kind, part in parts for name, t in part.items()}
        save_file(tensors, file, {_METADATA: json.dumps({"curve": self.curve, "config": self.config})})

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> UnitPath:
        """Inverse of `save`.

        Raises:
            ValueError: there is no such file, or it holds something else.
        """
        allowed = "allowed is a file that UnitPath.save wrote; name that, or search anew"
        try:
            with safe_open(file, "pt") as stored:
                found = (stored.metadata() or {}).get(_METADATA)
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError) as error:
            raise ValueError(f"units: got {file}, which cannot be read ({error}), {allowed}") from error
        if found is None:
            raise ValueError(f"units: got {file}, which is no path of a search, {allowed}")
        parts = [{n.removeprefix(p): t for n, t in tensors.items() if n.startswith(p)} for p in ("entry/", "tie/")]
        return cls(parts[0], parts[1], **json.loads(found))
