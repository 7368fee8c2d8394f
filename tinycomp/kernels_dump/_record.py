"""What a call of an op launches, without launching it: entries, grids, arguments, and the memory they point to."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import re
import struct
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CSRC = Path(__file__).parent.parent.parent / "csrc"
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# Letters of csrc/emulation/settings.cpp -> kind, format of the bits.
_KINDS = {"p": ("ptr", "<Q"), "l": ("i64", "<q"), "i": ("i32", "<i"), "f": ("f32", "<f")}
# Kinds of Triton's signatures -> ours.
_TRITON_KINDS = {"i32": "i32", "i64": "i64", "fp32": "f32"}


class Launch(NamedTuple):
    """One launch; an argument is its kind and its value, an address for "ptr"."""

    ptx: str
    entry: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    smem_bytes: int
    args: list[tuple[str, int | float]]


class Recording(NamedTuple):
    """The launches of one call, every tensor that it made, and what it returned."""

    launches: list[Launch]
    made: list[Tensor]
    returned: Any


class _Made(TorchDispatchMode):
    """Keeps the tensors that operations inside return, so that their memory is not used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.tensors += [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        return result


def _call(op: Any, args: tuple[Any, ...]) -> tuple[Any, list[Tensor]]:
    """Run an op's CPU implementation; what it returned, and the tensors that it made on the way."""
    with torch.no_grad(), _Made() as made:
        return op.redispatch(_CPU, *args), made.tensors


def _from_checkout(name: str) -> Any:
    if not (CSRC / "emulation").is_dir():
        raise RuntimeError(f"kernels_dump: {CSRC} is missing, the CUDA sources come with a checkout; run it there")
    for folder in (CSRC, CSRC / "emulation"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def why_not(backend: str) -> str | None:
    """None if the kernels of a backend can be compiled here, else the reason."""
    if backend == "triton":
        missing = importlib.util.find_spec("triton") is None
        return "triton is not installed; install it with make gpu-tools" if missing else None
    gpu_build = _from_checkout("gpu_build")
    home = gpu_build.cuda_home()
    if home is None:
        return "nvcc was not found; install it with make gpu-tools, or set CUDA_HOME to a CUDA toolkit"
    return gpu_build.why_no_emulation()


class CudaRecorder:
    """Records the launches of csrc/cuda with the host code of the emulation, which is that of the library."""

    def __init__(self) -> None:
        gpu_build, self.backend = _from_checkout("gpu_build"), _from_checkout("backend")
        self.library = self.backend.load()
        self.library.tinycomp_recorded.restype = ctypes.c_char_p
        address = self.library.tinycomp_emulated_counters
        address.restype = ctypes.c_void_p
        self.counters = torch.frombuffer((ctypes.c_int32 * 8).from_address(address()), dtype=torch.int32)
        self.modules = [path.read_text() for path in gpu_build.ptx_files(CSRC.parent / "build")]

    def record(self, name: str, args: tuple[Any, ...], processors: int) -> Recording:
        """What the CUDA kernels of an op launch on a device with so many processors."""
        self.backend.configure(self.library, processors=processors)
        self.library.tinycomp_record(True)
        try:
            returned, made = _call(getattr(torch.ops.tinycomp_emulated, name).default, args)
            lines = self.library.tinycomp_recorded().decode().splitlines()
        finally:
            self.library.tinycomp_record(False)
        return Recording([self._launch(line) for line in lines], [*made, self.counters], returned)

    def _launch(self, line: str) -> Launch:
        entry, *words = line.split()
        sizes, found = [int(word) for word in words[:7]], []
        for kind, bits in (word.split(":") for word in words[7:]):
            name, form = _KINDS[kind]
            found.append((name, struct.unpack_from(form, struct.pack("<Q", int(bits)))[0]))
        (module,) = (text for text in self.modules if f".entry {entry}(" in text)
        return Launch(only_entry(module, entry), entry, tuple(sizes[:3]), tuple(sizes[3:6]), sizes[6], found)


def only_entry(module: str, entry: str) -> str:
    """A PTX module with one of its kernels, and the variables that this kernel names."""
    start = re.search(rf"^\.visible \.entry {entry}\(", module, re.M)
    assert start is not None
    kernel = module[start.start() : module.index("\n}", start.end()) + 3]
    head = re.findall(r"^\.(?:version|target|address_size) .*", module, re.M)
    variables = re.findall(r"^\.(?:extern|global|shared|const)\b[^;]*?([\w$]+)(?:\[\d*\])?(?: =[^;]*)?;", module, re.M)
    named = [v for v in variables if v in kernel]
    kept = [re.search(rf"^\.(?:extern|global|shared|const)\b[^;]*?{v}\b[^;]*;", module, re.M) for v in named]
    return "\n".join([*head, "", *(k[0] for k in kept if k), "", kernel])


class _Target:
    """A driver that only names the GPU to compile for; there is no device behind it."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 80, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class TritonRecorder:
    """Compiles the Triton kernels for sm_80, each in the first configuration of its autotuner, and records launches."""

    def __init__(self) -> None:
        os.environ.pop("TRITON_INTERPRET", None)
        import triton
        from triton.runtime.autotuner import Autotuner
        from triton.runtime.jit import JITFunction

        triton.runtime.driver.set_active(_Target())
        importlib.import_module("tinycomp.triton_kernels")
        self._compile = JITFunction.run
        self._launches: list[Launch] = []

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            compiled = self._compile(kernel, *args, grid=grid, warmup=True, **options)
            self._launches.append(
                _triton_launch(compiled, dict(zip(kernel.arg_names, args, strict=False)) | options, grid)
            )
            return compiled

        def first(tuner: Any, *args: Any, **options: Any) -> Any:
            return tuner.fn.run(*args, **options, **tuner.configs[0].all_kwargs())

        JITFunction.run, Autotuner.run = run, first

    def record(self, name: str, args: tuple[Any, ...], processors: int) -> Recording:
        """What the Triton kernels of an op launch; their grids do not depend on the number of processors."""
        self._launches.clear()
        returned, made = _call(getattr(torch.ops.tinycomp_triton, name).default, args)
        from tinycomp.triton_kernels._stages import COUNTERS

        return Recording(list(self._launches), [*made, *COUNTERS.values()], returned)


def _triton_launch(compiled: Any, values: dict[str, Any], grid: Any) -> Launch:
    """Arguments as the entry takes them: constants and absent ones are compiled in, and two pointers come last."""
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.num_ctas != 1:
        raise RuntimeError(
            f"kernels_dump: {metadata.name} wants scratch memory or a cluster, which is not written down"
        )
    args: list[tuple[str, int | float]] = []
    for name, kind in compiled.src.signature.items():
        if kind.startswith("*"):
            args.append(("ptr", values[name].data_ptr()))
        elif kind != "constexpr":
            args.append((_TRITON_KINDS[kind], values[name]))
    args += [("ptr", 0), ("ptr", 0)]
    sizes = tuple(grid(values) if callable(grid) else grid)
    grid3, block = sizes + (1,) * (3 - len(sizes)), (32 * metadata.num_warps, 1, 1)
    return Launch(compiled.asm["ptx"], metadata.name, grid3, block, metadata.shared, args)
