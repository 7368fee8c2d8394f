"""Tiny random models of every architecture in the table, shared by the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_folder import write_folder
from torch import Tensor, nn

from tinycomp import ops
from tinycomp.data import calibration_text


def pytest_report_header() -> str:
    return f"torch {torch.__version__}, transformers {transformers.__version__}"


HIDDEN, WIDTH, VOCAB, BLOCKS = 32, 48, 64, 3
_LLAMA = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_BERT = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
_IMAGE = {**_BERT, "image_size": 16, "patch_size": 8}
_MARIAN = {
    "d_model": HIDDEN,
    "encoder_ffn_dim": WIDTH,
    "decoder_ffn_dim": WIDTH,
    "encoder_layers": BLOCKS,
    "decoder_layers": BLOCKS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_start_token_id": 1,
}
_T5 = {"d_model": HIDDEN, "d_ff": WIDTH, "d_kv": 8, "num_layers": BLOCKS, "num_heads": 4, "decoder_start_token_id": 0}


@dataclass(frozen=True)
class Family:
    """One stock class with the config of a tiny model."""

    model: str
    config: str
    auto: str
    fields: dict[str, Any] = field(default_factory=dict)
    inputs: str = "text"

    def build(self, seed: int = 0, **fields: Any) -> nn.Module:
        """A random model in eval mode, the same for the same seed; its biases are random too."""
        torch.manual_seed(seed)
        settings = {**self.fields, **fields}
        if self.inputs != "image":
            settings = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **settings}
        model = getattr(transformers, self.model)(getattr(transformers, self.config)(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.requires_grad:  # Marian recomputes its sinusoids instead of storing them
                    continue
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                else:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return model.eval()

    def batch(self, seed: int = 0) -> dict[str, Tensor]:
        """Inputs for `model(**batch)`."""
        generator = torch.Generator().manual_seed(seed)
        if self.inputs == "image":
            return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
        ids = {"input_ids": torch.randint(3, VOCAB, (2, 9), generator=generator)}
        if self.inputs == "pair":
            ids["decoder_input_ids"] = torch.randint(3, VOCAB, (2, 5), generator=generator)
        return ids


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", "AutoModelForCausalLM", {**_LLAMA, "tie_word_embeddings": True}),
    "mistral": Family("MistralForCausalLM", "MistralConfig", "AutoModelForCausalLM", _LLAMA),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", "AutoModelForCausalLM", _LLAMA),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", "AutoModelForCausalLM", {**_LLAMA, "head_dim": 16}),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        "AutoModelForCausalLM",
        {"n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": 4, "n_inner": WIDTH, "n_positions": 64},
    ),
    "opt": Family(
        "OPTForCausalLM",
        "OPTConfig",
        "AutoModelForCausalLM",
        {
            "hidden_size": HIDDEN,
            "ffn_dim": WIDTH,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 4,
            "word_embed_proj_dim": HIDDEN,
            "max_position_embeddings": 64,
        },
    ),
    "bert": Family("BertForSequenceClassification", "BertConfig", "AutoModelForSequenceClassification", _BERT),
    "distilbert": Family(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        "AutoModelForMaskedLM",
        {"dim": HIDDEN, "hidden_dim": WIDTH, "n_layers": BLOCKS, "n_heads": 4},
    ),
    "albert": Family("AlbertForMaskedLM", "AlbertConfig", "AutoModelForMaskedLM", {**_BERT, "embedding_size": 16}),
    "vit": Family("ViTForImageClassification", "ViTConfig", "AutoModelForImageClassification", _IMAGE, "image"),
    "deit": Family("DeiTForImageClassification", "DeiTConfig", "AutoModelForImageClassification", _IMAGE, "image"),
    "dinov2": Family(
        "Dinov2Model",
        "Dinov2Config",
        "AutoModel",
        {k: v for k, v in _IMAGE.items() if k != "intermediate_size"},
        "image",
    ),
    "t5": Family("T5ForConditionalGeneration", "T5Config", "AutoModelForSeq2SeqLM", _T5, "pair"),
    "t5-gated": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        "AutoModelForSeq2SeqLM",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "pair",
    ),
    "marian": Family("MarianMTModel", "MarianConfig", "AutoModelForSeq2SeqLM", _MARIAN, "pair"),
}

_OTHER = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}

# Architectures without a row in the table.
OTHERS: dict[str, Family] = {
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", "AutoModelForCausalLM", {**_OTHER, "intermediate_size": 48}
    ),
    "falcon": Family("FalconForCausalLM", "FalconConfig", "AutoModelForCausalLM", _OTHER),
    "bart": Family("BartForConditionalGeneration", "BartConfig", "AutoModelForSeq2SeqLM", _MARIAN, "pair"),
    "swin": Family(
        "SwinModel",
        "SwinConfig",
        "AutoModel",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
        "image",
    ),
    "bloom": Family("BloomForCausalLM", "BloomConfig", "AutoModelForCausalLM", {**_OTHER, "n_layer": 2, "n_head": 4}),
    "ctrl": Family(
        "CTRLLMHeadModel",
        "CTRLConfig",
        "AutoModelForCausalLM",
        {"n_embd": HIDDEN, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),  # scales its embeddings in place
    "mamba": Family("MambaForCausalLM", "MambaConfig", "AutoModelForCausalLM", {**_OTHER, "state_size": 8}),
    "nomic_bert": Family(  # its files fuse q, k and v
        "NomicBertModel", "NomicBertConfig", "AutoModel", {**_OTHER, "intermediate_size": 48, "head_dim": 8}
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        "MixtralConfig",
        "AutoModelForCausalLM",
        {**_OTHER, "intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 3},
    ),
}


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    """`tiny("llama")` builds a tiny random model of that architecture."""
    return lambda family, **fields: (FAMILIES | OTHERS)[family].build(**fields)


def output(model: nn.Module, family: str, seed: int = 0) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    with torch.no_grad():
        batch = (FAMILIES | OTHERS)[family].batch(seed)
        dtype = next(p.dtype for p in model.parameters())
        result = model(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()})
    return result.logits if "logits" in result else result.last_hidden_state


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with its tokenizer on disk."""
    return write_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text in a file."""
    path = tmp_path_factory.mktemp("text") / "speech.txt"
    path.write_text(calibration_text()[0][:4000])
    return path


@pytest.fixture(params=("cpu", "torch"))
def backend(request: pytest.FixtureRequest) -> Any:
    """A test that takes it runs on the native library, where it has the op, and on the reference."""
    if request.param == "cpu" and not any(r["available"] for r in ops.status() if r["backend"] == "cpu"):
        pytest.skip("the native library is not built")
    if request.param == "torch":
        with ops.use_backend("torch"):
            yield request.param
    else:
        yield request.param
