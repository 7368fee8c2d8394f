"""Layer pruning: whole blocks leave, chosen by one signal, by signals fused in a regressor, or by trying every set.

The result is an ordinary model with fewer blocks. Quality is measured on half of the calibration data (a classifier
needs labels), signals on the other half.

Source: Strategic Fusion Optimizes Transformer Compression (arXiv 2501.03273), reconstructed: the paper names seven of
its twelve signals, gives one formula, and has no code. Differs: no fine-tuning between removals (recovery comes after),
quality is measured on data that the signals have not seen, regressors learn changes of the loss instead of those of the
accuracy, beam and exhaustive search, more signals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from tinycomp.edits import Edit
from tinycomp.methods._base import Method, MethodConfig, Result
from tinycomp.models import ModelSpec, UnitPath, unit_groups
from tinycomp.signals import TWELVE, BlockEdit, FusionModel, Search, baseline, block_entry_times, drops
from tinycomp.signals.collect import the_stack
from tinycomp.signals.quality import rows_of
from tinycomp.signals.registry import columns, price, rank_correlations, signal_of
from tinycomp.signals.search import BASELINES

Batch = dict[str, Tensor]
COLLECTED = tuple(c for c in columns() if signal_of(c).needs not in ("probe", "input"))
FUSED = (*COLLECTED, "skip_loss")


class StrategicFusion(MethodConfig):
    """Removal of whole blocks. `ratio` is the fraction of the linear parameters of blocks not in `ignore` that stays.

    Args:
        ignore: a block with a matching linear stays; "re:model.layers.0.*" protects the first one.
        drop: blocks to remove; None derives it from `ratio`.
        strategy: "fusion", one signal's column ("block_influence", "energy@update", ...), "random", "every-other" or
            "top"; with search="exhaustive" it is not used.
        regressor: "forest" or "ridge".
        fusion: a stored regressor (JSON); None measures removals on the calibration data and fits one.
        search: "greedy"; "beam" (with strategy "fusion"); "exhaustive": the best set by measured quality.
        beam: orders kept by the beam.
        gradient_samples: samples that run backward for the gradient signals.
        random_orders: orders measured for the regressor beside those of the signals.
        recompute: signals of the shortened model after each removal. Always so with the paper preset.
        judge_samples: samples on which quality is measured.
        entry_times: when each block enters a differential-inclusion path, as one more signal.
        path: file of an SPP path of this model, to take `entry_times` from.
    """

    ignore: tuple[str, ...] = ()
    drop: int | None = Field(default=None, ge=1)
    strategy: str = "fusion"
    regressor: Literal["forest", "ridge"] = "forest"
    fusion: str | None = None
    search: Literal["greedy", "beam", "exhaustive"] = "greedy"
    beam: int = Field(default=4, ge=1)
    gradient_samples: int = Field(default=16, ge=1)
    random_orders: int = Field(default=2, ge=0)
    recompute: bool = False
    judge_samples: int = Field(default=16, ge=1)
    entry_times: tuple[float, ...] = ()
    path: str | None = None

    @field_validator("strategy")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != "fusion" and value not in BASELINES:
            try:
                signal_of(value)
            except ValueError as error:
                raise ValueError(f"{error}, fusion, {', '.join(BASELINES)}") from error
        return value

    @model_validator(mode="after")
    def _size(self) -> StrategicFusion:
        if self.targets:
            raise ValueError("got targets, allowed is none: whole blocks are removed; name those that stay in ignore")
        if self.drop is not None and self.ratio is not None:
            raise ValueError(f"got drop={self.drop} and ratio={self.ratio}, allowed is one of them; leave one out")
        if self.search == "beam" and self.strategy != "fusion":
            raise ValueError(f"got search='beam' with strategy={self.strategy!r}, allowed with 'fusion'")
        if self.strategy == "entry_time" and not (self.entry_times or self.path):
            raise ValueError("got strategy='entry_time' without entry_times; pass one number per block, or an SPP path")
        return self

    def count(self, depth: int, droppable: Sequence[int]) -> int:
        """Blocks to remove of the `droppable` ones, in a model of `depth` blocks.

        Raises:
            ValueError: neither `drop` nor `ratio`, nothing would stay, or `entry_times` are not one number per block.
        """
        if self.drop is None and self.ratio is None:
            raise ValueError("StrategicFusion: got neither drop nor ratio, allowed is one; give drop=2 or ratio=0.8")
        share = (1 - float(self.ratio or 1)) * len(droppable)
        count = self.drop if self.drop is not None else math.ceil(share - 1e-9)
        if count > min(len(droppable), depth - 1):
            ignored = f", of which {depth - len(droppable)} are in ignore" if len(droppable) < depth else ""
            raise ValueError(
                f"StrategicFusion: got {count} blocks to remove of {depth}{ignored}, allowed are at most "
                f"{min(len(droppable), depth - 1)}"
            )
        times = [t for t in self.entry_times if not math.isnan(t)]
        if self.entry_times and not len(times) == len(self.entry_times) == depth:
            got = f"{len(self.entry_times)} entry_times ({len(self.entry_times) - len(times)} NaN)"
            raise ValueError(f"StrategicFusion: got {got}, allowed is one number for each of the {depth} blocks")
        return count


def droppable_blocks(spec: ModelSpec, targeted: Iterable[str]) -> list[int]:
    """The blocks that may go: all their linears are targeted."""
    wanted = set(targeted)
    return [i for i, block in enumerate(the_stack(spec).blocks) if wanted.issuperset(block.linears)]


def choose(
    model: nn.Module, spec: ModelSpec, config: StrategicFusion, droppable: Sequence[int],
    batches: Callable[[], Sequence[Batch]], edited: Callable[[list[Edit]], nn.Module],
    progress: Callable[[str, int, int], None],
) -> tuple[Result, dict[str, Any]]:  # fmt: skip
    """The edits, a record per removed linear, and what the choice was based on.

    Args:
        model: left as it is.
        spec: of the model.
        config: what to remove and how to choose.
        droppable: the blocks it may choose from, ascending.
        batches: gives the calibration data; not called by strategies that look at nothing.
        edited: gives the model with edits made.
        progress: called with (description, done, total).
    """
    depth = len(the_stack(spec).blocks)
    count = config.count(depth, droppable)
    if not count:
        return Result(), {"order": []}
    if config.strategy in BASELINES and config.search != "exhaustive":
        order = baseline(config.strategy, depth, config.seed, droppable)[:count]
        return _result(model, spec, order), {"order": order}
    search = _search(model, spec, config, batches(), edited, droppable=droppable, progress=progress)
    details: dict[str, Any] = {}
    if config.search == "exhaustive":
        order = search.exhaustive(count)
    elif config.strategy == "fusion":
        order, details = _fused(search, config, count)
    else:
        order = search.by_signal(config.strategy, count)
    measured = [search.quality(order[: i + 1]) for i in range(count)]
    details |= {
        "order": order,
        "score_before": search.quality(()).score,
        "score_after_each_removal": [quality.score for quality in measured],
        "loss_before": search.quality(()).loss,
        "loss_after_each_removal": [quality.loss for quality in measured],
        "signal_seconds": search.seconds,
    }
    return _result(model, spec, order), details


def _search(
    model: nn.Module, spec: ModelSpec, config: StrategicFusion, batches: Sequence[Batch], edited: Any, **options: Any
) -> Search:
    rows = [row for batch in batches for row in rows_of(batch)]
    if len(rows) < 2:
        raise ValueError(f"StrategicFusion: got {len(rows)} calibration samples, allowed are two or more; pass more")
    half = len(rows) // 2
    times: Sequence[float] = config.entry_times
    if config.path is not None and not times:
        blocks = [block.path for block in the_stack(spec).blocks]
        times = block_entry_times(UnitPath.load(config.path), unit_groups(model, spec), blocks)
    inputs = {"entry_time": times} if times else {}
    stored = None if config.fusion is None else FusionModel.load(config.fusion).columns
    fuses = config.strategy == "fusion" and config.search != "exhaustive" and config.preset != "paper"
    shown, backward = _read(config, half)
    return Search(
        edited, model, rows[:shown], rows[half : half + config.judge_samples], seed=config.seed, inputs=inputs,
        gradient_samples=backward, recompute=config.recompute or config.preset == "paper",
        probe=fuses and (stored is None or "skip_loss" in stored), **options,
    )  # fmt: skip


def _read(config: StrategicFusion, samples: int) -> tuple[int, int]:
    """(samples that signals read, samples that run backward): one signal alone reads what it needs."""
    if config.strategy == "fusion" or config.search == "exhaustive":
        return samples, config.gradient_samples
    needs = signal_of(config.strategy).needs
    if needs == "backward":
        return min(config.gradient_samples, samples), config.gradient_samples
    return (samples if needs == "forward" else 0), 0


def _fused(search: Search, config: StrategicFusion, count: int) -> tuple[list[int], dict[str, Any]]:
    details: dict[str, Any] = {}
    table = search.table(())
    if config.fusion is not None:
        fused = FusionModel.load(config.fusion)
    else:
        wanted = TWELVE if config.preset == "paper" else [*FUSED, *search.inputs]
        names = [c for c in wanted if c in table.values]
        rows = search.transitions("calibration", count, names, config.random_orders)
        fused = FusionModel.fit(rows, config.regressor, config.seed)
        details["transitions"] = len(rows)
    order = search.by_fusion(fused, count, config.beam if config.search == "beam" else 1)
    pairs = []
    for i, block in enumerate(order):
        left = search.left(order[:i])
        gain = fused.score([BlockEdit(left.index(block))], search.table(order[:i]))[0]
        measured = search.quality(order[: i + 1]).gain - search.quality(order[:i]).gain
        pairs.append({"block": block, "predicted": float(gain), "measured": measured})
    details |= {"changes": pairs, "rank_correlations": rank_correlations(table.values)}
    return order, details


def _result(model: nn.Module, spec: ModelSpec, order: Sequence[int]) -> Result:
    stack = the_stack(spec)
    result = Result(edits=drops(model.config, spec, order))
    for index in sorted(order):
        for path in stack.blocks[index].linears:
            weight: Any = model.get_submodule(path).weight
            size = weight.numel()
            result.records.append(
                {
                    "path": path, "method": "StrategicFusion", "shape": list(weight.shape), "size_before": size,
                    "size_after": 0, "bits_after": 0, "relative_error": 1.0, "removed_as": order.index(index) + 1,
                }
            )  # fmt: skip
    return result


def costs(config: StrategicFusion, depth: int, droppable: Sequence[int]) -> list[str]:
    """What choosing will cost, in forward passes of the whole model, for `plan`."""
    count, dear = config.count(depth, droppable), price("skip_loss", depth)
    if config.search == "exhaustive":
        return [f"exhaustive search: {math.comb(len(droppable), count)} passes over the judging samples"]
    if config.strategy in BASELINES:
        return ["the order looks at no data"]
    if config.strategy == "skip_loss":
        return [f"skip_loss: {dear:g} passes a removal over the judging samples"]
    samples, paper = config.gradient_samples, config.preset == "paper"
    again = config.recompute or paper
    if config.strategy != "fusion":
        passes = price(config.strategy, depth)
        over = f"at most {samples} samples" if signal_of(config.strategy).needs == "backward" else "the samples"
        return [f"{config.strategy}: {passes:g} passes over {over}, {f'{count} times' if again else 'once'}"]
    orders = 0 if config.fusion else len(TWELVE if paper else FUSED) + config.random_orders
    times = f"up to {1 + orders * count} times" if again else "once"
    return [
        f"signals: 3 passes (one forward, one backward) over {samples} samples, 1 over the others, {times}",
        "skip_loss: not among them" if paper else f"skip_loss: {dear:g} passes over all samples, {times}",
        f"regressor: up to {orders * count} removals measured, one pass over {config.judge_samples} samples each",
        f"entry_time: {'read' if config.entry_times or config.path else 'not among them, no path is given'}",
    ]


METHOD = Method(
    "StrategicFusion", StrategicFusion, lambda _: frozenset(), lambda *_: [], lambda *_: Result(), blocks=choose,
)  # fmt: skip
