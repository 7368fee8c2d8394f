"""y = x wᵀ for a weight in any dense or rounded storage, with what the ops do to the outputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinycomp.triton_kernels._launch import DECODE_INPUTS, PRODUCT_CONFIGS, adjacent, configs, rows_of


@triton.jit
def load_weight(
    w_ptr, w_stride, scales_ptr, zeros_ptr, groups, group_size, n, k, inside, BITS: tl.constexpr, dtype: tl.constexpr
):
    """Columns k of rows n as a (k, n) block in `dtype`; rounded weights are rebuilt in float32 as the contract says."""
    if BITS == 0:
        w = tl.load(w_ptr + n[None, :] * w_stride + k[:, None], mask=inside, other=0.0)
    else:
        if BITS == 8:
            q = tl.load(w_ptr + n[None, :] * w_stride + k[:, None], mask=inside, other=0).to(tl.float32)
        else:
            both = tl.load(w_ptr + n[None, :] * w_stride + (k // 2)[:, None], mask=inside, other=0)
            q = ((both >> ((k % 2) * 4).to(tl.uint8)[:, None]) & 15).to(tl.float32)
        at = n[None, :] * groups + (k // group_size)[:, None]
        if zeros_ptr is not None:
            q -= tl.load(zeros_ptr + at, mask=inside, other=0.0).to(tl.float32)
        elif BITS == 4:
            q -= 8.0
        w = (q * tl.load(scales_ptr + at, mask=inside, other=0.0).to(tl.float32)).to(dtype)
    return w


@triton.jit
def one_hot_weight(labels_ptr, scales_ptr, n, k, columns, dtype: tl.constexpr):
    """Columns k of rows n as a (k, n) block in `dtype`: 1, or scales[k], where labels[k] is n."""
    label = tl.load(labels_ptr + k, mask=k < columns, other=0).to(tl.int32)
    value = tl.full(k.shape, 1.0, tl.float32)
    if scales_ptr is not None:
        value = tl.load(scales_ptr + k, mask=k < columns, other=0.0).to(tl.float32)
    return tl.where(label[:, None] == n[None, :], value[:, None], 0.0).to(dtype)


# fmt: off
@triton.jit
def product_tile(
    x_ptr, x_stride, w_ptr, w_stride, scales_ptr, zeros_ptr, groups, group_size, y_ptr, y_stride, kept_ptr, order_ptr,
    bias_ptr, base_ptr, base_stride, labels_ptr, label_scales_ptr, m, tile, inputs, rows, columns,
    BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):
    """A tile of x wᵀ, inputs `m` by BN outputs. With `kept_ptr`, it goes there as well, unordered and without bias.

    Without `w_stride`, `w_ptr` holds labels and w is `one_hot_weight`.
    """
    n = tile.to(tl.int64) * BN + tl.arange(0, BN)
    sums = tl.zeros((m.shape[0], BN), tl.float32)
    for start in range(0, columns, BK):
        k = start + tl.arange(0, BK)
        x_inside = (m < inputs)[:, None] & (k < columns)[None, :]
        x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=x_inside, other=0.0)
        if w_stride is None:
            w = one_hot_weight(w_ptr, scales_ptr, n, k, columns, x_ptr.dtype.element_ty)
        else:
            w_inside = (k < columns)[:, None] & (n < rows)[None, :]
            w = load_weight(
                w_ptr, w_stride, scales_ptr, zeros_ptr, groups, group_size, n, k, w_inside, BITS, x_ptr.dtype.element_ty
            )
        sums = tl.dot(x, w, sums, input_precision="ieee")
    inside = (m < inputs)[:, None] & (n < rows)[None, :]
    if kept_ptr is not None:
        sums = sums.to(x_ptr.dtype.element_ty).to(tl.float32)
        tl.store(kept_ptr + m[:, None] * rows + n[None, :], sums.to(x_ptr.dtype.element_ty), mask=inside)
    at = n
    if order_ptr is not None:
        at = tl.load(order_ptr + n, mask=n < rows, other=0).to(tl.int64)
    if base_ptr is not None:
        label = tl.where(n < rows, n, 0)  # as if loaded: on sm_100 ptxas spills registers for plain rows
        if labels_ptr is not None:
            label = tl.load(labels_ptr + n, mask=n < rows, other=0).to(tl.int64)
        base = tl.load(base_ptr + m[:, None] * base_stride + label[None, :], mask=inside, other=0.0).to(tl.float32)
        if label_scales_ptr is not None:
            base *= tl.load(label_scales_ptr + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
        sums += base
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + at, mask=n < rows, other=0.0).to(tl.float32)[None, :]
    if y_ptr is not None:
        tl.store(y_ptr + m[:, None] * y_stride + at[None, :], sums.to(x_ptr.dtype.element_ty), mask=inside)
# fmt: on


@triton.jit
def product_kernel(
    x_ptr,
    x_stride,
    w_ptr,
    w_stride,
    scales_ptr,
    zeros_ptr,
    groups,
    group_size,
    y_ptr,
    y_stride,
    kept_ptr,
    order_ptr,
    bias_ptr,
    base_ptr,
    base_stride,
    labels_ptr,
    label_scales_ptr,
    inputs,
    rows,
    columns,
    bucket,
    BITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    product_tile(
        x_ptr,
        x_stride,
        w_ptr,
        w_stride,
        scales_ptr,
        zeros_ptr,
        groups,
        group_size,
        y_ptr,
        y_stride,
        kept_ptr,
        order_ptr,
        bias_ptr,
        base_ptr,
        base_stride,
        labels_ptr,
        label_scales_ptr,
        tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM),
        tl.program_id(1),
        inputs,
        rows,
        columns,
        BITS,
        BN,
        BK,
    )


# `bucket` is the power of two above the number of inputs: one search serves all batch sizes in it.
_KERNELS = {
    kind: triton.autotune(configs(kind), key=["bucket", "rows", "columns"])(product_kernel) for kind in PRODUCT_CONFIGS
}


class Rounded(NamedTuple):
    """How the weight is rounded: bits 0 (not at all), 8 or 4."""

    bits: int = 0
    scales: Tensor | None = None
    zeros: Tensor | None = None
    group_size: int = 0


PLAIN = Rounded()


class Base(NamedTuple):
    """Added to output i: values[:, labels_i], times scales_i; without labels, values[:, i]."""

    values: Tensor
    labels: Tensor | None = None
    scales: Tensor | None = None


def product(
    x: Tensor,
    w: Tensor,
    y: Tensor | None,
    *,
    rounded: Rounded = PLAIN,
    kept: Tensor | None = None,
    order: Tensor | None = None,
    bias: Tensor | None = None,
    base: Base | None = None,
) -> None:
    """y[:, order] = x wᵀ + base + bias for matrices; each output feature index is its row of w without an order.

    Args:
        x: (M, K), rows adjacent.
        w: (N, K), or rounded storage of it.
        y: (M, at least N) contiguous, or None to fill `kept` alone.
        rounded: storage of w.
        kept: (M, N) contiguous that receives the plain product, or None.
        order: int32 (N,) or None.
        bias: indexed like the columns of y, or None.
        base: see `Base`.
    """
    w = rows_of(w)
    inputs, columns, rows = x.shape[0], x.shape[1], w.shape[0]
    if inputs == 0 or rows == 0:
        return
    kind = "decode" if inputs <= DECODE_INPUTS else "tiles"
    kind += "-float32" if x.dtype == torch.float32 else ""
    scales = None if rounded.scales is None else rounded.scales.contiguous()
    zeros = None if rounded.zeros is None else rounded.zeros.contiguous()
    groups = 1 if scales is None else scales.shape[1]
    group_size = rounded.group_size or max(columns, 1)
    torch.library.wrap_triton(_KERNELS[kind])[
        lambda meta: (triton.cdiv(inputs, meta["BM"]), triton.cdiv(rows, meta["BN"]))
    ](
        x,
        x.stride(0),
        w,
        w.stride(0),
        scales,
        zeros,
        groups,
        group_size,
        y,
        0 if y is None else y.stride(0),
        kept,
        order,
        bias,
        None if base is None else base.values,
        0 if base is None else base.values.stride(0),
        None if base is None else adjacent(base.labels),
        None if base is None else adjacent(base.scales),
        inputs,
        rows,
        columns,
        triton.next_power_of_2(inputs),
        BITS=rounded.bits,
    )
