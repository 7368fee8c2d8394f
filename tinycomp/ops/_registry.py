"""The one registration mechanism: contracts in a table, backends chosen in Python, gradients outside the dispatcher.

An op is an `Op` in `tinycomp/ops/<op>.py`, passed to `define`, which gives the callable that the rest of the library
uses. Its schema is registered once, here; `csrc/cpu/<op>.cpp` adds a CPU kernel to the same dispatcher entry, and a
file of `triton_kernels` adds a launcher with `register`. What is available is asked of the dispatcher, not listed.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinycomp.ops import _gpu

# The whole policy: for each device, backends in the order in which they are tried.
ORDER: dict[str, tuple[str, ...]] = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")}
BACKENDS = ("cuda", "triton", "cpu", "torch")
# Run only where they are forced: the CUDA kernels on the CPU emulation that the tests build.
FORCED_ONLY = ("cuda-emulated",)
_DISPATCH_KEY = {"cpu": "CPU", "cuda": "CUDA"}

OPS: dict[str, Op] = {}
_LAUNCHERS: dict[tuple[str, str], _Launcher] = {}
_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}
# Why an op has no kernel under a dispatch key; None where it has one. Filled by `load_native`.
_MISSING: dict[tuple[str, str], str | None] = {}
_library = torch.library.Library("tinycomp", "FRAGMENT")
_forced: str | None = None


class Cost(NamedTuple):
    """Floating-point operations (a multiply-add counts 2) and bytes that must move at least once."""

    flops: int
    bytes: int


class Sample(NamedTuple):
    """One call of the generic tests: a readable id and the positional arguments."""

    id: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Op:
    """The contract of one op; `reference` is its specification.

    Args:
        name: name under `torch.ops.tinycomp` and `tinycomp.ops`.
        schema: argument list and returns in the dispatcher's language, without the name.
        check: raises ValueError or TypeError for arguments the contract does not allow; reads shapes, dtypes and
            devices, and index contents where those are concrete.
        reference: plain torch, traceable, runs on any device.
        fake: outputs with the right shapes and dtypes, no computation.
        cost: Cost of one call.
        samples: dtype -> calls for the generic tests, awkward shapes included.
        backward: (args, needs_input_grad, *output_grads) -> one gradient or None per argument; None where the op
            has no gradient.
        autocast: positions of the tensors that follow the autocast dtype, as those of `F.linear` do.
    """

    name: str
    schema: str
    check: Callable[..., None]
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    cost: Callable[..., Cost]
    samples: Callable[[torch.dtype], Iterator[Sample]]
    backward: Callable[..., Sequence[Tensor | None]] | None = None
    autocast: tuple[int, ...] = ()


class _Launcher(NamedTuple):
    call: Callable[..., Any]
    why_not: Callable[..., str | None]


def define(op: Op) -> Callable[..., Any]:
    """Register the contract with torch and return the callable that chooses a backend.

    Extra cost over the bare native op on the inference path: three flag reads and one Python call.
    """
    if op.name in OPS:
        raise ValueError(f"ops.define: op {op.name!r} is already defined; each op has one contract file")
    _library.define(op.name + op.schema)
    schema = getattr(torch.ops.tinycomp, op.name).default._schema
    defaults = tuple(a.default_value for a in schema.arguments)

    # The dispatcher leaves out trailing arguments that equal their defaults.
    def reference(*args: Any) -> Any:
        args += defaults[len(args) :]
        op.check(*args)
        return op.reference(*args)

    def fake(*args: Any) -> Any:
        args += defaults[len(args) :]
        op.check(*args)
        return op.fake(*args)

    _library.impl(op.name, reference, "CompositeExplicitAutograd")

    torch.library.register_fake(f"tinycomp::{op.name}", fake, lib=_library)
    if op.autocast:
        _register_autocast(op, defaults)
    OPS[op.name] = op
    if op.backward is not None:
        _FUNCTIONS[op.name] = _make_function(op.backward)
    return _make_call(op)


def register(name: str, backend: str, why_not: Callable[..., str | None] = lambda *args: None) -> Callable[..., Any]:
    """Decorator that adds a Python launcher (Triton); `why_not(*args)` gives None or the reason it cannot run."""
    if name not in OPS:
        raise ValueError(f"ops.register: unknown op {name!r}, allowed {sorted(OPS)}; write its contract first")
    if backend not in ("triton", *FORCED_ONLY):
        raise ValueError(
            f"ops.register: backend {backend!r}, allowed 'triton'; C++ kernels register with the dispatcher"
        )

    def add(launch: Callable[..., Any]) -> Callable[..., Any]:
        _LAUNCHERS[name, backend] = _Launcher(launch, why_not)
        return launch

    return add


class _Fast:
    """Whether an op's CPU kernel may be called without asking further; false while another backend is forced."""

    __slots__ = ("cpu",)

    def __init__(self) -> None:
        self.cpu = False


_FAST: dict[str, _Fast] = {}


def _make_call(op: Op) -> Callable[..., Any]:
    bare = getattr(torch.ops.tinycomp, op.name).default
    fast, grad_enabled = _FAST.setdefault(op.name, _Fast()), torch.is_grad_enabled

    def call(*args: Any) -> Any:
        # Inference with a native kernel takes no more than these flags: the kernel refuses bad arguments by itself,
        # and only a refused call pays for the checks that explain it.
        if fast.cpu and not grad_enabled() and isinstance(args[0], Tensor) and args[0].is_cpu:
            try:
                return bare(*args)
            except (RuntimeError, NotImplementedError):
                op.check(*args)
                raise
        return _call_general(op, bare, args)

    return call


def _call_general(op: Op, bare: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    if not isinstance(args[0], Tensor):
        op.check(*args)
    if op.autocast:
        args = _autocast(op.autocast, args)
    backend = select(op, args)
    if backend == "torch":
        op.check(*args)
        with torch.set_grad_enabled(torch.is_grad_enabled() and op.backward is not None):
            return op.reference(*args)
    launch = _LAUNCHERS[op.name, backend].call if (op.name, backend) in _LAUNCHERS else bare
    needs_grad = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    try:
        if not needs_grad:
            return launch(*args)
        if op.backward is None:
            with torch.no_grad():
                return launch(*args)
        return _FUNCTIONS[op.name].apply(launch, *args)
    except (RuntimeError, NotImplementedError):
        op.check(*args)
        raise


def _register_autocast(op: Op, defaults: tuple[Any, ...]) -> None:
    """Casting for calls that reach the dispatcher directly; costs nothing while autocast is off."""
    keys = (torch._C.DispatchKey.AutocastCPU, torch._C.DispatchKey.AutocastCUDA)
    both = torch._C.DispatchKeySet(keys[0]) | torch._C.DispatchKeySet(keys[1])

    def kernel(*args: Any) -> Any:
        cast = _autocast(op.autocast, args + defaults[len(args) :])
        with torch._C._ExcludeDispatchKeyGuard(both):
            return getattr(torch.ops.tinycomp, op.name).default(*cast)

    for key in keys:
        _library.impl(op.name, kernel, key.name)


def _autocast(positions: tuple[int, ...], args: tuple[Any, ...]) -> tuple[Any, ...]:
    device = args[0].device.type
    if not torch.is_autocast_enabled(device):
        return args
    dtype = torch.get_autocast_dtype(device)
    cast = [i for i in positions if isinstance(args[i], Tensor) and args[i].dtype != torch.float64]
    return tuple(a.to(dtype) if i in cast else a for i, a in enumerate(args))


def _make_function(gradient: Callable[..., Sequence[Tensor | None]]) -> type[torch.autograd.Function]:
    """The autograd.Function around an op; the launcher is its first argument."""

    class OpFunction(torch.autograd.Function):
        @staticmethod
        def forward(launch: Callable[..., Any], *args: Any) -> Any:
            return launch(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            args = inputs[1:]
            ctx.save_for_backward(*[a for a in args if isinstance(a, Tensor)])
            ctx.others = [None if isinstance(a, Tensor) else (a,) for a in args]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            saved = iter(ctx.saved_tensors)
            args = [next(saved) if other is None else other[0] for other in ctx.others]
            return (None, *gradient(args, ctx.needs_input_grad[1:], *grads))

    return OpFunction


def why_not(op: Op, backend: str, args: tuple[Any, ...] = ()) -> str | None:
    """None if `backend` can run `op` (on `args`, when given), else the reason in one phrase."""
    if backend == "torch":
        return None
    if backend in _DISPATCH_KEY:
        device = args[0].device.type if args else backend
        if device != backend:
            return f"{op.name} got a tensor on {device}"
        return _MISSING[op.name, backend] or (_gpu.why_not_cuda(op.name, args) if args and backend == "cuda" else None)
    launcher = _LAUNCHERS.get((op.name, backend))
    if launcher is None:
        return f"no {backend} kernel is registered for {op.name}" + (_gpu.no_triton if backend == "triton" else "")
    return launcher.why_not(*args) if args else None


def select(op: Op, args: tuple[Any, ...]) -> str:
    """The backend that will run this call.

    Raises:
        RuntimeError: the forced backend cannot run it.
    """
    if _forced is None:
        candidates = ORDER.get(args[0].device.type, ("torch",))
        return next(backend for backend in candidates if why_not(op, backend, args) is None)
    if why_not(op, _forced, args) is None:
        return _forced
    device = args[0].device.type
    reasons = "; ".join(
        f"{b}: {why_not(op, b, args) or 'can run'}" for b in dict.fromkeys((_forced, *ORDER.get(device, ("torch",))))
    )
    raise RuntimeError(
        f"ops.{op.name}: backend {_forced!r} is forced and cannot run on {device}. {reasons}. "
        "Unset TINYCOMP_BACKEND, leave use_backend, or choose one that can run."
    )


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every op inside the block, in this process: `with use_backend("torch"):`.

    Raises:
        ValueError: the name is unknown. A backend that is known and cannot run raises RuntimeError at the call.
    """
    previous = _forced
    _force(name, "use_backend")
    try:
        yield
    finally:
        _force(previous, "use_backend")


def _force(name: str | None, where: str) -> None:
    global _forced
    if name is not None and name not in BACKENDS + FORCED_ONLY:
        raise ValueError(f"{where}: got {name!r}, allowed {', '.join(BACKENDS + FORCED_ONLY)}; choose one of these")
    _forced = name
    for op in OPS.values():
        _FAST[op.name].cpu = name in (None, "cpu") and why_not(op, "cpu") is None


def status() -> list[dict[str, Any]]:
    """One row per op and backend: {op, backend, available, active, reason}.

    `active` marks what a call on the backend's device runs now; `reason` is empty where the backend is available.
    """
    rows = []
    for op in OPS.values():
        for backend in BACKENDS:
            reason = why_not(op, backend)
            home = "cpu" if backend in ("cpu", "torch") else "cuda"
            chosen = _forced or next(b for b in ORDER[home] if why_not(op, b) is None)
            row = {"op": op.name, "backend": backend, "available": reason is None}
            rows.append(row | {"active": reason is None and chosen == backend, "reason": reason or ""})
    return rows


def load_native() -> None:
    """Load the native library, check it against the contracts, and read TINYCOMP_BACKEND.

    Raises:
        RuntimeError: a kernel was registered for an op that has no contract, or with another signature.
        ValueError: TINYCOMP_BACKEND names no backend.
    """
    not_loaded = dict.fromkeys(_DISPATCH_KEY, "")
    try:
        native = importlib.import_module("tinycomp._C")
    except ImportError as error:
        not_loaded["cpu"] = f"the native library is not loaded ({error})"
    else:
        _check_signatures(native.signatures())
    not_loaded["cuda"], kernels = _gpu.load_cuda()
    _check_signatures(kernels)
    _gpu.load_triton()
    for name in OPS:
        for backend, key in _DISPATCH_KEY.items():
            found = torch._C._dispatch_has_kernel_for_dispatch_key(f"tinycomp::{name}", key)
            reason = not_loaded[backend] or f"the native library has no {key} kernel for {name}"
            _MISSING[name, backend] = None if found else reason
    _force(os.environ.get("TINYCOMP_BACKEND") or None, "TINYCOMP_BACKEND")


def _check_signatures(signatures: dict[str, str]) -> None:
    for name, got in signatures.items():
        if name not in OPS:
            raise RuntimeError(
                f"tinycomp._C: it has a kernel for {name!r}, the contracts are {sorted(OPS)}; "
                "rebuild the library, or write tinycomp/ops/" + name + ".py"
            )
        schema = getattr(torch.ops.tinycomp, name).default._schema
        inputs = ", ".join(str(a.type) for a in schema.arguments)
        wanted = f"({inputs}) -> ({', '.join(str(r.type) for r in schema.returns)})"
        if got != wanted:
            raise RuntimeError(
                f"tinycomp._C: {name} has signature {got}, the contract says {wanted}; rebuild the library"
            )
