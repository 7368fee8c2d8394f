"""Where the blocks, attention and feed-forward sublayers of a model are: `spec_of(model)`."""

from tinycomp.models.find import config_after_drop, is_linear, spec_of
from tinycomp.models.spec import AttentionSpec, BlockSpec, FFNSpec, ModelSpec, Stack
from tinycomp.models.table import TABLE

__all__ = [
    "TABLE",
    "AttentionSpec",
    "BlockSpec",
    "FFNSpec",
    "ModelSpec",
    "Stack",
    "config_after_drop",
    "is_linear",
    "spec_of",
]
