"""Triton backend of `masked_linear`: packed blocks are unpacked on their way to the tensor cores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinycomp.triton_kernels._group import with_signature
from tinycomp.triton_kernels._launch import DECODE_INPUTS, adjacent, kernel_op, rows_of

# Inputs, rows and columns per program, warps. A step of 32 columns is one block of "block32".
MASKED_CONFIGS = {"decode": (16, 32, 32, 4), "tiles": (64, 64, 32, 4), "tiles-float32": (16, 64, 32, 8)}
MOST_LAYERS = 3


@triton.jit
def stored_value(values_ptr, at, inside, BITS: tl.constexpr):
    """Value number `at` of the packed array, as float32."""
    if BITS == 4:
        both = tl.load(values_ptr + at // 2, mask=inside, other=0)
        value = ((both >> ((at % 2) * 4).to(tl.uint8)) & 15).to(tl.float32) - 8.0
    else:
        value = tl.load(values_ptr + at, mask=inside, other=0).to(tl.float32)
    return value


# fmt: off
@triton.jit
def masked_tile(
    x_ptr, x_stride, values_ptr, mask_ptr, mask_columns, offsets_ptr, scales_ptr, bias_ptr, y_ptr, y_stride,
    m, tile, inputs, rows, columns, FORMAT: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):
    """Inputs `m` by BN outputs; a packed row is read from its start, its values counted on the way."""
    dtype = x_ptr.dtype.element_ty
    n = tile.to(tl.int64) * BN + tl.arange(0, BN)
    sums = tl.zeros((m.shape[0], BN), tl.float32)
    scale = tl.full((BN,), 1.0, tl.float32)
    if BITS != 0:
        scale = tl.load(scales_ptr + n, mask=n < rows, other=0.0).to(tl.float32)
    first = tl.zeros((BN,), tl.int64)
    if FORMAT == "bitmask":
        first = tl.load(offsets_ptr + n, mask=n < rows, other=0).to(tl.int64)
    if FORMAT == "block32":
        first = tl.load(offsets_ptr + n // 32, mask=n < rows, other=0).to(tl.int64)
    for start in range(0, columns, BK):
        k = start + tl.arange(0, BK)
        inside = (k < columns)[:, None] & (n < rows)[None, :]
        if FORMAT == "bitmask":
            byte = tl.load(mask_ptr + n[None, :] * mask_columns + (k // 8)[:, None], mask=inside, other=0)
            bit = ((byte >> (k % 8).to(tl.uint8)[:, None]) & 1).to(tl.int32)
            # Columns beyond the last are zeros in x; their bits are not counted because `inside` masks them.
            at = first[None, :] + tl.cumsum(bit, 0) - bit
            w = stored_value(values_ptr, at, inside & (bit == 1), BITS)
            first += tl.sum(bit, 0)
        elif FORMAT == "2:4":
            group = (k // 4)[:, None]
            byte = tl.load(mask_ptr + n[None, :] * mask_columns + group // 2, mask=inside, other=0)
            code = (byte >> ((group % 2) * 4).to(tl.uint8)) & 15
            at = n[None, :] * (2 * tl.cdiv(columns, 4)) + 2 * group
            place = (k % 4).to(tl.uint8)[:, None]
            w = stored_value(values_ptr, at, inside & ((code & 3) == place), BITS)
            second = stored_value(values_ptr, at + 1, inside & ((code >> 2) == place), BITS)
            w = tl.where((code & 3) == place, w, tl.where((code >> 2) == place, second, 0.0))
        else:
            block = start // 32
            byte = tl.load(mask_ptr + (n // 32) * mask_columns + block // 8, mask=n < rows, other=0)
            bit = ((byte >> tl.cast(block % 8, tl.uint8)) & 1).to(tl.int64)
            at = (first * 1024 + (n % 32) * 32)[None, :] + (k % 32)[:, None]
            w = stored_value(values_ptr, at, inside & (bit == 1)[None, :], BITS)
            w = tl.where((bit == 1)[None, :], w, 0.0)
            first += bit
        if FORMAT == "bitmask":
            w = tl.where(bit == 1, w, 0.0)
        x_inside = (m < inputs)[:, None] & (k < columns)[None, :]
        x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=x_inside, other=0.0)
        sums = tl.dot(x, (w * scale[None, :]).to(dtype), sums, input_precision="ieee")
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
    inside = (m < inputs)[:, None] & (n < rows)[None, :]
    tl.store(y_ptr + m[:, None] * y_stride + n[None, :], sums.to(dtype), mask=inside)


@triton.jit
def masked_kernel(
    x, x_stride,
    values1, mask1, mask_columns1, offsets1, scales1, bias1, y1, rows1,
    values2, mask2, mask_columns2, offsets2, scales2, bias2, y2, rows2,
    values3, mask3, mask_columns3, offsets3, scales3, bias3, y3, rows3,
    y_stride, inputs, columns,
    LAYERS: tl.constexpr, FORMAT: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One (BM, BN) tile of one of the layers."""
    layers = (
        (values1, mask1, mask_columns1, offsets1, scales1, bias1, y1, rows1),
        (values2, mask2, mask_columns2, offsets2, scales2, bias2, y2, rows2),
        (values3, mask3, mask_columns3, offsets3, scales3, bias3, y3, rows3),
    )
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    tile, before = tl.program_id(1), 0
    for i in tl.static_range(LAYERS):
        values, mask, mask_columns, offsets, scales, bias, y, rows = layers[i]
        tiles = tl.cdiv(rows, BN)
        if (tile >= before) & (tile < before + tiles):
            masked_tile(
                x, x_stride, values, mask, mask_columns, offsets, scales, bias, y, y_stride,
                m, tile - before, inputs, rows, columns, FORMAT, BITS, BN, BK,
            )
        before += tiles
# fmt: on


class SparseLayer(NamedTuple):
    """A layer: the arguments of `masked_linear` but x and those that say how all of them are packed."""

    values: Tensor
    mask: Tensor
    offsets: Tensor | None
    scales: Tensor | None
    bias: Tensor | None
    out_features: int


def packed_layers(x: Tensor, layers: Sequence[SparseLayer], format: str, value_bits: int) -> Tensor:
    """The outputs of one to three layers beside each other, in one launch."""
    flat, features = rows_of(x), [layer.out_features for layer in layers]
    y = x.new_empty(*x.shape[:-1], sum(features))
    if y.numel() == 0:
        return y
    args: list[Any] = []
    for layer, out in zip(layers, y.view(flat.shape[0], sum(features)).split(features, 1), strict=True):
        mask = layer.mask.contiguous()
        args += [layer.values.contiguous(), mask, mask.shape[1], adjacent(layer.offsets), adjacent(layer.scales)]
        args += [adjacent(layer.bias), out, layer.out_features]
    args += [None, None, 0, None, None, None, None, 0] * (MOST_LAYERS - len(layers))
    tiles = "tiles-float32" if x.dtype == torch.float32 else "tiles"
    bm, bn, bk, warps = MASKED_CONFIGS["decode" if flat.shape[0] <= DECODE_INPUTS else tiles]
    grid = triton.cdiv(flat.shape[0], bm), sum(triton.cdiv(n, bn) for n in features)
    torch.library.wrap_triton(masked_kernel)[grid](
        flat,
        flat.stride(0),
        *args,
        sum(features),
        flat.shape[0],
        x.shape[-1],
        LAYERS=len(layers),
        FORMAT=format,
        BITS=value_bits,
        BM=bm,
        BN=bn,
        BK=bk,
        num_warps=warps,
    )
    return y


@kernel_op("masked_linear")
@with_signature("masked_linear")
def masked_linear(x: Tensor, *args: Any) -> Tensor:
    return packed_layers(x, [SparseLayer(*args[:6])], *args[6:])
