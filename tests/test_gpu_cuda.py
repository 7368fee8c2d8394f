"""The CUDA kernels, executed on the CPU emulation: every sample of every contract, all schedules, seeded faults."""

from __future__ import annotations

from collections.abc import Iterator

import emulation
import pytest
import torch
from test_ops import fresh, run
from tolerance import assert_close

from tinycomp import ops
from tinycomp.ops import _registry
from tinycomp.ops._registry import OPS, Sample

REASON = emulation.gpu_build.why_no_emulation()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = sorted(path.stem for path in emulation.gpu_build.sources() if path.stem in OPS)


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    emulation.configure()
    torch.use_deterministic_algorithms(True)  # uninitialised outputs are NaN
    yield
    torch.use_deterministic_algorithms(False)


def check(name: str, sample: Sample) -> None:
    with ops.use_backend("cuda-emulated"), torch.no_grad():
        got = run(name, fresh(sample.args))
    with ops.use_backend("torch"), torch.no_grad():
        in_dtype = run(name, fresh(sample.args))
        reference = run(name, fresh(sample.args, torch.float64))
    for g, t, r in zip(got, in_dtype, reference, strict=True):
        if g.is_floating_point():
            assert_close(g, t, r, f"{name} {sample.id}")
        else:
            assert torch.equal(g, r), f"{name} {sample.id}"


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_samples(name: str, dtype: torch.dtype) -> None:
    ran = 0
    for sample in OPS[name].samples(dtype):
        if _registry.why_not(OPS[name], "cuda-emulated", sample.args) is None:
            check(name, sample)
            ran += 1
    assert ran or not list(OPS[name].samples(dtype))
