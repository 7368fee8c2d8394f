"""The order of a unit path as one number per block: the signal "entry_time"."""

from __future__ import annotations

from collections.abc import Sequence

from tinycomp.models import UnitGroup, UnitPath


def block_entry_times(path: UnitPath, groups: Sequence[UnitGroup], blocks: Sequence[str]) -> list[float]:
    """Mean entry step of each block's units, weighted by their parameters; late is unimportant.

    A unit that never entered counts the last step there is, plus up to one more the smaller its tie.

    Args:
        path: of a search on this model.
        groups: its unit groups; those the path does not rank are left out.
        blocks: paths of the blocks.

    Raises:
        ValueError: the path ranks no unit of some block.
    """
    ranked = [g for g in groups if g.name in path.entry]
    last = max((int(path.entry[g.name].max()) for g in ranked), default=-1)
    last = max(last, *(int(point["step"]) for point in path.curve), 0)
    most = max((float(path.tie[g.name].max()) for g in ranked), default=1.0) or 1.0
    totals = dict.fromkeys(blocks, 0.0)
    weights = dict.fromkeys(blocks, 0)
    for group in ranked:
        entry, tie = path.entry[group.name], path.tie[group.name]
        times = entry.double().where(entry >= 0, last + 1 - tie.double() / most)
        if group.block in totals:
            totals[group.block] += float(times.sum()) * group.parameters_per_unit
            weights[group.block] += group.count * group.parameters_per_unit
    missing = [block for block in blocks if not weights[block]]
    if missing:
        raise ValueError(
            f"entry_time: got a path that ranks no unit of {missing[0]}, allowed is a path of this model; search anew"
        )
    return [totals[block] / weights[block] for block in blocks]
