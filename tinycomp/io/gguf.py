"""GGUF files of the Llama family as ordinary transformers models.

llama.cpp stores the rows of q and k with the two halves of each head's rotary pairs interleaved; they are put back
into transformers' order here. Source: the GGUF specification; llama.cpp's convert_hf_to_gguf.py (`permute`).
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LLAMA_BPE_SPLIT = (  # tiktoken's cl100k pattern, as Llama 3 uses it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED = 3, 4  # llama.cpp's token types of tokens that text never splits


def _reader(path: str | os.PathLike[str]) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise RuntimeError(
            f"load: reading {os.fspath(path)} needs the package gguf; run: pip install 'tinycomp[gguf]'"
        ) from error

    class PlainReader(GGUFReader):
        """The package's reader over a plain ndarray: slicing a memmap object 300,000 times costs seconds."""

        @property  # type: ignore[override]
        def data(self) -> np.ndarray:
            return self._plain

        @data.setter
        def data(self, value: np.ndarray) -> None:
            self._plain = np.asarray(value)

    try:
        return PlainReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"load: {os.fspath(path)} is not a readable GGUF file ({error})") from error


def read_metadata(reader: Any) -> dict[str, Any]:
    """Key-value pairs of the file as Python values."""
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def _why_unsupported(meta: dict[str, Any], names: set[str]) -> str | None:
    architecture = meta.get("general.architecture")
    if architecture != "llama":
        return f"architecture {architecture!r}"
    if meta.get("llama.expert_count", 0):
        return "a mixture of experts"
    if meta.get("llama.rope.scaling.type", "none") not in ("none", "linear"):
        return f"rope scaling {meta['llama.rope.scaling.type']!r}"
    unknown = sorted(name for name in names if hf_name(name) is None)
    return f"tensors {unknown[:3]}" if unknown else None


def llama_config(meta: dict[str, Any], names: set[str]) -> Any:
    """`LlamaConfig` from the metadata and the set of tensor names."""
    from transformers import LlamaConfig

    def key(name: str, default: Any = None) -> Any:
        value = meta.get("llama." + name, default)
        if value is None:
            raise ValueError(f"load: the GGUF file has no metadata key llama.{name}; it is not a complete Llama model")
        return value

    heads, width = key("attention.head_count"), key("embedding_length")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": key("rope.freq_base", 10000.0)}
    if meta.get("llama.rope.scaling.type", "none") == "linear":
        rope |= {"rope_type": "linear", "factor": key("rope.scaling.factor")}
    special: dict[str, Any] = {
        f"{name}_token_id": meta.get(f"tokenizer.ggml.{other}_token_id")
        for name, other in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    config = LlamaConfig(
        vocab_size=meta.get("llama.vocab_size") or len(meta["tokenizer.ggml.tokens"]),
        hidden_size=width,
        intermediate_size=key("feed_forward_length"),
        num_hidden_layers=key("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=key("attention.head_count_kv", heads),
        head_dim=key("attention.key_length", width // heads),
        rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=key("context_length"),
        tie_word_embeddings="output.weight" not in names,
        attention_bias="blk.0.attn_q.bias" in names,
        mlp_bias="blk.0.ffn_up.bias" in names,
        rope_parameters=rope,
        **special,
    )
    config.architectures = ["LlamaForCausalLM"]
    return config


def hf_name(name: str) -> str | None:
    """transformers' name of a GGUF tensor; None when the Llama architecture has no such tensor."""
    stem, _, kind = name.rpartition(".")
    if name.startswith("blk."):
        _, index, stem = stem.split(".", 2)
        return f"model.layers.{index}.{BLOCK_NAMES[stem]}.{kind}" if stem in BLOCK_NAMES else None
    return f"{TOP_NAMES[stem]}.{kind}" if stem in TOP_NAMES else None


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's rotary order: within each head, row 2i+j returns to row j*d/2+i. rows: (heads*d, ...)."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def state_dict(reader: Any, config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Dequantised tensors under transformers' names, in its row order."""
    from gguf import dequantize

    tensors: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if ".attn_q." in tensor.name:
            values = unpermute(values, config.num_attention_heads)
        elif ".attn_k." in tensor.name:
            values = unpermute(values, config.num_key_value_heads)
        name = hf_name(tensor.name)
        assert name is not None  # _why_unsupported has looked at every name
        # a copy: unquantised tensors are views of the read-only file
        tensors[name] = torch.from_numpy(np.array(values, order="C")).to(dtype)
    return tensors


def _pre_tokenizer(kind: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if kind in ("gpt-2", "default"):
        return byte_level
    if kind in ("llama-bpe", "llama3"):
        split = pre_tokenizers.Split(Regex(LLAMA_BPE_SPLIT), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise ValueError(
        f"load: the GGUF file splits text by {kind!r}, allowed: smollm, gpt-2, default, llama-bpe, llama3; use the "
        "model's Hugging Face folder instead"
    )


def build_tokenizer(meta: dict[str, Any]) -> Any:
    """`PreTrainedTokenizerFast` from the byte-level BPE vocabulary and merges in the file."""
    pre_tokenizer = _pre_tokenizer(meta.get("tokenizer.ggml.pre", "default"))
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    tokens = meta["tokenizer.ggml.tokens"]
    types = meta.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    special = [
        AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, types, strict=True) if k == CONTROL
    ]
    backend.add_special_tokens(special)
    plain = [AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True) if k == USER_DEFINED]
    backend.add_tokens(plain)

    def token(name: str) -> str | None:
        index = meta.get(f"tokenizer.ggml.{name}_token_id")
        return None if index is None else tokens[index]

    bos = token("bos")
    if meta.get("tokenizer.ggml.add_bos_token") and bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        chat_template=meta.get("tokenizer.chat_template"),
        model_max_length=meta.get("llama.context_length"),
        clean_up_tokenization_spaces=False,
    )


def _tokenizer(path: str | os.PathLike[str], meta: dict[str, Any]) -> Any | None:
    kind = meta.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return build_tokenizer(meta)
    if kind in (None, "none"):
        return None
    from transformers import AutoTokenizer  # SentencePiece: transformers rebuilds it from the scores in the file

    folder, name = os.path.split(os.path.abspath(path))
    return AutoTokenizer.from_pretrained(folder, gguf_file=name)


def load_gguf(path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> tuple[Any, Any | None]:
    """Model in eval mode and tokenizer of a Llama-family GGUF file.

    Args:
        path: the file.
        dtype: of the dequantised weights; None means float32.

    Raises:
        ValueError: the file holds something that this reader would get wrong.
        RuntimeError: the package gguf is missing.
    """
    from transformers import GenerationConfig, LlamaForCausalLM

    reader = _reader(path)
    meta = read_metadata(reader)
    names = {tensor.name for tensor in reader.tensors}
    reason = _why_unsupported(meta, names)
    if reason is not None:
        raise ValueError(
            f"load: {os.fspath(path)} holds {reason}; only dense Llama models are read from GGUF. Load it with "
            "transformers (from_pretrained(folder, gguf_file=name)), save_pretrained it, and pass that folder"
        )
    config = llama_config(meta, names)
    tokenizer = _tokenizer(path, meta)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tensors = state_dict(reader, config, dtype or torch.float32)
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    missing = [name for name in missing if not (name == "lm_head.weight" and config.tie_word_embeddings)]
    if missing or unexpected:
        raise ValueError(f"load: {os.fspath(path)} lacks tensors {missing[:3]} or has unknown ones {unexpected[:3]}")
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not stored
    model.config.dtype = dtype or torch.float32
    model.generation_config = GenerationConfig.from_model_config(config)
    return model.eval(), tokenizer
