"""Several ops of this package in one call, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sequence(tensors: Sequence[Tensor | None], program: str) -> list[Tensor]:
    """Run ops one after another, and give some of their results: the same bits as one call each.

    It is a means of `tc.fuse_` and no op with a contract: there is no reference, no gradient, and no other device.

    Args:
        tensors: on the CPU; what the ops read.
        program: a line for each op, its name and arguments: `%n` for number n of `tensors` and, after them, of the
            results in their order, `-` for None, numbers and words as they are. Beside the ops there are `add a b`;
            `heads a d`, which sees (batch, 1, heads d) as (batch, heads, 1, d); `flat a`, which sees (batch, 1, heads,
            d) as (batch, 1, heads d); and `place a b`, without a result, which writes (batch, heads, 1, d) to the last
            place of (batch, heads, n, d). The last line is `return` and what is asked for. A program is read once and
            kept by its text.

    Raises:
        RuntimeError: the native library is not there, a line cannot be read, or an op refuses its arguments.
    """
    try:
        run = torch.ops.tinycomp.sequence.default
    except AttributeError:
        reason = "ops.sequence: the native library is not loaded; build it, or call the ops one by one"
        raise RuntimeError(reason) from None
    return run(tensors, program)
