"""The dump of the GPU kernels: launches fit the PTX, and CUDA ones, run from the files, give the results."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_ops import fresh, run
from tolerance import assert_close

from tinycomp import kernels_dump, ops
from tinycomp.kernels_dump import _cases, _record
from tinycomp.kernels_dump.__main__ import main as command_line

gpu_build = _record._from_checkout("gpu_build")
ROOT = Path(__file__).parent.parent
NO_CUDA = _record.why_not("cuda")
needs_nvcc = pytest.mark.skipif(NO_CUDA is not None, reason=str(NO_CUDA))
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (make gpu-tools)"
)
WIDTHS = {"ptr": 64, "i64": 64, "i32": 32, "f32": 32}
FORMATS = {"i64": "<q", "i32": "<i", "f32": "<f"}


def parameters(ptx: str, entry: str) -> list[str]:
    """Types of the parameters of an entry, as the PTX declares them."""
    found = re.search(rf"\.entry\s+{re.escape(entry)}\s*\((.*?)\)", ptx, re.S)
    assert found, f"no entry {entry}"
    return re.findall(r"\.param\s+(?:\.align \d+ )?\.(\w+)", found[1])


def check_case(folder: Path, case: str) -> dict[str, Any]:
    """The description of a case, held against its PTX and its files."""
    found = json.loads((folder / f"{case}.json").read_text())
    assert list(found) == ["op", "backend", "dtype", "shape", "launches", "buffers", "expected"]
    assert found["launches"], case
    for name, buffer in found["buffers"].items():
        assert set(buffer) == {"file", "role", "dtype", "shape"}
        assert buffer["role"] in ("in", "out", "scratch")
        numbers = np.load(folder / buffer["file"])
        assert list(numbers.shape) == buffer["shape"]
        assert str(numbers.dtype) == {"bfloat16": "uint16"}.get(buffer["dtype"], buffer["dtype"]), name
    for name, file in found["expected"].items():
        assert found["buffers"][name]["role"] == "out"
        assert list(np.load(folder / file).shape) == found["buffers"][name]["shape"], name
    used = set()
    for launch in found["launches"]:
        assert set(launch) == {"ptx", "entry", "grid", "block", "smem_bytes", "args"}
        ptx = (folder / launch["ptx"]).read_text()
        assert ".target sm_80" in ptx
        types = parameters(ptx, launch["entry"])
        assert len(types) == len(launch["args"]), launch["entry"]
        for kind, arg in zip(types, launch["args"], strict=True):
            assert int(kind[1:]) == WIDTHS[arg["kind"]], (launch["entry"], kind, arg)
            assert (kind[0] == "f") == (arg["kind"] == "f32"), (kind, arg)
            if arg["kind"] == "ptr":
                assert set(arg) == {"kind", "buffer", "offset_bytes"}
                size = np.load(folder / found["buffers"][arg["buffer"]]["file"]).nbytes
                assert 0 <= arg["offset_bytes"] < size
                used.add(arg["buffer"])
            else:
                assert set(arg) == {"kind", "value"}
        threads = int(np.prod(launch["block"]))
        assert int(re.search(r"\.(?:maxntid|reqntid) (\d+)", ptx)[1]) == threads
        assert len(launch["grid"]) == len(launch["block"]) == 3
        assert all(n >= 1 for n in launch["grid"])
        assert ("extern .shared" in ptx) == (launch["smem_bytes"] > 0), "dynamic shared memory"
    assert used == set(found["buffers"])
    return found


def replay(library: ctypes.CDLL, folder: Path, found: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Run the launches of a case in the emulation, from its files alone; gives the buffers afterwards."""
    memory = {k: torch.from_numpy(np.load(folder / b["file"])).clone() for k, b in found["buffers"].items()}
    library.tinycomp_replay.restype = ctypes.c_char_p
    for launch in found["launches"]:
        words = []
        for arg in launch["args"]:
            if arg["kind"] == "ptr":
                words.append(memory[arg["buffer"]].data_ptr() + arg["offset_bytes"])
            else:
                packed = struct.pack(FORMATS[arg["kind"]], arg["value"])
                words.append(int.from_bytes(packed, "little"))
        kernel = ctypes.cast(library[launch["entry"]], ctypes.c_void_p)
        sizes = (ctypes.c_uint * 6)(*launch["grid"], *launch["block"])
        bits = (ctypes.c_uint64 * len(words))(*words)
        error = library.tinycomp_replay(kernel, sizes, ctypes.c_size_t(launch["smem_bytes"]), bits)
        assert error is None, error.decode()
    return memory


def named(found: dict[str, Any], args: tuple[Any, ...], values: list[Any]) -> dict[str, torch.Tensor]:
    """What an op returns, or the arguments that it changed, under the names of the description."""
    results = run(found["op"], values)
    if getattr(torch.ops.tinycomp, found["op"]).default._schema.returns:
        return dict(zip(found["expected"], results, strict=True))
    schema = getattr(torch.ops.tinycomp, found["op"]).default._schema.arguments
    tensors = [a.name for a, value in zip(schema, args, strict=True) if isinstance(value, torch.Tensor)]
    return dict(zip(tensors, results, strict=True))


def typed(numbers: torch.Tensor, dtype: str) -> torch.Tensor:
    return numbers.view(torch.bfloat16) if dtype == "bfloat16" else numbers


@pytest.fixture(scope="module")
def cuda_dump(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("cuda")
    return folder, kernels_dump.dump(folder, backends=["cuda"])


@needs_nvcc
@pytest.mark.parametrize("name", sorted(_cases.DEFAULTS))
def test_cuda_launches_run_from_their_files(name: str, cuda_dump: tuple[Path, list[str]]) -> None:
    folder, cases = cuda_dump
    library = _record._from_checkout("backend").load()
    mine = [case for case in cases if case.startswith(f"{name}-")]
    assert len(mine) >= len(_cases.DEFAULTS[name])
    for case in mine:
        found = check_case(folder, case)
        assert found["shape"].get("inputs", 17) > 16 or len(found["launches"]) == 1, f"{case}: launches of decode"
        memory = replay(library, folder, found)
        args = _cases.make(name, getattr(torch, found["dtype"]), 0, found["shape"])
        with ops.use_backend("torch"):
            in_dtype, wide = named(found, args, fresh(args)), named(found, args, fresh(args, torch.float64))
        for key, file in found["expected"].items():
            dtype = found["buffers"][key]["dtype"]
            got = typed(memory[key], dtype)
            reference = typed(torch.from_numpy(np.load(folder / file)), dtype)
            if name == "sample_without_replacement":
                assert torch.equal(got, reference), case
                assert torch.equal(got.argsort(stable=True), in_dtype[key]), case
            elif got.is_floating_point():
                assert_close(got, in_dtype[key], wide[key], f"{case} {key}")
                assert torch.equal(reference, wide[key].to(reference.dtype)), f"{case} {key}: the reference"
            else:
                assert torch.equal(got, reference), f"{case} {key}"


@needs_nvcc
def test_dumped_ptx_assembles(cuda_dump: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, cases = cuda_dump
    modules = {(folder / f"{case}.ptx").read_text(): case for case in cases}
    assert len(modules) > len(_cases.DEFAULTS)
    for text, case in modules.items():
        assert text.count(".entry") == 1, case
    for name in _cases.DEFAULTS:
        case = next(case for case in cases if case.startswith(f"{name}-"))
        tool = gpu_build.cuda_home() / "bin" / "ptxas"
        gpu_build.run(tool, "-arch=sm_80", folder / f"{case}.ptx", "-o", tmp_path / "cubin")


@needs_nvcc
def test_a_wrong_description_is_noticed(cuda_dump: tuple[Path, list[str]]) -> None:
    folder, _ = cuda_dump
    library = _record._from_checkout("backend").load()
    found = check_case(folder, "lowrank_linear-cuda-float32-1")
    right = replay(library, folder, found)["y"]
    first = found["launches"][0]["args"]
    at = next(i for i, arg in enumerate(first) if arg.get("buffer") == "r")
    first[at]["offset_bytes"] += 4
    assert not torch.equal(replay(library, folder, found)["y"], right)


@needs_triton
def test_triton_launches_fit_their_ptx(tmp_path: Path) -> None:
    shapes = {name: found[:1] for name, found in _cases.DEFAULTS.items()}
    shapes["swsc_linear"] = _cases.DEFAULTS["swsc_linear"][1::2]  # labels as a weight, in a launch of their own and not
    (tmp_path / "shapes.json").write_text(json.dumps(shapes))
    command = f"""
import json, torch
from pathlib import Path
from tinycomp.kernels_dump import dump
folder = Path({str(tmp_path)!r})
shapes = json.loads((folder / "shapes.json").read_text())
half = [name for name in shapes if name != "split_bregman_step_"]
print(*dump(folder, half, ["triton"], shapes, [torch.bfloat16]))
print(*dump(folder, ["split_bregman_step_"], ["triton"], shapes, [torch.float32]))
"""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", command], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cases = done.stdout.split()
    assert {case.split("-")[0] for case in cases} == set(_cases.DEFAULTS)
    for case in cases:
        check_case(tmp_path, case)


def test_every_kernel_is_dumped() -> None:
    kernels = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")} & set(ops.OPS)
    assert set(_cases.DEFAULTS) == kernels
    for name, shapes in _cases.DEFAULTS.items():
        for shape in shapes:
            _cases.make(name, torch.float32, 0, shape)


def test_without_compilers_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_build, "cuda_home", lambda: None)
    with pytest.raises(RuntimeError, match="nvcc was not found; install it with make gpu-tools"):
        kernels_dump.dump(tmp_path, backends=["cuda"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        kernels_dump.dump(tmp_path, backends=["triton"])


def test_command_line_refuses_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line([str(tmp_path), "--op", "linear"]) == 1
    assert "op 'linear' is not known, allowed column_norms" in capsys.readouterr().err
    words = [sys.executable, "-m", "tinycomp.kernels_dump", str(tmp_path), "--shapes", str(tmp_path / "none.json")]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, "none.json" in done.stderr) == (1, True)


@needs_nvcc
def test_shapes_of_a_file(tmp_path: Path) -> None:
    shape = {"inputs": 3, "in_features": 40, "out_features": 24, "rank": 8, "pivoted": True}
    kernels_dump.dump(tmp_path, ["lowrank_linear"], ["cuda"], {"lowrank_linear": [shape]}, [torch.float16], seed=3)
    assert check_case(tmp_path, "lowrank_linear-cuda-float16-0")["shape"] == shape
    with pytest.raises(ValueError, match=r"required \['in_features', 'inputs', 'out_features', 'pivoted', 'rank'\]"):
        kernels_dump.dump(tmp_path, ["lowrank_linear"], ["cuda"], {"lowrank_linear": [{"inputs": 3}]})
