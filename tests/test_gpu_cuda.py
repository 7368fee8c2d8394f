"""The CUDA kernels, executed on the CPU emulation: every sample of every contract, all schedules, seeded faults."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward_shapes import AWKWARD, random_shape, unaligned
from test_ops import fresh, run
from tiny_models import tiny_llama
from tolerance import assert_close

import tinycomp as tc
from tinycomp import ops
from tinycomp.kernels_dump import _cases, _record
from tinycomp.layers import CURLinear, DenseLinear, MaskedLinear, QuantLinear, group_, set_ratio_
from tinycomp.models import spec_of, unit_groups
from tinycomp.ops import _registry
from tinycomp.ops._registry import OPS
from tinycomp.ops.quant_linear import pack_int4, round_activations

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "csrc"), str(ROOT / "csrc" / "emulation"), str(ROOT / "bench")]
import backend  # noqa: E402
import gpu_build  # noqa: E402
import gpu_model  # noqa: E402

REASON = gpu_build.why_no_emulation()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = sorted(path.stem for path in gpu_build.sources() if path.stem in OPS)
OF_ONE_GPU = backend.INSTRUCTIONS[1:]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture
def library() -> ctypes.CDLL:
    loaded = backend.load()
    backend.configure(loaded)
    return loaded


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(name: str, args: tuple, what: str) -> None:
    with torch.no_grad():
        with ops.use_backend("cuda-emulated"):
            # A copy starts at an aligned address; the tensor itself need not.
            got = run(name, fresh(args) if name.endswith("_") else list(args))
        with ops.use_backend("torch"):
            # Rows adjacent: torch 2.13 with AMX also multiplies what lies between odd ones of bfloat16, NaN here.
            adjacent = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in fresh(args)]
            in_dtype, reference = run(name, adjacent), run(name, fresh(args, torch.float64))
    for g, t, r in zip(got, in_dtype, reference, strict=True):
        if g.is_floating_point():
            assert_close(g, t, r, what)
        else:
            assert torch.equal(g, r), what


@pytest.mark.parametrize("processors", [1, 108])
@pytest.mark.parametrize("name", KERNELS)
@each_dtype
def test_samples(library: ctypes.CDLL, name: str, dtype: torch.dtype, processors: int) -> None:
    backend.configure(library, processors=processors)  # one processor: the configurations of large grids
    samples = list(OPS[name].samples(dtype))
    ran = [s for s in samples if _registry.why_not(OPS[name], "cuda-emulated", s.args) is None]
    for sample in ran:
        check(name, sample.args, f"{name} {sample.id}")
    assert len(ran) >= len(samples) / 2


@each_dtype
def test_inputs_are_rounded_as_the_contract_says(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Bit for bit, by the identity as a weight: ties, groups of zeros, numbers without an inverse, and no numbers."""
    samples = [s for s in OPS["quant_linear"].samples(dtype) if s.args[-1] == 8]
    assert len(samples) >= 8
    assert [s.id for s in samples if _registry.why_not(OPS["quant_linear"], "cuda-emulated", s.args)] == []
    ties = torch.cat((torch.arange(-63, 64) + 0.5, torch.tensor([127.0]))).repeat(2)
    strange = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    strange[0, 3], strange[1, 200], strange[2, :128], strange[3] = float("inf"), float("nan"), 0, 1e-38
    near = torch.tensor([152.0, 76.0]).repeat(128)  # 76 * (127 / 152): on the other side of 63.5 by a reciprocal
    x = torch.cat((ties[None], strange, near[None], 100 * torch.randn(11, 256))).to(dtype)
    one = torch.ones(256, 1)
    for bits, group in ((8, 0), (4, 0), (8, 10), (4, 32)):
        eye = torch.eye(256, dtype=torch.int8)
        scales = one.expand(256, -(-256 // group) if group else 1).contiguous()
        args = (x, pack_int4(eye) if bits == 4 else eye, scales, None, None, bits, group, 8)
        for rows in (16, 17):  # decode and tiles
            with ops.use_backend("cuda-emulated"):
                y = ops.quant_linear(x[:rows], *args[1:])
            whole = round_activations(x[:rows], group)
            undefined = whole.isnan().any(1, keepdim=True).expand_as(whole)
            assert torch.equal(y.isnan(), undefined), (bits, group, rows)
            assert torch.equal(y[~undefined], whole.to(dtype)[~undefined]), (bits, group, rows)


DECODE = [name for name in OPS if name.endswith(("_linear", "_linears"))]


@pytest.mark.parametrize("name", DECODE)
def test_few_inputs_allocate_nothing_but_the_result(library: ctypes.CDLL, name: str) -> None:
    """After the first call of a stream, which makes its scratch memory; and they take one launch."""
    shapes = [shape for shape in _cases.DEFAULTS[name] if shape["inputs"] <= 16 and "processors" not in shape]
    assert shapes
    op, library.tinycomp_recorded.restype = getattr(torch.ops.tinycomp_emulated, name).default, ctypes.c_char_p
    for shape in shapes:
        args = _cases.make(name, torch.bfloat16, 0, shape)
        _record._call(op, args)
        assert len(_record._call(op, args)[1]) == 1, shape
        library.tinycomp_record(True)
        try:
            _record._call(op, args)
            launches = library.tinycomp_recorded().decode().splitlines()
        finally:
            library.tinycomp_record(False)
        assert len(launches) == 1, (shape, launches)


def test_groups_that_int32_cannot_sum(library: ctypes.CDLL) -> None:
    k = (1 << 17) + 2
    args = (torch.zeros(1, k), torch.zeros(1, k, dtype=torch.int8), torch.ones(1, 1), None, None, 8)
    assert "at most 131072, got 131074" in _registry.why_not(OPS["quant_linear"], "cuda-emulated", (*args, k, 8))
    assert _registry.why_not(OPS["quant_linear"], "cuda-emulated", (*args, 0, 8)) is None


def elastic(model: torch.nn.Module) -> None:
    path = tc.UnitPath.from_scores({g.name: torch.arange(float(g.count)) for g in unit_groups(model)})
    tc.make_elastic_(model, path, uniform=True)
    set_ratio_(model, 0.75)


def replacing(make: Callable[[torch.nn.Linear], torch.nn.Module]) -> Callable[[torch.nn.Module], None]:
    def change(model: torch.nn.Module) -> None:
        for name, module in list(model.model.layers.named_modules()):
            if isinstance(module, torch.nn.Linear):
                model.model.layers.set_submodule(name, make(module))
        group_(model, spec_of(model).shared_inputs)

    return change


def three_factors(module: torch.nn.Linear) -> CURLinear:
    return CURLinear.from_factors(module.weight[:, :7], torch.ones(7, 6), module.weight[:6], module.bias)


def masked(module: torch.nn.Linear) -> MaskedLinear:
    return MaskedLinear.from_linear(module, module.weight > 0, value_bits=8)


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "names"),
    [
        (tc.SVD(ratio=0.6, weighting="none"), ["lowrank_linears"] * 2),
        (tc.SVD(ratio=0.6, weighting="none", bits=8), ["quant_lowrank_linears"] * 2),
        (tc.SWSC(clusters=4, rank=2, weighted=False), ["swsc_linears"] * 2),
        (tc.SWSC(clusters=4, rank=2, weighted=False, factor_bits=8), ["quant_swsc_linears"] * 2),
        (tc.SWSC(clusters=4, rank=2, weighted=False, axis="input"), ["swsc_linears"] * 2),
        (tc.SWSC(clusters=4, rank=2, weighted=False, axis="input", factor_bits=8), ["quant_swsc_linears"] * 2),
        (replacing(three_factors), ["cur_linears"] * 2),
        (tc.Rounding(bits=8), ["quant_linears"] * 2),
        (replacing(lambda m: QuantLinear.from_linear(m, 8, activation_bits=8)), ["quant_linears"] * 2),
        (elastic, ["swsc_linears", "sliced_linears"]),
        (replacing(DenseLinear.from_linear), ["sliced_linears"] * 2),
        (replacing(masked), ["masked_linears"] * 2),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_model_whose_layers_share_their_input(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, change: Any, names: list[str]
) -> None:
    """A sublayer's q, k and v, and gate and up, go in one launch each."""
    model = tiny_llama().eval()
    change(model) if callable(change) else tc.compress_(model, change, progress=False)
    calls: list[str] = []
    for name in dict.fromkeys(names):
        call = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, name=name, call=call: (calls.append(name), call(*args))[1])
    apart = model(torch.arange(7)[None]).logits
    assert not calls
    with ops.use_backend("cuda-emulated"):
        together = model(torch.arange(7)[None]).logits
    assert calls == names * model.config.num_hidden_layers
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


@each_dtype
def test_the_lowest_label_wins_a_tie(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Within a thread, between lanes, between warps and between tiles of 64 centroids."""
    g = torch.Generator().manual_seed(0)
    points = torch.randint(-3, 4, (70, 72), generator=g).to(dtype)
    for period in (1, 2, 8, 32, 64):
        centroids = points[:period].repeat(200 // period, 1)
        check("kmeans_assign", (points, centroids), f"period {period}")
        with ops.use_backend("cuda-emulated"):
            labels, distances = ops.kmeans_assign(points[:period], centroids)
        assert labels.tolist() == list(range(period))
        assert not distances.any()


def layer(m: int, k: int, n: int, rank: int, dtype: torch.dtype, pivoted: bool) -> tuple:
    g = torch.Generator().manual_seed(m)
    x, r, t = (torch.randn(s, generator=g).to(dtype) for s in ((m, k), (rank, k), (n - rank * pivoted, rank)))
    return x, r, t, torch.randperm(n, generator=g).int() if pivoted else None, None


@pytest.mark.parametrize("order", backend.ORDERS)
@pytest.mark.parametrize("lazy_copies", [True, False], ids=["lazy", "eager"])
def test_schedules(library: ctypes.CDLL, order: str, lazy_copies: bool) -> None:
    backend.configure(library, order, 7, lazy_copies, processors=1)
    for m in (7, 33):
        check("lowrank_linear", layer(m, 264, 136, 40, torch.bfloat16, True), f"{order} {m} rows")


@pytest.mark.parametrize("order", backend.ORDERS)
@pytest.mark.parametrize("lazy_copies", [True, False], ids=["lazy", "eager"])
def test_integer_products_on_every_schedule(library: ctypes.CDLL, order: str, lazy_copies: bool) -> None:
    """More steps than stages; copied and unpacked weights, in large and small tiles, and decode."""
    for m, processors, bits, group in ((20, 1, 8, 0), (20, 1, 4, 128), (33, 108, 8, 0), (33, 108, 4, 32), (7, 1, 8, 0)):
        backend.configure(library, order, 7, lazy_copies, processors)
        shape = {"inputs": m, "in_features": 592, "out_features": 40, "bits": bits, "group_size": group}
        args = _cases.make("quant_linear", torch.bfloat16, 0, shape | {"symmetric": False, "activation_bits": 8})
        check("quant_linear", args, f"{order} {shape}")


@pytest.mark.parametrize("m", [1, 7, 16, 17, 33, 129])
@pytest.mark.parametrize("rank", [1, 7, 255])
def test_awkward_shapes(library: ctypes.CDLL, m: int, rank: int) -> None:
    for processors in (1, 108):
        backend.configure(library, processors=processors)
        check("lowrank_linear", layer(m, 193, 300, rank, torch.bfloat16, rank == 7), f"{m} rows, rank {rank}")


@pytest.mark.parametrize("name", KERNELS)
@each_dtype
def test_awkward_shapes_of_every_op(library: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    """Also as views whose rows are not aligned; with one processor, large tiles and tall decode items."""
    for i, shape in enumerate(AWKWARD[name]):
        if name == "split_bregman_step_" and dtype != torch.float32:
            continue  # its state is float32
        args = _cases.make(name, dtype, 0, shape)
        backend.configure(library, processors=(1, 108)[i // 2 % 2])
        check(name, args, f"{name} {shape}")
        check(name, tuple(map(unaligned, args)), f"{name} {shape} unaligned")


@pytest.mark.parametrize("order", backend.ORDERS)
@pytest.mark.parametrize("lazy_copies", [True, False], ids=["lazy", "eager"])
def test_random_shapes_on_every_schedule(library: ctypes.CDLL, order: str, lazy_copies: bool) -> None:
    draw = random.Random(f"{order} {lazy_copies}")
    for name in KERNELS:
        dtype = torch.float32 if name == "split_bregman_step_" else draw.choice(DTYPES)
        shape = random_shape(name, draw)
        backend.configure(library, order, draw.randrange(100), lazy_copies, draw.choice((1, 7, 108)))
        check(name, _cases.make(name, dtype, 0, shape), f"{name} {dtype} {shape}")


@pytest.mark.parametrize("order", backend.ORDERS)
@pytest.mark.parametrize("lazy_copies", [True, False], ids=["lazy", "eager"])
@pytest.mark.parametrize("instructions", OF_ONE_GPU)
def test_products_by_tensor_copies(library: ctypes.CDLL, order: str, lazy_copies: bool, instructions: str) -> None:
    """The kernels of one GPU: more steps than stages, ragged in all sizes; z of an odd rank has padded rows."""
    backend.configure(library, order, 7, lazy_copies, 1, instructions)
    for dtype in DTYPES[1:]:
        check("lowrank_linear", layer(33, 456, 136, 55, dtype, True), f"{order} {instructions}")


@pytest.mark.parametrize("instructions", OF_ONE_GPU)
def test_where_tensor_copies_cannot_be_16_bytes(library: ctypes.CDLL, instructions: str) -> None:
    backend.configure(library, processors=1, instructions=instructions)
    for m, k, n in ((129, 64, 257), (17, 7, 1), (130, 193, 129)):
        g = torch.Generator().manual_seed(m)
        x, w = torch.randn(m, k, generator=g).bfloat16(), torch.randn(n, k, generator=g).bfloat16()
        check("sliced_linear", (x, w, None, k, n), f"{m} x {k} x {n}")


def test_pick_config(library: ctypes.CDLL) -> None:
    def pick(inputs: int, columns: int, rows: int, own: str = "mma") -> tuple[bool, int, bool, int, str]:
        config = (ctypes.c_int64 * 5)()
        sizes = (ctypes.c_int64(v) for v in (inputs, columns, rows))
        library.tinycomp_pick_config(*sizes, 108, backend.INSTRUCTIONS.index(own), config)
        return bool(config[0]), config[1], bool(config[2]), config[3], backend.INSTRUCTIONS[config[4]]

    assert pick(1, 4096, 4096) == pick(16, 4096, 4096) == (True, 2, False, 216, "mma")
    assert pick(1, 4096, 512) == (True, 1, False, 64, "mma")
    assert pick(1, 4096, 14336)[:2] == (True, 2)
    assert pick(17, 4096, 4096)[0] is False
    assert pick(128, 4096, 4096)[2] is False
    assert pick(2048, 4096, 4096)[2] is True
    for own in backend.INSTRUCTIONS:
        assert [pick(m, 4096, 4096, own)[4] for m in (16, 128, 2048)] == ["mma", "mma", own]
    for inputs in (1, 5, 16):
        for rows in (1, 100, 5000):
            decode, tiles, _, blocks, _ = pick(inputs, 64, rows)
            assert decode
            assert 1 <= blocks <= min(3 * 108, -(-rows // (8 * tiles)))
            (modelled,) = gpu_model.launches((gpu_model.Product(inputs, 64, rows),), 108)
            assert modelled.blocks == -(-rows // (8 * tiles))
    for inputs in (17, 128, 2048):
        (modelled,) = gpu_model.launches((gpu_model.Product(inputs, 4096, 4096),), 108)
        side = 128 if pick(inputs, 4096, 4096)[2] else 64
        assert modelled.blocks == -(-inputs // side) * (4096 // side)
