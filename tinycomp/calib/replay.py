"""Running one stack of blocks a block at a time, on two streams: the original model's and the compressed prefix's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinycomp.calib.loss import no_cache
from tinycomp.calib.stats import LinearStats, Rows, linear_paths
from tinycomp.models import Stack


class _Stop(Exception):
    """Ends a forward pass once the first block's input is known."""


@dataclass
class Call:
    """How the model calls one block: everything but the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def chainable(model: nn.Module, stack: Stack, batch: dict[str, Tensor]) -> str | None:
    """None when each block's first argument is the previous block's output, else the reason a replay is impossible."""
    if stack.shared:
        return f"{stack.path}: one block is called repeatedly"
    paths = [b.path for b in stack.blocks]
    seen: list[str] = []
    problem: list[str] = []
    last: list[Tensor | None] = [None]

    def before(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not args or not isinstance(args[0], Tensor):
                problem.append(f"{path}: its first argument is no tensor")
            elif last[0] is not None and args[0] is not last[0] and not torch.equal(args[0], last[0]):
                problem.append(f"{path}: its input is not the previous block's output")
            seen.append(path)

        return hook

    def after(_: nn.Module, __: Any, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) and output else None
        last[0] = first if isinstance(first, Tensor) else None
        if last[0] is None:
            problem.append("a block returns no tensor")

    handles: list[Any] = []
    for path in paths:
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        with torch.no_grad(), no_cache(model):
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    if not problem and seen != paths:
        problem.append(f"{stack.path}: blocks ran as {seen[:4]}..., not once each in order")
    return problem[0] if problem else None


class Replay:
    """Both streams of one stack. `advance` moves them over one block after its linears have been compressed.

    Args:
        original: the untouched model.
        working: the model under compression, equal so far except for earlier stacks.
        stack: the blocks.
        batches: dicts of tensors, as for `model(**batch)`.
        decoder: the stack is the decoder of an encoder-decoder, so padding follows `decoder_attention_mask`.
    """

    def __init__(
        self, original: nn.Module, working: nn.Module, stack: Stack, batches: Sequence[dict[str, Tensor]], decoder: bool
    ):
        self.original, self.working, self.stack = original, working, stack
        self.batches, self.decoder = batches, decoder
        self.rows = Rows()
        self.hidden = {"original": [], "working": []}  # type: dict[str, list[Tensor]]
        self.calls = {"original": [], "working": []}  # type: dict[str, list[list[Call]]]
        self.index = 0
        self._original: list[tuple[dict[str, Tensor], Tensor]] = []  # of the current block, once it has run
        for name, model in (("original", original), ("working", working)):
            alike = False
            for batch in batches:
                hidden, calls = capture(model, stack, batch, stop=alike)
                alike = alike or len(calls) == 1
                self.hidden[name].append(hidden)
                self.calls[name].append(calls)

    def _block(self, name: str) -> nn.Module:
        model = self.original if name == "original" else self.working
        return model.get_submodule(self.stack.blocks[self.index].path)

    def _run(self, name: str, number: int) -> Tensor:
        calls = self.calls[name][number]
        call = calls[self.index] if len(calls) > 1 else calls[0]
        with torch.no_grad():
            return first_tensor(self._block(name)(self.hidden[name][number], *call.args, **call.kwargs))

    def statistics(self, paths: Sequence[str]) -> dict[str, LinearStats]:
        """gram (of the working stream) and cross (original x working) of these linears of the current block."""
        if not self._original:
            self._run_original()
        sums: dict[str, LinearStats] = {path: LinearStats() for path in paths}
        alias: dict[str, str] = {}
        inputs: dict[str, Tensor] = {}
        handles = _record(self.working, paths, inputs)
        try:
            for number, batch in enumerate(self.batches):
                inputs.clear()
                self.rows.set_batch(batch, self.decoder)
                self._run("working", number)
                self._accumulate(sums, alias, self._original[number][0], inputs)
        finally:
            for handle in handles:
                handle.remove()
        for path, target in alias.items():
            sums[path] = sums[target]
        return {
            path: LinearStats(s.gram / s.tokens, None, s.cross / s.tokens, s.tokens)  # type: ignore[operator, arg-type]
            for path, s in sums.items()
            if s.tokens
        }

    def _run_original(self) -> None:
        """Inputs of every linear of the current block, and the block's output, on the original stream."""
        inputs: dict[str, Tensor] = {}
        handles = _record(self.original, self.stack.blocks[self.index].linears, inputs)
        try:
            for number in range(len(self.batches)):
                inputs.clear()
                output = self._run("original", number)
                self._original.append((dict(inputs), output))
        finally:
            for handle in handles:
                handle.remove()

    def _accumulate(
        self,
        sums: dict[str, LinearStats],
        alias: dict[str, str],
        original: dict[str, Tensor],
        working: dict[str, Tensor],
    ) -> None:
        done: dict[int, str] = {}
        for path, new in working.items():
            if id(new) in done:
                alias[path] = done[id(new)]
                continue
            done[id(new)] = path
            x, y = self.rows(original[path]).float(), self.rows(new).float()
            entry = sums[path]
            if entry.gram is None or entry.cross is None:
                entry.gram, entry.cross = (torch.zeros(x.shape[-1], x.shape[-1], device=x.device) for _ in range(2))
            entry.gram.addmm_(y.T, y)
            entry.cross.addmm_(x.T, y)
            entry.tokens += y.shape[0]

    def advance(self) -> None:
        """Run the current block on both streams and go on to the next."""
        for number in range(len(self.batches)):
            self.hidden["original"][number] = (
                self._original[number][1] if self._original else self._run("original", number)
            )
            self.hidden["working"][number] = self._run("working", number)
        self._original = []
        self.index += 1


def _record(
    model: nn.Module, paths: Sequence[str], inputs: dict[str, Tensor]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that leave each linear's input in `inputs`."""

    def recorder(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[path] = args[0]

        return hook

    return [m.register_forward_pre_hook(recorder(p)) for p, m in linear_paths(model, list(paths)).items()]


def capture(model: nn.Module, stack: Stack, batch: dict[str, Tensor], stop: bool) -> tuple[Tensor, list[Call]]:
    """The first block's input, and how each block is called (one entry when all are called alike).

    stop: blocks are known to be called alike, so the pass ends at the first one.
    """
    first: list[Tensor] = []
    calls: list[Call] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not first:
            first.append(args[0])
        kwargs = {k: None if k in ("past_key_value", "past_key_values") else v for k, v in kwargs.items()}
        calls.append(Call(args[1:], kwargs))
        if stop:
            raise _Stop

    handles = [model.get_submodule(b.path).register_forward_pre_hook(hook, with_kwargs=True) for b in stack.blocks]
    try:
        with torch.no_grad(), no_cache(model):
            model(**batch)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return first[0], calls[:1] if all(_same(call, calls[0]) for call in calls) else calls


def _same(a: Call, b: Call) -> bool:
    return (
        len(a.args) == len(b.args)
        and a.kwargs.keys() == b.kwargs.keys()
        and all(x is y for x, y in zip(a.args, b.args, strict=True))
        and all(a.kwargs[k] is b.kwargs[k] or _equal_scalars(a.kwargs[k], b.kwargs[k]) for k in a.kwargs)
    )


def _equal_scalars(x: Any, y: Any) -> bool:
    return isinstance(x, int | float | str) and isinstance(y, type(x)) and x == y
