"""One small recovery, run in a process of its own: `python recovery_job.py OUTPUT_DIR RESULT [KILL_AT_STEP]`."""

from __future__ import annotations

import copy
import os
import signal
import sys
from typing import Any

import torch
from conftest import FAMILIES
from safetensors.torch import save_file
from torch import nn

import tinycomp as tc

CONFIG = tc.Distill(
    steps=8, eval_every=2, batch_size=4, gradient_accumulation=2, learning_rate=1e-3, hidden=1.0,
    heal_samples=8, warmup_steps=2, weight_decay=0.1, weight_decay_end=0.0, patience=0,
)  # fmt: skip


def data() -> list[dict[str, torch.Tensor]]:
    """Six batches, the odd ones with padding."""
    found = []
    for seed in range(6):
        ids = torch.randint(3, 60, (6, 10), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        if seed % 2:
            mask[::2, 7:] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def models() -> tuple[Any, Any]:
    """(student, teacher): the student has low-rank factors and tied embeddings."""
    teacher = FAMILIES["llama"].build()
    student = copy.deepcopy(teacher)
    tc.compress_(student, tc.SVD(ratio=0.2), data()[:2], progress=False)
    return student, teacher


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def run(folder: str, resume: bool = False) -> tuple[nn.Module, Any]:
    student, teacher = models()
    report = tc.recover_(student, teacher, data(), CONFIG, output_dir=folder, resume=resume, progress=False)
    return student, report


def kill_at(step: int) -> None:
    """End this process, as by `kill -9`, when the optimizer is about to take that step."""
    from tinycomp.train.trainer import _Schedule

    before = _Schedule.on_pre_optimizer_step

    def stop(self: Any, args: Any, trainer_state: Any, control: Any, **kwargs: Any) -> None:
        if trainer_state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        before(self, args, trainer_state, control, **kwargs)

    _Schedule.on_pre_optimizer_step = stop  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 3:
        kill_at(int(sys.argv[3]))
    recovered, _ = run(sys.argv[1])
    if int(os.environ.get("RANK", 0)) == 0:
        save_file(state(recovered), sys.argv[2])
