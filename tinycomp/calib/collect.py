"""Passes over the whole model, forward and where gradients are asked for backward, that fill the statistics."""

from __future__ import annotations

import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinycomp.calib.loss import fisher_loss, no_cache
from tinycomp.calib.stats import LinearStats, Rows, add_gram, features_out, linear_paths, mirrored
from tinycomp.models import BlockSpec, ModelSpec

Progress = Callable[[str, int, int], None]
STATS_BYTES = 2**31  # statistics held in memory at once; more blocks than fit mean more passes
GRADIENT_TOKENS = 8192  # a pass with gradients costs three without
GRADIENT_ROWS = 2  # sequences per backward pass: logits of a large vocabulary dominate its memory


class StatsStore:
    """Statistics of each block in a temporary file, so that memory holds one block's at a time.

    last_hidden: block path -> (documents, d) outputs at each text's last real token, when asked for.
    options: what methods found they could do with these statistics, remembered for other ratios.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tinycomp-stats-")
        self._alias: dict[str, str] = {}
        self._tokens: dict[str, int] = {}
        self._file: dict[str, Path] = {}
        self._remembered: dict[tuple[str, str], Path] = {}
        self._cached = threading.local()  # units of one block are asked for one after another, by one thread
        self.last_hidden: dict[str, Tensor] = {}
        self.options: dict[tuple[str, str, str], Any] = {}

    def put(self, block: str, stats: dict[str, LinearStats], alias: dict[str, str]) -> None:
        tensors: dict[str, Tensor] = {}
        target = Path(self._folder.name) / f"{len(set(self._file.values()))}.safetensors"
        for path, entry in stats.items():
            self._tokens[path] = entry.tokens
            self._file[path] = target
            for name in ("gram", "output_gram"):
                value = getattr(entry, name)
                if value is not None:
                    tensors[f"{path}|{name}"] = value.contiguous()
        self._alias |= alias
        save_file(tensors, target)

    def get(self, paths: Sequence[str]) -> dict[str, LinearStats]:
        """Statistics of these linears; those that share an input share its Gram matrix."""
        files = {self._file[p] for p in paths if p in self._file}
        files |= {self._file[self._alias[p]] for p in paths if self._alias.get(p) in self._file}
        if files != getattr(self._cached, "files", None):
            self._cached.tensors = {k: v for file in files for k, v in load_file(file).items()}
            self._cached.files = files
        loaded = self._cached.tensors
        return {
            p: LinearStats(
                gram=loaded.get(f"{self._alias.get(p, p)}|gram"),
                output_gram=loaded.get(f"{p}|output_gram"),
                tokens=self._tokens.get(p, 0),
            )
            for p in paths
        }

    def shares_input(self, path: str) -> str:
        """The linear whose input this one reads too (itself when it is the first to read it)."""
        return self._alias.get(path, path)

    def seen(self, path: str) -> bool:
        """Whether the model called this linear at all."""
        return self._tokens.get(path, 0) > 0

    def remember(self, path: str, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """`make()`, or what it returned the first time this linear and key came; kept in the temporary folder."""
        known = self._remembered.get((path, key))
        if known is not None:
            return load_file(known)
        made = make()
        target = Path(self._folder.name) / f"remembered-{uuid.uuid4().hex}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in made.items()}, target)
        self._remembered[path, key] = target
        return made

    def close(self) -> None:
        self._folder.cleanup()


def collect(
    model: nn.Module,
    spec: ModelSpec,
    batches: Iterable[dict[str, Tensor]],
    needs: frozenset[str],
    *,
    paths: Sequence[str] | None = None,
    seed: int = 0,
    gradient_tokens: int = GRADIENT_TOKENS,
    progress: Progress = lambda *_: None,
) -> StatsStore:
    """Second moments of the linears at `paths` (default: all of the spec's), over every token of `batches`.

    Args:
        model: in eval mode; restored exactly afterwards.
        spec: of the model.
        batches: dicts of tensors, passed as `model(**batch)`; consumed once into a list.
        paths: linears to observe.
        needs: any of "gram" and "output_gram".
        seed: of the labels that are sampled for the gradients.
        gradient_tokens: the output gradients are averaged over about this many tokens, from the first batch on.
        progress: called with (description, done, total).

    Raises:
        ValueError: no batch, or a statistic that is not finite.
    """
    batch_list = list(batches)
    if not batch_list:
        raise ValueError("calibration: got no batches, allowed at least one; pass text, a path or tensors as `data`")
    wanted = set(spec.linears if paths is None else paths)
    blocks = [b for b in spec.blocks if wanted & set(b.linears)]
    store = StatsStore()
    chunks = _chunks(model, blocks, wanted, needs)
    for index, chunk in enumerate(chunks):
        names = [p for b in chunk for p in b.linears if p in wanted]
        outputs = _LastTokens(model, [b.path for b in spec.blocks]) if "last_hidden" in needs and index == 0 else None
        collector = _Collector(model, names, needs)
        label = "calibrating" if len(chunks) == 1 else f"calibrating, part {index + 1} of {len(chunks)}"
        try:
            for done, batch in enumerate(batch_list):
                gradients = "output_gram" in needs and collector.gradient_tokens_seen < gradient_tokens
                if outputs is not None:
                    outputs.mask = batch.get("attention_mask")
                collector.run(batch, gradients, seed + done)
                progress(label, done + 1, len(batch_list))
        finally:
            collector.close()
            if outputs is not None:
                store.last_hidden = outputs.close()
        found = collector.finish()
        for block in chunk:
            stats = {p: found[p] for p in block.linears if p in found}
            store.put(block.path, stats, {p: a for p, a in collector.alias.items() if p in stats})
    return store


def _chunks(
    model: nn.Module, blocks: list[BlockSpec], wanted: set[str], needs: frozenset[str]
) -> list[list[BlockSpec]]:
    """Consecutive blocks whose statistics fit in STATS_BYTES together."""
    chunks: list[list[BlockSpec]] = []
    used = STATS_BYTES
    for block in blocks:
        size = 0
        for module in linear_paths(model, [p for p in block.linears if p in wanted]).values():
            weight: Tensor = module.weight  # type: ignore[assignment]
            n_out = features_out(module)
            size += 4 * (weight.numel() // n_out) ** 2 + (4 * n_out**2 if "output_gram" in needs else 0)
        if used + size > STATS_BYTES and (not chunks or chunks[-1]):
            chunks.append([])
            used = 0
        chunks[-1].append(block)
        used += size
    return chunks


class _Collector:
    """Hooks on the linears, and the running sums they fill."""

    def __init__(self, model: nn.Module, paths: list[str], needs: frozenset[str]):
        self.model, self.needs = model, needs
        self.alias: dict[str, str] = {}
        self.rows = Rows()
        self.sums = {path: LinearStats() for path in paths}
        self.gradient_tokens = dict.fromkeys(paths, 0)
        self._last: tuple[Tensor, str] | None = None
        self._gradients = False
        self._hooks = [
            module.register_forward_hook(self._hook(path)) for path, module in linear_paths(model, paths).items()
        ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def gradient_tokens_seen(self) -> int:
        return max(self.gradient_tokens.values(), default=0)

    def finish(self) -> dict[str, LinearStats]:
        """The means; the sums are used up."""
        out = {}
        for path, entry in self.sums.items():
            if entry.tokens == 0:
                continue  # never called: an unused branch of the model
            gram, grad, tokens = entry.gram, entry.output_gram, max(self.gradient_tokens[path], 1)
            for name, value in (("input", gram), ("output gradient", grad)):
                # The diagonal holds sums of squares: a number that is not finite shows there, wherever it was.
                if value is not None and not torch.isfinite(value.diagonal()).all():
                    raise ValueError(
                        f"calibration: the {name} of {path} is NaN or infinite, allowed finite values only; "
                        "check the weights and the data, or load the model in float32"
                    )
            out[path] = LinearStats(
                None if gram is None else mirrored(gram).div_(entry.tokens),
                None if grad is None else mirrored(grad).div_(tokens),
                None,
                entry.tokens,
            )
        return out

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            entry = self.sums[path]
            rows = self.rows(inputs[0].detach())
            entry.tokens += rows.shape[0]
            # Linears called one after another on the same tensor (q, k, v; gate, up) share one Gram matrix.
            if self._last is not None and self._last[0] is inputs[0] and self.alias.get(path) in (None, self._last[1]):
                self.alias[path] = self._last[1]
            elif path not in self.alias:
                self._last = (inputs[0], path)
                if "gram" in self.needs:
                    entry.gram = add_gram(entry.gram, rows)
            if self._gradients and output.requires_grad:
                output.register_hook(self._gradient_hook(path))

        return hook

    def _gradient_hook(self, path: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            rows = self.rows(gradient.detach())
            self.gradient_tokens[path] += rows.shape[0]
            self.sums[path].output_gram = add_gram(self.sums[path].output_gram, rows)

        return hook

    def run(self, batch: dict[str, Tensor], gradients: bool, seed: int) -> None:
        if gradients:
            size = next(iter(batch.values())).shape[0]
            for start in range(0, size, GRADIENT_ROWS):
                self._run_gradients(
                    {k: v[start : start + GRADIENT_ROWS] for k, v in batch.items()}, seed * 65537 + start
                )
        else:
            self._gradients = False
            self.rows.set_batch(batch)
            with torch.no_grad(), no_cache(self.model):
                self.model(**batch)
        self._last = None

    def _run_gradients(self, batch: dict[str, Tensor], seed: int) -> None:
        self._gradients = True
        self.rows.set_batch(batch)
        frozen = [p for p in self.model.parameters() if p.requires_grad]
        for p in frozen:
            p.requires_grad_(False)
        handle = _embedding_entry(self.model)
        try:
            with torch.enable_grad(), no_cache(self.model):
                fisher_loss(self.model(**batch), self.rows.mask, seed).backward()
        finally:
            handle.remove()
            for p in frozen:
                p.requires_grad_(True)
            self._last = None


class _LastTokens:
    """Records each block's output at the last token that is not padding."""

    def __init__(self, model: nn.Module, paths: list[str]):
        self.mask: Tensor | None = None
        self.found: dict[str, list[Tensor]] = {path: [] for path in paths}
        self._hooks = [model.get_submodule(p).register_forward_hook(self._hook(p)) for p in paths]

    def _hook(self, path: str) -> Callable[[nn.Module, object, Tensor | tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            hidden = (output if isinstance(output, Tensor) else output[0]).detach()
            mask = self.mask if self.mask is not None and self.mask.shape == hidden.shape[:2] else None
            if mask is None:
                rows = hidden[:, -1]
            else:
                rows = hidden[torch.arange(len(hidden)), (torch.arange(hidden.shape[1]) * (mask != 0)).argmax(1)]
            self.found[path].append(rows.float())

        return hook

    def close(self) -> dict[str, Tensor]:
        for hook in self._hooks:
            hook.remove()
        return {path: torch.cat(parts) for path, parts in self.found.items() if parts}


def _embedding_entry(model: nn.Module) -> torch.utils.hooks.RemovableHandle:
    """Make the gradient graph begin at the embeddings' output although every parameter is frozen."""

    def start(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return (
            output.detach().requires_grad_(True).clone()  # some models scale it in place, which a leaf forbids
            if isinstance(output, Tensor) and output.is_floating_point()
            else output
        )

    handles = [
        module.register_forward_hook(start)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.Conv2d)
    ]

    class Handles:
        def remove(self) -> None:
            for handle in handles:
                handle.remove()

    return Handles()  # type: ignore[return-value]
