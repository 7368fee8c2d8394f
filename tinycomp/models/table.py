"""One row per architecture: the names its stock classes give to blocks, attention and feed-forward linears.

A name is looked for from the block downwards; a tuple of candidates lists the names that transformers releases have
used, and the first one that is there counts. To add an architecture, add a row and a tiny model to `tests/conftest.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class AttentionNames:
    """Where one attention sublayer is inside a block; q, k, v and o are relative to the block."""

    path: str
    q: str
    k: str
    v: str
    o: str
    kind: Literal["self", "cross"] = "self"


@dataclass(frozen=True)
class FFNNames:
    """Where the feed-forward sublayer is: `path` inside the block ("" is the block itself), linears inside `path`."""

    path: str
    inputs: tuple[str, ...]
    down: str


@dataclass(frozen=True)
class StackNames:
    """A list of blocks whose path ends with `suffix`.

    Args:
        suffix: last components of the list's path.
        depth_field: config field with the number of blocks; None when the blocks cannot be dropped.
        width_field: config field with the feed-forward width; None when the config has none.
        decoder: True or False selects lists whose owner says so through `is_decoder`; None takes any.
    """

    suffix: str
    depth_field: str | None
    width_field: str | None
    decoder: bool | None = None


@dataclass(frozen=True)
class Row:
    """One architecture."""

    stacks: tuple[StackNames, ...]
    attention: tuple[AttentionNames, ...]
    ffn: tuple[FFNNames, ...]
    shared: bool = False
    cross: tuple[AttentionNames, ...] = field(default=())


def _names(path: str, q: str, k: str, v: str, o: str, kind: Literal["self", "cross"] = "self") -> AttentionNames:
    return AttentionNames(path, f"{path}.{q}", f"{path}.{k}", f"{path}.{v}", f"{path}.{o}", kind)


_LLAMA = Row(
    stacks=(StackNames("layers", "num_hidden_layers", "intermediate_size"),),
    attention=(_names("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),),
    ffn=(FFNNames("mlp", ("gate_proj", "up_proj"), "down_proj"),),
)
_BERT_ATTENTION = AttentionNames(
    "attention.self", "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"
)
_VIT_ATTENTION = (_names("attention", "q_proj", "k_proj", "v_proj", "o_proj"),)
_VIT = Row(
    stacks=(StackNames("layers", "num_hidden_layers", "intermediate_size"),),
    attention=_VIT_ATTENTION,
    ffn=(FFNNames("mlp", ("fc1",), "fc2"),),
)

TABLE: dict[str, Row] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": Row(
        stacks=(StackNames("h", "n_layer", "n_inner"),),
        attention=(_names("attn", "c_attn", "c_attn", "c_attn", "c_proj"),),
        cross=(_names("crossattention", "q_attn", "c_attn", "c_attn", "c_proj", "cross"),),
        ffn=(FFNNames("mlp", ("c_fc",), "c_proj"),),
    ),
    "opt": Row(
        stacks=(StackNames("layers", "num_hidden_layers", "ffn_dim"),),
        attention=(_names("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),),
        ffn=(FFNNames("", ("fc1",), "fc2"),),
    ),
    "bert": Row(
        stacks=(StackNames("encoder.layer", "num_hidden_layers", "intermediate_size"),),
        attention=(_BERT_ATTENTION,),
        cross=(
            AttentionNames(
                "crossattention.self",
                "crossattention.self.query",
                "crossattention.self.key",
                "crossattention.self.value",
                "crossattention.output.dense",
                "cross",
            ),
        ),
        ffn=(FFNNames("", ("intermediate.dense",), "output.dense"),),
    ),
    "distilbert": Row(
        stacks=(StackNames("layer", "n_layers", "hidden_dim"),),
        attention=(_names("attention", "q_lin", "k_lin", "v_lin", "out_lin"),),
        ffn=(FFNNames("ffn", ("lin1",), "lin2"),),
    ),
    "albert": Row(
        stacks=(StackNames("albert_layers", None, "intermediate_size"),),
        attention=(_names("attention", "query", "key", "value", "dense"),),
        ffn=(FFNNames("", ("ffn",), "ffn_output"),),
        shared=True,
    ),
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": Row(
        stacks=(StackNames("encoder.layer", "num_hidden_layers", None),),
        attention=_VIT_ATTENTION,
        ffn=(
            FFNNames("mlp", ("fc1",), "fc2"),
            FFNNames("mlp", ("gate_proj", "up_proj"), "down_proj"),
        ),
    ),
    "t5": Row(
        stacks=(
            StackNames("block", "num_layers", "d_ff", decoder=False),
            StackNames("block", "num_decoder_layers", "d_ff", decoder=True),
        ),
        attention=(_names("layer.0.SelfAttention", "q", "k", "v", "o"),),
        cross=(_names("layer.1.EncDecAttention", "q", "k", "v", "o", "cross"),),
        ffn=tuple(
            FFNNames(f"layer.{index}.DenseReluDense", inputs, "wo")
            for index in (1, 2)
            for inputs in (("wi_0", "wi_1"), ("wi",))
        ),
    ),
    "marian": Row(
        stacks=(
            StackNames("encoder.layers", "encoder_layers", "encoder_ffn_dim"),
            StackNames("decoder.layers", "decoder_layers", "decoder_ffn_dim"),
        ),
        attention=(_names("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),),
        cross=(_names("encoder_attn", "q_proj", "k_proj", "v_proj", "out_proj", "cross"),),
        ffn=(FFNNames("", ("fc1",), "fc2"),),
    ),
}
