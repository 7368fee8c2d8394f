"""Compressed linear layers: thin modules over `tinycomp.ops`, named in plans by their key in `LAYERS`."""

from torch import nn

from tinycomp.layers._base import CompressedLinear
from tinycomp.layers.dense import DenseLinear
from tinycomp.layers.elastic import ElasticLinear, elastic_layers, set_ratio_
from tinycomp.layers.grouped import group_
from tinycomp.layers.low_rank import CURLinear, LowRankLinear
from tinycomp.layers.masked import MaskedLinear
from tinycomp.layers.quant import QuantLinear
from tinycomp.layers.quant_low_rank import QuantLowRankLinear
from tinycomp.layers.quant_swsc import QuantSWSCLinear
from tinycomp.layers.swsc import SWSCLinear

LAYERS: dict[str, type[nn.Module]] = {
    "LowRankLinear": LowRankLinear,
    "CURLinear": CURLinear,
    "SWSCLinear": SWSCLinear,
    "QuantLinear": QuantLinear,
    "QuantLowRankLinear": QuantLowRankLinear,
    "QuantSWSCLinear": QuantSWSCLinear,
    "MaskedLinear": MaskedLinear,
    "ElasticLinear": ElasticLinear,
}

__all__ = [
    "LAYERS",
    "CURLinear",
    "CompressedLinear",
    "DenseLinear",
    "ElasticLinear",
    "LowRankLinear",
    "MaskedLinear",
    "QuantLinear",
    "QuantLowRankLinear",
    "QuantSWSCLinear",
    "SWSCLinear",
    "elastic_layers",
    "group_",
    "set_ratio_",
]
