"""Every signal of every block: forward, attention, backward and weights in one calibration pass; probing on demand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tinycomp.calib.loss import no_cache
from tinycomp.models import ModelSpec, Stack
from tinycomp.signals import estimators
from tinycomp.signals.quality import Batch, losses, quality, rows_of

POINTS = 384  # tokens (or pooled samples) that the information and CKA estimators look at
Weights = dict[str, dict[str, float]]


@dataclass
class SignalTable:
    """values[column][i]: the signal of the model's i-th block; seconds of processor time by what they were spent on."""

    values: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def standardised(self, columns: Sequence[str]) -> np.ndarray:
        """(blocks, columns): z-scores over the blocks; a column that is constant or missing is 0."""
        depth = len(next(iter(self.values.values())))
        out = np.zeros((depth, len(columns)))
        for j, column in enumerate(columns):
            if column in self.values:
                x = np.asarray(self.values[column], dtype=np.float64)
                spread = x.std()
                out[:, j] = (x - x.mean()) / spread if spread > 1e-12 * max(np.abs(x).max(), 1e-300) else 0.0
        return out


def the_stack(spec: ModelSpec) -> Stack:
    """The model's only list of blocks.

    Raises:
        ValueError: there are several, or its blocks cannot be dropped.
    """
    if len(spec.stacks) != 1 or spec.stacks[0].depth_field is None or len(spec.stacks[0].blocks) < 2:
        raise ValueError(
            f"layer pruning: got a model with {len(spec.stacks)} lists of blocks ({spec.note or 'see its table row'}), "
            "allowed is one list of two or more blocks that can be dropped"
        )
    return spec.stacks[0]


def collect_signals(
    model: nn.Module, spec: ModelSpec, batches: Sequence[Batch], *, gradient_samples: int = 32, seed: int = 0,
    weights: Weights | None = None, probe: bool = False,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> SignalTable:  # fmt: skip
    """Every signal but "entry_time", of every block; all but "skip_loss" in one pass.

    The first `gradient_samples` samples run one by one, forward and backward (the Fisher signal is a mean over
    samples); the others run in their batches, forward only.

    Args:
        model: with one list of blocks; left as it is.
        spec: of the model.
        batches: dicts of tensors; with labels for a classifier. None at all: the signals of the weights alone.
        gradient_samples: samples that run backward; 0: no gradient signals.
        seed: of the points that the estimators look at.
        weights: results of the weight signals by block identity, kept for calls on the same blocks.
        probe: "skip_loss" as well: one more forward pass over all batches per block.
        progress: called with (description, done, total).
    """
    stack = the_stack(spec)
    table = SignalTable()
    watch = _Watch(model, stack, seed)
    clock = _Clock(table.seconds)
    singles = [row for batch in batches for row in rows_of(batch)][:gradient_samples]
    rest, skip = [], len(singles)
    for batch in batches:
        size = len(next(iter(batch.values())))
        if skip < size:
            rest.append({k: v[skip:] for k, v in batch.items()})
        skip = max(skip - size, 0)
    with _attention_maps(model) as maps, watch, no_cache(model), _only_blocks_train(model, stack) as parameters:
        gradients = _Gradients(parameters)
        for number, batch in enumerate([*singles, *rest]):
            back = number < len(singles)
            with clock("forward"), torch.set_grad_enabled(back):
                loss, output = losses(model, batch, maps)
                watch.see(output, batch, loss)
            if back:
                with clock("backward"):
                    gradients.add(loss.mean())
            progress("collecting signals", number + 1, len(singles) + len(rest))
    table.values |= gradients.values() | watch.values(clock)
    with clock("weights"):
        table.values |= _weight_signals(model, stack, seed, {} if weights is None else weights)
    if probe:
        table.values["skip_loss"] = []
        for number, block in enumerate(stack.blocks):
            with clock("skip_loss"):
                table.values["skip_loss"].append(_loss_without(model, block.path, batches))
            progress("leaving out one block", number + 1, len(stack.blocks))
    if batches and "attention_weight" not in table.values:
        table.notes.append(f"{type(model).__name__} returns no attention maps: no attention signals")
    return table


def _loss_without(model: nn.Module, path: str, batches: Sequence[Batch]) -> float:
    """Loss while the block at `path` gives back its input."""

    def give_back(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    handle = model.get_submodule(path).register_forward_hook(give_back, with_kwargs=True)
    try:
        return quality(model, batches).loss
    finally:
        handle.remove()


class _Clock:
    def __init__(self, seconds: dict[str, float]):
        self.seconds = seconds

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start


class _Gradients:
    """Running sums over samples of the gradients of each block's parameters."""

    def __init__(self, parameters: list[list[nn.Parameter]]):
        self.parameters = parameters
        self.magnitude, self.fisher, self.taylor = ([0.0] * len(parameters) for _ in range(3))
        self.samples = 0

    def add(self, loss: Tensor) -> None:
        flat = [p for group in self.parameters for p in group]
        found = iter(torch.autograd.grad(loss, flat, allow_unused=True))
        for i, group in enumerate(self.parameters):
            pairs = [(p, g.float()) for p in group if (g := next(found)) is not None]
            square = sum(float(g.pow(2).sum()) for _, g in pairs)
            self.magnitude[i] += square**0.5
            self.fisher[i] += square
            self.taylor[i] += sum(float((p.detach().float() * g).sum()) for p, g in pairs)
        self.samples += 1

    def values(self) -> dict[str, list[float]]:
        n = self.samples
        if not n:
            return {}
        return {
            "gradient_magnitude": [v / n for v in self.magnitude],
            "gradient_fisher": [v / n for v in self.fisher],
            "gradient_taylor": [abs(v) / n for v in self.taylor],
        }


class _Watch:
    """Hooks on the blocks: sums over real tokens, and points for the estimators."""

    def __init__(self, model: nn.Module, stack: Stack, seed: int):
        self.model, self.paths = model, [b.path for b in stack.blocks]
        self.hidden: list[Tensor] = []
        self.sums: dict[str, list[float]] = {}
        self.tokens = self.queries = 0.0
        self.points: list[list[Tensor]] = [[] for _ in range(len(self.paths) + 1)]
        self.answers: list[Tensor] = []
        self.classes = False
        self.generator = torch.Generator().manual_seed(seed)

    def __enter__(self) -> _Watch:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.hidden = [(args[0] if args else kwargs["hidden_states"]).detach()]

        def after(_: nn.Module, __: Any, output: Any) -> None:
            self.hidden.append((output if isinstance(output, Tensor) else output[0]).detach())

        blocks = [self.model.get_submodule(p) for p in self.paths]
        self.handles: list[Any] = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
        self.handles += [block.register_forward_hook(after) for block in blocks]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _add(self, name: str, index: int, value: Tensor) -> None:
        self.sums.setdefault(name, [0.0] * len(self.paths))[index] += float(value)

    def see(self, output: Any, batch: Batch, loss: Tensor) -> None:
        """One forward pass: `loss` is (B,) of sequences, or (B, T - 1) of tokens."""
        length = self.hidden[0].shape[1]
        mask = batch.get("attention_mask")
        if mask is None or mask.shape[1] != length:
            mask = self.hidden[0].new_ones(self.hidden[0].shape[:2])
        real = mask.bool()
        before = self.hidden[0][real].float()
        self.tokens += len(before)
        for i, h in enumerate(self.hidden[1:]):
            now = h[real].float()
            for suffix, a in (("", now), ("@update", now - before)):
                self._add(f"inhibition{suffix}", i, a.sum() / a.shape[1])
                self._add(f"intensity{suffix}", i, a.norm(dim=1).sum())
                self._add(f"energy{suffix}", i, a.pow(2).sum())
            cosine = functional.cosine_similarity(before.double(), now.double(), dim=1).clamp(-1, 1)
            self._add("block_influence", i, (1 - cosine).sum())
            self._add("angular_distance", i, cosine.acos().sum() / torch.pi)
            before = now
        for i, p in enumerate(getattr(output, "attentions", None) or ()):
            rows = p.detach().float().transpose(1, 2)[real]  # (tokens, heads, keys)
            self._add("attention_weight", i, rows.amax(-1).sum() / rows.shape[1])
            self._add("attention_entropy", i, torch.special.entr(rows).sum() / rows.shape[1])
        self._sample(real, batch, loss.detach())

    def _sample(self, real: Tensor, batch: Batch, loss: Tensor) -> None:
        """Points for the estimators: pooled sequences, or at most a few tokens of each sequence."""
        if loss.ndim == 1:
            weight = real[..., None].float()
            for place, h in zip(self.points, self.hidden, strict=True):
                place.append((h.float() * weight).sum(1) / weight.sum(1).clamp(min=1))
            self.classes = "labels" in batch
            self.answers.append(batch["labels"] if self.classes else loss)
            return
        usable = (real[:, 1:] & real[:, :-1]).nonzero()
        chosen = usable[torch.randperm(len(usable), generator=self.generator)[: 16 * len(real)].to(usable.device)]
        for place, h in zip(self.points, self.hidden, strict=True):
            place.append(h[chosen[:, 0], chosen[:, 1]].float())
        self.answers.append(loss[chosen[:, 0], chosen[:, 1]])

    def values(self, clock: _Clock) -> dict[str, list[float]]:
        if not self.answers:
            return {}
        out = {name: [v / self.tokens for v in sums] for name, sums in self.sums.items()}
        points = [torch.cat(parts)[:POINTS] for parts in self.points]
        answers = torch.cat(self.answers)[:POINTS].cpu().double().numpy()
        with clock("information"):
            parts = [estimators.principal(p) for p in points]
            added = [estimators.principal(b - a) for a, b in pairwise(points)]

            def relevance(x: np.ndarray) -> float:
                if self.classes:
                    return estimators.class_information(x, answers)
                return estimators.information(x, (answers - answers.mean())[:, None])

            out["task_relevance"] = [relevance(x) for x in parts[1:]]
            out["task_relevance@update"] = [relevance(x) for x in added]
            out["flow"] = [estimators.information(a, b) for a, b in pairwise(parts)]
        with clock("cka"):
            out["cka"] = [estimators.linear_cka(a, b) for a, b in pairwise(points)]
        return out


def _weight_signals(model: nn.Module, stack: Stack, seed: int, known: Weights) -> dict[str, list[float]]:
    out: dict[str, list[float]] = {"weight_norm": [], "weight_entropy": [], "stable_rank": []}
    for block in stack.blocks:
        module = model.get_submodule(block.path)
        key = str(next(module.parameters()).data_ptr())  # a block keeps its tensors when others are dropped
        if key not in known:
            theta = torch.cat([p.detach().float().flatten() for p in module.parameters()])
            matrices = [p for p in module.parameters() if p.ndim == 2]
            known[key] = {
                "weight_norm": float(theta.pow(2).mean().sqrt()),
                "weight_entropy": estimators.histogram_entropy(theta),
                "stable_rank": float(np.mean([estimators.stable_rank(w, seed) for w in matrices])),
            }
        for name, values in out.items():
            values.append(known[key][name])
    return out


@contextmanager
def _attention_maps(model: Any) -> Iterator[bool]:
    """Within it the model can return its attention maps, where its class knows how to; gives whether it does."""
    before = getattr(model.config, "_attn_implementation", None)
    if not hasattr(model, "set_attn_implementation") or before is None:
        yield False
        return
    model.set_attn_implementation("eager")  # other implementations never hold the whole map
    try:
        yield True
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _only_blocks_train(model: nn.Module, stack: Stack) -> Iterator[list[list[nn.Parameter]]]:
    """Gradients on for the blocks' parameters alone; gives them block by block."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    groups = [[p for p in model.get_submodule(b.path).parameters() if p.is_floating_point()] for b in stack.blocks]
    for p, _ in flags:
        p.requires_grad_(False)
    for group in groups:
        for p in group:
            p.requires_grad_(True)
    try:
        yield groups
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
