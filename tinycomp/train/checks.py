"""What a recovery refuses: before anything is asked or trained, and once its samples and the teacher are known."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from tinycomp.data import check_labels
from tinycomp.train.config import Distill
from tinycomp.train.losses import Batch, Task
from tinycomp.train.parameters import training_parameters
from tinycomp.train.teacher import Teacher


def rank() -> int:
    """This process among those of `torchrun`."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check(model: nn.Module, config: Distill, teacher: Any, output_dir: Any) -> None:
    """Refuse what no data could make right, before anything is asked or trained.

    Raises:
        ValueError, TypeError, RuntimeError: the message says what is allowed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"recover: got a {type(model).__name__} as model, allowed is a torch module; load it first")
    if any(hasattr(m, "base_layer") and hasattr(m, "merge") for m in model.modules()):
        raise ValueError("recover: got a model with adapters attached, allowed are plain weights; merge them first")
    if config.steps and importlib.util.find_spec("accelerate") is None:
        raise RuntimeError("recover: training needs the package accelerate; install tinycomp[train], or use steps=0")
    if teacher is model:
        raise ValueError("recover: got the same object as model and teacher; pass the original as teacher")
    if teacher is None and (config.kl or config.hidden):
        raise ValueError("recover: got no teacher with kl or hidden above 0; pass one, or Distill(kl=0, ce=1)")
    if world() > 1 and output_dir is None:
        raise ValueError("recover: got no output_dir on several processes; name a folder that all of them see")
    if config.batch_size % world():
        raise ValueError(
            f"recover: got batch_size {config.batch_size} on {world()} processes, allowed is a multiple; change it"
        )
    if config.steps and config.train != "lora":  # adapters fit every model that has blocks
        with training_parameters(model, config):
            pass


def check_all_labels(task: Task, classes: int, rows: Sequence[Batch]) -> None:
    for number, row in enumerate(rows):
        batch = {name: value[None] for name, value in row.items()}
        if "labels" not in batch:
            raise ValueError(
                f"recover: got ce above 0 and sample {number} without labels; add labels to each batch, or use ce=0"
            )
        positions = task.positions(batch).shape if task.kind != "causal" else batch["input_ids"].shape
        check_labels(batch["labels"], positions, classes, "recover", ignored=True)


def check_task(kind: str, classes: int, width: int, teacher: Teacher | None, config: Distill) -> None:
    if kind == "none" and (config.kl or config.ce):
        raise ValueError(
            "recover: got kl or ce above 0 for a model without class logits; use Distill(kl=0, ce=0, hidden=1)"
        )
    if teacher is not None and config.kl and (kind, classes) != (teacher.task.kind, teacher.classes):
        raise ValueError(
            f"recover: the student gives {classes} {kind} logits and the teacher {teacher.classes} "
            f"{teacher.task.kind} ones; allowed is a teacher with the same head"
        )
    if teacher is not None and (config.heal or config.hidden):
        found = teacher.outputs(0, teacher.places[0]).shape[-1]
        if found != width:
            raise ValueError(
                f"recover: the student's blocks give {width} numbers a token and the teacher's {found}, allowed are "
                "equal widths where they are compared; use heal=False and hidden=0"
            )
