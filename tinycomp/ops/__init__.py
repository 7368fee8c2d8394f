"""The ops: each file is one contract; `status()` says which backends run it here."""

from __future__ import annotations

from tinycomp.ops._registry import OPS, ORDER, Cost, Op, load_native, register, status, use_backend
from tinycomp.ops._sequence import sequence
from tinycomp.ops.column_norms import column_norms
from tinycomp.ops.cur_linear import cur_linear
from tinycomp.ops.cur_linears import cur_linears
from tinycomp.ops.decode_attention import decode_attention
from tinycomp.ops.gram_accumulate_ import gram_accumulate_
from tinycomp.ops.kmeans_assign import kmeans_assign
from tinycomp.ops.kmeans_update import kmeans_update
from tinycomp.ops.lowrank_linear import lowrank_linear
from tinycomp.ops.lowrank_linears import lowrank_linears
from tinycomp.ops.masked_formats import Packed, pack_masked, unpack_masked
from tinycomp.ops.masked_linear import masked_linear
from tinycomp.ops.masked_linears import masked_linears
from tinycomp.ops.quant_linear import Quantized, dequantize, pack_int4, quant_linear, quantize, unpack_int4
from tinycomp.ops.quant_linears import quant_linears
from tinycomp.ops.quant_lowrank_linear import quant_lowrank_linear
from tinycomp.ops.quant_lowrank_linears import quant_lowrank_linears
from tinycomp.ops.quant_swsc_linear import quant_swsc_linear
from tinycomp.ops.quant_swsc_linears import quant_swsc_linears
from tinycomp.ops.rms_norm import rms_norm
from tinycomp.ops.rotary_embedding import rotary_embedding
from tinycomp.ops.sample_without_replacement import sample_without_replacement
from tinycomp.ops.select_pivots import select_pivots
from tinycomp.ops.silu_and_mul import silu_and_mul
from tinycomp.ops.sliced_linear import sliced_linear
from tinycomp.ops.sliced_linears import sliced_linears
from tinycomp.ops.split_bregman_step_ import split_bregman_step_
from tinycomp.ops.swsc_linear import swsc_linear
from tinycomp.ops.swsc_linears import swsc_linears

__all__ = [
    "OPS",
    "ORDER",
    "Cost",
    "Op",
    "Packed",
    "Quantized",
    "column_norms",
    "cur_linear",
    "cur_linears",
    "decode_attention",
    "dequantize",
    "gram_accumulate_",
    "kmeans_assign",
    "kmeans_update",
    "lowrank_linear",
    "lowrank_linears",
    "masked_linear",
    "masked_linears",
    "pack_int4",
    "pack_masked",
    "quant_linear",
    "quant_linears",
    "quant_lowrank_linear",
    "quant_lowrank_linears",
    "quant_swsc_linear",
    "quant_swsc_linears",
    "quantize",
    "register",
    "rms_norm",
    "rotary_embedding",
    "sample_without_replacement",
    "select_pivots",
    "sequence",
    "silu_and_mul",
    "sliced_linear",
    "sliced_linears",
    "split_bregman_step_",
    "status",
    "swsc_linear",
    "swsc_linears",
    "unpack_int4",
    "unpack_masked",
    "use_backend",
]

load_native()
