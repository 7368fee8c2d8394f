"""The ops: each file is one contract; `status()` says which backends run it here."""

from __future__ import annotations

from tinycomp.ops._registry import OPS, ORDER, Cost, Op, load_native, register, status, use_backend
from tinycomp.ops.column_norms import column_norms
from tinycomp.ops.cur_linear import cur_linear
from tinycomp.ops.gram_accumulate_ import gram_accumulate_
from tinycomp.ops.kmeans_assign import kmeans_assign
from tinycomp.ops.kmeans_update import kmeans_update
from tinycomp.ops.lowrank_linear import lowrank_linear
from tinycomp.ops.quant_linear import Quantized, dequantize, pack_int4, quant_linear, quantize, unpack_int4
from tinycomp.ops.sample_without_replacement import sample_without_replacement
from tinycomp.ops.select_pivots import select_pivots
from tinycomp.ops.swsc_linear import swsc_linear

__all__ = [
    "OPS",
    "ORDER",
    "Cost",
    "Op",
    "Quantized",
    "column_norms",
    "cur_linear",
    "dequantize",
    "gram_accumulate_",
    "kmeans_assign",
    "kmeans_update",
    "lowrank_linear",
    "pack_int4",
    "quant_linear",
    "quantize",
    "register",
    "sample_without_replacement",
    "select_pivots",
    "status",
    "swsc_linear",
    "unpack_int4",
    "use_backend",
]

load_native()
