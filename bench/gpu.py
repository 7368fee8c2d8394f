"""GPU kernels against what one would otherwise run: `python bench/gpu.py` on a machine with a GPU.

First every contract's samples on the device, under the tests' one tolerance rule; a failure ends the run. Then each
layer shape of a Llama-3-8B block: CUDA and Triton kernels, cuBLAS (F.linear) and torch.compile, in CUDA graphs, the
second-level cache flushed before every repeat. One JSON line per case in bench/results/gpu-<device>.jsonl, with the
modelled bound beside the measured time. Without a GPU: `--model H100` prints the bounds, modelled and unmeasured.
"""

from __future__ import annotations

import argparse
import json
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
from tinycomp.ops import _registry  # noqa: E402

REPEATS = 50


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


def cases(
    inputs: int, rows: int, columns: int
) -> Iterator[tuple[str, tuple[gpu_model.Product, ...], Callable[[], Any]]]:
    """Name, what is multiplied, and the call, of everything that competes on one shape."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16) / shape[-1] ** 0.5

    rank = gpu_model.pivoted_rank(rows, columns, 0.5)
    x, w, r, t = draw(inputs, columns), draw(rows, columns), draw(rank, columns), draw(rows - rank, rank)
    order = torch.randperm(rows, device="cuda").int()
    dense = (gpu_model.Product(inputs, columns, rows),)
    chain = (gpu_model.Product(inputs, columns, rank), gpu_model.Product(inputs, rank, rows - rank))
    yield "dense F.linear", dense, lambda: F.linear(x, w)
    compiled = torch.compile(lambda: F.linear(F.linear(x, r), t))
    yield "low rank torch.compile", chain, compiled
    int4 = ops.quantize(w.cpu(), 4, 128)
    q, scales = int4.qweight.cuda(), int4.scales.cuda()
    for backend in ("cuda", "triton"):
        for name, products, args in (
            ("lowrank_linear", chain, (x, r, t, order, None)),
            ("quant_linear", (dense[0]._replace(bits=4.125),), (x, q, scales, None, None, 4, 128, 0)),
        ):
            if _registry.why_not(ops.OPS[name], backend, args) is not None:
                continue

            def call(name: str = name, args: tuple[Any, ...] = args, backend: str = backend) -> Any:
                with ops.use_backend(backend):
                    return getattr(ops, name)(*args)

            yield f"{name} {backend}", products, call


def device_facts() -> dict[str, str]:
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    values = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    facts = dict(zip(query.split(","), values, strict=True))
    return facts | {"torch": torch.__version__, "cuda": str(torch.version.cuda), "commit": commit.strip()}


def measure(output: Path | None) -> None:
    print(f"{check_correctness()} samples agree with float64 on this device")
    facts = device_facts()
    known = next((name for name in gpu_model.GPUS if name in facts["name"]), None)
    path = output or ROOT / "bench" / "results" / f"gpu-{facts['name'].replace(' ', '-')}.jsonl"
    with path.open("a") as file, torch.no_grad():
        for layer, (rows, columns) in gpu_model.LLAMA_3_8B.items():
            for inputs in (1, 16, 512, 2048):
                for name, products, call in cases(inputs, rows, columns):
                    median, low, high = measure_us(call)
                    row: dict[str, Any] = {"layer": layer, "rows": inputs, "case": name, "us": median}
                    row |= {"us_p20": low, "us_p80": high, "gb_s": sum(p.bytes for p in products) / median / 1e3}
                    if known:
                        row["modelled_bound_us"] = gpu_model.bound_us(products, gpu_model.GPUS[known])[0]
                    print(f"{layer:9} {inputs:5} {name:24} {median:9.1f} us ({low:.1f}..{high:.1f})")
                    file.write(json.dumps(row | facts) + "\n")
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
    else:
        print("no GPU here, nothing was measured; --model H100 prints modelled bounds")


if __name__ == "__main__":
    main()
