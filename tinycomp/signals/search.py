"""Which blocks to remove: orders by one signal or by the fused prediction, beam and exhaustive search, baselines."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import nn

from tinycomp.edits import Drop, Edit
from tinycomp.models import ModelSpec, config_after_drop, spec_of
from tinycomp.signals.collect import SignalTable, Weights, collect_signals, the_stack
from tinycomp.signals.fusion import BlockEdit, FusionModel, Transition
from tinycomp.signals.quality import Batch, Quality, quality
from tinycomp.signals.registry import rank, signal_of

Removed = tuple[int, ...]
MOST_SUBSETS = 5000
BASELINES = ("random", "every-other", "top")


def drops(config: Any, spec: ModelSpec, removed: Sequence[int]) -> list[Edit]:
    """The edits that remove these blocks, from the last to the first so that no index moves; config fields follow."""
    stack = the_stack(spec)
    fields = SimpleNamespace(**config.to_dict())
    found: list[Edit] = []
    for index in sorted(removed, reverse=True):
        values = config_after_drop(fields, spec, stack, index)
        found.append(Drop(f"{stack.path}.{index}", config=values))
        vars(fields).update(values)
        stack = replace(stack, blocks=stack.blocks[:index] + stack.blocks[index + 1 :])
    return found


def baseline(name: str, depth: int, seed: int = 0, droppable: Sequence[int] | None = None) -> list[int]:
    """An order that looks at nothing: "random", "every-other" (1, 3, 5, ... from below, then the rest), "top".

    Args:
        name: of the order.
        depth: blocks of the model.
        seed: of "random".
        droppable: the only blocks in the order; None is all of them.
    """
    orders = {
        "random": np.random.default_rng(seed).permutation(depth).tolist(),
        "top": range(depth - 1, -1, -1),
        "every-other": [*range(1, depth, 2), *range(0, depth, 2)],
    }
    if name not in orders:
        raise ValueError(f"strategy: got {name!r}, allowed baselines: {', '.join(BASELINES)}")
    return [i for i in orders[name] if droppable is None or i in droppable]


class Search:
    """Measures models without some of their blocks, each set once.

    Args:
        edited: gives a model with these edits made; the original stays as it is.
        model: the whole model.
        signal_batches: data for the signals.
        judge_batches: data on which quality is measured.
        gradient_samples: samples that run backward for the signals.
        seed: of estimators and random orders.
        inputs: signals from elsewhere, one value per block of the whole model ("entry_time").
        recompute: signals of the shortened model after every removal; otherwise those of the whole model stay.
        probe: "skip_loss" is among the signals.
        droppable: blocks that may be removed; None is all of them.
        progress: called with (description, done, total).
    """

    def __init__(
        self, edited: Callable[[list[Edit]], nn.Module], model: nn.Module, signal_batches: Sequence[Batch],
        judge_batches: Sequence[Batch], *, gradient_samples: int = 32, seed: int = 0,
        inputs: Mapping[str, Sequence[float]] | None = None, recompute: bool = True, probe: bool = False,
        droppable: Sequence[int] | None = None, progress: Callable[[str, int, int], None] = lambda *_: None,
    ):  # fmt: skip
        self.edited, self.model, self.spec = edited, model, spec_of(model)
        self.depth = len(the_stack(self.spec).blocks)
        self.signal_batches, self.judge_batches = signal_batches, judge_batches
        self.gradient_samples, self.seed, self.recompute = gradient_samples, seed, recompute
        self.inputs, self.probe, self.progress = inputs or {}, probe, progress
        self.droppable = range(self.depth) if droppable is None else droppable
        self.seconds: dict[str, float] = {}
        self._qualities: dict[Removed, Quality] = {}
        self._tables: dict[Removed, SignalTable] = {}
        self._weights: Weights = {}

    def without(self, removed: Sequence[int]) -> nn.Module:
        return self.edited(drops(self.model.config, self.spec, removed)) if removed else self.model

    def left(self, removed: Sequence[int]) -> list[int]:
        return [i for i in range(self.depth) if i not in removed]

    def quality(self, removed: Sequence[int]) -> Quality:
        key = tuple(sorted(removed))
        if key not in self._qualities:
            self._qualities[key] = quality(self.without(key), self.judge_batches)
        return self._qualities[key]

    def table(self, removed: Sequence[int]) -> SignalTable:
        """Signals of the blocks still there, in order."""
        key = tuple(sorted(removed))
        if key not in self._tables:
            self._tables[key] = self._cut(key) if key and not self.recompute else self._collect(key)
        return self._tables[key]

    def _collect(self, key: Removed) -> SignalTable:
        model = self.without(key)
        found = collect_signals(
            model, spec_of(model), self.signal_batches, gradient_samples=self.gradient_samples, seed=self.seed,
            weights=self._weights, probe=self.probe, progress=self.progress,
        )  # fmt: skip
        for name, values in self.inputs.items():
            signal_of(name)
            found.values[name] = [float(values[i]) for i in self.left(key)]
        for name, seconds in found.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        return found

    def _cut(self, key: Removed) -> SignalTable:
        whole = self.table(())
        return SignalTable({c: [v[i] for i in self.left(key)] for c, v in whole.values.items()}, {}, whole.notes)

    def skip_losses(self, removed: Sequence[int] = ()) -> list[float]:
        """The loss on the judging data without each of the blocks still there."""
        left, found = self.left(removed), []
        for i in left:
            found.append(self.quality([*removed, i]).loss)
            self.progress("leaving out one more block", len(found), len(left))
        return found

    def by_signal(self, column: str, count: int) -> list[int]:
        """The first `count` blocks to remove by one signal, looked at anew after every removal."""
        order: list[int] = []
        while len(order) < count:
            measured = column == "skip_loss" and not self.probe
            values = {column: self.skip_losses(order)} if measured else self.table(order).values
            if column not in values:
                raise ValueError(f"strategy: got {column!r}, this model and data give {', '.join(values)}")
            left = self.left(order)
            order.append(next(left[i] for i in rank(values, column) if left[i] in self.droppable))
            self.progress("choosing blocks", len(order), count)
        return order

    def by_fusion(self, fused: FusionModel, count: int, beam: int = 1) -> list[int]:
        """The order whose predicted changes of quality add up to most; `beam` partial orders are kept (1: greedy)."""
        states: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(count):
            longer: dict[Removed, tuple[float, list[int]]] = {}
            for total, order in states:
                left = self.left(order)
                gains = fused.score([BlockEdit(i) for i in range(len(left))], self.table(order))
                for block, gain in zip(left, gains, strict=True):
                    if block not in self.droppable:
                        continue
                    key = tuple(sorted([*order, block]))
                    entry = (total + float(gain), [*order, block])
                    longer[key] = max(longer.get(key, entry), entry, key=lambda e: e[0])
            states = sorted(longer.values(), key=lambda e: -e[0])[:beam]
        return states[0][1]

    def exhaustive(self, count: int) -> list[int]:
        """The best set of `count` blocks by measured quality; needs depth over count forward passes.

        Raises:
            ValueError: too many sets.
        """
        found = itertools.combinations(self.droppable, count)
        subsets = [list(subset) for subset in itertools.islice(found, MOST_SUBSETS + 1)]
        if len(subsets) > MOST_SUBSETS:
            raise ValueError(
                f"search: got {count} of {len(self.droppable)} blocks, exhaustive search is allowed up to "
                f"{MOST_SUBSETS} sets; use greedy or beam"
            )
        for number, subset in enumerate(subsets):
            self.quality(subset)
            self.progress("measuring every set", number + 1, len(subsets))
        return max(subsets, key=lambda s: self.quality(s).score)

    def transitions(
        self, data_set: str, count: int, columns: Sequence[str], random_orders: int = 3, part: str = "fit",
    ) -> list[Transition]:  # fmt: skip
        """Measured removals along the order of every signal and of some random orders, each removal once."""
        found: dict[tuple[Removed, int], Transition] = {}
        strategies: list[Any] = [*columns, *range(random_orders)]
        for number, strategy in enumerate(strategies):
            if isinstance(strategy, int):
                order = baseline("random", self.depth, self.seed * 1000 + strategy, self.droppable)[:count]
            else:
                order = self.by_signal(strategy, count)
            for step, block in enumerate(order):
                before = tuple(sorted(order[:step]))
                if (before, block) in found:
                    continue
                z = self.table(before).standardised(columns)[self.left(before).index(block)]
                found[before, block] = Transition(
                    data_set, before, block, dict(zip(columns, map(float, z), strict=True)),
                    self.quality(before).gain, self.quality([*before, block]).gain, part=part,
                )  # fmt: skip
            self.progress("measuring removals", number + 1, len(strategies))
        return list(found.values())
