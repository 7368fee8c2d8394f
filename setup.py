"""Builds the native library when torch, pybind11 and a compiler are at hand; installs without it otherwise."""

import os
import runpy
import sys
from glob import glob
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# `make sanitize`: checks of addresses and undefined behaviour compiled in.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g"]
SANITIZED = SANITIZE if os.environ.get("TINYCOMP_SANITIZE") == "1" else []
REQUIRED = os.environ.get("TINYCOMP_REQUIRE_NATIVE") == "1"


def torch_folder():
    """Where torch is, or None. Importing it takes seconds, and pip runs this file three times."""
    found = find_spec("torch")
    return None if found is None else Path(found.origin).parent


def native():
    """The extension tinycomp._C in a list, or an empty list and one line that says why.

    Compilation may fail: setuptools then warns and goes on, because every op has a reference in torch.
    """
    torch_dir = torch_folder()
    try:
        import pybind11
        from pybind11.setup_helpers import ParallelCompile

        if torch_dir is None:
            raise ImportError("no torch")
    except ImportError as error:
        if REQUIRED:
            raise
        print(f"tinycomp: native library skipped ({error}); `pip install --no-build-isolation .` builds it")
        return []
    ParallelCompile("TINYCOMP_BUILD_JOBS", default=os.cpu_count() or 1).install()
    return [
        Extension(
            "tinycomp._C",
            sources=["csrc/module.cpp", *sorted(glob("csrc/common/*.cpp") + glob("csrc/cpu/*.cpp"))],
            depends=glob("csrc/common/*.h"),
            include_dirs=[str(torch_dir / "include"), pybind11.get_include()],
            library_dirs=[str(torch_dir / "lib")],
            libraries=["torch_cpu"],
            runtime_library_dirs=["$ORIGIN/../torch/lib"],
            # The stable ABI of torch 2.10: one binary serves that release and later ones.
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
            # Without contraction, sampling draws the same items on every processor. GCC 12 warns about uninitialised
            # variables in its own AVX-512 header.
            extra_compile_args=[
                *("-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off"),
                *("-fno-math-errno", "-fno-trapping-math"),  # loops that compare floats become vector code
                *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
                *SANITIZED,
            ],
            extra_link_args=SANITIZED,
            optional=not REQUIRED,
        )
    ]


class BuildWithCuda(build_ext):
    """Also builds the CUDA library, where nvcc is found and torch has CUDA (or TINYCOMP_BUILD_CUDA=1 asks for it)."""

    def run(self):
        super().run()
        if torch_folder() is None:
            return print("tinycomp: CUDA library skipped (no torch)")
        sys.path.insert(0, "csrc")
        import gpu_build

        cuda = runpy.run_path(str(torch_folder() / "version.py"))["cuda"]
        wanted = cuda is not None or os.environ.get("TINYCOMP_BUILD_CUDA") == "1"
        if not wanted or gpu_build.cuda_home() is None:
            return print("tinycomp: CUDA library skipped (torch has no CUDA, or nvcc was not found)")
        output = Path("tinycomp" if self.inplace else Path(self.build_lib) / "tinycomp")
        try:
            gpu_build.cuda_library(Path(self.build_temp) / "cuda", output / "_C_cuda.so")
        except RuntimeError as error:
            if REQUIRED:
                raise
            print(f"tinycomp: CUDA library skipped ({error})")


setup(ext_modules=native(), cmdclass={"build_ext": BuildWithCuda})
