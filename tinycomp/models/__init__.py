"""Where the blocks, attention and feed-forward sublayers of a model are: `spec_of(model)`."""

from tinycomp.models.find import config_after_drop, is_linear, spec_of
from tinycomp.models.spec import AttentionSpec, BlockSpec, FFNSpec, ModelSpec, Stack
from tinycomp.models.table import TABLE
from tinycomp.models.units import Chunk, Member, UnitGroup, UnitPath, unit_groups

__all__ = [
    "TABLE",
    "AttentionSpec",
    "BlockSpec",
    "Chunk",
    "FFNSpec",
    "Member",
    "ModelSpec",
    "Stack",
    "UnitGroup",
    "UnitPath",
    "config_after_drop",
    "is_linear",
    "spec_of",
    "unit_groups",
]
