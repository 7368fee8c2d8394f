"""Seconds of a search before it runs: steps on a few blocks of the same sizes, with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from tinycomp.calib.loss import no_cache
from tinycomp.eval.timing import time_interleaved
from tinycomp.models import ModelSpec, spec_of, unit_groups
from tinycomp.train.masks import Masks, search_loss
from tinycomp.train.path_search import PathSearch

BLOCKS = (1, 5)  # a line through the times of two depths; a wider gap says more of a block beside a large vocabulary
REPEATS = 2
MOST_PARAMETERS = 500_000_000  # of the deeper trial; beyond, a trial takes longer than anyone waits for a plan


def step_seconds(model: Any, config: PathSearch, kinds: set[str]) -> float | None:
    """Seconds of one step of a search on this machine, from trials; the matrix products are about half of them.

    Args:
        model: a transformers model of one stack of blocks that reads token ids; on meta too.
        config: of the search.
        kinds: of the units that have masks.

    Returns:
        None where no trial is made: the model is too large, on a GPU, has two stacks or reads something else.
    """
    spec = spec_of(model)
    stack = spec.stacks[0]
    field = "num_hidden_layers" if stack.shared else stack.depth_field
    depth = getattr(model.config, field or "", 0)
    here = next(model.parameters()).device.type in ("cpu", "meta")
    if not here or len(spec.stacks) > 1 or not depth or getattr(model, "main_input_name", "") != "input_ids":
        return None
    few, more = (min(n, depth) for n in BLOCKS)
    left_out = sum(_parameters(model.get_submodule(block.path)) for block in stack.blocks[more:])
    if _parameters(model) - left_out > MOST_PARAMETERS:
        return None
    samples = config.samples if config.compensate else 1  # refits take the same time whatever the batch
    with torch.enable_grad(), ExitStack() as open_:
        steps = {n: _step(_shallow(model, spec, str(field), n), config, samples, kinds, open_) for n in {few, more}}
        times = time_interleaved({str(n): steps[n] for n in sorted(steps)}, REPEATS)
    best = {name: min(timing.seconds) for name, timing in times.items()}
    per_block = (best[str(more)] - best[str(few)]) / max(more - few, 1)
    return (best[str(few)] + max(per_block, 0.0) * (depth - few)) * config.samples / samples


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _shallow(model: Any, spec: ModelSpec, field: str, depth: int) -> nn.Module:
    """A model of that many blocks, with random weights."""
    config = copy.deepcopy(model.config)
    setattr(config, field, depth)
    for name in spec.per_layer_fields:
        setattr(config, name, getattr(config, name)[:depth])
    with torch.random.fork_rng(devices=[]):
        return type(model)(config).to(next(model.parameters()).dtype).eval()


def _step(model: nn.Module, config: PathSearch, samples: int, kinds: set[str], open_: ExitStack) -> Callable[[], None]:
    """The loss and its gradients with respect to the masks, which stay attached while `open_` is."""
    groups = [g for g in unit_groups(model) if g.kind in kinds]
    readers = [g.members[-1] for g in groups if g.members[-1].dim == 1]
    grams = {m.path: torch.eye(m.shape[1]) for m in readers} if config.compensate else None
    open_.enter_context(no_cache(model))
    masks = open_.enter_context(Masks(model, groups, config.per_head, grams))
    length = min(config.length, getattr(model.config, "max_position_embeddings", None) or config.length)  # type: ignore[union-attr]
    batch = {"input_ids": torch.ones(samples, length, dtype=torch.int64)}
    loss = search_loss(model, masks, batch, "distill" if config.loss == "distill" else "auto")
    return lambda: loss(batch).backward()
