"""The one place that runs methods: collect, choose under one budget, build block by block, apply.

Everything happens on a shadow of the model that shares its tensors; the caller's model changes once, at the end, when
nothing can fail any more.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tinycomp import data as text_data
from tinycomp import hf, linalg, planning
from tinycomp.calib import Replay, StatsStore, chainable, collect
from tinycomp.choosing import Choices, choose
from tinycomp.edits import Plan
from tinycomp.eval.machine import peak_memory
from tinycomp.io import Journal, fingerprint
from tinycomp.methods import Method, MethodConfig, Result, method_of
from tinycomp.models import BlockSpec, ModelSpec, Stack, spec_of
from tinycomp.progress import Bars
from tinycomp.surgery import apply_
from tinycomp.targets import UnitSpec, check_finite, find_targets, gather, shapes, unit_specs

REFIT_DAMPING = 1e-2  # pull of the refit target towards the original weight; see linalg.refit
PAPER_SAMPLES, PAPER_LENGTH = 128, 128


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


def compress_(
    model: nn.Module,
    configs: MethodConfig | Sequence[MethodConfig],
    data: Any = None,
    *,
    tokenizer: Any = None,
    num_calibration_samples: int | None = None,
    max_seq_length: int | None = None,
    batch_size: int = 8,
    statistics: StatsStore | None = None,
    journal: Journal | None = None,
    progress: bool = True,
) -> CompressionReport:
    """Compress a model in place; when anything fails it is left exactly as it was.

    Args:
        model: a transformers model, dense or already compressed by tinycomp (the new edits append).
        configs: one method's config, or several that run one after another.
        data: calibration data in any of the forms of `tinycomp.data.batches`; None is the bundled text.
        tokenizer: needed for text.
        num_calibration_samples: windows of text; default 48 (128 with a paper preset).
        max_seq_length: tokens per window; default 512 (128 with a paper preset).
        batch_size: windows per batch.
        statistics: from `statistics_of` for this model and data, to share one calibration pass among several calls.
        journal: keeps finished blocks, so that a killed run continues where it was.
        progress: show progress bars.

    Returns:
        CompressionReport.

    Raises:
        TypeError, ValueError: bad config, target, data or weights; the message says what is allowed.
    """
    started = time.perf_counter()
    found = [configs] if isinstance(configs, MethodConfig) else list(configs)
    if not found:
        raise ValueError("compress: got no method, allowed one or more; e.g. tinycomp.CUR(ratio=0.8)")
    methods = [(method_of(config), config) for config in found]
    hf.check_compressible(model)
    paper = any(config.preset == "paper" for config in found)
    calibration = _Calibration(
        model, data, tokenizer, num_calibration_samples or (PAPER_SAMPLES if paper else 48),
        max_seq_length or (PAPER_LENGTH if paper else 512), batch_size,
    )  # fmt: skip
    report = CompressionReport(
        parameters_before=_parameters(model), fingerprint=fingerprint([c.model_dump() for c in found])
    )
    shadow = shadow_of(model)
    was_training = model.training
    shadow.eval()
    steps: list[tuple[Plan, dict[str, Tensor]]] = []
    linalg.drain_fallbacks()
    with peak_memory() as peak, Bars(progress) as bars:
        for number, (method, config) in enumerate(methods):
            calibration.seed = config.seed
            job = _Job(shadow, method, config, calibration, bars, journal, f"{number}:{method.name}", statistics)
            steps.append(job.run(report))
            apply_(shadow, *steps[-1])
            statistics = None  # they describe the model before this step
    for plan, tensors in steps:
        apply_(model, plan, tensors)
        hf.attach_(model, plan)
    model.train(was_training)
    report.fallbacks += linalg.drain_fallbacks()
    report.ratio_requested = found[-1].ratio if len(found) == 1 else None
    report.parameters_after = _parameters(model)
    report.seconds = time.perf_counter() - started
    report.peak_memory_bytes = peak.bytes
    return report


def compress(
    model: nn.Module, configs: MethodConfig | Sequence[MethodConfig], data: Any = None, **kwargs: Any
) -> tuple[nn.Module, CompressionReport]:
    """Like `compress_`, on a copy: returns (compressed model, report) and leaves `model` alone."""
    new = copy.deepcopy(model)
    return new, compress_(new, configs, data, **kwargs)


def statistics_of(
    model: nn.Module, configs: Sequence[MethodConfig], data: Any = None, *, tokenizer: Any = None,
    num_calibration_samples: int = 48, max_seq_length: int = 512, batch_size: int = 8, seed: int = 0,
    progress: bool = True,
) -> StatsStore:  # fmt: skip
    """One calibration pass with everything that `configs` need, for `compress_(statistics=...)`."""
    needs = frozenset[str]().union(*(method_of(c).needs(c) for c in configs))
    calibration = _Calibration(model, data, tokenizer, num_calibration_samples, max_seq_length, batch_size, seed)
    with Bars(progress) as bars:
        return collect(model, spec_of(model), calibration.batches(), needs, seed=seed, progress=bars.update)


def plan(
    model: Any, configs: MethodConfig | Sequence[MethodConfig], data: Any = None, *, tokenizer: Any = None,
    num_calibration_samples: int = 48, max_seq_length: int = 512, batch_size: int = 8, progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """What a compression would give, before doing it.

    From a config (or a model without weights) the sizes follow from `ratio` alone, the same in every matrix. From a
    real model the choice itself is made, calibration included, and the sizes are those that `compress_` will build.

    Args:
        model: a model, a config object, or the path of a folder or config.json.
        configs: one method's config, or a list with one; a later method's sizes depend on what the first leaves.
        data, tokenizer, num_calibration_samples, max_seq_length, batch_size, progress: as for `compress_`.

    Returns:
        {"modules": [...], "parameters_before", "parameters_after", "bytes_before", "bytes_after", "ratio_achieved",
        "notes"}; bytes are those of the tensors on disk.
    """
    found = [configs] if isinstance(configs, MethodConfig) else list(configs)
    if len(found) != 1:
        raise ValueError(f"plan: got {len(found)} methods, allowed one; plan the next one on the first one's output")
    method, config = method_of(found[0]), found[0]
    skeleton = planning.skeleton_of(model)
    if next(skeleton.parameters()).is_meta:
        return planning.from_shapes(skeleton, spec_of(skeleton), method, config)
    calibration = _Calibration(
        skeleton, data, tokenizer, num_calibration_samples, max_seq_length, batch_size, config.seed
    )
    with Bars(progress) as bars:
        job = _Job(skeleton, method, config, calibration, bars, None, "plan", None)
        choices = job.choose()
    return planning.from_choices(skeleton, job.paths, job.units, choices)


def shadow_of(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares every tensor with `model`: edits on it replace tensors, never write them."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@dataclass
class _Calibration:
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


class _Job:
    """One method on one model: from targets to a plan and its tensors. `model` is not changed."""

    def __init__(
        self, model: nn.Module, method: Method, config: MethodConfig, calibration: _Calibration, bars: Bars,
        journal: Journal | None, key: str, statistics: StatsStore | None,
    ):  # fmt: skip
        self.model, self.method, self.config = model, method, config
        self.calibration, self.bars, self.journal, self.key = calibration, bars, journal, key
        self.statistics = statistics
        self.spec: ModelSpec = spec_of(model)

    def choose(self) -> Choices:
        """Targets, statistics and the sizes to build; the model and its weights are only read."""
        self.targets = find_targets(self.model, self.spec, self.config)
        families = self.method.families(self.config) if self.method.families else ((self.method, self.config),)
        kinds = {m.unit_kind for m, _ in families}
        self.units = unit_specs(self.spec, self.targets.paths, kinds, self.method.name)
        self.paths = sorted({p for u in self.units for p in u.paths}, key=self.targets.paths.index)
        check_finite(self.model, self.paths)
        needs = self.method.needs(self.config)
        if self.statistics is None and needs:
            self.statistics = collect(
                self.model, self.spec, self.calibration.batches(), needs, paths=self.paths, seed=self.config.seed,
                progress=self.bars.update,
            )  # fmt: skip
        if self.statistics is not None and needs:
            self._leave_unseen(self.statistics)
        return choose(
            self.model, self.spec, self.method, self.config, families, self.units, self.statistics, self.journal,
            self.key, self.bars,
        )  # fmt: skip

    def _leave_unseen(self, store: StatsStore) -> None:
        """Linears whose weight the model reads without calling them (Mamba's dt_proj) cannot be replaced."""
        unseen = {p for p in self.paths if not store.seen(p)}
        self.units = [u for u in self.units if not unseen & set(u.paths)]
        self.paths = [p for p in self.paths if p not in unseen]
        self.targets.skipped += [
            {"path": p, "reason": "never called on the calibration data", "parameters": self._size(p)}
            for p in sorted(unseen)
        ]
        if not self.units:
            raise ValueError("calibration: got no call of any targeted linear, allowed data that reaches them; check it")

    def _size(self, path: str) -> int:
        return self.model.get_submodule(path).weight.numel()  # type: ignore[union-attr, operator]

    def run(self, report: CompressionReport) -> tuple[Plan, dict[str, Tensor]]:
        """The plan and its tensors; `report` gets this job's part."""
        choices = self.choose()
        result = self._build(choices)
        before = {p: m * n for p, (m, n) in shapes(self.model, self.paths).items()}
        touched = {r["path"]: r["size_before"] - r["size_after"] for r in result.records}
        report.records += result.records
        report.skipped += self.targets.skipped + [
            {"path": p, "reason": "kept dense: no smaller form is worth its loss", "parameters": size}
            for p, size in before.items()
            if p not in touched
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
        report.methods.append(provenance)
        return Plan(result.edits, [provenance]), result.tensors

    def _build(self, choices: Choices) -> Result:
        chosen = [u for u in self.units if u.name in choices.by_unit]
        blocks = [(stack, block) for stack in self.spec.stacks for block in stack.blocks]
        total = Result()
        working = shadow_of(self.model)
        replay: Replay | None = None
        wants_replay = self.config.sequential and "gram" in self.method.needs(self.config)
        last_stack: Stack | None = None
        for number, (stack, block) in enumerate(blocks):
            if stack is not last_stack:
                replay = self._replay(stack, working, choices) if wants_replay else None
                last_stack = stack
            mine = [u for u in chosen if u.block.path == block.path]
            key = f"{self.key}:{block.path}"
            entry = self.journal.get(key) if self.journal else None
            if entry is not None:
                result = Result(list(entry.edits), dict(entry.tensors), list(entry.records))
                apply_(working, Plan(result.edits), result.tensors)
            else:
                result = self._build_block(block, mine, choices, replay, working)
                if self.journal:
                    self.journal.put(key, result.edits, result.tensors, result.records)
            total.extend(result)
            if replay is not None and number + 1 < len(blocks):
                replay.advance()
            self.bars.update(f"{self.method.name}: compressing", number + 1, len(blocks))
        return total

    def _replay(self, stack: Stack, working: nn.Module, choices: Choices) -> Replay | None:
        batches = self.calibration.batches()
        reason = chainable(self.model, stack, batches[0])
        if reason:
            choices.notes.append(f"fitted on the original model's inputs, not in sequence ({reason})")
            return None
        decoder = len(self.spec.stacks) > 1 and stack is self.spec.stacks[-1]
        return Replay(self.model, working, stack, batches, decoder)

    def _build_block(
        self, block: BlockSpec, units: list[UnitSpec], choices: Choices, replay: Replay | None, working: nn.Module
    ) -> Result:
        """The units of one block, built in call order; later ones see the earlier ones' errors when in sequence."""
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
                gathered = gather(self.model, unit, stats, weights)
                result.extend(self.method.build(gathered, choices.by_unit[unit.name], self.config))
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
