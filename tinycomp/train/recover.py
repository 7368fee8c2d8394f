"""`recover_`: heal a compressed model on data, in closed form first and by training after, and never make it worse."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tinycomp.calib.loss import no_cache
from tinycomp.io import fingerprint
from tinycomp.io.journal import write_atomic
from tinycomp.io.provenance import model_fingerprint
from tinycomp.models import spec_of
from tinycomp.progress import Bars
from tinycomp.train.checks import check, check_all_labels, check_task, rank, world
from tinycomp.train.config import Distill
from tinycomp.train.heal import heal_
from tinycomp.train.losses import BlockOutputs
from tinycomp.train.parameters import in_float32, training_parameters
from tinycomp.train.samples import Split, split_samples, task_of
from tinycomp.train.teacher import Teacher, questions_of, store
from tinycomp.train.trainer import Objective, RecoveryTrainer, arguments, last_checkpoint, load_into

JOB, START = "recovery.json", "start.safetensors"


@dataclass
class RecoveryReport:
    """What a recovery did. Losses are the objective on held-out samples; `*_terms` hold its terms, unweighted.

    curve: one entry per judgement: step, seconds since training began (None for steps of an earlier, killed run), loss
        and terms.
    healed: one record per block that the closed form changed or looked at.
    """

    config: dict[str, Any] = field(default_factory=dict)
    loss_before: float = 0.0
    loss_healed: float = 0.0
    loss_after: float = 0.0
    terms_before: dict[str, float] = field(default_factory=dict)
    terms_after: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    best_step: int = 0
    trained_parameters: int = 0
    samples: int = 0
    held_out_samples: int = 0
    seconds: float = 0.0
    healed: list[dict[str, Any]] = field(default_factory=list)
    curve: list[dict[str, float | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def recover_(
    model: nn.Module,
    teacher: nn.Module | str | os.PathLike[str] | None,
    data: Any = None,
    config: Distill | None = None,
    *,
    tokenizer: Any = None,
    held_out: Any = None,
    num_samples: int = 256,
    max_seq_length: int = 512,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> RecoveryReport:
    """Heal a compressed model in place; it never ends with a worse held-out loss, and an error leaves it as it was.

    A refit in closed form, then training by transformers' Trainer; the best state on held-out samples remains. Under
    `torchrun` every process calls it alike.

    Args:
        model: the student: any transformers model, compressed or with fewer blocks than the teacher.
        teacher: the original model; or the folder that `cache_teacher` filled, so that it need not be in memory; or
            None to train on labels alone (`Distill(kl=0, ce=1)`).
        data: samples, in any of the forms of `tinycomp.data.batches`; None is the bundled text.
        config: what to do.
        tokenizer: needed for text.
        held_out: samples to judge by, in the same forms; None takes the last part of `data`.
        num_samples: windows of text.
        max_seq_length: tokens per window.
        output_dir: where checkpoints and the teacher's answers are kept; None keeps no checkpoints.
        resume: continue a killed run of the same job in `output_dir`, with the same result.
        progress: show progress bars.

    Raises:
        ValueError, TypeError: bad config, data or job; the message says what is allowed.
    """
    started = time.perf_counter()
    config = config or Distill()
    check(model, config, teacher, output_dir)
    report = RecoveryReport(config=config.model_dump())
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    with _workspace(output_dir) as folder, Bars(progress and rank() == 0) as bars, torch.random.fork_rng(devices=[]):
        try:
            split = split_samples(model, data, held_out, tokenizer, config, num_samples, max_seq_length)
            report.samples, report.held_out_samples = len(split.train), len(split.held_out)
            with no_cache(model):
                answers = _answers(model, teacher, split, folder, config, bars)
                job = _Job(model, original, answers, split, config, report, bars)
                job.run(None if output_dir is None else folder, str(folder), resume)
        except BaseException:
            load_into(dict(model.named_parameters()), original)
            raise
        if not report.loss_after <= report.loss_before:
            load_into(dict(model.named_parameters()), original)
            report.notes.append(f"nothing helped (best held-out loss {report.loss_after:.6g}): the model is as it was")
            report.loss_after, report.terms_after, report.best_step = report.loss_before, report.terms_before, 0
    _wait_for_all()  # whoever is first must not remove what others still read
    report.seconds = time.perf_counter() - started
    return report


def cache_teacher(
    teacher: nn.Module, data: Any, folder: str | os.PathLike[str], config: Distill | None = None, *,
    tokenizer: Any = None, held_out: Any = None, num_samples: int = 256, max_seq_length: int = 512,
    progress: bool = True,
) -> None:  # fmt: skip
    """Store everything `recover_` will ask this teacher, so that it need not be in memory then.

    Pass the same `data`, `config`, `held_out` and sizes to `recover_`, with `folder` as its teacher.

    Args:
        teacher: the original model.
        data: as for `recover_`, like all that follow.
        folder: made when missing; a killed call continues where it was.
        config: decides what is stored.
        tokenizer: needed for text.
        held_out: samples to judge by.
        num_samples: windows of text.
        max_seq_length: tokens per window.
        progress: show a progress bar.
    """
    config = config or Distill()
    split = split_samples(teacher, data, held_out, tokenizer, config, num_samples, max_seq_length)
    with Bars(progress and rank() == 0) as bars:
        _ask(teacher, split, Path(folder), config, bars)


class _Job:
    """One recovery: judge, heal, train, judge again."""

    def __init__(
        self, model: nn.Module, original: dict[str, Tensor], teacher: Teacher | None, split: Split, config: Distill,
        report: RecoveryReport, bars: Bars,
    ):  # fmt: skip
        self.model, self.original, self.teacher, self.split, self.config = model, original, teacher, split, config
        self.report, self.bars, self.identity = report, bars, ""
        device = next(model.parameters()).device
        sample = {k: v.to(device) for k, v in split.train.batches(1)[0].items()}
        with BlockOutputs(model, [spec_of(model).blocks[0].path]) as recorder:
            task, classes = task_of(model, sample)
            width = recorder.take()[0].shape[-1]
        check_task(task.kind, classes, width, teacher, config)
        if config.ce and task.kind != "none":
            check_all_labels(task, classes, [*split.train.rows, *split.held_out.rows])
        self.objective = Objective(model, task, teacher, config)

    def run(self, folder: Path | None, scratch: str, resume: bool) -> None:
        """`folder` is where checkpoints go, if anywhere."""
        report, config = self.report, self.config
        job = self._open(folder, resume)
        report.terms_before = job.get("before") or self._judge()
        report.loss_before = report.terms_before["loss"]
        if not math.isfinite(report.loss_before):
            raise ValueError(
                "recover: the held-out loss is not finite before anything was done; check the model's weights and the "
                "data, or load it in float32"
            )
        with in_float32(self.model):
            healed = self._heal(folder, job)
            report.loss_healed = healed["loss"]
            if config.steps:
                with training_parameters(self.model, config) as chosen:
                    report.trained_parameters = sum(p.numel() for p in chosen.values())
                    self._train(chosen, folder, scratch, healed, resume)
        report.terms_after = self._judge()
        report.loss_after = report.terms_after["loss"]

    def _judge(self) -> dict[str, float]:
        return self.objective.judge(self.split.held_out, self.config.batch_size)

    def _open(self, folder: Path | None, resume: bool) -> dict[str, Any]:
        """What an earlier run of this job left, once it was healed; {} for a new one."""
        if folder is None:
            return {}
        self.identity = fingerprint(
            self.config, model_fingerprint(self.model), [*self.split.train.rows, *self.split.held_out.rows]
        )
        if not (folder / JOB).exists():
            return {}
        job = json.loads((folder / JOB).read_text())
        if job["identity"] != self.identity:
            raise ValueError(
                f"recover: {folder} holds another job (its model, data or config differ); name another folder"
            )
        if not resume and rank() == 0:
            raise ValueError(f"recover: {folder} holds this job already; pass resume to continue it, or delete it")
        return dict(job)

    def _heal(self, folder: Path | None, job: dict[str, Any]) -> dict[str, float]:
        """The judgement after healing; healing that does not help is undone."""
        report, parameters = self.report, dict(self.model.named_parameters())
        if "healed" in job:
            assert folder is not None
            changed = load_file(folder / START)
            load_into({name: parameters[name] for name in changed}, changed)
            report.healed, report.notes = job["records"], job["notes"]
            return dict(job["healed"])
        before, changed = report.terms_before, {}
        if self.config.heal and self.teacher is not None:
            training = self.model.training
            self.model.eval()
            samples = min(self.config.heal_samples, len(self.split.train))
            report.healed, notes = heal_(
                self.model, self.split, self.teacher, samples, self.config.batch_size, self.bars.update
            )
            self.model.train(training)
            report.notes += notes
            after = self._judge()
            if after["loss"] < before["loss"]:
                changed = {
                    name: p.detach() for name, p in parameters.items() if not torch.equal(p, self.original[name].to(p))
                }
                before = after
            else:
                load_into(parameters, self.original)
                report.notes.append(f"the closed form did not help (held-out loss {after['loss']:.6g}) and was undone")
        if folder is not None and rank() == 0:
            write_atomic(folder / START, save({name: p.cpu() for name, p in changed.items()}))
            job = {
                "identity": self.identity, "before": report.terms_before, "healed": before, "records": report.healed,
                "notes": report.notes,
            }  # fmt: skip
            write_atomic(folder / JOB, json.dumps(job).encode())
        return before

    def _train(
        self, chosen: dict[str, nn.Parameter], folder: Path | None, scratch: str, start: dict[str, float], resume: bool
    ) -> None:
        def on_progress(done: int, total: int, loss: float | None) -> None:
            self.bars.update("recovering", done, total, "" if loss is None else f"loss {loss:.4g}")

        device = next(self.model.parameters()).device
        args = arguments(self.config, folder, scratch, world(), device.type == "cpu")
        trainer = RecoveryTrainer(self.objective, self.split, chosen, folder, args, start, on_progress)
        training = self.model.training
        self.report.steps = trainer.recover(last_checkpoint(folder) if resume and folder is not None else None)
        self.model.train(training)
        load_into(chosen, trainer.best)
        self.report.best_step = trainer.best_step
        self.report.curve = trainer.curve


def _answers(model: nn.Module, teacher: Any, split: Split, folder: Path, config: Distill, bars: Bars) -> Teacher | None:
    """The stored answers, matched to the student's blocks; a live teacher is asked first."""
    if teacher is None:
        return None
    if isinstance(teacher, nn.Module):
        _ask(teacher, split, folder / "teacher", config, bars)
        teacher = folder / "teacher"
    answers = Teacher(teacher, questions_of(split, config))
    answers.fit(model, spec_of(model), config.hidden > 0)
    return answers


def _ask(teacher: nn.Module, split: Split, folder: Path, config: Distill, bars: Bars) -> None:
    """Store the answers, every process its share; all of them are there when it returns."""
    cpu = next(teacher.parameters()).device.type == "cpu"
    if world() > 1:
        arguments(config, folder, str(folder), world(), cpu).device  # noqa: B018 (starts the process group)
    store(teacher, split, folder, config, bars.update, rank(), world())
    _wait_for_all()


def _wait_for_all() -> None:
    """Until every process is here; one process alone waits for nobody."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


@contextlib.contextmanager
def _workspace(output_dir: str | os.PathLike[str] | None) -> Iterator[Path]:
    """`output_dir`, made when missing, or a temporary folder."""
    if output_dir is None:
        with tempfile.TemporaryDirectory(prefix="tinycomp-recover-") as name:
            yield Path(name)
        return
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
