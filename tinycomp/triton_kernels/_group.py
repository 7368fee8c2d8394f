"""Low-rank layers that read the same input: one launch for all first factors, one for all second ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinycomp.triton_kernels._launch import DECODE_INPUTS, adjacent, configs, rows_of
from tinycomp.triton_kernels._product import Rounded, product, product_tile


@triton.jit
def group_kernel(
    x1_ptr,
    x_stride1,
    w1_ptr,
    w_stride1,
    scales1_ptr,
    zeros1_ptr,
    groups1,
    kept1_ptr,
    order1_ptr,
    bias1_ptr,
    y1_ptr,
    rows1,
    columns1,
    x2_ptr,
    x_stride2,
    w2_ptr,
    w_stride2,
    scales2_ptr,
    zeros2_ptr,
    groups2,
    kept2_ptr,
    order2_ptr,
    bias2_ptr,
    y2_ptr,
    rows2,
    columns2,
    x3_ptr,
    x_stride3,
    w3_ptr,
    w_stride3,
    scales3_ptr,
    zeros3_ptr,
    groups3,
    kept3_ptr,
    order3_ptr,
    bias3_ptr,
    y3_ptr,
    rows3,
    columns3,
    group_size,
    y_stride,
    inputs,
    bucket,
    BITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A tile of one of three products; one that is not there has no rows, and the arguments of the first."""
    tile = tl.program_id(1)
    in_first, in_second = tl.cdiv(rows1, BN), tl.cdiv(rows2, BN)
    if tile < in_first:
        product_tile(
            x1_ptr,
            x_stride1,
            w1_ptr,
            w_stride1,
            scales1_ptr,
            zeros1_ptr,
            groups1,
            group_size,
            y1_ptr,
            y_stride,
            kept1_ptr,
            order1_ptr,
            bias1_ptr,
            None,
            0,
            None,
            None,
            tile,
            inputs,
            rows1,
            columns1,
            BITS,
            BM,
            BN,
            BK,
        )
    elif tile < in_first + in_second:
        product_tile(
            x2_ptr,
            x_stride2,
            w2_ptr,
            w_stride2,
            scales2_ptr,
            zeros2_ptr,
            groups2,
            group_size,
            y2_ptr,
            y_stride,
            kept2_ptr,
            order2_ptr,
            bias2_ptr,
            None,
            0,
            None,
            None,
            tile - in_first,
            inputs,
            rows2,
            columns2,
            BITS,
            BM,
            BN,
            BK,
        )
    else:
        product_tile(
            x3_ptr,
            x_stride3,
            w3_ptr,
            w_stride3,
            scales3_ptr,
            zeros3_ptr,
            groups3,
            group_size,
            y3_ptr,
            y_stride,
            kept3_ptr,
            order3_ptr,
            bias3_ptr,
            None,
            0,
            None,
            None,
            tile - in_first - in_second,
            inputs,
            rows3,
            columns3,
            BITS,
            BM,
            BN,
            BK,
        )


_KERNELS = {
    kind: triton.autotune(configs(kind), key=["bucket", "rows1", "rows2", "rows3", "columns1"])(group_kernel)
    for kind in ("decode", "decode-float32")
}


class Layer(NamedTuple):
    """The factors of a low-rank layer, rounded or not."""

    r: Tensor
    t: Tensor
    order: Tensor | None
    bias: Tensor | None
    rounded_r: Rounded
    rounded_t: Rounded


class _Part(NamedTuple):
    """One product of a launch: `product`'s arguments."""

    x: Tensor
    w: Tensor
    rounded: Rounded
    kept: Tensor | None
    order: Tensor | None
    bias: Tensor | None
    y: Tensor | None


def with_signature(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator: a launcher of all arguments of op `name` gets those left out, and the signature `triton_op` reads."""
    types = {"Tensor": Tensor, "Optional[Tensor]": Tensor | None, "int": int}
    parameters = [
        inspect.Parameter(
            a.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=a.default_value if a.has_default_value() else inspect.Parameter.empty,
            annotation=types[str(a.type)],
        )
        for a in getattr(torch.ops.tinycomp, name).default._schema.arguments
    ]

    signature = inspect.Signature(parameters, return_annotation=Tensor)

    def add(launch: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Tensor | int | None) -> Tensor:
            bound = signature.bind(*args)
            bound.apply_defaults()
            return launch(*bound.args)

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return add


def run_group(x: Tensor, layers: list[Layer]) -> Tensor:
    """The outputs of two or three layers beside each other; more than 16 inputs take two launches per layer."""
    flat = rows_of(x)
    features = [layer.t.shape[0] + (0 if layer.order is None else layer.r.shape[0]) for layer in layers]
    y = x.new_empty(*x.shape[:-1], sum(features))
    first, second = [], []
    for layer, out in zip(layers, y.view(flat.shape[0], sum(features)).split(features, 1), strict=True):
        rank, bias = layer.r.shape[0], adjacent(layer.bias)
        z = x.new_empty(flat.shape[0], rank)
        if layer.order is None:
            first.append(_Part(flat, layer.r, layer.rounded_r, z, None, None, None))
            second.append(_Part(z, layer.t, layer.rounded_t, None, None, bias, out))
        else:
            order = layer.order.contiguous()
            first.append(_Part(flat, layer.r, layer.rounded_r, z, order[:rank], bias, out))
            second.append(_Part(z, layer.t, layer.rounded_t, None, order[rank:], bias, out))
    for parts in (first, second):
        if flat.shape[0] <= DECODE_INPUTS:
            _launch(parts)
        else:
            for p in parts:
                product(p.x, p.w, p.y, rounded=p.rounded, kept=p.kept, order=p.order, bias=p.bias)
    return y


def _launch(parts: list[_Part]) -> None:
    inputs = parts[0].x.shape[0]
    if inputs == 0 or not any(p.w.shape[0] for p in parts):
        return
    args: list[Tensor | int | None] = []
    rows = []
    for p, there in zip((*parts, parts[0])[:3], (True, True, len(parts) == 3), strict=True):
        w = rows_of(p.w)
        scales = None if p.rounded.scales is None else p.rounded.scales.contiguous()
        zeros = None if p.rounded.zeros is None else p.rounded.zeros.contiguous()
        rows.append(w.shape[0] if there else 0)
        args += [p.x, p.x.stride(0), w, w.stride(0), scales, zeros, 1 if scales is None else scales.shape[1]]
        args += [p.kept, p.order, p.bias, p.y, rows[-1], p.x.shape[1]]
    rounded, kind = parts[0].rounded, "decode-float32" if parts[0].x.dtype == torch.float32 else "decode"
    torch.library.wrap_triton(_KERNELS[kind])[
        lambda meta: (triton.cdiv(inputs, meta["BM"]), sum(triton.cdiv(n, meta["BN"]) for n in rows))
    ](
        *args,
        rounded.group_size or 1 << 30,
        next((p.y.stride(0) for p in parts if p.y is not None), 0),
        inputs,
        triton.next_power_of_2(inputs),
        BITS=rounded.bits,
    )
