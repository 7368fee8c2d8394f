"""Shapes that are no multiple of anything, for every op: few and many inputs, ranks 1, 7 and 255; and random ones."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from tinycomp.kernels_dump import _cases

_SIZES = {"in_features": 193, "out_features": 300}
# Inputs and rank: decode and tiles, each with a rank that is short and one that is long.
_LAYERS = [{"inputs": m, "rank": rank} | _SIZES for m, rank in ((1, 255), (7, 1), (33, 255), (129, 7))]
_PLAIN = [{"inputs": m} | _SIZES for m in (1, 7, 33, 129)]
# Rows that are read 16 bytes at a time, several times by each warp.
_ALIGNED = [{"inputs": m, "in_features": 1056, "out_features": 20} for m in (3, 17)]
_POINTS = [{"points": n, "clusters": k, "columns": d} for n, k, d in ((1, 7, 33), (7, 1, 129), (129, 255, 33))]
_MATRICES = [{"rows": n, "columns": d} for n, d in ((1, 7), (33, 129), (129, 255))]


def _turns(shapes: list[dict[str, Any]], *variants: dict[str, Any]) -> list[dict[str, Any]]:
    """Every variant with every second shape: with one of decode and one of tiles."""
    return [shape | v for i, v in enumerate(variants) for shape in shapes[i % 2 :: 2]]


def _grouped(shape: dict[str, Any]) -> dict[str, Any]:
    rank = shape["rank"]
    layers = [[300, rank, 1], [257, 7, 0], [256, rank, 1]]
    return {"inputs": shape["inputs"], "in_features": shape["in_features"], "layers": layers}


def _beside(shape: dict[str, Any]) -> dict[str, Any]:
    return {"inputs": shape["inputs"], "in_features": shape["in_features"], "layers": [300, 257, 256]}


def _sharing(shape: dict[str, Any], least: int = 0) -> dict[str, Any]:
    layers = [[300, 255, shape["rank"]], [257, 7, least], [256, 33, shape["rank"]]]
    return {"inputs": shape["inputs"], "in_features": shape["in_features"], "layers": layers}


AWKWARD: dict[str, list[dict[str, Any]]] = {
    "lowrank_linear": _turns(_LAYERS, {"pivoted": True}, {"pivoted": False}),
    "lowrank_linears": [_grouped(shape) for shape in _LAYERS],
    "quant_lowrank_linear": _turns(
        _LAYERS,
        {"pivoted": True, "bits": 8, "group_size": 0},
        {"pivoted": False, "bits": 8, "group_size": 32},
        {"pivoted": True, "bits": 4, "group_size": 10},
        {"pivoted": False, "bits": 4, "group_size": 0},
    ),
    "quant_lowrank_linears": _turns(
        [_grouped(shape) for shape in _LAYERS], {"bits": 8, "group_size": 0}, {"bits": 4, "group_size": 10}
    ),
    "sliced_linears": [_beside(shape) for shape in _PLAIN],
    "quant_linears": _turns(
        [_beside(shape) for shape in _PLAIN],
        {"bits": 8, "group_size": 0},
        {"bits": 4, "group_size": 10},
        {"bits": 4, "group_size": 10, "activation_bits": 8},
        {"bits": 8, "group_size": 0, "activation_bits": 8},
    ),
    "swsc_linears": _turns([_sharing(shape) for shape in _LAYERS], {"axis": 0}, {"axis": 0}, {"axis": 1}, {"axis": 1}),
    "quant_swsc_linears": _turns(
        [_sharing(shape, 1) for shape in _LAYERS],
        {"bits": 8, "group_size": 0},
        {"bits": 4, "group_size": 10},
        {"bits": 4, "group_size": 10, "axis": 1},
        {"bits": 8, "group_size": 0, "axis": 1},
    ),
    "cur_linear": _LAYERS,
    "cur_linears": [
        {"inputs": s["inputs"], "in_features": 193, "layers": [[300, s["rank"]], [257, 7], [256, s["rank"]]]}
        for s in _LAYERS
    ],
    "swsc_linear": _turns(
        _LAYERS,
        {"clusters": 255, "axis": 0, "label_bits": 8},
        {"clusters": 255, "axis": 1, "label_bits": 32},
        {"clusters": 7, "axis": 1, "label_bits": 64},
        {"clusters": 7, "axis": 0, "label_bits": 32},
    ),
    "quant_swsc_linear": _turns(
        _LAYERS,
        {"clusters": 255, "axis": 0, "bits": 8, "group_size": 0},
        {"clusters": 7, "axis": 0, "bits": 4, "group_size": 10},
        {"clusters": 7, "axis": 1, "bits": 8, "group_size": 32},
        {"clusters": 255, "axis": 1, "bits": 4, "group_size": 0},
    ),
    "sliced_linear": [shape | {"whole": [301, 195]} for shape in _PLAIN],
    "quant_linear": _turns(
        _PLAIN,
        {"bits": 8, "group_size": 0, "symmetric": True},
        {"bits": 8, "group_size": 10, "symmetric": False},
        {"bits": 4, "group_size": 64, "symmetric": True},
        {"bits": 4, "group_size": 10, "symmetric": False},
        {"bits": 8, "group_size": 0, "symmetric": True, "activation_bits": 8},
        {"bits": 8, "group_size": 10, "symmetric": False, "activation_bits": 8},
        {"bits": 4, "group_size": 10, "symmetric": True, "activation_bits": 8},
        {"bits": 4, "group_size": 0, "symmetric": False, "activation_bits": 8},
    )
    + [
        shape | {"bits": bits, "group_size": group, "symmetric": False, "activation_bits": rounded}
        for shape in _ALIGNED
        for bits, group, rounded in ((8, 0, 0), (8, 10, 0), (4, 10, 0), (8, 64, 8), (8, 0, 8), (4, 32, 8), (4, 128, 8))
    ],
    "masked_linear": _turns(
        _PLAIN, *({"format": f, "value_bits": b} for f in ("bitmask", "2:4", "block32") for b in (0, 8, 4))
    ),
    "masked_linears": _turns(
        [_beside(shape) for shape in _PLAIN],
        *({"format": f, "value_bits": b} for f in ("bitmask", "2:4", "block32") for b in (0, 8, 4)),
    ),
    "column_norms": _MATRICES,
    "gram_accumulate_": _MATRICES,
    "kmeans_assign": _POINTS,
    "kmeans_update": _POINTS,
    "select_pivots": [
        {"rows": n, "columns": d, "k": k, "method": method}
        for n, d, k in ((1, 7, 1), (33, 129, 7), (129, 33, 33))
        for method in ("qr", "lu")
    ],
    "sample_without_replacement": [{"count": n} for n in (1, 7, 33, 255)],
    "split_bregman_step_": [
        {"count": n, "momentum": n > 7, "coupled": n < 33, "gamma": n % 2 == 1, "support": True, "group_size": group}
        for n, group in ((1, 0), (7, 7), (33, 0), (1029, 7))
    ],
}


def unaligned(value: Any) -> Any:
    """A tensor as a view whose rows start one number behind where an aligned load would, NaN around them."""
    if not isinstance(value, Tensor) or value.dim() not in (1, 2):
        return value
    fill = float("nan") if value.is_floating_point() else 0
    wide = torch.full((*value.shape[:-1], value.shape[-1] + 3), fill, dtype=value.dtype)
    view = wide[..., 1 : 1 + value.shape[-1]]
    return view.copy_(value)


def random_shape(name: str, draw: random.Random) -> dict[str, Any]:
    """One of the dumped shapes of an op with all its sizes drawn anew."""
    shape = dict(draw.choice(_cases.DEFAULTS[name]))
    most = {"inputs": 70, "in_features": 150, "out_features": 150, "clusters": 40, "rows": 80, "columns": 80}
    for field, size in (most | {"points": 150, "count": 600}).items():
        if field in shape:
            shape[field] = draw.randint(1, size)
    if "whole" in shape:
        shape["whole"] = [shape["out_features"] + draw.randint(0, 9), shape["in_features"] + draw.randint(0, 9)]
    if "rank" in shape:
        shape["rank"] = draw.randint(1, shape["out_features"])
    if "layers" in shape:
        rows = [draw.randint(1, 90) for _ in shape["layers"]]
        one = shape["layers"][0]  # features; with rank and whether it is pivoted, or with clusters and rank
        if isinstance(one, int):
            shape["layers"] = rows
        elif name == "cur_linears":
            shape["layers"] = [[n, draw.randint(1, 20)] for n in rows]
        else:
            # Pivoted or not; ranks, of rounded factors from 1 on.
            low, high = (0, 1) if name.endswith("lowrank_linears") else (int(name.startswith("quant")), 20)
            shape["layers"] = [[n, draw.randint(1, n), draw.randint(low, high)] for n in rows]
    if "k" in shape:
        shape["k"] = draw.randint(1, min(shape["rows"], shape["columns"]))
    if "count" in shape and shape.get("group_size"):
        shape["count"] *= shape["group_size"]
    return shape
