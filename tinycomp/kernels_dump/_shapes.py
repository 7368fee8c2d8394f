"""The shapes that are dumped unless others are asked for: small, awkward, and every kernel among them."""

from __future__ import annotations

from typing import Any

_FEW = {"inputs": 1, "in_features": 256, "out_features": 192}
_ODD = {"inputs": 33, "in_features": 193, "out_features": 129}
# Two shapes that ask for the kernels of large layers on a device with few processors.
_WIDE = {"inputs": 16, "in_features": 128, "out_features": 96, "processors": 1}
_TALL = {"inputs": 160, "in_features": 136, "out_features": 264, "processors": 1}
_LAYERS = (_FEW, _ODD, _WIDE, _TALL)


def _layers(*variants: dict[str, Any], layers: tuple[dict[str, int], ...] = _LAYERS) -> list[dict[str, Any]]:
    """Every layer shape, the variants taken in turn, and every variant at least once."""
    count = max(len(layers), len(variants))
    return [layers[i % len(layers)] | variants[i % len(variants)] for i in range(count)]


DEFAULTS: dict[str, list[dict[str, Any]]] = {
    "lowrank_linear": _layers({"rank": 40, "pivoted": True}, {"rank": 7, "pivoted": False}),
    "lowrank_linears": [
        {"inputs": 1, "in_features": 256, "layers": [[192, 40, 1], [64, 16, 1], [64, 24, 0]]},
        {"inputs": 16, "in_features": 193, "layers": [[129, 33, 1], [257, 7, 0]]},
        {"inputs": 7, "in_features": 128, "layers": [[96, 40, 1], [96, 32, 1]], "processors": 1},
        {"inputs": 33, "in_features": 193, "layers": [[129, 33, 0], [64, 16, 1]]},
    ],
    "quant_lowrank_linears": [
        {
            "inputs": 1,
            "in_features": 256,
            "layers": [[192, 64, 1], [64, 32, 1], [64, 32, 0]],
            "bits": 4,
            "group_size": 32,
        },
        {"inputs": 16, "in_features": 193, "layers": [[129, 33, 1], [257, 7, 0]], "bits": 8, "group_size": 0},
        {"inputs": 33, "in_features": 193, "layers": [[129, 33, 0], [64, 16, 1]], "bits": 4, "group_size": 10},
    ],
    "sliced_linears": [
        {"inputs": 1, "in_features": 256, "layers": [192, 64, 64]},
        {"inputs": 16, "in_features": 193, "layers": [129, 257]},
        {"inputs": 7, "in_features": 128, "layers": [96, 96], "processors": 1},
        {"inputs": 33, "in_features": 193, "layers": [129, 64]},
    ],
    "quant_linears": [
        {"inputs": 1, "in_features": 256, "layers": [192, 64, 64], "bits": 4, "group_size": 32},
        {"inputs": 16, "in_features": 193, "layers": [129, 257], "bits": 8, "group_size": 0},
        {"inputs": 33, "in_features": 193, "layers": [129, 64], "bits": 4, "group_size": 10},
        {"inputs": 7, "in_features": 256, "layers": [129, 64, 8], "bits": 8, "group_size": 0, "activation_bits": 8},
    ],
    "swsc_linears": [
        {"inputs": 1, "in_features": 256, "layers": [[192, 40, 16], [64, 16, 0], [64, 24, 8]]},
        {"inputs": 16, "in_features": 193, "layers": [[129, 33, 7], [257, 17, 5]]},
        {"inputs": 33, "in_features": 193, "layers": [[129, 33, 7], [64, 16, 0]]},
        {"inputs": 7, "in_features": 193, "layers": [[129, 33, 7], [64, 16, 0], [64, 24, 8]], "axis": 1},
        {"inputs": 33, "in_features": 193, "layers": [[129, 33, 7], [64, 16, 0]], "axis": 1},
    ],
    "quant_swsc_linears": [
        {
            "inputs": 1,
            "in_features": 256,
            "layers": [[192, 40, 32], [64, 16, 32], [64, 24, 32]],
            "bits": 4,
            "group_size": 32,
        },
        {"inputs": 16, "in_features": 193, "layers": [[129, 33, 7], [257, 17, 5]], "bits": 8, "group_size": 0},
        {"inputs": 33, "in_features": 193, "layers": [[129, 33, 7], [64, 16, 9]], "bits": 4, "group_size": 10},
        {"inputs": 7, "in_features": 193, "layers": [[129, 33, 7], [64, 16, 9]], "bits": 8, "group_size": 0, "axis": 1},
        {"inputs": 33, "in_features": 128, "layers": [[129, 32, 8], [6, 4, 2]], "bits": 4, "group_size": 32, "axis": 1},
    ],
    "cur_linear": _layers({"rank": 33}),
    "cur_linears": [
        {"inputs": 1, "in_features": 256, "layers": [[192, 40], [64, 16], [64, 24]]},
        {"inputs": 16, "in_features": 193, "layers": [[129, 33], [257, 7]]},
        {"inputs": 33, "in_features": 193, "layers": [[129, 33], [64, 16]]},
    ],
    "sliced_linear": _layers({"whole": [272, 264]}),
    "swsc_linear": _layers(
        {"rank": 7, "clusters": 17, "axis": 0, "label_bits": 8},
        {"rank": 15, "clusters": 23, "axis": 1, "label_bits": 32},
        layers=(_FEW, _ODD, _TALL, _WIDE),
    ),
    "quant_linear": _layers(
        {"bits": 4, "group_size": 64, "symmetric": False},
        {"bits": 8, "group_size": 0, "symmetric": True},
        {"bits": 4, "group_size": 10, "symmetric": True},
    )
    + _layers(
        {"bits": 8, "group_size": 0, "symmetric": True, "activation_bits": 8},
        {"bits": 4, "group_size": 64, "symmetric": False, "activation_bits": 8},
        {"bits": 8, "group_size": 10, "symmetric": False, "activation_bits": 8},
    ),
    "quant_lowrank_linear": _layers(
        {"rank": 64, "pivoted": True, "bits": 4, "group_size": 32},
        {"rank": 33, "pivoted": False, "bits": 8, "group_size": 0},
    ),
    "quant_swsc_linear": _layers(
        {"rank": 64, "clusters": 24, "axis": 0, "bits": 4, "group_size": 32},
        {"rank": 15, "clusters": 23, "axis": 1, "bits": 4, "group_size": 0},
        {"rank": 15, "clusters": 23, "axis": 0, "bits": 8, "group_size": 0},
        {"rank": 7, "clusters": 40, "axis": 1, "bits": 8, "group_size": 32},
    ),
    "masked_linear": _layers(
        *({"format": f, "value_bits": b} for b in (0, 8, 4) for f in ("bitmask", "2:4", "block32"))
    ),
    "masked_linears": [
        {"inputs": 1, "in_features": 256, "layers": [192, 64, 64], "format": "bitmask", "value_bits": 0},
        {"inputs": 16, "in_features": 193, "layers": [129, 257], "format": "2:4", "value_bits": 8},
        {"inputs": 33, "in_features": 193, "layers": [129, 64], "format": "block32", "value_bits": 4},
    ],
    "column_norms": [{"rows": 300, "columns": 129}],
    "gram_accumulate_": [{"rows": 70, "columns": 129}, {"rows": 260, "columns": 136, "processors": 1}],
    "kmeans_assign": [
        {"points": 129, "clusters": 70, "columns": 33},
        {"points": 70, "clusters": 129, "columns": 200},
    ],
    "kmeans_update": [{"points": 129, "clusters": 7, "columns": 133}],
    "select_pivots": [{"rows": 41, "columns": 33, "k": 7, "method": method} for method in ("qr", "lu")],
    "sample_without_replacement": [{"count": 300}],
    "split_bregman_step_": [
        {"count": 1100, "momentum": True, "coupled": True},
        {"count": 1100, "momentum": False, "coupled": False},
        {"count": 1099, "momentum": True, "coupled": False, "adam": True, "gamma": False, "support": True},
        {"count": 1100, "momentum": False, "coupled": True, "gamma": False, "support": True, "group_size": 11},
    ],
}
