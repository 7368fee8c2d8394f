"""Other libraries on the same layers: OpenVINO and ONNX Runtime int8 and int4, scikit-learn and faiss for k-means.

They are imported from the environment that `--peers` names (requirements-peers.txt), into this process, so that their
rounds interleave with ours. Each holds one graph with as many layers on the same input as make its weights cold (copies
have their rows rolled: equal constants would be merged), and is timed only after its outputs were close to the float32
product. A library that is missing leaves its column empty.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from case import Case

LIBRARIES = ("openvino", "onnxruntime", "onnx", "sklearn", "faiss", "scipy")
PACKAGES = {"sklearn": "scikit-learn", "faiss": "faiss-cpu"}
GROUP = 128
KEPT = 8  # graphs that a later row may use again; all of a whole run would not fit into memory
# What rounding weights to this many bits may cost, of the norm of the output.
ALLOWED = {8: 0.03, 4: 0.2}
Layers = Callable[[], list[Any]]
Copies = Callable[[int], int]


class Peers:
    """The peers found in one environment; `wanted`, if not empty, names those that are built."""

    def __init__(self, environment: Path | None, wanted: frozenset[str] = frozenset()) -> None:
        self.wanted = wanted
        self.found: dict[str, Any] = {}
        self.versions: dict[str, str] = {}
        self.threads = torch.get_num_threads()
        self._built: dict[tuple[Any, ...], tuple[Layers, int]] = {}
        if environment is None:
            return
        sys.path += [str(path) for path in environment.glob("lib/python*/site-packages")]
        for name in LIBRARIES:
            try:
                self.found[name] = importlib.import_module(name)
                self.versions[name] = importlib.metadata.version(PACKAGES.get(name, name))
            except ImportError as error:
                self.versions[name] = f"not available: {error}"

    def add(self, named: dict[str, list[Any]], case: Case, args: tuple[Any, ...], copies: Copies) -> list[Any]:
        """Add this case's peers to `named`; returns (peer, fault) of those that failed their output check.
        `copies` says how many layers of a size a graph shall have."""
        if case.op == "kmeans_assign":
            return self._clustering(named, args)
        if case.outside is None or case.op == "masked_linear":
            return []
        faults = []
        builders = {
            ("openvino", 8): self._openvino,
            ("openvino", 4): self._openvino,
            ("onnxruntime", 8): self._onnx_int8,
            ("onnxruntime", 4): self._onnx_int4,
        }
        for (library, bits), build in builders.items():
            if library not in self.found or (library == "onnxruntime" and "onnx" not in self.found):
                continue
            name = f"{library} int{bits}"
            if self.wanted and name not in self.wanted:
                continue
            key = (library, bits, *case.outside, case.m)
            if key not in self._built:
                for old in list(self._built)[:-KEPT]:
                    del self._built[old]
                self._built[key] = self._checked(build, bits, case, copies)
            run, count = self._built[key]
            if count == 0:
                faults.append((name, "output differs from the float32 product"))
            else:
                # One call runs all copies: it is counted as that many.
                named[name] = [run, *[_nothing] * (count - 1)]
        return faults

    def _checked(self, build: Any, bits: int, case: Case, copies: Copies) -> tuple[Layers, int]:
        assert case.outside is not None
        n, k = case.outside
        count = copies(n * k * bits // 8)
        g = torch.Generator().manual_seed(0)
        w, x = torch.randn(n, k, generator=g) / k**0.5, torch.randn(case.m, k, generator=g)
        run = build(w, x, bits, count)
        wanted = x @ w.t()
        for copy, output in enumerate(run()):
            error = (torch.from_numpy(output) - wanted.roll(copy, 1)).norm() / wanted.norm()
            if not error <= ALLOWED[bits]:
                return run, 0
        return run, count

    def _openvino(self, w: torch.Tensor, x: torch.Tensor, bits: int, count: int) -> Layers:
        ov = self.found["openvino"]
        np, opset = importlib.import_module("numpy"), importlib.import_module("openvino.opset13")
        (n, k), groups = w.shape, -(-w.shape[1] // GROUP)
        levels, scales = _rounded(w, bits, GROUP if bits == 4 else k)
        parameter = opset.parameter([x.shape[0], k], np.float32)
        results, kept = [], []
        for copy in range(count):
            rolled, steps = levels.roll(copy, 0), scales.roll(copy, 0)
            if bits == 8:
                stored = opset.constant(np.ascontiguousarray(rolled.numpy()))
                shape, scale = [n, k], steps.numpy()
            else:
                unsigned = (rolled + 8).to(torch.uint8).reshape(n, -1, 2)
                packed = np.ascontiguousarray((unsigned[..., 0] | unsigned[..., 1] << 4).numpy())
                tensor = ov.Tensor(packed, [n, groups, GROUP], ov.Type.u4)
                stored = opset.subtract(
                    opset.convert(opset.constant(tensor), np.float32), opset.constant(np.float32(8))
                )
                kept.append(packed)  # the tensor shares this memory
                shape, scale = [n, k], steps.reshape(n, groups, 1).numpy()
            wide = opset.convert(stored, np.float32) if bits == 8 else stored
            weight = opset.reshape(opset.multiply(wide, opset.constant(scale)), np.array(shape), False)
            results.append(opset.matmul(parameter, weight, False, True))
        config = {"INFERENCE_NUM_THREADS": self.threads, "NUM_STREAMS": 1, "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP}
        config["INFERENCE_PRECISION_HINT"] = "f32"
        request = ov.Core().compile_model(ov.Model(results, [parameter]), "CPU", config).create_infer_request()
        inputs = [ov.Tensor(np.ascontiguousarray(x.numpy()))]

        def run() -> list[Any]:
            request.infer(inputs, share_inputs=True)
            return [request.get_output_tensor(i).data for i in range(count)]

        run.kept = kept  # type: ignore[attr-defined]
        return run

    def _session(self, nodes: list[Any], weights: list[Any], outputs: list[str], x: torch.Tensor, n: int) -> Layers:
        onnx, ort = self.found["onnx"], self.found["onnxruntime"]
        helper, kind = onnx.helper, onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            nodes,
            "layers",
            [helper.make_tensor_value_info("x", kind, list(x.shape))],
            [helper.make_tensor_value_info(name, kind, [x.shape[0], n]) for name in outputs],
            weights,
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self.threads, 3
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feed = {"x": x.numpy()}
        return lambda: session.run(None, feed)

    def _onnx_int4(self, w: torch.Tensor, x: torch.Tensor, bits: int, count: int) -> Layers:
        onnx = self.found["onnx"]
        (n, k), numpy_helper = w.shape, onnx.numpy_helper
        levels, scales = _rounded(w, bits, GROUP)
        unsigned = (levels + 8).to(torch.uint8).reshape(n, k // GROUP, GROUP // 2, 2)
        packed = unsigned[..., 0] | unsigned[..., 1] << 4
        nodes, weights, names = [], [], []
        for i in range(count):
            weights.append(numpy_helper.from_array(packed.roll(i, 0).numpy(), f"w{i}"))
            weights.append(numpy_helper.from_array(scales.roll(i, 0).reshape(-1).numpy(), f"s{i}"))
            fields = {"K": k, "N": n, "bits": 4, "block_size": GROUP, "accuracy_level": 4}
            make = onnx.helper.make_node
            nodes.append(make("MatMulNBits", ["x", f"w{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft", **fields))
            names.append(f"y{i}")
        return self._session(nodes, weights, names, x, n)

    def _onnx_int8(self, w: torch.Tensor, x: torch.Tensor, bits: int, count: int) -> Layers:
        onnx = self.found["onnx"]
        numpy_helper, make = onnx.numpy_helper, onnx.helper.make_node
        levels, scales = _rounded(w, bits, w.shape[1])
        nodes = [make("DynamicQuantizeLinear", ["x"], ["q", "qs", "qz"])]
        weights: list[Any] = []
        names = []
        for i in range(count):
            weights.append(numpy_helper.from_array(scales.roll(i, 0).reshape(-1).numpy(), f"s{i}"))
            nodes.append(make("Mul", ["qs", f"s{i}"], [f"scale{i}"]))
            weights.append(numpy_helper.from_array(levels.roll(i, 0).t().contiguous().numpy(), f"w{i}"))
            nodes.append(make("MatMulInteger", ["q", f"w{i}", "qz"], [f"i{i}"]))
            nodes.append(make("Cast", [f"i{i}"], [f"f{i}"], to=1))
            nodes.append(make("Mul", [f"f{i}", f"scale{i}"], [f"y{i}"]))
            names.append(f"y{i}")
        return self._session(nodes, weights, names, x, w.shape[0])

    def _clustering(self, named: dict[str, list[Any]], args: tuple[Any, ...]) -> list[Any]:
        """One assignment of all points, as each library exposes it."""
        points, centroids = (a.float().numpy() for a in args[:2])
        if "sklearn" in self.found:
            metrics = importlib.import_module("sklearn.metrics")
            named["scikit-learn"] = [lambda: metrics.pairwise_distances_argmin(points, centroids)]
        if "faiss" in self.found:
            faiss = self.found["faiss"]
            faiss.omp_set_num_threads(self.threads)
            index = faiss.IndexFlatL2(points.shape[1])
            index.add(centroids)
            named["faiss"] = [lambda: index.search(points, 1)]
        return []


def _nothing() -> None:
    pass


def _rounded(w: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric levels (n, k) int8 and scales (n, groups)."""
    largest = 2 ** (bits - 1) - 1
    wide = w.reshape(w.shape[0], -1, group)
    scales = wide.abs().amax(2, keepdim=True) / largest
    return (wide / scales).round().to(torch.int8).reshape(w.shape), scales.squeeze(2).contiguous()
