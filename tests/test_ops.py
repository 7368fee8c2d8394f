"""Every op, backend, dtype and sample of the registry against the contract's reference, and the registry itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tolerance import assert_close
from torch import Tensor, nn

from tinycomp import ops
from tinycomp.ops import _registry
from tinycomp.ops._registry import OPS, Op, Sample

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("cpu", "torch")
each_op = pytest.mark.parametrize("name", sorted(OPS))
each_backend = pytest.mark.parametrize("backend", BACKENDS)
differentiable = pytest.mark.parametrize("name", sorted(n for n, op in OPS.items() if op.backward))


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """A kernel that leaves an output unwritten must not pass by luck."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def runnable(op: Op, backend: str) -> None:
    reason = _registry.why_not(op, backend)
    if reason is not None:
        pytest.skip(reason)


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def fresh(args: tuple[Any, ...], dtype: torch.dtype | None = None) -> list[Any]:
    """Arguments that an in-place op may change, layout kept; floating ones in `dtype` if given."""
    copied = []
    for value in args:
        if isinstance(value, Tensor):
            copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)
            value = copy.to(dtype) if dtype is not None and is_float(copy) else copy
        copied.append(value)
    return copied


def run(name: str, args: list[Any]) -> list[Tensor]:
    """Outputs of an op; of an in-place op, its floating and integer arguments after the call."""
    out = getattr(ops, name)(*args)
    if out is None:
        return [a for a in args if isinstance(a, Tensor)]
    return list(out) if isinstance(out, tuple) else [out]


def samples(name: str, dtype: torch.dtype = torch.float32) -> list[Sample]:
    found = list(OPS[name].samples(dtype))
    if not found:
        pytest.skip(f"{name} has no samples in {dtype}")
    return found


@each_backend
def test_inputs_are_rounded_by_a_division(backend: str) -> None:
    """76 * (127 / 152) is below 63.5 by a division, and above it by a reciprocal, which is rounded twice."""
    runnable(OPS["quant_linear"], backend)
    x, w = torch.tensor([[152.0, 76.0, -76.0, 0.0]]), torch.eye(4, dtype=torch.int8)
    with ops.use_backend(backend):
        y = ops.quant_linear(x, w, torch.ones(4, 1), None, None, 8, 0, 8)
    assert torch.equal(y, torch.tensor([[127.0, 63.0, -63.0, 0.0]]) * (x[0, 0] / 127))


@each_op
@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_results(name: str, backend: str, dtype: torch.dtype) -> None:
    runnable(OPS[name], backend)
    for sample in samples(name, dtype):
        with ops.use_backend(backend):
            got = run(name, fresh(sample.args))
        with ops.use_backend("torch"):
            in_dtype = run(name, fresh(sample.args))
            reference = run(name, fresh(sample.args, torch.float64))
        assert len(got) == len(reference)
        for g, t, r in zip(got, in_dtype, reference, strict=True):
            what = f"{name} {backend} {dtype} {sample.id}"
            if g.is_floating_point():
                assert_close(g, t, r, what)
            else:
                assert torch.equal(g, r), what


@each_op
def test_samples_are_awkward_and_cost_is_counted(name: str) -> None:
    found = {s.id: s.args for s in samples(name)}
    assert any("0" in i or "empty" in i for i in found), "no sample with zero rows"
    assert any("sliced" in i for i in found), "no sample with gaps between entries"
    costs = [OPS[name].cost(*args) for args in found.values()]
    assert all(c.flops >= 0 and c.bytes >= 0 for c in costs)
    assert max(c.flops for c in costs) > 0
    assert max(c.bytes for c in costs) > 0


@differentiable
@each_backend
def test_gradients_follow_the_reference(name: str, backend: str) -> None:
    op = OPS[name]
    runnable(op, backend)

    def gradients(call: Any, args: list[Any]) -> list[Tensor]:
        leaves = [a.requires_grad_() for a in args if is_float(a)]
        out = call(*args)
        weight = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
        return list(torch.autograd.grad((out * weight).sum(), leaves))

    for sample in samples(name):
        with ops.use_backend(backend):
            got = gradients(getattr(ops, name), fresh(sample.args))
        in_dtype = gradients(op.reference, fresh(sample.args))
        reference = gradients(op.reference, fresh(sample.args, torch.float64))
        for g, t, r in zip(got, in_dtype, reference, strict=True):
            assert_close(g, t, r, f"gradient of {name} {backend} {sample.id}")


@differentiable
def test_gradcheck(name: str) -> None:
    op = OPS[name]
    sample = next(s for s in op.samples(torch.float64) if "sliced" in s.id)
    args = fresh(sample.args)
    leaves = [i for i, a in enumerate(args) if is_float(a)]

    def function(*values: Tensor) -> Tensor:
        call = list(args)
        for i, value in zip(leaves, values, strict=True):
            call[i] = value
        return getattr(ops, name)(*call)

    inputs = tuple(args[i].requires_grad_() for i in leaves)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@each_op
def test_opcheck(name: str) -> None:
    found = samples(name)
    for sample in (found[0], found[-1]):
        result = torch.library.opcheck(getattr(torch.ops.tinycomp, name).default, tuple(fresh(sample.args)))
        assert set(result.values()) == {"SUCCESS"}


@each_op
@each_backend
def test_compiles_whole_and_exports(name: str, backend: str) -> None:
    op = OPS[name]
    runnable(op, backend)
    sample = samples(name)[0]
    call = getattr(ops, name)

    class Module(nn.Module):
        def forward(self, *args: Any) -> Any:
            out = call(*args)
            return tuple(a for a in args if isinstance(a, Tensor)) if out is None else out

    with ops.use_backend(backend):
        torch._dynamo.reset()
        compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
        exported = torch.export.export(Module(), tuple(fresh(sample.args))).module()
        wanted = run(name, fresh(sample.args))
        for function in (compiled, exported):
            with torch.no_grad():
                out = function(*fresh(sample.args))
            out = list(out) if isinstance(out, tuple) else [out]
            assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))
        if op.backward:
            args = [a.requires_grad_() if is_float(a) else a for a in fresh(sample.args)]
            compiled(*args).sum().backward()
            assert all(a.grad is not None for a in args if is_float(a))


@pytest.mark.parametrize("backend", ["cpu", pytest.param("torch", marks=pytest.mark.slow)])
def test_inductor(backend: str) -> None:
    runnable(OPS["lowrank_linear"], backend)
    args = fresh(next(s.args for s in samples("lowrank_linear") if s.id == "pivoted-odd"))
    with ops.use_backend(backend):
        torch._dynamo.reset()
        compiled = torch.compile(ops.lowrank_linear, fullgraph=True)
        assert_close(compiled(*args), ops.lowrank_linear(*args), OPS["lowrank_linear"].reference(*args), "inductor")


@each_backend
def test_autocast_takes_mixed_inputs(backend: str) -> None:
    for name in ("lowrank_linear", "cur_linear", "swsc_linear", "quant_linear"):
        runnable(OPS[name], backend)
        args = fresh(samples(name)[0].args)
        args[0] = args[0].bfloat16()
        with ops.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            assert getattr(ops, name)(*args).dtype == torch.bfloat16
            with torch.no_grad():
                assert getattr(ops, name)(*args).dtype == torch.bfloat16
            assert getattr(torch.ops.tinycomp, name)(*args).dtype == torch.bfloat16


def test_threads_do_not_change_results() -> None:
    g = torch.Generator().manual_seed(0)
    x, r, t = (torch.randn(s, generator=g) for s in ((3, 512), (300, 512), (400, 300)))
    labels = torch.randint(300, (400,), generator=g).int()
    a = torch.randn(400, 512, generator=g)
    calls = {
        "lowrank_linear": (x, r, t[:212], torch.randperm(512, generator=g).int(), None),
        "cur_linear": (x, r, torch.randn(300, 300, generator=g), t, None),
        "swsc_linear": (x, r, labels, r[:64], t[:, :64].contiguous(), None, None, 0),
        "quant_linear": (x, *ops.quantize(a, 4, 64, symmetric=False), None, 4, 64),
        "sliced_linear": (torch.randn(600, 512, generator=g), a, torch.randn(400, generator=g), 512, 400),
        "select_pivots": (a, 50, "qr"),
        "column_norms": (a,),
    }
    threads = torch.get_num_threads()
    try:
        for name, args in calls.items():
            torch.set_num_threads(1)
            one = getattr(ops, name)(*args)
            torch.set_num_threads(2)
            assert torch.equal(one, getattr(ops, name)(*args)), name
    finally:
        torch.set_num_threads(threads)


def test_status_lists_every_pair_with_a_reason() -> None:
    rows = ops.status()
    assert {(r["op"], r["backend"]) for r in rows} == {(o, b) for o in OPS for b in _registry.BACKENDS}
    for row in rows:
        assert row["available"] == (row["reason"] == "")
        assert row["available"] or not row["active"]
    for name in OPS:
        active = {r["backend"] for r in rows if r["op"] == name and r["active"]}
        assert len(active & {"cpu", "torch"}) == 1
    with ops.use_backend("torch"):
        assert {r["backend"] for r in ops.status() if r["active"]} == {"torch"}


def test_forced_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_registry._MISSING, ("sliced_linear", "cpu"), "the library has no CPU kernel for sliced_linear")
    args = samples("lowrank_linear")[0].args
    with (
        ops.use_backend("triton"),
        pytest.raises(RuntimeError, match=r"'triton' is forced.*no triton kernel.*torch: can"),
    ):
        ops.lowrank_linear(*args)
    with ops.use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' is forced.*sliced_linear"):
        ops.sliced_linear(torch.ones(1, 2), torch.ones(2, 2), None, 1, 1)
    with pytest.raises(ValueError, match="got 'fast', allowed cuda, triton, cpu, torch"), ops.use_backend("fast"):
        pass


def test_launchers_register_and_decline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry, "_LAUNCHERS", {})

    @ops.register("column_norms", "triton", lambda w: None if w.shape[0] else "no rows")
    def launch(w: Tensor) -> Tensor:
        return torch.full((w.shape[1],), 7.0)

    with ops.use_backend("triton"):
        assert torch.equal(ops.column_norms(torch.ones(2, 3)), torch.full((3,), 7.0))
        with pytest.raises(RuntimeError, match="no rows"):
            ops.column_norms(torch.ones(0, 3))
    with pytest.raises(ValueError, match="unknown op 'nothing'"):
        ops.register("nothing", "triton")
    with pytest.raises(ValueError, match="allowed 'triton'"):
        ops.register("column_norms", "cpu")
