"""GPU kernels against what one would otherwise run: `python bench/gpu.py` on a machine with a GPU.

First every contract's samples on the device, under the tests' one tolerance rule; a failure ends the run. Then each
layer shape of a Llama-3-8B block: every op in CUDA, Triton and torch, cuBLAS (F.linear), torch.compile and, where they
are installed, torchao's and gemlite's int4 and torch's 2:4, in CUDA graphs, the second-level cache flushed before every
repeat. One JSON line per case in bench/results/gpu-<device>.jsonl, with the modelled bound beside the measured time.
On compute capability 9.0 and 10.0 the whole runs again with TINYCOMP_TMA=1, the instructions of that GPU alone.
Without a GPU: `--model H100` prints the bounds, modelled and unmeasured.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_model
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from tolerance import assert_close  # noqa: E402

from tinycomp import ops  # noqa: E402
from tinycomp.kernels_dump import _cases  # noqa: E402
from tinycomp.ops import _registry  # noqa: E402

REPEATS = 50
TMA = os.environ.get("TINYCOMP_TMA") == "1"


def on_device(args: tuple[Any, ...], wide: bool = False) -> list[Any]:
    """Arguments on the GPU, layout kept; floating ones in float64 if `wide`."""
    moved: list[Any] = []
    for value in args:
        if isinstance(value, Tensor):
            dtype = torch.float64 if wide and value.is_floating_point() else value.dtype
            value = torch.empty_strided(value.shape, value.stride(), dtype=dtype, device="cuda").copy_(value)
        moved.append(value)
    return moved


def outputs(name: str, backend: str, args: list[Any]) -> list[Tensor]:
    with ops.use_backend(backend):
        out = getattr(ops, name)(*args)
    if out is None:
        return [a for a in args if isinstance(a, Tensor)]
    return list(out) if isinstance(out, tuple) else [out]


def check_correctness() -> int:
    """Every op, GPU backend, dtype and sample; raises AssertionError on the first that is wrong."""
    checked = 0
    for name, op in ops.OPS.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for sample in op.samples(dtype):
                for backend in ("cuda", "triton"):
                    args = on_device(sample.args)
                    if _registry.why_not(op, backend, tuple(args)) is not None:
                        continue
                    got = outputs(name, backend, args)
                    plain = outputs(name, "torch", on_device(sample.args))
                    reference = outputs(name, "torch", on_device(sample.args, wide=True))
                    for g, p, r in zip(got, plain, reference, strict=True):
                        what = f"{name} {backend} {dtype} {sample.id}"
                        if g.is_floating_point():
                            assert_close(g, p, r, what)
                        else:
                            assert torch.equal(g, r), what
                    checked += 1
    return checked


def measure_us(call: Callable[[], Any]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of microseconds in a CUDA graph, the cache flushed before each repeat."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(REPEATS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    parts = statistics.quantiles(times, n=10)
    return statistics.median(times), parts[1], parts[7]


Case = tuple[str, tuple[gpu_model.Product, ...], Callable[[], Any]]


def moved(args: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)


def on_backends(name: str, args: tuple[Any, ...], label: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The op on every backend of the device that takes these arguments, torch last."""
    for backend in _registry.ORDER[args[0].device.type]:
        if _registry.why_not(ops.OPS[name], backend, args) is None:

            def call(backend: str = backend) -> Any:
                with ops.use_backend(backend):
                    return getattr(ops, name)(*args)

            yield f"{label} {backend}", call


def layer_cases(inputs: int, rows: int, columns: int, device: str = "cuda") -> Iterator[Case]:
    """Name, what is multiplied, and the call, of everything that competes on one shape of a layer, in bfloat16."""
    rank = gpu_model.pivoted_rank(rows, columns, 0.5)
    shape = {"inputs": inputs, "in_features": columns, "out_features": rows}
    whole = gpu_model.Product(inputs, columns, rows)

    def chain(*sizes: int, bits: float = 16) -> tuple[gpu_model.Product, ...]:
        return tuple(gpu_model.Product(inputs, a, b, bits) for a, b in itertools.pairwise(sizes))

    low, third = {"rank": rank, "pivoted": True}, min(rows, columns) // 4
    grouped, half = {"bits": 4, "group_size": 128}, [rows, columns]
    pivoted = (gpu_model.Product(inputs, columns, rank), gpu_model.Product(inputs, rank, rows - rank))
    shared = {"rank": 32, "clusters": rows // 4, "axis": 0, "label_bits": 32}
    variants: tuple[tuple[str, str, dict[str, Any], tuple[gpu_model.Product, ...]], ...] = (
        ("lowrank_linear", "low rank 50 %", low, pivoted),
        ("quant_lowrank_linear", "low rank 50 % int4", low | grouped, tuple(p._replace(bits=4.25) for p in pivoted)),
        ("cur_linear", "cur", {"rank": third}, chain(columns, third, third, rows)),
        ("swsc_linear", "swsc", shared, (*chain(columns, rows // 4), *chain(columns, 32, rows))),
        (
            "quant_swsc_linear",
            "swsc int4",
            {"rank": 128, "clusters": rows // 4, "axis": 0} | grouped,
            tuple(p._replace(bits=4.25) for p in (*chain(columns, rows // 4), *chain(columns, 128, rows))),
        ),
        ("sliced_linear", "sliced", {"whole": half}, (whole,)),
        ("quant_linear", "int4", grouped | {"symmetric": True}, (whole._replace(bits=4.125),)),
        ("quant_linear", "int8", {"bits": 8, "group_size": 0, "symmetric": True}, (whole._replace(bits=8),)),
        ("masked_linear", "bitmask", {"format": "bitmask", "value_bits": 0}, (whole._replace(bits=9),)),
        ("masked_linear", "2:4", {"format": "2:4", "value_bits": 0}, (whole._replace(bits=9),)),
        ("masked_linear", "block32", {"format": "block32", "value_bits": 0}, (whole._replace(bits=8),)),
    )
    x, w = (t.to(device) for t in _cases.make("sliced_linear", torch.bfloat16, 0, shape | {"whole": half})[:2])
    yield "dense F.linear", (whole,), lambda: F.linear(x, w)
    r, t = w[:rank], w[rank:, :rank].contiguous()
    # Else it would compile for dynamic sizes from the second shape on, and run eagerly after the eighth.
    torch.compiler.reset()
    yield "low rank torch.compile", pivoted, torch.compile(lambda: F.linear(F.linear(x, r), t), dynamic=False)
    for name, label, fields, products in variants:
        args = moved(_cases.make(name, torch.bfloat16, 0, shape | fields), device)
        for case, call in on_backends(name, args, label):
            yield case, products, call
    two = {"inputs": inputs, "in_features": columns, "layers": [[rows, rank, 1]] * 2}
    for name, label, fields, bits in (
        ("lowrank_linears", "two low rank 50 %", two, 16),
        ("quant_lowrank_linears", "two low rank 50 % int4", two | grouped, 4.25),
    ):
        args = moved(_cases.make(name, torch.bfloat16, 0, fields), device)
        for case, call in on_backends(name, args, label):
            yield case, tuple(p._replace(bits=bits) for p in pivoted * 2), call
    yield from peers(x, w, whole)


def peers(x: Tensor, w: Tensor, whole: gpu_model.Product) -> Iterator[Case]:
    """Other libraries' compressed layers, where they are installed; what cannot run is printed with its reason."""

    def semi_structured() -> Callable[[], Any]:
        keep = w.view(w.shape[0], -1, 4).abs().argsort(2).argsort(2) >= 2
        packed = torch.sparse.to_sparse_semi_structured(torch.where(keep.view_as(w), w, 0))
        return lambda: F.linear(x, packed)

    def torchao(config: str, module: str = "torchao.quantization", **fields: Any) -> Callable[[], Any]:
        layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype, device=w.device)
        layer.weight.data.copy_(w)
        # Without its settings of Inductor: they are global, and would change the torch.compile cases that follow.
        made = getattr(importlib.import_module(module), config)(**fields, group_size=128, set_inductor_config=False)
        importlib.import_module("torchao.quantization").quantize_(layer, made)
        return lambda: layer(x)

    def gemlite() -> Callable[[], Any]:
        try:
            return torchao("UIntxWeightOnlyConfig", "torchao.prototype.quantization", bit_width=4)
        except (ImportError, AttributeError):  # its name before torchao 0.17
            return torchao("GemliteUIntXWeightOnlyConfig", bit_width=4)

    for name, bits, build in (
        ("2:4 torch.sparse", 9, semi_structured),
        ("int4 torchao", 4.25, lambda: torchao("Int4WeightOnlyConfig")),  # compute capability 9.0 and further packages
        ("int4 torchao tiled", 4.25, lambda: torchao("Int4WeightOnlyConfig", int4_packing_format="tile_packed_to_4d")),
        ("int4 gemlite", 4.25, gemlite),
    ):
        try:
            call = build()
            call()
        except Exception as error:  # of another library: any
            print(f"{name:24} not measured: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        else:
            yield name, (whole._replace(bits=bits),), call


def method_cases(rows: int, columns: int, device: str = "cuda") -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """Name, bytes that must move, and the call, of the ops that methods run on one weight."""
    for name, fields in (
        ("column_norms", {"rows": rows, "columns": columns}),
        ("gram_accumulate_", {"rows": 2048, "columns": columns}),
        ("kmeans_assign", {"points": rows, "clusters": 64, "columns": columns}),
        ("kmeans_update", {"points": rows, "clusters": 64, "columns": columns}),
        ("select_pivots", {"rows": rows, "columns": min(columns, 256), "k": min(columns, 64), "method": "qr"}),
        ("sample_without_replacement", {"count": rows * 8}),
        ("split_bregman_step_", {"count": rows * columns, "momentum": True, "coupled": True}),
    ):
        dtype = torch.float32 if name == "split_bregman_step_" else torch.bfloat16
        args = moved(_cases.make(name, dtype, 0, fields), device)
        for case, call in on_backends(name, args, name):
            yield case, ops.OPS[name].cost(*args).bytes, call


def nvidia_smi(query: str) -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    values = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    return dict(zip(query.split(","), values, strict=True))


def device_facts() -> dict[str, str]:
    facts = nvidia_smi("name,driver_version,clocks.max.sm,power.limit")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return facts | {"torch": torch.__version__, "cuda": str(torch.version.cuda), "commit": commit.strip()}


def measure(output: Path | None) -> None:
    print(f"{check_correctness()} samples agree with float64 on this device")
    facts = device_facts()
    known = next((name for name in gpu_model.GPUS if name in facts["name"]), None)
    path = output or ROOT / "bench" / "results" / f"gpu-{facts['name'].replace(' ', '-')}.jsonl"
    gpu = gpu_model.GPUS[known] if known else None
    with path.open("a") as file, torch.no_grad():

        def measure_one(layer: str, inputs: int, name: str, moved_bytes: float, bound: float | None, call: Any) -> None:
            if TMA:
                if not name.endswith("cuda"):
                    return
                name += " TMA"
            median, low, high = measure_us(call)
            row: dict[str, Any] = {"layer": layer, "rows": inputs, "case": name, "us": median}
            row |= {"us_p20": low, "us_p80": high, "gb_s": moved_bytes / median / 1e3, "modelled_bound_us": bound}
            row |= nvidia_smi("clocks.sm,clocks.mem")  # right after the repeats: those of a GPU that has just worked
            print(f"{layer:9} {inputs:5} {name:28} {median:9.1f} us ({low:.1f}..{high:.1f})")
            file.write(json.dumps(row | facts) + "\n")

        for layer, (rows, columns) in gpu_model.LLAMA_3_8B.items():
            for inputs in (1, 16, 512, 2048):
                for name, products, call in layer_cases(inputs, rows, columns):
                    bound = gpu_model.bound_us(products, gpu)[0] if gpu else None
                    measure_one(layer, inputs, name, sum(p.bytes for p in products), bound, call)
            for name, size, call in method_cases(rows, columns):
                bound = size / gpu.gb_s / 1e3 + gpu_model.LAUNCH_US if gpu else None
                measure_one(layer, rows, name, size, bound, call)
    print(f"written: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(gpu_model.GPUS), help="print modelled bounds; no GPU is needed")
    parser.add_argument("--compare", nargs="+", type=Path, help="print JSON lines of this script as a table")
    parser.add_argument("--output", type=Path, help="JSON lines to append to")
    options = parser.parse_args()
    if options.model:
        print(gpu_model.table(options.model))
    elif options.compare:
        lines = [line for path in options.compare for line in path.read_text().splitlines()]
        print(gpu_model.comparison([json.loads(line) for line in lines]))
    elif torch.cuda.is_available():
        measure(options.output)
        if torch.cuda.get_device_capability() in ((9, 0), (10, 0)) and not TMA:
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=os.environ | {"TINYCOMP_TMA": "1"}).returncode)
    else:
        print("no GPU here, nothing was measured; --model H100 prints modelled bounds")


if __name__ == "__main__":
    main()
