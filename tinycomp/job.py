"""The work behind `tinycomp compress` and `tinycomp plan`: load, compress, measure, save; nothing half-written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinycomp import pipeline
from tinycomp.errors import UsageError
from tinycomp.eval.quality import Protocol, perplexity
from tinycomp.io import (
    Journal,
    alone,
    check_output_dir,
    fingerprint,
    load_config,
    load_model,
    model_fingerprint,
    save_model,
)
from tinycomp.recipe import make_recipe


@dataclass(frozen=True)
class Calibration:
    """Calibration inputs: `data` is a path, None the bundled speeches; None elsewhere is the pipeline's default."""

    data: str | None = None
    num_calibration_samples: int | None = None
    max_seq_length: int | None = None
    batch_size: int = 8


def journal_dir(output_dir: Path) -> Path:
    """Where unfinished work for `output_dir` is kept: beside it, hidden."""
    return output_dir.parent / f".{output_dir.name}.tinycomp-journal"


def _data_identity(data: str | None) -> list[Any]:
    """Path, size and modification time: enough to see that a calibration file was replaced."""
    if data is None:
        return ["bundled"]
    if not os.path.isfile(data):
        raise ValueError(f"data: there is no file {data}; give a .txt, .jsonl or .parquet file")
    stat = os.stat(data)
    return [os.path.abspath(data), stat.st_size, stat.st_mtime_ns]


def _open_journal(path: Path, model: Any, configs: Any, calibration: Calibration, resume: bool) -> Journal:
    if not any(path.rglob("*.safetensors")):  # interrupted before any block was finished, any search begun
        shutil.rmtree(path, ignore_errors=True)
    elif not resume:
        raise ValueError(
            f"compress: an interrupted run left its finished blocks in {path}; pass --resume to continue it, or delete "
            "that folder"
        )
    identity = fingerprint(
        model_fingerprint(model), list(configs), asdict(calibration), _data_identity(calibration.data)
    )
    return Journal(path, identity)


def run(
    source: str,
    configs: Sequence[Any],
    output_dir: str | os.PathLike[str],
    calibration: Calibration,
    *,
    protocol: Protocol | None = None,
    max_perplexity: float | None = None,
    resume: bool = False,
    force: bool = False,
    command: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """Compress `source` and save the result.

    Args:
        source: model folder, .gguf file or Hub name.
        configs: methods, applied in order.
        output_dir: checked before any work; written whole at the end.
        calibration: inputs for methods that need them.
        protocol: measure this perplexity of the result.
        max_perplexity: with `protocol`; above it nothing is saved.
        resume: continue from the journal of an interrupted run.
        force: replace a non-empty `output_dir`.
        command: recorded in the recipe.
        progress: show progress bars.

    Returns:
        JSON: {"output_dir", "saved", "report", "evaluation"}.
    """
    path = check_output_dir(output_dir, force)
    data_identity = _data_identity(calibration.data)
    model, tokenizer = load_model(source)
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path):
        journal = _open_journal(journal_dir(path), model, configs, calibration, resume)
        try:
            report = pipeline.compress_(
                model, list(configs), calibration.data, tokenizer=tokenizer,
                num_calibration_samples=calibration.num_calibration_samples, max_seq_length=calibration.max_seq_length,
                batch_size=calibration.batch_size, journal=journal, progress=progress,
            ).to_dict()  # fmt: skip
            evaluation = None
            if protocol is not None:
                evaluation = perplexity(model, tokenizer, protocol).to_dict()
                report["evaluations"] = [evaluation]
            saved = max_perplexity is None or (evaluation is not None and evaluation["perplexity"] <= max_perplexity)
            if saved:
                recipe = make_recipe(
                    source, configs, command, model, data_identity=data_identity, **asdict(calibration)
                )
                save_model(model, tokenizer, path, report, recipe, force, source if os.path.isdir(source) else None)
        except BaseException as error:
            if journal.count():
                error.add_note("finished blocks are kept, the same command with --resume continues")
            else:
                journal.delete()
            raise
        journal.delete()
    return {"output_dir": str(path), "saved": saved, "report": report, "evaluation": evaluation}


def plan_source(source: str, configs: Sequence[Any]) -> dict[str, Any]:
    """`pipeline.plan` for a model folder, config.json, Hub name or .gguf file, without looking at weights."""
    if len(configs) != 1:
        raise UsageError(f"plan: got {len(configs)} methods, allowed one; plan the next one on the first one's output")
    if source.endswith(".gguf"):
        model: Any = load_model(source)[0].to("meta")
        model.tie_weights()  # the move to meta made two parameters of every shared one
    else:
        model = load_config(source)
    return pipeline.plan(model, configs[0])
