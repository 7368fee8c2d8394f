"""What transformers computes in many small calls on a CPU, in few: attention of one token, RMSNorm, rotary position
embeddings, the activation of gated feed-forward sublayers, and whole layers of Llama's kind for one token.

    tc.fuse_(model)

State dicts and saved folders stay as they are. Each op stands aside, and leaves the work to what was there before,
where it has no CPU kernel or the tensors are elsewhere, while gradients are recorded, and while a compiler is at work,
which fuses by itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from tinycomp.fused._base import MARK, FusedModule, fused_class
from tinycomp.fused._layer import FusedLayer, is_plain_layer
from tinycomp.fused._modules import asks_transformers, replace_sdpa, replacement


class Fused(NamedTuple):
    """How many modules of a model were fused, of each kind."""

    attentions: int
    norms: int
    rotary_embeddings: int
    mlps: int
    layers: int


def fuse_(model: nn.Module) -> Fused:
    """Let a model on a CPU compute attention, norms, rotary embeddings, gated sublayers and layers in fewer calls.

    Attention is that of modules which ask transformers' `AttentionInterface` for it, whenever it is "sdpa" there, for
    one query a sequence; transformers' entry of that name is replaced by a function that leaves all other modules to
    the one before. Norms and sublayers of any class are fused that give what the op gives, tried on random numbers;
    norms in the dtype they have now. Angles are marked by the module that computes them, and `apply_rotary_pos_emb` of
    its file is replaced by a function that knows the mark, where the two give the same bits.

    Layers of these parts that compute what Llama's do, tried as well, take one call for one token a sequence, with the
    same bits; linear layers of torch are multiplied by `ops.sliced_linear` there. Hooks, adapters and whatever else is
    attached to a part are found in every call, and the parts called one by one. The layers of a `DynamicCache` get room
    for tokens to come, so that their keys and values are the beginning of larger tensors.

    Args:
        model: on any device; the ops run where it is on a CPU, when it is called.

    Returns:
        How many of each are fused now, also by earlier calls.

    Source: the equations are in `tinycomp.ops`.
    """
    found = dict.fromkeys(Fused._fields, 0)
    for module in list(model.modules()):
        if not isinstance(module, FusedModule) and (how := replacement(module)) is not None:
            kind, mark = how
            _become(module, kind, mark)
        if isinstance(module, FusedModule):
            found[module.counted_as] += 1
        elif "Attention" in type(module).__name__ and asks_transformers(module):
            setattr(module, MARK, True)
            found["attentions"] += 1
    if found["attentions"]:
        replace_sdpa()
    for module in list(model.modules()):
        if not isinstance(module, FusedModule) and is_plain_layer(module):
            _become(module, FusedLayer, type(module._modules["self_attn"]))
            found["layers"] += 1
    return Fused(**found)


def _become(module: nn.Module, kind: type[FusedModule], mark: Any) -> None:
    """Put the class `kind` before the module's own, and have it remember `mark`."""
    setattr(module, MARK, mark)
    module.__class__ = fused_class(kind, type(module))  # type: ignore[arg-type]
