"""Compiles csrc/cuda: the library for a GPU (nvcc), and the same sources for the CPU emulation of the tests (g++)."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).parent
# sm_80 code runs on every later GPU through its PTX; the others save that translation.
ARCHITECTURES = ("80", "90a", "100a")
# Files of the library itself, and of kernels that several ops launch.
NO_OPS = ("library", "product_tcgen05", "product_wgmma")
# The stable ABI of torch 2.10: one binary serves that release and later ones.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# What a CUDA build of torch provides and a CPU build does not; enough to link where torch has no CUDA.
_TORCH_CUDA = """
int aoti_torch_get_current_cuda_stream(int d, void** s) { (void)d; (void)s; return 1; }
int torch_c10_cuda_check_msg(int e, const char* f, const char* g, unsigned l, _Bool b, char** m) {
  (void)e; (void)f; (void)g; (void)l; (void)b; (void)m; return 1; }
void torch_c10_cuda_free_error_msg(char* m) { (void)m; }
"""
# What every emulated source includes first and nobody here writes: compiled once.
_PRELUDE = """#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <random>
"""


def cuda_home() -> Path | None:
    """The CUDA toolkit: $CUDA_HOME, the one that pip installed, or the one on the system; None if there is none."""
    pip = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13"
    for home in (Path(os.environ.get("CUDA_HOME", "/nonexistent")), pip, Path("/usr/local/cuda")):
        if (home / "bin" / "nvcc").exists():
            return home
    return None


def why_no_emulation() -> str | None:
    """None if the emulation can be built here, else the reason."""
    if os.uname().machine != "x86_64":
        return f"the CUDA emulation runs on x86-64, this is {os.uname().machine}"
    if shutil.which("g++") is None:
        return "g++ is not installed"
    return None if cuda_home() else "the CUDA headers are not installed (make gpu-tools)"


def sources(csrc: Path = CSRC, only: tuple[str, ...] = ()) -> list[Path]:
    """The .cu files, or those named in `only` and those that belong to no op."""
    files = sorted((csrc / "cuda").glob("*.cu"))
    return [f for f in files if not only or f.stem in (*only, *NO_OPS)]


def included(source: Path) -> set[Path]:
    """A source and the files of the repository that it includes."""
    found, waiting = set(), [source]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            names = re.findall(r'^#include "(.+)"', path.read_text(), re.M)
            waiting += [(path.parent / name).resolve() for name in names]
    return found


def fingerprint(source: Path, *words: str) -> str:
    """Hash of a source, of what it includes and of the words: the name of what is built from them."""
    digest = hashlib.sha256("\n".join(words).encode())
    for path in sorted(included(source.resolve())):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run(*command: str | Path) -> str:
    """Output of a command; raises RuntimeError with what it printed if it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _compile_all(build: Path, files: list[Path], base: list[str | Path], suffix: str = ".o") -> list[Path]:
    """Compile what has changed, on all cores."""
    build.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        target = build / f"{source.stem}-{fingerprint(source, *map(str, base))}{suffix}"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}{suffix}")  # others may build it as well
            run(*base, source, "-o", partial)
            partial.rename(target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, files))


def _precompiled(build: Path, base: list[str | Path]) -> Path:
    """A header of what others wrote, beside its precompiled form for these flags."""
    build.mkdir(parents=True, exist_ok=True)
    words = [_PRELUDE, *map(str, base)]
    header = build / f"prelude-{hashlib.sha256(chr(10).join(words).encode()).hexdigest()[:16]}.h"
    if not header.with_suffix(".h.gch").exists():
        partial = header.with_suffix(f".{os.getpid()}.h")
        partial.write_text(_PRELUDE)
        run(*[w if w != "c++" else "c++-header" for w in base], partial, "-o", partial.with_suffix(".gch"))
        partial.rename(header)
        partial.with_suffix(".gch").rename(header.with_suffix(".h.gch"))
    return header


def emulated_library(build: Path, csrc: Path, only: tuple[str, ...] = (), flags: tuple[str, ...] = ()) -> Path:
    """Build csrc/cuda, or some of its ops, for the emulation; cached by contents. `flags` are g++'s."""
    import torch

    home, where = cuda_home(), Path(torch.__file__).parent
    assert home is not None
    flags = ("-O1", "-std=c++17", "-fPIC", "-w", "-pthread", "-ffp-contract=off", *flags)
    base: list[str | Path] = ["g++", "-c", *flags, TORCH_TARGET, "-DTINYCOMP_EMULATION", "-DTINYCOMP_TORCH"]
    base += ["-isystem", home / "include", "-isystem", where / "include", "-x", "c++"]
    base += ["-include", _precompiled(build / "emulation", base)]
    objects = _compile_all(build / "emulation", [csrc / "emulation" / "settings.cpp", *sources(csrc, only)], base)
    digest = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:16]
    library = build / "emulation" / f"libtinycomp_emulated-{digest}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        run("g++", "-shared", *flags, *objects, "-L", where / "lib", "-ltorch_cpu", "-lc10", "-o", partial)
        partial.rename(library)
    return library


def cuda_library(build: Path, output: Path) -> Path:
    """Build the library that a CUDA build of torch loads; works where torch has no CUDA."""
    import torch

    home, where = cuda_home(), Path(torch.__file__).parent
    assert home is not None
    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    gencode.append(f"-gencode=arch=compute_{ARCHITECTURES[0]},code=compute_{ARCHITECTURES[0]}")
    base = [home / "bin" / "nvcc", "-c", "-Xcompiler=-fPIC,-fvisibility=hidden", *gencode, *_device_flags()]
    objects = _compile_all(build, sources(), base)
    torch_cuda = where / "lib"
    if torch.version.cuda is None:
        torch_cuda = build / "stub"
        torch_cuda.mkdir(exist_ok=True)
        (torch_cuda / "stub.c").write_text(_TORCH_CUDA)
        run("gcc", "-shared", "-fPIC", torch_cuda / "stub.c", "-o", torch_cuda / "libtorch_cuda.so")
    # nvcc finds lib64 itself; in the toolkit of pip it is lib.
    links = ["-L", home / "lib", "-L", where / "lib", "-L", torch_cuda, "-ltorch_cpu", "-ltorch_cuda", "-lc10"]
    run(home / "bin" / "nvcc", "-shared", "-cudart=static", "-Xlinker=-z,defs", *objects, *links, "-o", output)
    return output


def host_objects(build: Path) -> list[Path]:
    """Compile every source as nvcc does for the library, its host code included, without optimization."""
    home = cuda_home()
    assert home is not None
    ptx_only = f"-gencode=arch=compute_{ARCHITECTURES[0]},code=compute_{ARCHITECTURES[0]}"
    flags = _device_flags("-O0")
    return _compile_all(build / "host", sources(), [home / "bin" / "nvcc", "-c", ptx_only, "-Xcicc", "-O0", *flags])


def _device_flags(level: str = "-O3") -> list[str | Path]:
    import torch

    return [
        level,
        "-std=c++17",
        TORCH_TARGET,
        "-DUSE_CUDA",
        "-DTINYCOMP_TORCH",
        "-I",
        Path(torch.__file__).parent / "include",
    ]


def ptx_files(build: Path, architecture: str = ARCHITECTURES[0], only: tuple[str, ...] = ()) -> list[Path]:
    """Compile every source, or as `sources` says, to PTX for one GPU; cached by contents."""
    home = cuda_home()
    assert home is not None
    base = [home / "bin" / "nvcc", "-ptx", f"-arch=sm_{architecture}", *_device_flags()]
    return _compile_all(build / f"sm_{architecture}", sources(only=only), base, ".ptx")


def cubins(build: Path, architecture: str, only: tuple[str, ...] = (), own: bool = False) -> list[tuple[Path, str]]:
    """Assemble kernels for one GPU; gives the cubin of each source and what ptxas said about it.

    Ops are assembled from their sm_80 PTX, as a driver does it, kernels of one GPU from PTX of its own; so are ops with
    `own`, as in the library, which takes minutes for nothing but the conversions in CUDA's headers.
    """
    home = cuda_home()
    assert home is not None

    def assemble(ptx: Path) -> tuple[Path, str]:
        cubin = ptx.with_suffix(f".{architecture}.cubin")
        log = cubin.with_suffix(".log")
        if not log.exists():
            log.write_text(run(home / "bin" / "ptxas", "-v", f"-arch=sm_{architecture}", ptx, "-o", cubin))
        return cubin, log.read_text()

    files = ptx_files(build, architecture if own else ARCHITECTURES[0], only)
    if not own and architecture != ARCHITECTURES[0]:
        files = [f for f in files if f.stem.split("-")[0] not in NO_OPS] + ptx_files(build, architecture, NO_OPS)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(assemble, files))
