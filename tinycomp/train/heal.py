"""Closed-form healing: the linear that writes each block's result is refit so that it gives the teacher's output.

Block after block, on the student's own inputs: with x the features that the last factor D of the writing linear reads
and e = target - output, the change of D is E (S + l I)^-1 with E = sum w² e xᵀ and S = sum w² x xᵀ (ridge regression
towards the present weight). w makes every token's error relative, so that a few outlier tokens do not decide; l is the
one of `DAMPING` that is best on samples left out of the sums, and nothing changes where none of them helps there.
A block whose follower was dropped takes over the target of the last dropped block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinycomp import linalg
from tinycomp.calib import chainable
from tinycomp.calib.replay import Call, capture, first_tensor
from tinycomp.models import Stack, is_linear, spec_of
from tinycomp.train.losses import Batch
from tinycomp.train.samples import Samples, Split, model_inputs
from tinycomp.train.teacher import Teacher

DAMPING = (1e-2, 1e-1, 1.0)
EVERY = 4  # one sample in so many chooses the damping instead of entering the sums


@dataclass
class _Factor:
    """The weight that changes: its layer's output at `columns` gains delta x, or left delta x where `left` is given.

    reads: from the layer's input to the features x that the weight multiplies; a 1 follows them where there is a bias.
    transposed: the weight is stored as (in, out).
    """

    weight: Any
    reads: Callable[[Tensor], Tensor]
    bias: Any = None
    columns: Tensor | None = None
    left: Tensor | None = None
    transposed: bool = False

    def features(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.reads(inputs)
        return x if self.bias is None else torch.cat([x, torch.ones_like(x[:, :1])], 1)

    def add_(self, delta: Tensor) -> None:
        change = delta if self.bias is None else delta[:, :-1]
        self.weight.data += (change.T if self.transposed else change).to(self.weight)
        if self.bias is not None:
            part = slice(None) if self.columns is None else self.columns
            self.bias.data[part] += delta[:, -1].to(self.bias)


def _factor(layer: Any) -> _Factor | None:
    """What can change in a writing linear; None for layers without a floating-point last factor (rounded weights)."""
    if is_linear(layer):
        return _Factor(layer.weight, lambda x: x, layer.bias, transposed=not isinstance(layer, nn.Linear))
    name = type(layer).__name__
    if name == "LowRankLinear":
        columns = layer.order[layer.rank :].long() if layer.pivoted else None  # the first ones are exact rows
        return _Factor(layer.up.weight, layer.down, layer.bias, columns)
    if name == "CURLinear":
        return _Factor(layer.u.weight, layer.r, left=layer.c.weight.detach().double())
    return None


class _Sums:
    """E, S and the squared error before, of one of the two sets of samples."""

    def __init__(self) -> None:
        self.cross: Any = 0.0
        self.gram: Any = 0.0
        self.before = 0.0

    def add(self, x: Tensor, e: Tensor, w: Tensor) -> None:
        x, e = (x * w).detach(), (e * w).detach()
        self.cross = self.cross + (e.T @ x).double()
        self.gram = self.gram + (x.T @ x).double()
        self.before += float(e.double().pow(2).sum())

    def after(self, change: Tensor) -> float:
        """Squared error with the output changed by `change` @ x."""
        return self.before - 2 * float((change * self.cross).sum()) + float((change @ self.gram * change).sum())


def _solve(fit: _Sums, judge: _Sums, left: Tensor | None) -> tuple[Tensor | None, float]:
    """(change of the factor, relative squared error on the judging samples); None when nothing helps there."""
    best, delta = judge.before, None
    for damping in DAMPING:
        factor = linalg.cholesky(fit.gram, damping, "healing gram")
        change = torch.cholesky_solve(fit.cross.T, factor).T
        if left is not None:
            change = torch.linalg.lstsq(left, change).solution
        error = judge.after(change if left is None else left @ change)
        if error < best:
            best, delta = error, change
    return delta, best / max(judge.before, 1e-30)


class _Stream:
    """The student's hidden states in front of one block, sample batch by sample batch."""

    def __init__(self, model: nn.Module, stack: Stack, batches: list[Batch]):
        self.model, self.stack = model, stack
        captured = [capture(model, stack, model_inputs(batch), stop=False) for batch in batches]
        self.hidden: list[Tensor] = [hidden for hidden, _ in captured]
        self.calls: list[list[Call]] = [calls for _, calls in captured]

    def run(self, index: int, number: int) -> Tensor:
        calls = self.calls[number]
        call = calls[index] if len(calls) > 1 else calls[0]
        block = self.model.get_submodule(self.stack.blocks[index].path)
        with torch.no_grad():
            return first_tensor(block(self.hidden[number], *call.args, **call.kwargs))

    def advance(self, index: int) -> None:
        self.hidden = [self.run(index, number) for number in range(len(self.hidden))]


def heal_(
    student: nn.Module, split: Split, teacher: Teacher, samples: int, batch_size: int,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> tuple[list[dict[str, Any]], list[str]]:  # fmt: skip
    """Refit, in place, the writing linear of every block.

    Args:
        student: in eval mode.
        split: its samples; the first `samples` to learn from are read.
        teacher: stored answers with the hidden states of those samples.
        samples: how many.
        batch_size: samples per run of a block.
        progress: called with (description, done, total).

    Returns:
        (one record per block: {"path", "error_left": what is left of its squared error on the judging samples}, notes
        on what was left alone).
    """
    spec = spec_of(student)
    device = next(student.parameters()).device
    rows = Samples(split.train.rows[:samples], split.train.first, split.train.pad_token_id)
    batches = [{k: v.to(device) for k, v in batch.items()} for batch in rows.batches(batch_size)]
    records: list[dict[str, Any]] = []
    notes: list[str] = []
    place = 0
    for stack in spec.stacks:
        reason = chainable(student, stack, model_inputs(batches[0]))
        stream = None if reason else _Stream(student, stack, batches)
        if reason:
            notes.append(f"not healed in closed form: {reason}")
        decoder = len(spec.stacks) > 1 and stack is spec.stacks[-1]
        for index, block in enumerate(stack.blocks):
            if stream is not None:
                layer = None if block.ffn is None else student.get_submodule(block.ffn.down)
                masks = [teacher.task.real(b, h.shape[1], decoder) for b, h in zip(batches, stream.hidden, strict=True)]
                found = _heal_block(stream, index, layer, masks, batches, teacher, teacher.places[place])
                if isinstance(found, str):
                    notes.append(f"{block.path}: not healed in closed form, {found}")
                else:
                    records.append({"path": block.ffn.down, **found})  # type: ignore[union-attr]
                stream.advance(index)
            place += 1
            progress("healing in closed form", place, len(spec.blocks))
    return records, notes


def _heal_block(
    stream: _Stream, index: int, layer: Any, masks: list[Tensor], batches: list[Batch], teacher: Teacher, place: int
) -> dict[str, float] | str:
    """Refit one block's writing linear; its record, or why it was left alone."""
    factor = None if layer is None else _factor(layer)
    if factor is None:
        return "it has no feed-forward part that writes through a dense or low-rank linear"
    norm = _writes_through(stream, index, layer)
    if isinstance(norm, str):
        return norm
    fit, judge = _Sums(), _Sums()
    for number, (batch, mask) in enumerate(zip(batches, masks, strict=True)):
        seen: dict[str, Tensor] = {}
        with _watching(layer, seen, "x"), _watching(norm, seen, "z"):
            out = stream.run(index, number)[mask].float()
        target = torch.cat([teacher.outputs(int(i), place) for i in batch["sample"]]).to(out)
        e, w = _residual(out, target, None if norm is None else seen["z"][mask].float(), norm)
        x = factor.features(seen["x"].reshape(*mask.shape, -1)[mask]).float()
        e = e if factor.columns is None else e[:, factor.columns]
        judging = (batch["sample"] % EVERY == 0)[:, None].expand(mask.shape)[mask]
        for sums, chosen in ((fit, ~judging), (judge, judging)):
            sums.add(x[chosen], e[chosen], w[chosen])
    delta, ratio = _solve(fit, judge, factor.left)
    if delta is not None:
        factor.add_(delta)
    return {"error_left": ratio}


def _residual(out: Tensor, target: Tensor, z: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """(n, d) change wanted of what the writing linear adds, (n, 1) weight of each row.

    Behind a LayerNorm the target is mapped back through it with the present mean and spread of the row.
    """
    if z is None:
        return target - out, target.pow(2).mean(1, keepdim=True).sqrt().clamp(min=1e-6).reciprocal()
    mean, spread = z.mean(1, keepdim=True), (z.var(1, keepdim=True, correction=0) + norm.eps).sqrt()
    gain = torch.where(norm.weight.abs() < 1e-6, torch.inf, norm.weight.float())
    wanted = (target - norm.bias.float()) / gain
    return mean + spread * wanted - z, spread.reciprocal()


def _writes_through(stream: _Stream, index: int, layer: nn.Module) -> nn.LayerNorm | str | None:
    """None where the block returns a sum with the linear's output in it, the LayerNorm where it returns the sum's.

    Found by adding something to the linear's output and seeing what changes by exactly that.
    """
    block = stream.model.get_submodule(stream.stack.blocks[index].path)
    returned: list[nn.LayerNorm] = []
    seen: dict[str, Tensor] = {}
    norms = [m for m in block.modules() if isinstance(m, nn.LayerNorm) and m.weight is not None and m.bias is not None]
    for candidate in norms:
        with _watching(candidate, seen, "z", "n"):
            if torch.equal(stream.run(index, 0), seen["n"]):
                returned.append(candidate)
    norm = returned[-1] if returned else None
    with _watching(norm, seen, "z"):
        out = stream.run(index, 0)
    before = out if norm is None else seen["z"]
    push = before.float().std() * torch.linspace(-1, 1, before.shape[-1], device=out.device).to(before)
    handle = layer.register_forward_hook(lambda _, __, y: y + push)
    try:
        with _watching(norm, seen, "z"):
            out = stream.run(index, 0)
    finally:
        handle.remove()
    moved = (out if norm is None else seen["z"]) - before
    if float((moved - push).float().norm()) > 0.02 * float(push.float().norm()) * (moved[..., 0].numel() ** 0.5):
        return "its result is not a sum with that linear's output in it"
    return norm


@contextmanager
def _watching(
    module: nn.Module | None, seen: dict[str, Tensor], inputs: str, output: str | None = None
) -> Iterator[None]:
    """Within it `seen` gets the module's first input and, where named, its output."""

    def hook(_: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        seen[inputs] = args[0].detach()
        if output is not None:
            seen[output] = result.detach()

    handle = None if module is None else module.register_forward_hook(hook)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
