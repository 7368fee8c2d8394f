"""`tinycomp recover`: load the teacher, store its answers, let it go, load the student, heal it, save it."""

from __future__ import annotations

import gc
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError

from tinycomp.errors import UsageError


@dataclass(frozen=True)
class Inputs:
    """Where the samples come from: None is the bundled speeches."""

    data: str | None = None
    held_out: str | None = None
    num_samples: int = 256
    max_seq_length: int = 512


def make_config(settings: Sequence[str], **fields: Any) -> Any:
    """The recovery's configuration from `FIELD=VALUE` settings; `fields` that are None keep their default.

    Raises:
        UsageError: unknown field, or a value outside its range.
    """
    from tinycomp.train import Distill

    values = {name: value for name, value in fields.items() if value is not None}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise UsageError(f"--set: got {setting!r}, allowed: FIELD=VALUE")
        values[key.replace("-", "_")] = yaml.safe_load(value)
    try:
        return Distill(**values)
    except ValidationError as error:
        details = "; ".join(
            f"{'.'.join(map(str, p['loc'])) or 'Distill'}: got {p['input']!r}, {p['msg']}" for p in error.errors()
        )
        raise UsageError(f"recover: {details}; the fields are {', '.join(Distill.model_fields)}") from error


def run(
    source: str, teacher: str | None, output_dir: str | os.PathLike[str], config: Any, inputs: Inputs, *,
    resume: bool = False, force: bool = False, command: str = "", progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Recover `source` and save the result; teacher and student are never in memory together.

    Args:
        source: model folder, .gguf file or Hub name of the student.
        teacher: the same of the original; None trains on labels alone.
        output_dir: checked before any work; written whole at the end.
        config: a `Distill`.
        inputs: the samples.
        resume: continue an interrupted run.
        force: replace a non-empty `output_dir`.
        command: recorded in the recipe.
        progress: show progress bars.

    Returns:
        JSON: {"output_dir", "report"}.
    """
    from tinycomp.io import alone, check_output_dir, load_model, save_model
    from tinycomp.train.checks import check, rank

    path = check_output_dir(output_dir, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.parent / f".{path.name}.tinycomp-recovery"
    with alone(path) if rank() == 0 else nullcontext():
        if rank() == 0 and work.exists() and not resume:
            raise ValueError(
                f"recover: an interrupted run left its work in {work}; pass --resume, or delete that folder"
            )
        check(load_model(source)[0], config, teacher, work)  # before the teacher is asked, which takes long
        with _kept_when_interrupted(work):
            model, tokenizer, report = _recover(source, teacher, work, config, inputs, resume, progress)
        if rank() == 0:
            recipe = _recipe(source, teacher, model, config, inputs, command)
            save_model(model, tokenizer, path, report, recipe, force, source if os.path.isdir(source) else None)
            shutil.rmtree(work)
    return {"output_dir": str(path), "report": report}


def _recover(
    source: str, teacher: str | None, work: Path, config: Any, inputs: Inputs, resume: bool, progress: bool
) -> tuple[Any, Any, dict[str, Any]]:
    """(recovered model, tokenizer, report); the teacher has left memory when the student comes."""
    from tinycomp.io import load_model
    from tinycomp.train import cache_teacher, recover_

    samples: dict[str, Any] = {
        "held_out": inputs.held_out, "num_samples": inputs.num_samples, "max_seq_length": inputs.max_seq_length,
        "progress": progress,
    }  # fmt: skip
    answers = None
    if teacher is not None:
        original, tokenizer = load_model(teacher)
        answers = work / "teacher"
        cache_teacher(original, inputs.data, answers, config, tokenizer=tokenizer, **samples)
        del original
        gc.collect()
    model, tokenizer = load_model(source)
    report = recover_(
        model, answers, inputs.data, config, tokenizer=tokenizer, output_dir=work, resume=resume, **samples
    ).to_dict()
    return model, tokenizer, report


@contextmanager
def _kept_when_interrupted(work: Path) -> Iterator[None]:
    """An error removes a work folder that was made within, unless there is something in it to continue from."""
    from tinycomp.train.checks import rank

    existed = work.exists()
    try:
        yield
    except BaseException as error:
        refused = isinstance(error, ValueError | TypeError)
        answers = [] if refused else [*work.glob("teacher/sample-*")]
        if existed or answers or any(work.glob("checkpoint-*")):
            error.add_note(f"what is finished is kept in {work}, the same command with --resume continues")
        elif rank() == 0:
            shutil.rmtree(work, ignore_errors=True)
        raise


def _recipe(source: str, teacher: str | None, model: Any, config: Any, inputs: Inputs, command: str) -> dict[str, Any]:
    return {
        "model": source, "teacher": teacher, "model_class": type(model).__name__, "method_names": ["recover"],
        "methods": [config.model_dump(mode="json")], "calibration": vars(inputs), "command": command,
        "quant_method": "tinycomp" if getattr(model.config, "quantization_config", None) is not None else None,
    }  # fmt: skip


def recover(
    model: Annotated[str, typer.Argument(help="compressed model: folder, .gguf file or Hub name", show_default=False)],
    output_dir: Annotated[Path, typer.Option(help="new folder for the result", show_default=False)],
    teacher: Annotated[str | None, typer.Option(help="the original; none: --set kl=0 --set ce=1")] = None,
    data: Annotated[str | None, typer.Option(help=".txt, .jsonl or .parquet; default: bundled speeches")] = None,
    held_out: Annotated[str | None, typer.Option(help="data to judge by; default: the last part of --data")] = None,
    num_samples: Annotated[int, typer.Option(min=2, help="windows of text")] = 256,
    max_seq_length: Annotated[int, typer.Option(min=1, help="tokens per window")] = 512,
    train: Annotated[str | None, typer.Option(help="u, factors, lora or all")] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="optimizer steps; 0: closed form only")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="FIELD=VALUE of the recovery; repeatable")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue an interrupted run of the same command")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace what is in the output folder")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")] = False,
) -> None:
    """Heal a compressed model: closed form first, then distillation from the original."""
    from tinycomp import console
    from tinycomp.train.checks import rank

    config = make_config(settings or (), train=train, steps=steps)
    result = run(
        model, teacher, output_dir, config, Inputs(data, held_out, num_samples, max_seq_length), resume=resume,
        force=force, command=shlex.join(["tinycomp", *sys.argv[1:]]), progress=not as_json,
    )  # fmt: skip
    if rank() != 0:  # one process of several speaks
        return
    if as_json:
        console.emit(result)
        return
    report = result["report"]
    for name in ("loss_before", "loss_healed", "loss_after", "steps", "best_step", "trained_parameters", "seconds"):
        console.out.print(f"{name.replace('_', ' '):24} {console.cell(report[name])}")
    for note in report["notes"]:
        console.out.print(f"note: {note}", markup=False)
    console.out.print(f"saved in {result['output_dir']}", markup=False, soft_wrap=True)
