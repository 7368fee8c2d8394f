"""One method on one model: targets, statistics, the choice of sizes, and the build, block by block."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tinycomp import data as text_data
from tinycomp import linalg
from tinycomp.calib import Replay, StatsStore, chainable, collect
from tinycomp.choosing import Choices, choose
from tinycomp.edits import Edit, Plan
from tinycomp.io import Entry, Journal
from tinycomp.methods import Method, MethodConfig, Result
from tinycomp.methods.strategic_fusion import droppable_blocks
from tinycomp.models import BlockSpec, ModelSpec, Stack, spec_of
from tinycomp.parallel import in_order
from tinycomp.progress import Bars
from tinycomp.signals.collect import the_stack
from tinycomp.surgery import apply_
from tinycomp.targets import UnitSpec, check_finite, find_targets, gather, shapes, unit_specs

Blocks = list[tuple[Stack, BlockSpec]]
REFIT_DAMPING = 1e-2  # pull of the refit target towards the original weight; see linalg.refit


@dataclass
class CompressionReport:
    """What a compression did. Sizes count stored numbers; times are seconds, memory is bytes.

    records: one row per touched linear (see `methods._base.record`); skipped: everything left alone and why.
    """

    methods: list[dict[str, Any]] = field(default_factory=list)
    ratio_requested: float | None = None
    ratio_achieved: float = 1.0
    targeted_parameters: int = 0
    parameters_before: int = 0
    parameters_after: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    allocation: str = ""
    fingerprint: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def shadow_of(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares every tensor with `model`: edits on it replace tensors, never write them."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


@dataclass
class Calibration:
    """Where batches come from; made when first asked for, so that data-free methods need no data."""

    model: nn.Module
    data: Any
    tokenizer: Any
    num_calibration_samples: int
    max_seq_length: int
    batch_size: int
    seed: int = 0
    _made: dict[int, list[dict[str, Tensor]]] = field(default_factory=dict)

    def batches(self) -> list[dict[str, Tensor]]:
        if self.seed not in self._made:
            raw = text_data.batches(
                self.data, self.tokenizer, num_calibration_samples=self.num_calibration_samples,
                max_seq_length=self.max_seq_length, batch_size=self.batch_size, seed=self.seed,
            )  # fmt: skip
            device = next(self.model.parameters()).device
            ready = [text_data.for_model(b, self.model) for b in raw]
            self._made[self.seed] = [{k: v.to(device) for k, v in b.items()} for b in ready]
        return self._made[self.seed]


class Job:
    """One method on one model: from targets to a plan and its tensors. `model` is not changed."""

    def __init__(
        self, model: nn.Module, method: Method, config: MethodConfig, calibration: Calibration, bars: Bars,
        journal: Journal | None, key: str, statistics: StatsStore | None,
    ):  # fmt: skip
        self.model, self.method, self.config = model, method, config
        self.calibration, self.bars, self.journal, self.key = calibration, bars, journal, key
        self.statistics = statistics
        self.spec: ModelSpec = spec_of(model)
        self.in_sequence = config.sequential and "gram" in method.needs(config)

    def choose(self) -> Choices:
        """Targets, statistics and the sizes to build; the model and its weights are only read."""
        self.targets = find_targets(self.model, self.spec, self.config)
        families = self.method.families(self.config) if self.method.families else ((self.method, self.config),)
        kinds: set[str] = {m.unit_kind for m, _ in families}
        self.units = unit_specs(self.spec, self.targets.paths, kinds, self.method.name)
        self.paths = sorted({p for u in self.units for p in u.paths}, key=self.targets.paths.index)
        self._skip(set(self.targets.paths) - set(self.paths), f"{self.method.name} works on feed-forward sublayers")
        check_finite(self.model, self.paths)
        needs = self.method.needs(self.config)
        if self.statistics is None and needs:
            self.statistics = collect(
                self.model, self.spec, self.calibration.batches(), needs, paths=self.paths, seed=self.config.seed,
                progress=self.bars.update,
            )  # fmt: skip
        if self.statistics is not None and needs:
            self._leave_unseen(self.statistics)
        weights = self.method.weights(self.model, self.spec, self.config, self.calibration.batches)
        return choose(
            self.model, self.spec, self.method, self.config, families, self.units, self.statistics, self.journal,
            self.key, self.bars, weights,
        )  # fmt: skip

    def _leave_unseen(self, store: StatsStore) -> None:
        """Linears whose weight the model reads without calling them (Mamba's dt_proj) cannot be replaced."""
        unseen = {p for p in self.paths if not store.seen(p)}
        self.units = [u for u in self.units if not unseen & set(u.paths)]
        self.paths = [p for p in self.paths if p not in unseen]
        self._skip(unseen, "never called on the calibration data")
        if not self.units:
            raise ValueError("calibration: got no call of any targeted linear, allowed data that reaches them; check")

    def _skip(self, paths: set[str], reason: str) -> None:
        sizes = shapes(self.model, sorted(paths))
        self.targets.skipped += [{"path": p, "reason": reason, "parameters": m * n} for p, (m, n) in sizes.items()]

    def run(self, report: CompressionReport) -> tuple[Plan, dict[str, Tensor]]:
        """The plan and its tensors; `report` gets this job's part."""
        details: dict[str, Any] = {}
        if self.method.blocks is not None:
            choices, result, details = self._choose_blocks()
        elif self.method.units is not None:
            choices, result, details = self._choose_units()
        else:
            choices = self.choose()
            result = self._build(choices)
        before = {p: m * n for p, (m, n) in shapes(self.model, self.paths).items()}
        touched = {r["path"]: r["size_before"] - r["size_after"] for r in result.records}
        report.records += result.records
        report.skipped += self.targets.skipped + [
            {"path": p, "reason": choices.kept, "parameters": size} for p, size in before.items() if p not in touched
        ]
        report.notes += choices.notes
        report.targeted_parameters += sum(before.values())
        achieved = 1 - sum(touched.values()) / sum(before.values())
        report.ratio_achieved *= achieved
        report.allocation = choices.allocation
        provenance = {
            "method": self.method.name,
            "config": self.config.model_dump(mode="json"),
            "seed": self.config.seed,
            "achieved_ratio": achieved,
        }
        report.methods.append(provenance | details)
        return Plan(result.edits, [provenance]), result.tensors

    def _choose_blocks(self) -> tuple[Choices, Result, dict[str, Any]]:
        """Choice and result of a method that removes whole blocks."""
        assert self.method.blocks is not None
        self.targets = find_targets(self.model, self.spec, self.config)
        droppable = droppable_blocks(self.spec, self.targets.paths)
        self.paths = [path for i in droppable for path in the_stack(self.spec).blocks[i].linears]
        self._skip(set(self.targets.paths) - set(self.paths), "its block has a linear in ignore")
        check_finite(self.model, self.paths)

        def edited(edits: list[Edit]) -> nn.Module:
            model = shadow_of(self.model)
            apply_(model, Plan(edits), {})
            return model

        choices = Choices({}, "whole blocks", kept="its block stays")
        finished = self._finished("blocks")
        if finished is not None:
            return choices, *finished
        result, details = self.method.blocks(
            self.model, self.spec, self.config, droppable, self.calibration.batches, edited, self.bars.update
        )
        return choices, self._keep("blocks", result, details), details

    def _choose_units(self) -> tuple[Choices, Result, dict[str, Any]]:
        """Choice and result of a method that ranks the units of the whole model."""
        assert self.method.units is not None
        groups_of, choose_units = self.method.units
        self.targets = find_targets(self.model, self.spec, self.config)
        groups = groups_of(self.model, self.spec, self.config, self.targets.paths)
        inside = {member.path for group in groups for member in group.members}
        self.paths = [p for p in self.targets.paths if p in inside]
        self._skip(set(self.targets.paths) - inside, f"{self.method.name} was not asked to prune it, or cannot")
        check_finite(self.model, self.paths)
        choices = Choices({}, "one ranking of all units", kept="all its units stay")
        finished = self._finished("units")
        if finished is not None:
            return choices, *finished
        folder = self.journal.directory / "search" if self.journal else None
        result, details = choose_units(
            self.model, self.spec, self.config, groups, self.calibration.batches, folder, self.bars.update
        )
        return choices, self._keep("units", result, details), details

    def _build(self, choices: Choices) -> Result:
        chosen = [u for u in self.units if u.name in choices.by_unit]
        blocks = [(stack, block) for stack in self.spec.stacks for block in stack.blocks]
        mine = {block.path: [u for u in chosen if u.block.path == block.path] for _, block in blocks}
        built = self._in_sequence(blocks, mine, choices) if self.in_sequence else self._apart(blocks, mine, choices)
        total = Result()
        for number, result in enumerate(built):
            total.extend(result)
            self.bars.update(f"{self.method.name}: compressing", number + 1, len(blocks))
        return total

    def _apart(self, blocks: Blocks, mine: dict[str, list[UnitSpec]], choices: Choices) -> Iterator[Result]:
        """Every block from the original model's statistics, on all cores."""

        def build(entry: tuple[Stack, BlockSpec]) -> Result:
            path = entry[1].path
            finished = self._finished(path)
            return finished[0] if finished else self._keep(path, self._build_block(entry[1], mine[path], choices))

        yield from in_order(build, blocks, next(self.model.parameters()).device)

    def _in_sequence(self, blocks: Blocks, mine: dict[str, list[UnitSpec]], choices: Choices) -> Iterator[Result]:
        """Every block from the inputs that the compressed blocks before it produce."""
        working = shadow_of(self.model)
        replay: Replay | None = None
        last_stack: Stack | None = None
        for number, (stack, block) in enumerate(blocks):
            if stack is not last_stack:
                replay, last_stack = self._replay(stack, working, choices), stack
            finished = self._finished(block.path)
            if finished is None:
                yield self._keep(block.path, self._build_block(block, mine[block.path], choices, replay, working))
            else:
                apply_(working, Plan(finished[0].edits), finished[0].tensors)
                yield finished[0]
            if replay is not None and number + 1 < len(blocks):
                replay.advance()

    def _finished(self, path: str) -> tuple[Result, dict[str, Any]] | None:
        """What an earlier, interrupted run has journalled for this block: the result, and what it was based on."""
        entry = self.journal.get(f"{self.key}:{path}") if self.journal else None
        return None if entry is None else (Result(entry.edits, entry.tensors, entry.records), entry.details)

    def _keep(self, path: str, result: Result, details: dict[str, Any] | None = None) -> Result:
        if self.journal:
            entry = Entry(result.edits, result.tensors, result.records, details or {})
            self.journal.put(f"{self.key}:{path}", entry)
        return result

    def _replay(self, stack: Stack, working: nn.Module, choices: Choices) -> Replay | None:
        batches = self.calibration.batches()
        reason = chainable(self.model, stack, batches[0])
        if reason:
            choices.notes.append(f"fitted on the original model's inputs, not in sequence ({reason})")
            return None
        decoder = len(self.spec.stacks) > 1 and stack is self.spec.stacks[-1]
        return Replay(self.model, working, stack, batches, decoder)

    def _build_block(
        self, block: BlockSpec, units: list[UnitSpec], choices: Choices, replay: Replay | None = None,
        working: nn.Module | None = None,
    ) -> Result:  # fmt: skip
        """The units of one block, built in call order; later ones see the errors left in `working`."""
        total = Result()
        store = self.statistics
        first = {path: i for i, path in enumerate(block.linears)}
        for stage in _stages(sorted(units, key=lambda u: first[u.paths[0]]), store):
            paths = [p for u in stage for p in u.paths]
            stats = store.get(paths) if store else {}
            weights: dict[str, Tensor] = {}
            if replay is not None:
                for path, fresh in replay.statistics(paths).items():
                    stats[path].gram = fresh.gram
                    weights[path] = self._target(path, fresh.cross, fresh.gram)
            result = Result()
            for unit in stage:
                gathered = gather(self.model, unit, store, stats, weights)
                result.extend(self.method.build(gathered, choices.by_unit[unit.name], self.config))
            if working is not None:
                apply_(working, Plan(result.edits), result.tensors)
            total.extend(result)
        return total

    def _target(self, path: str, cross: Tensor | None, gram: Tensor | None) -> Tensor:
        """The weight that reproduces the original outputs from the compressed prefix's inputs."""
        module = self.model.get_submodule(path)
        weight: Tensor = module.weight.detach()  # type: ignore[union-attr, operator]
        weight = (weight if isinstance(module, nn.Linear) else weight.T).float()
        return linalg.refit(weight, cross, gram, REFIT_DAMPING)  # type: ignore[arg-type]


def _stages(units: list[UnitSpec], store: StatsStore | None) -> list[list[UnitSpec]]:
    """Consecutive units that read the same input are built from the same statistics."""
    stages: list[list[UnitSpec]] = []
    for unit in units:
        source = store.shares_input(unit.paths[0]) if store else unit.paths[0]
        previous = stages[-1][0].paths[0] if stages else None
        if (
            previous is not None
            and store is not None
            and unit.kind == "linear"
            and store.shares_input(previous) == source
        ):
            stages[-1].append(unit)
        else:
            stages.append([unit])
    return stages
