"""The stock transformers Trainer with stored teacher answers as targets, exact resume and a best state that is kept."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from tinycomp.io.journal import write_atomic
from tinycomp.models import spec_of
from tinycomp.train.config import Distill
from tinycomp.train.losses import Batch, BlockOutputs, Targets, Task, objective
from tinycomp.train.samples import Samples, Split, logits_of, model_inputs
from tinycomp.train.teacher import Teacher, stack_masks

WEIGHTS, BEST, STATE = "trainable.safetensors", "best.safetensors", "trainer_state.json"


class Objective:
    """The recovery objective on one model; what training and judging share.

    Args:
        model: the student.
        task: what it predicts.
        teacher: stored answers, or None for labels alone.
        config: weights of the terms.
    """

    def __init__(self, model: nn.Module, task: Task, teacher: Teacher | None, config: Distill):
        self.model, self.task, self.teacher, self.config = model, task, teacher, config
        self.spec = spec_of(model)
        self.paths = [b.path for b in self.spec.blocks] if config.hidden else []

    def __call__(self, run: nn.Module, batch: Batch, counts: Tensor) -> tuple[Tensor, dict[str, float]]:
        """(objective, its terms) of `batch`, divided by `counts`; `run` is the model or a wrapper around it."""
        device = next(self.model.parameters()).device
        batch = {name: value.to(device) for name, value in batch.items()}
        with BlockOutputs(self.model, self.paths) as recorder:
            logits = logits_of(run(**model_inputs(batch)))
            hidden = recorder.take()
        targets = Targets(None, None, None, None, [])
        if self.teacher is not None:
            targets = self.teacher.targets(batch["sample"], device)
        masks = stack_masks(self.task, self.spec, hidden, batch)
        return objective(self.task, logits, hidden, masks, batch, targets, counts, self.config)

    def judge(self, samples: Samples, size: int) -> dict[str, float]:
        """The objective over all samples, as "loss", and its terms; NaN becomes infinity."""
        batches = samples.batches(size)
        counts = torch.stack([self.task.counts(batch) for batch in batches]).sum(0)
        training = self.model.training
        self.model.eval()
        sums = {"loss": 0.0}
        with torch.no_grad():
            for batch in batches:
                loss, terms = self(self.model, batch, counts)
                for name, value in {"loss": float(loss), **terms}.items():
                    sums[name] = sums.get(name, 0.0) + value
        self.model.train(training)
        return {name: value if math.isfinite(value) else math.inf for name, value in sums.items()}


class RecoveryTrainer(Trainer):
    """Trains `chosen` towards the objective; judges it on held-out samples and remembers its best state.

    Dropout is off: a student learns the teacher's answers, and every process sees the same function.
    """

    objective: Objective

    def __init__(
        self, objective: Objective, split: Split, chosen: dict[str, nn.Parameter], folder: Path | None,
        args: TrainingArguments, start: dict[str, float], on_progress: Callable[[int, int, float | None], None],
    ):  # fmt: skip
        super().__init__(
            model=objective.model, args=args, train_dataset=split.train, eval_dataset=split.held_out,
            data_collator=split.train.collate, callbacks=[_Schedule(objective.config, on_progress)],
        )  # fmt: skip
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the objective divides by the counts of the whole step itself
        self.objective, self.split, self.chosen, self.folder = objective, split, chosen, folder
        self.best = {name: p.detach().cpu().clone() for name, p in chosen.items()}
        self.best_loss, self.best_step = start["loss"], 0
        self.curve: list[dict[str, float | None]] = [{"step": 0, "seconds": 0.0, **start}]
        self._begun = time.perf_counter()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The batches of one step and the counts of all of them on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.zeros(3, dtype=torch.float64)
        for batch in batches:
            counts += self.objective.task.counts({k: v.cpu() for k, v in batch.items()})
        return batches, self.accelerator.reduce(counts.float().to(device), "sum")

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        model.eval()
        loss, _ = self.objective(model, inputs, num_items_in_batch)
        return loss * self.accelerator.num_processes  # gradients are averaged over processes, counts are of all

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Judge the present state on the held-out samples; stop when it has not improved for long enough."""
        found = self.objective.judge(self.split.held_out, self.args.eval_batch_size)
        step = self.state.global_step
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.curve.append({"step": step, "seconds": time.perf_counter() - self._begun, **found})
        if found["loss"] < self.best_loss:
            self.best_loss, self.best_step = found["loss"], step
            self.best = {name: p.detach().cpu().clone() for name, p in self.chosen.items()}
            if self.folder is not None and self.args.should_save:
                header = {"loss": found["loss"], "step": step}
                write_atomic(self.folder / BEST, save(self.best, metadata={"best": json.dumps(header)}))
        if self._hopeless(step):
            self.control.should_training_stop = True
        return metrics

    def _hopeless(self, step: int) -> bool:
        """Whether the held-out loss has not improved for so long that training stops at this step."""
        config = self.objective.config
        return config.patience > 0 and step - self.best_step >= config.patience * config.eval_every

    def recover(self, checkpoint: str | None) -> int:
        """Train, from `checkpoint` on where there is one; the step it ended at. The best state is in `best`."""
        if checkpoint is not None:
            step = self._remember(Path(checkpoint))
            if self._hopeless(step):
                return step
        self.train(resume_from_checkpoint=checkpoint)
        self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)  # autocast stays on otherwise
        return self.state.global_step

    def _remember(self, checkpoint: Path) -> int:
        """Take up the judgements before a checkpoint and the best state so far; the checkpoint's step."""
        assert self.folder is not None
        state = json.loads((checkpoint / STATE).read_text())
        for entry in state["log_history"]:
            if "eval_loss" in entry:
                found = {k.removeprefix("eval_"): v for k, v in entry.items() if k.startswith("eval_")}
                self.curve.append({"step": entry["step"], "seconds": None, **found})
        if (self.folder / BEST).exists():
            with safe_open(self.folder / BEST, "pt") as file:
                header = json.loads(file.metadata()["best"])
                self.best = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            self.best_loss, self.best_step = header["loss"], header["step"]
        return int(state["global_step"])

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """A checkpoint holds the trained parameters alone; the others are those of the model that was passed in."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: p.detach().cpu().clone() for name, p in self.chosen.items()}
        write_atomic(folder / WEIGHTS, save(state))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_into(self.chosen, load_file(Path(resume_from_checkpoint) / WEIGHTS))


class _Schedule(TrainerCallback):
    """Weight decay along the steps, and progress with the last loss."""

    def __init__(self, config: Distill, on_progress: Callable[[int, int, float | None], None]):
        self.config, self.on_progress = config, on_progress
        self.loss: float | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        end = self.config.weight_decay_end
        if end is not None:
            share = state.global_step / max(self.config.steps - 1, 1)
            for group in kwargs["optimizer"].param_groups:
                if group["weight_decay"] or group.get("decays"):
                    group["decays"] = True
                    group["weight_decay"] = self.config.weight_decay + share * (end - self.config.weight_decay)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_progress(state.global_step, self.config.steps, self.loss)


def load_into(parameters: dict[str, nn.Parameter], state: dict[str, Tensor]) -> None:
    """Copy stored values into the parameters of the same names."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def arguments(config: Distill, folder: Path | None, scratch: str, world: int, cpu: bool) -> TrainingArguments:
    """The Trainer's settings; `batch_size` counts over all processes."""
    size, headless = config.batch_size // world, not (config.kl or config.ce)  # headless: the head gets no gradient
    made = TrainingArguments(
        output_dir=str(folder or scratch),
        max_steps=max(config.steps, 1),
        per_device_train_batch_size=size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=min(config.warmup_steps, config.steps),
        weight_decay=max(config.weight_decay, config.weight_decay_end or 0.0),  # which parameters decay is decided here
        max_grad_norm=config.max_grad_norm,
        bf16=config.dtype == "bfloat16",
        use_cpu=cpu,
        seed=config.seed,
        data_seed=config.seed,
        eval_strategy="steps",
        eval_steps=config.eval_every,
        save_strategy="no" if folder is None else "steps",
        save_steps=config.eval_every,
        save_total_limit=2,
        logging_steps=max(min(10, config.eval_every), 1),
        logging_nan_inf_filter=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        ddp_find_unused_parameters=headless if world > 1 else None,
        average_tokens_across_devices=False,
        disable_tqdm=True,
        report_to="none",
        ddp_backend="gloo" if cpu and world > 1 else None,
    )
    if made.n_gpu > 1:
        made._n_gpu = 1  # one process, one device: several devices are for torchrun, not for threads
    return made


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written completely; its state file is written last."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    for path in found:
        try:
            json.loads((path / STATE).read_text())
        except (OSError, json.JSONDecodeError):
            continue
        if (path / "scheduler.pt").exists():
            return os.fspath(path)
    return None
