"""The one place that runs methods: collect, choose under one budget, build block by block, apply.

Everything happens on a shadow of the model that shares its tensors; the caller's model changes once, at the end, when
nothing can fail any more.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from tinycomp import hf, linalg, planning
from tinycomp.calib import GRADIENT_TOKENS, StatsStore, collect
from tinycomp.compression import Calibration, CompressionReport, Job, shadow_of
from tinycomp.edits import Plan
from tinycomp.eval.machine import peak_memory
from tinycomp.eval.size import size_of
from tinycomp.io import Journal, fingerprint
from tinycomp.methods import SPP, Method, MethodConfig, StrategicFusion, method_of
from tinycomp.models import spec_of
from tinycomp.progress import Bars
from tinycomp.surgery import apply_

PAPER_SAMPLES, PAPER_LENGTH = 128, 128


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
    found = _configs(configs)
    if not found:
        raise ValueError("compress: got no method, allowed one or more; e.g. tinycomp.CUR(ratio=0.8)")
    methods = [(method_of(config), config) for config in found]
    hf.check_compressible(model)
    paper = any(config.preset == "paper" for config in found)
    calibration = Calibration(
        model, data, tokenizer, num_calibration_samples or (PAPER_SAMPLES if paper else 48),
        max_seq_length or (PAPER_LENGTH if paper else 512), batch_size,
    )  # fmt: skip
    report = CompressionReport(
        parameters_before=size_of(model, flops=False).parameters,
        fingerprint=fingerprint([c.model_dump() for c in found]),
    )
    linalg.drain_fallbacks()
    with peak_memory() as peak, Bars(progress) as bars:
        steps = _run(shadow_of(model).eval(), methods, calibration, bars, journal, statistics, report)
    hf.edit_(model, steps)
    report.fallbacks += linalg.drain_fallbacks()
    report.ratio_requested = found[-1].ratio if len(found) == 1 else None
    report.parameters_after = size_of(model, flops=False).parameters
    report.seconds = time.perf_counter() - started
    report.peak_memory_bytes = peak.bytes
    return report


def _run(
    shadow: nn.Module, methods: list[tuple[Method, MethodConfig]], calibration: Calibration, bars: Bars,
    journal: Journal | None, statistics: StatsStore | None, report: CompressionReport,
) -> list[tuple[Plan, dict[str, Tensor]]]:  # fmt: skip
    """Each method's plan and tensors, the next one working on what the one before left of the shadow."""
    steps: list[tuple[Plan, dict[str, Tensor]]] = []
    for number, (method, config) in enumerate(methods):
        calibration.seed = config.seed
        job = Job(shadow, method, config, calibration, bars, journal, f"{number}:{method.name}", statistics)
        steps.append(job.run(report))
        if number + 1 < len(methods):
            apply_(shadow, *steps[-1])
        statistics = None  # they describe the model before this step
    return steps


def compress(
    model: nn.Module, configs: MethodConfig | Sequence[MethodConfig], data: Any = None, **kwargs: Any
) -> tuple[nn.Module, CompressionReport]:
    """Like `compress_`, on a copy: returns (compressed model, report) and leaves `model` alone."""
    new = copy.deepcopy(model)
    return new, compress_(new, configs, data, **kwargs)


def statistics_of(
    model: nn.Module, configs: Sequence[MethodConfig], data: Any = None, *, tokenizer: Any = None,
    num_calibration_samples: int = 48, max_seq_length: int = 512, batch_size: int = 8, seed: int = 0,
    gradient_tokens: int = GRADIENT_TOKENS, progress: bool = True,
) -> StatsStore:  # fmt: skip
    """One calibration pass with everything that `configs` need, for `compress_(statistics=...)`; see `collect`."""
    needs = frozenset[str]().union(*(method_of(c).needs(c) for c in configs))
    calibration = Calibration(model, data, tokenizer, num_calibration_samples, max_seq_length, batch_size, seed)
    with Bars(progress) as bars:
        return collect(model, spec_of(model), calibration.batches(), needs, seed=seed, gradient_tokens=gradient_tokens,
                       progress=bars.update)  # fmt: skip


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
        data: calibration data, as for `compress_`; used on a real model only, like all that follow.
        tokenizer: needed for text.
        num_calibration_samples: windows of text.
        max_seq_length: tokens per window.
        batch_size: windows per batch.
        progress: show progress bars.

    Returns:
        {"modules": [...], "parameters_before", "parameters_after", "bytes_before", "bytes_after", "ratio_achieved",
        "notes"}; bytes are those of the tensors on disk.
    """
    found = _configs(configs)
    if len(found) != 1:
        raise ValueError(f"plan: got {len(found)} methods, allowed one; plan the next one on the first one's output")
    method, config = method_of(found[0]), found[0]
    skeleton = planning.skeleton_of(model)
    if isinstance(config, StrategicFusion):
        return planning.from_blocks(skeleton, spec_of(skeleton), config)
    if isinstance(config, SPP):
        return planning.from_units(skeleton, spec_of(skeleton), config)
    if next(skeleton.parameters()).is_meta:
        return planning.from_shapes(skeleton, spec_of(skeleton), method, config)
    calibration = Calibration(
        skeleton, data, tokenizer, num_calibration_samples, max_seq_length, batch_size, config.seed
    )
    with Bars(progress) as bars:
        job = Job(skeleton, method, config, calibration, bars, None, "plan", None)
        choices = job.choose()
    choices.notes += planning.mask_notes(config)
    return planning.from_choices(skeleton, job.paths, job.units, choices)


def _configs(configs: MethodConfig | Sequence[MethodConfig]) -> list[MethodConfig]:
    return list(configs) if isinstance(configs, list | tuple) else [configs]  # type: ignore[list-item]
