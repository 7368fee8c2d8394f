"""Run in its own process: what a compiler sees of every op whose Triton backend was chosen, one JSON line each.

The compiler stops at the graph, so that neither a GPU nor a driver is needed: launches it can see, and ops of ours that
it cannot look into.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import torch
import triton
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from triton.backends.compiler import GPUTarget

from tinycomp import ops
from tinycomp.kernels_dump import _cases
from tinycomp.ops import _gpu


class Driver:
    """Names the target; there is no device behind it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self) -> int:
        return 0


class Seen(Exception):
    """Ends the compilation: there is nothing to run the graph on."""


seen: list[dict[str, Any]] = []


def stop(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    words = [str(node.target) for node in graph.graph.nodes]
    launches, opaque = sum("triton_kernel" in word for word in words), [word for word in words if "tinycomp" in word]
    seen.append({"launches": launches, "opaque": opaque})
    raise Seen


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    importlib.import_module("tinycomp.triton_kernels")
    _gpu.interpreted = lambda: True  # so that tensors on the CPU may choose Triton
    for name in sorted(_cases.DEFAULTS):
        dtype = torch.float32 if name == "split_bregman_step_" else torch.bfloat16
        args, call = _cases.make(name, dtype, 0, _cases.DEFAULTS[name][0]), getattr(ops, name)
        torch.compiler.reset()
        with ops.use_backend("triton"), torch.no_grad():
            try:
                torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=stop))(*args)
            except BackendCompilerFailed:  # by `stop`; without it nothing was seen, and `pop` fails
                print(json.dumps({"op": name} | seen.pop()), flush=True)


if __name__ == "__main__":
    main()
