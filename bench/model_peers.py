"""Whole models in other libraries: OpenVINO (as OpenVINO GenAI reads a GGUF file) and llama.cpp, from the same file.

They are imported from the environment that `--peers` of bench/model.py names (requirements-peers.txt), into this
process. Each is wrapped as a model of transformers, so that the functions that time ours and measure their perplexity
take it as it is, and is used only after its logits were close to those of the dense model.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn

OTHERS = ("F16", "Q8_0")  # encodings beside that of the file
# What rounding of weights and activations may cost, of the norm of the logits; more in 4 bits.
ALLOWED, ALLOWED_4 = 0.1, 0.25
CONTEXT = 2048
# (token ids, whether they begin a text, whether the logits of all are wanted) -> logits (tokens or 1, vocabulary)
Run = Callable[[np.ndarray, bool, bool], np.ndarray]


class PeerModel(nn.Module):
    """Another library's model as functions of this one call it: batch 1, one text at a time."""

    def __init__(self, config: Any, run: Run, version: str) -> None:
        super().__init__()
        self.config, self.run, self.version = config, run, version
        self.token = nn.Parameter(torch.zeros(1), requires_grad=False)  # says where the model is

    def can_generate(self) -> bool:
        return True

    def forward(
        self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = True, logits_to_keep: int = 0
    ) -> SimpleNamespace:
        new = past_key_values is None
        logits = self.run(input_ids[0].numpy(), new, new and not logits_to_keep)
        return SimpleNamespace(logits=torch.from_numpy(logits)[None], past_key_values=self if use_cache else None)


def reencoded(source: Path, target: Path, kind: str) -> None:
    """A GGUF file with all matrices in another encoding; vectors and metadata stay."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    wanted = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def openvino_run(path: Path, threads: int) -> Run:
    genai, ov = importlib.import_module("openvino_genai"), importlib.import_module("openvino")
    genai.LLMPipeline(str(path), "CPU", enable_save_ov_model=True)  # writes openvino_model.xml beside the file
    core, opset = ov.Core(), importlib.import_module("openvino.opset13")
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}

    def compiled(last_only: bool) -> Any:
        model = core.read_model(path.parent / "openvino_model.xml")
        if last_only:  # the head on the last token, as generation pipelines do
            product = model.outputs[0].get_node().input_value(0).get_node()
            while product.get_type_name() != "MatMul":
                product = product.input_value(0).get_node()
            last = opset.slice(product.input_value(0), [-1], [np.iinfo(np.int32).max], [1], [1])
            product.input(0).replace_source_output(last.output(0))
            model.validate_nodes_and_infer_types()
        return core.compile_model(model, "CPU", options).create_infer_request()

    requests = {every: compiled(not every) for every in (False, True)}
    seen = 0

    def run(ids: np.ndarray, new: bool, every: bool) -> np.ndarray:
        nonlocal seen
        request = requests[every]
        if new:
            request.reset_state()
            seen = 0
        first, seen = seen, seen + len(ids)
        inputs = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, seen), np.int64),
            "position_ids": np.arange(first, seen)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        return request.infer(inputs)["logits"][0].copy()

    return run


def llama_run(path: Path, threads: int) -> Run:
    llama = importlib.import_module("llama_cpp")
    common = {"n_ctx": CONTEXT, "n_batch": CONTEXT, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
    models = {every: llama.Llama(str(path), logits_all=every, **common) for every in (False, True)}

    def run(ids: np.ndarray, new: bool, every: bool) -> np.ndarray:
        model = models[every]
        if new:
            model.reset()
        model.eval(ids.tolist())
        rows = len(ids) if every else 1
        found = np.ctypeslib.as_array(model._ctx.get_logits(), shape=(rows * model.n_vocab(),))
        return found.reshape(rows, -1).copy()

    return run


LIBRARIES = (("openvino", "openvino-genai", openvino_run), ("llama.cpp", "llama-cpp-python", llama_run))


def peer_models(environment: Path, source: Path, dense: Any, folder: Path, threads: int) -> dict[str, tuple[Any, int]]:
    """name -> (model, bytes of its file) of every library that is there; says which are missing or wrong.

    Args:
        environment: folder of a virtual environment.
        source: GGUF file of the model.
        dense: the same in float32.
        folder: for files in other encodings; they must stay while the models are used.
        threads: of each library.
    """
    sys.path += [str(path) for path in environment.glob("lib/python*/site-packages")]
    found: dict[str, tuple[Any, int]] = {}
    ids = torch.arange(16)[None] * 97 + 5
    wanted = dense(input_ids=ids).logits
    own = Counter(t.tensor_type.name for t in gguf.GGUFReader(source).tensors).most_common(1)[0][0]
    for kind in (own, *OTHERS):
        path = folder / kind / "model.gguf"
        path.parent.mkdir()
        if kind == own:
            path.symlink_to(source)
        else:
            reencoded(source, path, kind)
        for library, package, build in LIBRARIES:
            name = f"{library} {kind}"
            try:
                model = PeerModel(dense.config, build(path, threads), importlib.metadata.version(package))
            except ImportError as error:
                print(f"{name}: not available: {error}")
                continue
            error = float((model(ids).logits - wanted).norm() / wanted.norm())
            last = model(ids, logits_to_keep=1).logits[0, -1]
            apart = float((last - wanted[0, -1]).norm() / wanted[0, -1].norm())
            allowed = ALLOWED_4 if "4" in kind else ALLOWED
            if max(error, apart) <= allowed:
                found[name] = model.eval(), path.stat().st_size
            print(f"{name}: logits differ by {error:.4f}, the last by {apart:.4f}; {allowed} is allowed", flush=True)
    return found
