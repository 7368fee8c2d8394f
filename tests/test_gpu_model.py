"""The modelled bounds: what they must obey whatever the numbers are, and that they are labelled."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tinycomp.kernels_dump import _cases

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))
import gpu  # noqa: E402
import gpu_model  # noqa: E402
from gpu_model import GPUS, Product  # noqa: E402


@pytest.mark.parametrize("name", sorted(GPUS))
def test_bounds_are_bounds(name: str) -> None:
    gpu = GPUS[name]
    for inputs in (1, 16, 17, 512, 4096):
        product = Product(inputs, 4096, 4096)
        time, limit, waves = gpu_model.bound_us((product,), gpu)
        assert time >= gpu_model.LAUNCH_US + product.bytes / gpu.gb_s / 1e3
        assert time >= gpu_model.LAUNCH_US + product.flops / gpu.tflops / 1e6
        assert waves > 0
        assert limit == ("bytes" if inputs <= 17 else limit)
    assert gpu_model.bound_us((Product(4096, 4096, 4096),), gpu)[1] == "compute"


def test_decode_of_a_chain_is_one_launch() -> None:
    chain = (Product(16, 4096, 1024), Product(16, 1024, 3072))
    assert [launch.kernel for launch in gpu_model.launches(chain, 108)] == ["chain2_decode"]
    more = tuple(p._replace(inputs=17) for p in chain)
    assert [launch.kernel for launch in gpu_model.launches(more, 108)] == ["product_tiles"] * 2


@pytest.mark.parametrize("name", sorted(GPUS))
def test_one_launch_saves_the_others(name: str) -> None:
    chain = (Product(1, 4096, 1024), Product(1, 1024, 3072))
    one, three = gpu_model.group_us((chain,) * 3, GPUS[name]), 3 * gpu_model.bound_us(chain, GPUS[name])[0]
    assert three - one >= 2 * gpu_model.LAUNCH_US
    assert one >= gpu_model.LAUNCH_US + 3 * sum(p.bytes for p in chain) / GPUS[name].gb_s / 1e3


def test_what_mma_reaches_matters_where_products_are_the_limit() -> None:
    for inputs, slower in ((1, False), (4096, True)):
        chain, gpu = (Product(inputs, 4096, 4096),), GPUS["H100"]
        assert (gpu_model.bound_us(chain, gpu, gpu.mma_share)[0] > gpu_model.bound_us(chain, gpu)[0]) == slower


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
def test_pivoted_rank_keeps_the_ratio(ratio: float) -> None:
    rows, columns = 14336, 4096
    rank = gpu_model.pivoted_rank(rows, columns, ratio)
    assert rank * (rows + columns - rank) <= ratio * rows * columns
    assert (rank + 1) * (rows + columns - rank - 1) > ratio * rows * columns


def test_script_says_when_nothing_was_measured() -> None:
    done = subprocess.run([sys.executable, BENCH / "gpu.py"], capture_output=True, text=True, check=True)
    first = done.stdout.splitlines()[0]
    assert "nothing was measured" in first or "samples agree" in first


def test_command_line_prints_the_bounds_and_measurements_beside_them(tmp_path: Path) -> None:
    def bench(*words: str) -> list[str]:
        command = [sys.executable, "-m", "tinycomp", "bench", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    lines = bench("--model-gpu", "H100")
    assert "modelled, unmeasured" in lines[0]
    assert "modelled, unmeasured" in lines[-1]
    for word in ("MB", "GFLOP", "regs", "shared KB", "occupancy", "waves", "limit", "bound us", "dense us", "int4 us"):
        assert word in lines[1], word
    assert sum(re.match(r"(q, o|k, v|gate, up|down) +\d", line) is not None for line in lines) == 16
    row = {"name": "NVIDIA X", "layer": "q, o", "rows": 1, "case": "dense F.linear", "us": 20.0, "us_p20": 19.0}
    row |= {"us_p80": 22.0, "modelled_bound_us": 13.0}
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    files[0].write_text(json.dumps(row) + "\n")
    files[1].write_text(json.dumps(row | {"case": "lowrank_linear cuda", "us": 10.0, "modelled_bound_us": None}) + "\n")
    head, dense, ours, note = bench("--compare", *map(str, files))
    assert head.index("measured us") < head.index("modelled bound us")
    assert dense.split()[-6:] == ["F.linear", "20.0", "19.0..22.0", "13.0", "65%", "1.00"]
    assert ours.split()[-5:] == ["10.0", "19.0..22.0", "-", "-", "2.00"]
    assert "modelled" in note


def test_every_op_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """The cases of the measurement, built and called on the CPU: every op, and dense and compiled beside it."""
    layers = {}
    for name, products, call in gpu.layer_cases(17, 256, 128, "cpu"):
        assert sum(p.bytes for p in products) > 0
        layers[name] = call
    assert all(
        call().shape == (17, 512 if name.startswith("two") else 256)
        for name, call in layers.items()
        if "compile" not in name
    )
    assert {"dense F.linear", "low rank torch.compile", "low rank 50 % cpu", "int4 torch", "2:4 torch"} <= set(layers)
    methods = {name: call for name, size, call in gpu.method_cases(256, 128, "cpu") if size > 0}
    assert all(call() is not None or "_ " in name for name, call in methods.items())
    assert {n.split()[0] for n in methods} == {n for n in _cases.DEFAULTS if not n.endswith(("linear", "linears"))}
    # 2:4 of torch needs a GPU: it is named with its reason, not left out
    assert "2:4 torch.sparse         not measured: RuntimeError" in capsys.readouterr().out
