"""SmolLM2 as a whole: prefill and decode of dense and compressed forms, perplexity beside speed.

    python bench/model.py [--quick] [--compile] [--large-pages] [--peers DIR] [--ratio 0.5 ...] [--model MODEL]
                          [--threads 2] [--json]

Dense: torch in float32, bfloat16 and dynamic int8, and our own int8. Compressed: SVD at each ratio in bfloat16 with the
head on our dense kernel, and with factors and head in int8, inputs rounded to 8 bits; without --quick also with factors
in int4. "Fused": after `tc.fuse_`; the dense model decodes on our kernel, too, then. "No linear layers" is the model
whose linear layers return zeros at once: no compression can be faster. --compile also times decoding with torch.compile
and a static cache, a minute or two per model. --large-pages: `tc.huge_pages_` for all models, dense ones too (not for
torch's int8, whose weights are no parameters). --peers names the environment of requirements-peers.txt: OpenVINO and
llama.cpp on the same GGUF file, as it is and in F16 and Q8_0. All models run interleaved in this process.
Lines are appended to bench/results/model.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from model_peers import PeerModel, peer_models
from torch import Tensor, nn
from transformers import StaticCache

import tinycomp as tc
from tinycomp.eval.machine import machine
from tinycomp.eval.quality import DEFAULT, perplexity
from tinycomp.eval.size import size_of
from tinycomp.eval.speed import speed_of
from tinycomp.eval.timing import time_interleaved
from tinycomp.io.load import default_model, load_model
from tinycomp.layers import DenseLinear, LowRankLinear, QuantLinear, QuantLowRankLinear

RESULTS = Path(__file__).parent / "results" / "model.jsonl"


def replaced(model: nn.Module, change: Any) -> nn.Module:
    """`model` after `change(name, module)` gave a new module, or None, for each of its linear layers."""
    kinds = (nn.Linear, LowRankLinear)
    found = []
    for name, module in model.named_modules():
        parent, _, child = name.rpartition(".")
        within = model.get_submodule(parent)
        if isinstance(module, kinds) and not isinstance(within, LowRankLinear):
            found.append((name, module, within, child))
    for name, module, within, child in found:
        if (new := change(name, module)) is not None:
            setattr(within, child, new)
    return model.eval()


def rounded(model: nn.Module, bits: int) -> nn.Module:
    """Every linear layer that is not rounded yet in `bits`, inputs in 8; the head always in 8."""

    def change(name: str, module: nn.Module) -> nn.Module:
        if isinstance(module, LowRankLinear):
            return QuantLowRankLinear.from_low_rank(module, bits, activation_bits=8)
        assert isinstance(module, nn.Linear)
        return QuantLinear.from_linear(module, 8 if name.endswith("lm_head") else bits, activation_bits=8)

    return replaced(model, change)


def own_head(model: nn.Module) -> nn.Module:
    """The head on our dense kernel, its tie to the embedding kept."""
    return replaced(model, lambda name, module: DenseLinear.from_linear(module) if name.endswith("lm_head") else None)


def fused(model: nn.Module) -> nn.Module:
    """A copy with our attention and norms; the others have those of torch and transformers."""
    other = copy.deepcopy(model)
    tc.fuse_(other)
    return other


class Free(nn.Module):
    """A linear layer that costs no more than its output."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.in_features, self.out_features = linear.weight, linear.in_features, linear.out_features
        # A low-rank layer of rank 0, for layers that are computed in one call.
        self.factors = linear.weight.new_empty(0, linear.in_features), linear.weight.new_empty(linear.out_features, 0)

    def as_call(self) -> tuple[str, tuple[Tensor | None, ...], tuple[int, ...]]:
        return "lowrank_linear", (*self.factors, None, None), ()

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


def compiled_decode(models: dict[str, nn.Module], steps: int, repeats: int) -> dict[str, float]:
    """Decoded tokens/s of each model compiled whole, one step with a static cache behind 128 tokens."""

    def stepper(model: Any) -> Any:
        cache = StaticCache(config=model.config, max_cache_len=256)
        model(input_ids=torch.zeros(1, 128, dtype=torch.int64), past_key_values=cache)

        def step(ids: Tensor, position: Tensor) -> Tensor:
            return model(input_ids=ids, past_key_values=cache, position_ids=position).logits

        fast, token = torch.compile(step, dynamic=False), torch.tensor([[5]])
        return lambda: [fast(token, torch.tensor([[128]])) for _ in range(steps)]

    torch._dynamo.config.recompile_limit = 4 * len(models)
    found = time_interleaved({name: stepper(model) for name, model in models.items()}, repeats, warmup=2)
    return {name: timing.rate(steps).median for name, timing in found.items()}


def torch_int8(model: nn.Module) -> nn.Module | None:
    """torch's dynamic int8, where this release still has it."""
    quantization = getattr(torch.ao, "quantization", None)
    if quantization is None or not hasattr(quantization, "quantize_dynamic"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def models(options: argparse.Namespace) -> tuple[dict[str, nn.Module], Any]:
    dense, tokenizer = load_model(options.model or default_model(), torch.float32)
    half = copy.deepcopy(dense).bfloat16()
    found = {"dense float32": dense, "dense bfloat16": half}
    found["no linear layers"] = replaced(copy.deepcopy(half), lambda name, module: Free(module))
    int8 = torch_int8(dense)
    if int8 is not None:
        found["dense int8, torch"] = int8
    found["dense int8, ours"] = rounded(copy.deepcopy(half), 8)
    for ratio in options.ratio:
        samples = 8 if options.quick else 48
        small, report = tc.compress(dense, tc.SVD(ratio=ratio), tokenizer=tokenizer, num_calibration_samples=samples)
        print(f"svd {ratio}: kept {report.to_dict()['ratio_achieved']:.3f} of the targeted parameters", flush=True)
        small = small.bfloat16()
        found[f"svd {ratio} bfloat16"] = own_head(copy.deepcopy(small))
        found[f"svd {ratio} int8"] = rounded(copy.deepcopy(small), 8)
        if not options.quick:
            # By the method, which weighs the errors and takes minutes: the nearest levels of 4 bits are too far away.
            method = tc.SVD(ratio=ratio, bits=4, activation_bits=8)
            small, _ = tc.compress(dense, method, tokenizer=tokenizer, num_calibration_samples=samples)
            found[f"svd {ratio} int4"] = rounded(small.bfloat16(), 8)
    for name in [
        name for name in found if name == "no linear layers" or name.endswith(("bfloat16", "int8", "int4", "ours"))
    ]:
        found[f"{name}, fused"] = fused(found[name])
    if options.large_pages:
        for model in found.values():
            tc.huge_pages_(model)
    return found, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one ratio, little calibration and evaluation text")
    parser.add_argument("--compile", action="store_true", help="decode compiled, too")
    parser.add_argument("--large-pages", action="store_true", help="weights on pages of 2 MB")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="environment of requirements-peers.txt")
    parser.add_argument("--ratio", type=float, nargs="+")
    parser.add_argument("--model", help="default: SmolLM2-135M")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.ratio = options.ratio or ([0.5] if options.quick else [0.8, 0.6, 0.5])
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    found, tokenizer = models(options)
    protocol = DEFAULT.shortened(1024) if options.quick else DEFAULT
    sizes = {name: size_of(model).bytes_memory for name, model in found.items()}
    if options.peers is not None:
        source, dense = Path(options.model or default_model()), found["dense float32"]
        with torch.no_grad():
            peers = peer_models(options.peers, source, dense, folder, options.threads)
        found |= {name: model for name, (model, _) in peers.items()}
        sizes |= {name: size for name, (_, size) in peers.items()}
    with torch.no_grad():
        speeds = speed_of(found, 128, 32 if options.quick else 64, 7 if options.quick else 9)
        compiled: dict[str, float] = {}
        if options.compile:
            # torch's int8 does not compile, and a compiler leaves out what reads the zeros of no linear layers.
            skipped = ("dense int8, torch", "no linear layers", "no linear layers, fused")
            able = {n: m for n, m in found.items() if n not in skipped and not isinstance(m, PeerModel)}
            compiled = compiled_decode(able, 8, 7)
        quality = {name: perplexity(model, tokenizer, protocol).perplexity for name, model in found.items()}
    base = speeds["dense bfloat16"]
    about = machine()
    rows = []
    for name, speed in speeds.items():
        assert speed.decode is not None
        assert base.decode is not None
        row = {
            "name": name,
            "perplexity": quality[name],
            "protocol": protocol.name,
            "bytes_memory": sizes[name],
            "prefill_tokens_s": speed.prefill.median,
            "decode_tokens_s": speed.decode.median,
            "decode_vs_dense_bfloat16": speed.decode.median / base.decode.median,
            "prefill_vs_dense_bfloat16": speed.prefill.median / base.prefill.median,
            "compiled_decode_tokens_s": compiled.get(name),
            "speed": speed.to_dict(),
            "version": getattr(found[name], "version", None),
            "machine": about,
            "large_pages": options.large_pages,
        }
        rows.append(row)
        text = f"{name:24} ppl {row['perplexity']:8.2f} | {row['bytes_memory'] / 1e6:7.1f} MB"
        text += f" | prefill {row['prefill_tokens_s']:8.1f} t/s {row['prefill_vs_dense_bfloat16']:5.2f}x"
        text += f" | decode {row['decode_tokens_s']:7.1f} t/s {row['decode_vs_dense_bfloat16']:5.2f}x dense bfloat16"
        if name in compiled:
            text += f" | compiled {compiled[name]:7.1f} t/s {compiled[name] / compiled['dense bfloat16']:5.2f}x"
        print(json.dumps(row) if options.json else text, flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
