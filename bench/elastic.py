"""Sliced and elastic models against the dense one: their linears at M = 1, and whole tokens per second.

    python bench/elastic.py [--ratio 0.5] [--model MODEL | --hidden 2048] [--repeats 15] [--json]

All linears of the blocks are called one after another on one row, so that weights come from memory as in decoding.
The bytes that are left out allow a speed-up of bytes dense / bytes sliced; the line says which part of it is reached.
A call of torch's own linear costs time that no bytes explain: what an 8 x 8 one takes after each of the dense layers is
taken as that, and the line says as well which speed-up is left where it is not shortened.
One thread, interleaved, process CPU time; units in random order, every sublayer at the same ratio. `--hidden` takes two
random blocks of a Llama of that size instead, where an operator's own cost is small beside its weights. Lines go to
bench/results/elastic.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tinycomp as tc
from tinycomp.eval.machine import machine
from tinycomp.eval.speed import speed_of
from tinycomp.eval.timing import time_interleaved
from tinycomp.io.load import default_model, load_model
from tinycomp.layers import DenseLinear, ElasticLinear, set_ratio_
from tinycomp.models import unit_groups

CALLS = "dense torch, after each an 8 x 8"
RESULTS = Path(__file__).parent / "results" / "elastic.jsonl"


def with_inputs(model: nn.Module, paths: list[str]) -> list[tuple[nn.Module, torch.Tensor]]:
    """The linears with one row of input each."""
    found = []
    for path in paths:
        module: Any = model.get_submodule(path)
        width = module.in_features
        if isinstance(module, ElasticLinear) and not module.gather:
            width = module.active_in
        found.append((module, torch.randn(1, 1, width, dtype=module.weight.dtype)))
    return found


def weight_bytes(linears: list[tuple[nn.Module, torch.Tensor]]) -> int:
    total = 0
    for module, x in linears:
        if isinstance(module, ElasticLinear):
            total += module.active_in * module.active_out * x.element_size()
        else:
            total += module.weight.nbytes  # type: ignore[union-attr, operator]
    return total


def dense_model(options: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    if not options.hidden:
        return load_model(options.model or default_model(), dtype)[0]
    size = options.hidden
    config = LlamaConfig(
        hidden_size=size, intermediate_size=size * 11 // 4, num_hidden_layers=2, num_attention_heads=size // 64,
        num_key_value_heads=size // 256, vocab_size=1024, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def models(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, nn.Module]:
    dense = dense_model(options, dtype)
    groups = unit_groups(dense)
    generator = torch.Generator().manual_seed(0)
    path = tc.UnitPath.from_scores({g.name: torch.rand(g.count, generator=generator) for g in groups})
    elastic = copy.deepcopy(dense)
    tc.make_elastic_(elastic, path, uniform=True)
    set_ratio_(elastic, options.ratio)
    sliced = tc.export(elastic)
    return {
        "dense torch": dense,
        "dense ours": with_own_kernel(dense),
        "sliced torch": sliced,
        "sliced ours": with_own_kernel(sliced),
        "elastic": elastic,
    }


def with_own_kernel(model: nn.Module) -> nn.Module:
    """A copy whose linears are DenseLinear; compressed layers use the library's kernels as they are."""
    own = copy.deepcopy(model)
    for name, module in list(own.named_modules()):
        inside = own.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear) and not isinstance(inside, ElasticLinear):
            own.set_submodule(name, DenseLinear.from_linear(module))
    return own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--model", help="default: SmolLM2-135M")
    parser.add_argument("--hidden", type=int, help="random blocks of this size")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rows += measure(models(options, dtype), dtype, options)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def measure(found: dict[str, nn.Module], dtype: torch.dtype, options: argparse.Namespace) -> list[dict[str, Any]]:
    paths = list(dict.fromkeys(m.path for g in unit_groups(found["dense torch"]) for m in g.members))
    linears = {name: with_inputs(model, paths) for name, model in found.items()}

    small = nn.Linear(8, 8, bias=False, dtype=dtype), torch.randn(1, 1, 8, dtype=dtype)
    linears[CALLS] = [pair for dense in linears["dense torch"] for pair in (dense, small)]

    def run(name: str) -> None:
        for module, x in linears[name]:
            module(x)

    rows = []
    with torch.no_grad():
        timings = time_interleaved(
            {name: lambda name=name: run(name) for name in linears},  # type: ignore[misc]
            options.repeats, warmup=2, clock=time.process_time,
        )  # fmt: skip
        speeds = speed_of(found, 32, 8, 5)
    base, bytes_dense = timings["dense torch"], weight_bytes(linears["dense torch"])
    calls = timings.pop(CALLS).median - base.median
    for name, timing in timings.items():
        decode = speeds[name].decode
        assert decode is not None
        allowed, reached = bytes_dense / weight_bytes(linears[name]), base.median / timing.median
        with_calls = base.median / ((base.median - calls) / allowed + calls)
        row = {
            "name": name, "dtype": str(dtype).removeprefix("torch."), "ratio": options.ratio,
            "model": f"random, hidden {options.hidden}" if options.hidden else options.model or "SmolLM2-135M",
            "linears_ms": timing.median * 1e3, "linears_ms_p20_p80": [timing.quantile(q) * 1e3 for q in (0.2, 0.8)],
            "speed_up": reached, "speed_up_of_bytes": allowed, "reached": reached / allowed,
            "calls_ms": calls * 1e3, "speed_up_of_bytes_with_calls": with_calls,
            "decode_tokens_s": decode.median, "machine": machine(),
        }  # fmt: skip
        rows.append(row)
        text = f"{name:12} {row['dtype']:8} linears {row['linears_ms']:7.2f} ms {reached:5.2f}x dense torch"
        text += (
            f" of {allowed:4.2f}x allowed by bytes ({100 * reached / allowed:3.0f} %), {with_calls:4.2f}x with calls"
        )
        text += f" | decode {decode.median:6.1f} t/s"
        print(json.dumps(row) if options.json else text, flush=True)
    return rows


if __name__ == "__main__":
    main()
