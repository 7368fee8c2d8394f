"""Write every GPU kernel's PTX and launches to a folder for anyone to execute: docs/gpu.md has the schema."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinycomp import ops
from tinycomp.kernels_dump import _cases, _record
from tinycomp.ops.sample_without_replacement import finishing_times

BACKENDS = ("cuda", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Names of what an op returns, where it is not one "y". The race of the sampling is ours, the sort after it is torch's.
_RETURNED = {
    "kmeans_assign": ("labels", "distances"),
    "kmeans_update": ("centroids", "counts"),
    "column_norms": ("norms",),
    "select_pivots": ("pivots",),
    "sample_without_replacement": ("finish",),
}


def dump(
    folder: Path,
    names: Iterable[str] = (),
    backends: Iterable[str] = BACKENDS,
    shapes: dict[str, list[dict[str, Any]]] | None = None,
    dtypes: Iterable[torch.dtype] = DTYPES,
    seed: int = 0,
) -> list[str]:
    """Write PTX, launches, buffers and expected results of each op, backend, dtype and shape.

    Args:
        folder: where the files go; made if missing.
        names: ops, all by default.
        backends: "cuda" and "triton", or one of them.
        shapes: op -> shapes, as `_cases.DEFAULTS`.
        dtypes: dtypes of the data.
        seed: of the numbers in the buffers.

    Returns:
        The names of the cases.

    Raises:
        RuntimeError: a backend cannot be compiled here.
        ValueError: an op, backend or shape is not known.
    """
    shapes = _cases.DEFAULTS if shapes is None else shapes
    names = list(names) or list(shapes)
    allowed = (("op", shapes, _cases.DEFAULTS), ("op", names, shapes), ("backend", backends, BACKENDS))
    for what, given, known in allowed:
        for word in given:
            if word not in known:
                raise ValueError(f"kernels_dump: {what} {word!r} is not known, allowed {', '.join(sorted(known))}")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for backend in backends:
        reason = _record.why_not(backend)
        if reason is not None:
            raise RuntimeError(f"kernels_dump: the {backend} kernels cannot be compiled here: {reason}")
        recorder = _record.CudaRecorder() if backend == "cuda" else _record.TritonRecorder()
        for name in names:
            for dtype in dtypes:
                if dtype != torch.float32 and name == "split_bregman_step_":
                    continue  # its state is float32
                for i, shape in enumerate(shapes[name]):
                    if backend == "triton" and shape.get("activation_bits"):
                        continue  # its kernels do not round inputs
                    case = f"{name}-{backend}-{_dtype_name(dtype)}-{i}"
                    _write(folder, case, name, backend, dtype, shape, recorder, seed)
                    written.append(case)
    return written


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write(
    folder: Path,
    case: str,
    name: str,
    backend: str,
    dtype: torch.dtype,
    shape: dict[str, Any],
    recorder: Any,
    seed: int,
) -> None:
    args = _cases.make(name, dtype, seed, shape)
    expected = _expected(name, args)
    torch.use_deterministic_algorithms(True)  # fills what is not initialised with NaN: whoever reads it will notice
    try:
        recording = recorder.record(name, args, shape.get("processors", _cases.PROCESSORS))
    finally:
        torch.use_deterministic_algorithms(False)
    memory = _Memory(name, args, recording)
    ptx_of: dict[str, str] = {}
    launches = []
    for launch in recording.launches:
        suffix = f".{len(ptx_of)}" if ptx_of else ""
        file = ptx_of.setdefault(launch.ptx, f"{case}{suffix}.ptx")
        (folder / file).write_text(launch.ptx)
        described = [memory.argument(kind, value) for kind, value in launch.args]
        sizes = {"grid": list(launch.grid), "block": list(launch.block), "smem_bytes": launch.smem_bytes}
        launches.append({"ptx": file, "entry": launch.entry, **sizes, "args": described})
    buffers = {}
    for key, (role, tensor) in memory.used.items():
        numbers = _numbers(tensor)
        np.save(folder / f"{case}.{key}.npy", numbers)
        kind = {"dtype": _dtype_name(tensor.dtype), "shape": list(numbers.shape)}
        buffers[key] = {"file": f"{case}.{key}.npy", "role": role, **kind}
    for key, tensor in expected.items():
        np.save(folder / f"{case}.{key}.ref.npy", _numbers(tensor))
    head = {"op": name, "backend": backend, "dtype": _dtype_name(dtype), "shape": shape}
    references = {key: f"{case}.{key}.ref.npy" for key in expected}
    text = json.dumps(head | {"launches": launches, "buffers": buffers, "expected": references}, indent=1)
    (folder / f"{case}.json").write_text(text)


def _numbers(tensor: Tensor) -> np.ndarray[Any, Any]:
    """What a .npy file holds: a contiguous tensor as it is, the memory of any other; bfloat16 as its bits."""
    if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes:
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        tensor = torch.as_strided(tensor, (size,), (1,), 0)
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _written(name: str, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """The arguments that an op writes to, by name."""
    schema = getattr(torch.ops.tinycomp, name).default._schema.arguments
    pairs = zip(schema, args, strict=True)
    return {a.name: v for a, v in pairs if a.alias_info is not None and a.alias_info.is_write and v is not None}


def _expected(name: str, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """Results of the contract's reference on the arguments in float64, in the dtypes of the kernel's results."""
    if name == "sample_without_replacement":
        return {"finish": finishing_times(args[0], args[2])}
    wide = tuple((v.double() if v.is_floating_point() else v).clone() if isinstance(v, Tensor) else v for v in args)
    plain = tuple(v.clone() if isinstance(v, Tensor) else v for v in args)
    results = []
    with torch.no_grad():
        for values in (wide, plain):
            returned = ops.OPS[name].reference(*values)
            found = returned if isinstance(returned, tuple) else () if returned is None else (returned,)
            results.append(dict(zip(_RETURNED.get(name, ("y",)), found, strict=False)) | _written(name, values))
    return {key: value.to(results[1][key].dtype).contiguous() for key, value in results[0].items()}


class _Memory:
    """The buffers of a recording: finds the one that an address lies in."""

    def __init__(self, name: str, args: tuple[Any, ...], recording: _record.Recording):
        schema = getattr(torch.ops.tinycomp, name).default._schema.arguments
        written = _written(name, args)
        returned = recording.returned if isinstance(recording.returned, tuple) else (recording.returned,)
        outputs = dict(zip(_RETURNED.get(name, ("y",)), returned, strict=False))
        if name == "sample_without_replacement":
            outputs = {"finish": next(t for t in recording.made if t.dtype == torch.float64)}
        named = {a.name: v for a, v in zip(schema, args, strict=True) if isinstance(v, Tensor)}
        self.tensors = [(k, "out" if k in written else "in", v) for k, v in named.items()]
        self.tensors += [(k, "out", v) for k, v in outputs.items() if isinstance(v, Tensor)]
        self.tensors += [("", "scratch", t) for t in recording.made]
        self.used: dict[str, tuple[str, Tensor]] = {}

    def argument(self, kind: str, value: int | float) -> dict[str, Any]:
        """An argument of a launch as the schema writes it; an absent pointer is the 64-bit number 0."""
        if kind != "ptr":
            return {"kind": kind, "value": value}
        if value == 0:
            return {"kind": "i64", "value": 0}
        for i, (key, role, tensor) in enumerate(self.tensors):
            storage = tensor.untyped_storage()
            if 0 <= value - storage.data_ptr() < storage.nbytes():
                if not key:
                    key = f"scratch{sum(r == role for r, _ in self.used.values())}"
                    self.tensors[i] = (key, role, tensor)
                self.used[key] = (role, tensor)
                return {"kind": "ptr", "buffer": key, "offset_bytes": int(value) - storage.data_ptr()}
        raise RuntimeError(f"kernels_dump: a launch got the address {value:#x}, which is in no tensor of the call")
