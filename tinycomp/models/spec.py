"""What tinycomp needs to know about a model: where its blocks, attention and feed-forward sublayers are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class FFNSpec:
    """One feed-forward sublayer: `down(act(inputs[0](x)) [* inputs[1](x)])`.

    Args:
        path: the module that holds it; the block itself where the sublayer has no module of its own (BERT, OPT).
        inputs: linears that read the hidden state: gate and up, or the only first linear.
        down: the linear that writes the hidden state back.
        width: number of hidden units now.
        config_field: config attribute holding the width when it is uniform; None when the config has no such field.
        gated: whether two linears read the input.
    """

    path: str
    inputs: tuple[str, ...]
    down: str
    width: int
    config_field: str | None
    gated: bool


@dataclass(frozen=True)
class AttentionSpec:
    """One attention sublayer.

    Args:
        path: the module that owns the head geometry.
        q: path of the linear that makes the queries; q = k = v where one linear makes all three (GPT-2).
        k: path of the linear that makes the keys.
        v: path of the linear that makes the values.
        o: path of the output projection.
        num_heads: query heads now.
        num_kv_heads: key/value heads now.
        head_dim: features per head.
        kind: "self", or "cross" when keys and values come from an encoder.
    """

    path: str
    q: str
    k: str
    v: str
    o: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kind: Literal["self", "cross"]


@dataclass(frozen=True)
class BlockSpec:
    """One repeated block.

    Args:
        path: full path, `model.layers.3`.
        linears: every nn.Linear or Conv1D inside that is not compressed yet, full paths, in call order.
        attention: its attention sublayers; empty without a table row.
        ffn: its feed-forward sublayer; None without a table row.
    """

    path: str
    linears: tuple[str, ...]
    attention: tuple[AttentionSpec, ...] = ()
    ffn: FFNSpec | None = None


@dataclass(frozen=True)
class Stack:
    """A list of blocks that run one after another.

    Args:
        path: path of the list, `model.layers`.
        blocks: its blocks.
        shared: the forward pass calls the same block repeatedly (ALBERT), so a block sees several depths.
        depth_field: config field with the number of blocks, which a `Drop` lowers; None when blocks cannot be dropped.
    """

    path: str
    blocks: tuple[BlockSpec, ...]
    shared: bool = False
    depth_field: str | None = None


@dataclass(frozen=True)
class ModelSpec:
    """Where everything is in one model.

    Args:
        model_type: the config's `model_type`, "" when there is none.
        has_row: the architecture table describes this model; otherwise only `linears` of the blocks are known.
        stacks: lists of blocks, encoder before decoder.
        per_layer_fields: config fields with one entry per block, which a `Drop` slices.
        uncovered: (parameter path, number of elements, reason) for weights inside blocks that no linear holds.
        note: why there is no row, and what to do for methods that need one; "" with a row.
    """

    model_type: str
    has_row: bool
    stacks: tuple[Stack, ...]
    per_layer_fields: tuple[str, ...] = ()
    uncovered: tuple[tuple[str, int, str], ...] = ()
    note: str = ""

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """Every block of every stack, in the order they run."""
        return tuple(block for stack in self.stacks for block in stack.blocks)

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of every linear of every block."""
        return tuple(path for block in self.blocks for path in block.linears)

    @property
    def shared_inputs(self) -> tuple[tuple[str, ...], ...]:
        """Linears that a sublayer calls with one tensor, in that order: q, k, v of self-attention; gate, up."""
        found = [(a.q, a.k, a.v) for b in self.blocks for a in b.attention if a.kind == "self" and a.q != a.k]
        return (*found, *(b.ffn.inputs for b in self.blocks if b.ffn is not None and b.ffn.gated))
