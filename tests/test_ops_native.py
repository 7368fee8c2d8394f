"""The native library as a file: what it links, which instructions it uses, and life without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tinycomp.ops import _registry

INSTRUCTION_SETS = ("amx", "avx512bf16", "avx512vbmi2", "avx512vnni", "avx512", "avx2", "portable")
# Ops need torch alone; blocking the rest proves it, and saves its import.
WITHOUT_TRANSFORMERS = "import sys; sys.modules['transformers'] = None\n"


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process that has torch and not transformers, with tests/ on its path."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)} | env
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_TRANSFORMERS + code]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("value", "expected"), [("torch", "['torch']"), ("fast", "ValueError: TINYCOMP_BACKEND: got 'fast'")]
)
def test_environment_variable(value: str, expected: str) -> None:
    code = "from tinycomp import ops; print(sorted({r['backend'] for r in ops.status() if r['active']}))"
    done = python(code, TINYCOMP_BACKEND=value)
    assert expected in done.stdout + done.stderr


def test_everything_runs_without_the_native_library() -> None:
    code = """
import torch
sys.modules["tinycomp._C"] = None
from tinycomp import ops
from tinycomp.ops._registry import OPS
for name, op in OPS.items():
    sample = next(op.samples(torch.float32))
    getattr(ops, name)(*sample.args)
rows = [r for r in ops.status() if r["backend"] == "cpu"]
assert not any(r["available"] for r in rows) and all("not loaded" in r["reason"] for r in rows), rows
try:
    with ops.use_backend("cpu"):
        ops.column_norms(torch.ones(2, 2))
except RuntimeError as error:
    print(error)
"""
    done = python(code)
    assert "the native library is not loaded" in done.stdout, done.stderr


def test_native_library_uses_only_the_stable_interface() -> None:
    native = pytest.importorskip("tinycomp._C", reason="the native library is not built")
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    listing = subprocess.run(
        [nm, "-D", "--undefined-only", native.__file__], capture_output=True, text=True, check=True
    )
    symbols = {line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()}
    torch_cpp = [
        s for s in symbols if s.startswith("_Z") and any(n in s for n in ("2at", "3c10", "5torch", "pybind11"))
    ]
    assert not torch_cpp
    assert any(s.startswith("aoti_torch_") for s in symbols)
    assert native.build_info()["instruction_set"] in INSTRUCTION_SETS
    assert all(isinstance(v, bool) for v in native.cpu_features().values())


@pytest.mark.parametrize("instructions", [*INSTRUCTION_SETS, "mmx"])
def test_every_instruction_set_computes_the_same_contract(instructions: str) -> None:
    native = pytest.importorskip("tinycomp._C", reason="the native library is not built")
    feature = {"avx512": "avx512f"}.get(instructions, instructions)
    if instructions != "mmx" and not native.cpu_features().get(feature, True):
        pytest.skip(f"this processor has no {instructions}")
    done = python("import native_samples; native_samples.main()", TINYCOMP_CPU_INSTRUCTIONS=instructions)
    if instructions == "mmx":
        assert "TINYCOMP_CPU_INSTRUCTIONS: got 'mmx', allowed" in done.stderr
    else:
        assert done.stdout.split() == [instructions, "same"], done.stderr


def test_wrong_native_library_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"column_norms has signature \(int\) -> \(Tensor\), the contract says"):
        _registry._check_signatures({"column_norms": "(int) -> (Tensor)"})
    with pytest.raises(RuntimeError, match="kernel for 'nothing'"):
        _registry._check_signatures({"nothing": "() -> ()"})
