"""The report and the terminal table, on made-up results."""

from __future__ import annotations

import copy
import io
import math
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from tinycomp.eval import report, table
from tinycomp.eval.plots import layer_table
from tinycomp.eval.report import print_table, write_report

PROJECTIONS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
LAYERS = 30
LINEAR, OTHER, DENSE_BYTES = 106_168_320, 28_346_688, 538_060_032
# name, method, ratio, kept, perplexity, decode tokens/s relative to dense; invented for this test
INVENTED = [
    ("CUR 0.9", "CUR", 0.9, 0.8994, 37.9, 1.05),
    ("CUR 0.6", "CUR", 0.6, 0.5991, 1002.0, 1.42),
    ("SWSC 0.9", "SWSC", 0.9, 0.8987, 151.0, 0.93),
    ("SWSC 0.6", "SWSC", 0.6, 0.5999, 4.1e6, 1.31),
    ("SVD 0.9", "SVD", 0.9, 0.8999, 29.9, 1.04),
    ("SVD 0.6", "SVD", 0.6, 0.5998, 104.0, 1.44),
    ("WidthPrune 0.9", "WidthPrune", 0.9, 0.9007, 26.2, 1.09),
    ("WidthPrune 0.6", "WidthPrune", 0.6, 0.6003, 58.0, 1.55),
    ("int8", "Rounding", None, 1.0, 24.12, 1.8),
]


def _records(method: str, kept: float) -> list[dict]:
    out = []
    for layer in range(LAYERS):
        for index, (name, (rows, columns)) in enumerate(PROJECTIONS.items()):
            share = min(1.0, max(0.05, kept + 0.35 * math.sin(0.4 * layer + index) * (1 - kept)))
            out.append(
                {
                    "path": f"model.layers.{layer}.{name}",
                    "method": method,
                    "shape": [rows, columns],
                    "size_before": rows * columns,
                    "size_after": int(share * rows * columns),
                    "bits_after": 16 * int(share * rows * columns),
                    "relative_error": 0.02 + (1 - share) * (0.3 + 0.1 * math.cos(0.7 * layer) + 0.05 * index),
                    "predicted_loss": 0.001,
                }
            )
    return out


def _compression(name: str, method: str, ratio: float, kept: float) -> dict:
    return {
        "name": name,
        "methods": [{"method": method, "seed": 0}],
        "ratio_requested": ratio,
        "ratio_achieved": kept,
        "targeted_parameters": LINEAR,
        "parameters_before": LINEAR + OTHER,
        "parameters_after": int(LINEAR * kept) + OTHER,
        "seconds": 41.2,
        "peak_memory_bytes": 2_140_000_000,
        "records": _records(method, kept),
        "skipped": [
            {"path": "model.embed_tokens", "reason": "embedding (ignored by default)", "parameters": 28_311_552},
            *(
                {"path": f"model.layers.{i}.input_layernorm", "reason": "norm (ignored by default)", "parameters": 576}
                for i in range(LAYERS)
            ),
        ],
        "fallbacks": ["model.layers.29.mlp.down_proj: Cholesky failed, solved by eigendecomposition"],
        "allocation": "global budget by predicted loss",
        "fingerprint": "6f2c9d0b41aa77e3",
    }


def sample_results() -> dict:
    rows = [
        {
            "name": "dense", "method": "dense", "ratio": 1.0, "achieved_ratio": 1.0, "parameters": LINEAR + OTHER,
            "linear_parameters": LINEAR, "bytes_disk": DENSE_BYTES + 31_000, "bytes_memory": DENSE_BYTES,
            "flops_per_token": 269_028_864, "prefill_tokens_s": 412.7, "decode_tokens_s": 21.3, "perplexity": 23.98,
            "compress_seconds": None, "peak_memory_bytes": None, "plain": True, "note": "",
        }
    ]  # fmt: skip
    for name, method, ratio, kept, perplexity, faster in INVENTED:
        size = int(LINEAR * kept) + OTHER
        stored = size * 4 if method != "Rounding" else LINEAR + OTHER * 4
        rows.append(
            {
                "name": name, "method": method, "ratio": ratio, "achieved_ratio": kept, "parameters": size,
                "linear_parameters": size - OTHER, "bytes_disk": stored + 52_000, "bytes_memory": stored,
                "flops_per_token": 2 * size, "prefill_tokens_s": 412.7 * faster**0.7, "decode_tokens_s": 21.3 * faster,
                "perplexity": perplexity, "compress_seconds": 41.2, "peak_memory_bytes": 2_140_000_000,
                "plain": method == "WidthPrune", "note": "",
            }
        )  # fmt: skip
    compressions = [_compression(n, m, r, k) for n, m, r, k, _, _ in INVENTED if r is not None and m != "WidthPrune"]
    return {
        "title": "SmolLM2-135M-Instruct: invented numbers",
        "model": "SmolLM2-135M-Instruct (Llama, 30 layers, fp32)",
        "machine": {
            "cpu": "Intel(R) Xeon(R) Processor @ 2.50GHz", "cores": 2, "threads": 2, "memory_gb": 25.3,
            "load_average": 0.84, "stream_gb_s": 21.8, "gemm_gf_s": 290.2, "torch": "2.13.0", "python": "3.11.7",
        },
        "protocol": {"name": "ppl/sotu-2013-2014/512/512/token", "hash": "e436aed55e7a4f35"},
        "command": "tinycomp demo --out demo_out",
        "rows": rows,
        "compressions": compressions,
        "notes": ["Every compression is one-shot: nothing was trained afterwards."],
    }  # fmt: skip
