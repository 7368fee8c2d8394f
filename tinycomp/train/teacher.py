"""The teacher's answers on disk: its largest logits for every prediction and its blocks' outputs, one file a sample.

The student trains from these files, so the two models need never be in memory together.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tinycomp.calib.loss import no_cache
from tinycomp.io import fingerprint
from tinycomp.io.journal import write_atomic
from tinycomp.io.provenance import model_fingerprint
from tinycomp.models import ModelSpec, spec_of
from tinycomp.train.config import Distill
from tinycomp.train.losses import Batch, BlockOutputs, Targets, Task
from tinycomp.train.samples import Split, logits_of, model_inputs, task_of

MANIFEST, SIGNS = "teacher.json", "signs.safetensors"
VARIANCE_SAMPLES = 16  # samples from which the teacher's variance per block is estimated


Signs = dict[str, Tensor]  # a block's vectors by name


def block_signs(model: nn.Module, spec: ModelSpec) -> list[list[Signs]]:
    """Per stack and block its vectors (norm weights, biases): compression leaves most of them alone."""
    return [
        [
            {n: p.detach().float() for n, p in model.get_submodule(b.path).named_parameters() if p.ndim == 1}
            for b in stack.blocks
        ]
        for stack in spec.stacks
    ]


def match_blocks(student: Sequence[Signs], teacher: Sequence[Signs]) -> list[int]:
    """For every student block the teacher block it came from, in ascending order, by the distance of their vectors.

    Vectors count that all blocks have, with the same size; without any the blocks are spread evenly.

    Raises:
        ValueError: the student has more blocks.
    """
    n, m = len(student), len(teacher)
    if n > m:
        raise ValueError(f"recover: got a student with {n} blocks and a teacher with {m}, allowed are at most as many")
    if n == m:
        return list(range(n))
    every = [*student, *teacher]
    common = [n for n, v in student[0].items() if all(n in s and s[n].shape == v.shape for s in every)]
    if not common:
        return [round(i * (m - 1) / max(n - 1, 1)) for i in range(n)]
    mine, theirs = (torch.stack([torch.cat([s[c] for c in common]) for s in side]) for side in (student, teacher))
    cost = torch.cdist(mine.double(), theirs.double())
    best = torch.full((n + 1, m + 1), float("inf"), dtype=torch.float64)
    best[0] = 0
    for i in range(n):
        for j in range(i, m):
            best[i + 1, j + 1] = min(best[i + 1, j], best[i, j] + cost[i, j])
    found, i, j = [], n, m
    while i:
        if best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            found.append(j)
    return found[::-1]


def hidden_targets(kept: Sequence[int], depth: int) -> list[int]:
    """The teacher block whose output each student block should give: the last one before the next kept block."""
    return [*(k - 1 for k in kept[1:]), depth - 1]


class Teacher:
    """Stored answers.

    Args:
        folder: as `store` filled it.
        expected: fingerprint of samples and settings; None skips the check.

    Raises:
        ValueError: nothing there, or answers to other questions.
    """

    def __init__(self, folder: str | os.PathLike[str], expected: str | None = None):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            raise ValueError(f"teacher: {self.folder} holds no stored answers; write them with tinycomp.cache_teacher")
        manifest = json.loads((self.folder / MANIFEST).read_text())
        if expected not in (None, manifest["questions"]):
            raise ValueError(
                f"teacher: {self.folder} answers other samples or other settings (top_k, temperature, hidden states); "
                "use the data and config it was made with, or another folder"
            )
        self.task = Task(manifest["task"])
        self.classes: int = manifest["classes"]
        with safe_open(self.folder / SIGNS, "pt") as file:
            self.signs: list[list[Signs]] = [[{} for _ in range(depth)] for depth in manifest["depths"]]
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                stack, block, name = key.split(".", 2)
                self.signs[int(stack)][int(block)][name] = file.get_tensor(key)
        self.hidden: list[int] | None = None
        self.scales: list[float] = []

    def fit(self, model: nn.Module, spec: ModelSpec, hidden: bool) -> None:
        """Match the student's blocks with the teacher's; with `hidden`, give their outputs among the targets.

        Raises:
            ValueError: the student has more stacks or blocks.
        """
        signs = block_signs(model, spec)
        if len(signs) != len(self.signs):
            raise ValueError(f"recover: the student has {len(signs)} lists of blocks, the teacher {len(self.signs)}")
        self.places: list[int] = []
        first = 0
        for mine, theirs in zip(signs, self.signs, strict=True):
            self.places += [first + i for i in hidden_targets(match_blocks(mine, theirs), len(theirs))]
            first += len(theirs)
        if hidden:
            self.hidden = self.places
            self.scales = [self._variance(place) for place in self.places]

    def outputs(self, sample: int, place: int) -> Tensor:
        """(real tokens, d) bfloat16: what teacher block `place` gave for one sample."""
        with safe_open(_file(self.folder, sample), "pt") as file:
            return file.get_tensor(f"hidden.{place}")

    def targets(self, samples: Tensor, device: torch.device) -> Targets:
        """The answers for a batch, in its order."""
        parts: dict[str, list[Tensor]] = {}
        names = ["values", "indices", "total"] if self.classes else []
        names += [f"hidden.{place}" for place in self.hidden or ()]
        for sample in samples.tolist():
            with safe_open(_file(self.folder, sample), "pt") as file:
                for name in dict.fromkeys(names):
                    parts.setdefault(name, []).append(file.get_tensor(name))
        joined = {name: torch.cat(tensors).to(device) for name, tensors in parts.items()}
        indices = joined.get("indices")
        return Targets(
            joined.get("values"),
            None if indices is None else indices.long(),
            joined.get("total"),
            None if self.hidden is None else [joined[f"hidden.{place}"] for place in self.hidden],
            self.scales,
        )

    def _variance(self, place: int) -> float:
        rows = []
        for file in sorted(self.folder.glob("sample-*.safetensors"))[:VARIANCE_SAMPLES]:
            with safe_open(file, "pt") as stored:
                rows.append(stored.get_tensor(f"hidden.{place}").float())
        return max(float(torch.cat(rows).var(0, correction=0).mean()), 1e-12)


def questions_of(split: Split, config: Distill) -> str:
    """Fingerprint of everything but the teacher that decides what is stored."""
    return fingerprint(
        [*split.train.rows, *split.held_out.rows], config.top_k, config.temperature, _hidden_samples(split, config)
    )


def _hidden_samples(split: Split, config: Distill) -> int:
    if config.hidden:
        return len(split.train) + len(split.held_out)
    return min(config.heal_samples, len(split.train)) if config.heal else 0


def store(
    teacher: nn.Module, split: Split, folder: str | os.PathLike[str], config: Distill,
    progress: Callable[[str, int, int], None] = lambda *_: None, rank: int = 0, world: int = 1,
) -> None:  # fmt: skip
    """Ask the teacher everything the recovery will need; what is there already is kept, so a killed run continues.

    Args:
        teacher: any transformers model, left as it is.
        split: the samples.
        folder: made when missing.
        config: decides what is stored.
        progress: called with (description, done, total).
        rank: this process; every process stores its share.
        world: number of processes.

    Raises:
        ValueError: the folder holds another teacher's answers, or answers to other questions.
        RuntimeError: the disk has too little room.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spec, training = spec_of(teacher), teacher.training
    teacher.eval()
    device = next(teacher.parameters()).device
    batches = [batch for part in (split.train, split.held_out) for batch in part.batches(config.batch_size)]
    try:
        with torch.no_grad(), no_cache(teacher):
            task, classes = task_of(teacher, _on(batches[0], device))
            _begin(teacher, spec, folder, questions_of(split, config), task, classes, rank)
            for number, batch in enumerate(batches):
                missing = [int(i) for i in batch["sample"] if not _file(folder, int(i)).exists()]
                if number % world == rank and missing:
                    _answer(teacher, spec, task, _on(batch, device), folder, config, _hidden_samples(split, config))
                progress("asking the teacher", number + 1, len(batches))
    finally:
        teacher.train(training)


def _begin(
    teacher: nn.Module, spec: ModelSpec, folder: Path, questions: str, task: Task, classes: int, rank: int
) -> None:
    """Write the manifest, or check that the one there is of the same teacher and questions."""
    signs = block_signs(teacher, spec)
    manifest = {
        "questions": questions, "teacher": model_fingerprint(teacher), "task": task.kind, "classes": classes,
        "depths": [len(s) for s in signs],
    }  # fmt: skip
    if (folder / MANIFEST).exists():
        if json.loads((folder / MANIFEST).read_text()) != manifest:
            raise ValueError(
                f"teacher: {folder} holds the answers of another teacher, or to other samples or settings; name another"
                " folder, or delete it"
            )
    elif rank == 0:
        tensors = {
            f"{s}.{b}.{name}": v.contiguous()
            for s, blocks in enumerate(signs) for b, vectors in enumerate(blocks) for name, v in vectors.items()
        }  # fmt: skip
        write_atomic(folder / SIGNS, save(tensors))
        write_atomic(folder / MANIFEST, json.dumps(manifest).encode())


def _answer(
    teacher: nn.Module, spec: ModelSpec, task: Task, batch: Batch, folder: Path, config: Distill, hidden_samples: int
) -> None:
    """One forward pass; one file per sample."""
    wanted = bool((batch["sample"] < hidden_samples).any())
    with BlockOutputs(teacher, [b.path for b in spec.blocks] if wanted else []) as recorder:
        logits = logits_of(teacher(**model_inputs(batch)))
        hidden = recorder.take()
    masks = stack_masks(task, spec, hidden, batch)
    per_sample: dict[str, list[Tensor]] = {}
    if logits is not None:
        rows = task.rows(logits, batch)
        k = min(config.top_k or rows.shape[1], rows.shape[1])
        values, indices = rows.topk(k, dim=1)
        sizes = task.positions(batch).reshape(len(batch["sample"]), -1).sum(1).tolist()
        total = (rows / config.temperature).logsumexp(1)
        for name, value in (("values", values), ("indices", indices.to(torch.int32)), ("total", total)):
            per_sample[name] = list(value.split(sizes))
    for place, (h, mask) in enumerate(zip(hidden, masks, strict=True)):
        per_sample[f"hidden.{place}"] = [h[i][mask[i]].to(torch.bfloat16) for i in range(len(h))]
    if not all(t.isfinite().all() for parts in per_sample.values() for t in parts):
        raise ValueError("teacher: its answers are not finite; check its weights and the data, or load it in float32")
    needed = sum(t.nbytes for parts in per_sample.values() for t in parts)
    if shutil.disk_usage(folder).free < 2 * needed:
        raise RuntimeError(
            f"teacher: the disk of {folder} has no room for {needed} more bytes; lower top_k or the number of samples, "
            "set hidden=0, or name a folder on another disk"
        )
    for i, sample in enumerate(batch["sample"].tolist()):
        mine = {name: parts[i].cpu().contiguous().clone() for name, parts in per_sample.items()}
        if sample >= hidden_samples:
            mine = {name: tensor for name, tensor in mine.items() if not name.startswith("hidden.")}
        write_atomic(_file(folder, sample), save(mine))


def stack_masks(task: Task, spec: ModelSpec, hidden: list[Tensor], batch: Batch) -> list[Tensor]:
    """(B, T) bool per block: its real tokens. The last of several stacks is the decoder."""
    decoder = [len(spec.stacks) > 1 and stack is spec.stacks[-1] for stack in spec.stacks for _ in stack.blocks]
    return [task.real(batch, h.shape[1], last) for h, last in zip(hidden, decoder, strict=False)]


def _file(folder: Path, sample: int) -> Path:
    return folder / f"sample-{sample:07d}.safetensors"


def _on(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device) for name, value in batch.items()}
