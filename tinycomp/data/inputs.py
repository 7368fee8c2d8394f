"""`batches(data, ...)`: calibration batches from every form of `data` that the public functions take."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinycomp.data.sotu import calibration_text
from tinycomp.data.tokens import frame, length_limit, token_ids

FORMS = "None, a list of strings, a path to .txt/.jsonl/.parquet, a datasets.Dataset, an iterable of dicts of tensors"


def batches(
    data: Any = None,
    tokenizer: Any = None,
    *,
    num_calibration_samples: int = 48,
    max_seq_length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    text_column: str = "text",
) -> list[dict[str, Tensor]]:
    """Calibration batches, ready for `model(**batch)`.

    Text is joined by single spaces, tokenised without special tokens and cut into windows of `max_seq_length`;
    `num_calibration_samples` windows are drawn without replacement with `seed`. Tokenizers that have both a [CLS]
    and a [SEP] token get them around every window, inside the length.

    Args:
        data: None (the bundled speeches), a list of strings, a path to a .txt, .jsonl or .parquet file, a
            `datasets.Dataset`, or dicts of tensors. A list or tuple of dicts is used whole; a DataLoader or any other
            iterable is read until it has given `num_calibration_samples` rows.
        tokenizer: transformers tokenizer or `tokenizers.Tokenizer`; needed for text.
        num_calibration_samples: windows (text) or rows (iterables).
        max_seq_length: tokens per window.
        batch_size: windows per batch.
        seed: of the draw.
        text_column: column of .jsonl, .parquet and datasets that holds the text.

    Returns:
        For text, dicts of `input_ids` and `attention_mask`, int64 (batch, length). Dicts of tensors as they came.

    Raises:
        ValueError: empty text, no tokenizer, unknown column, unknown file ending, a size below 1.
        TypeError: `data` is of another kind.
        FileNotFoundError: the file is missing.
        RuntimeError: the file needs a package that is not installed.
    """
    for name, value in (
        ("num_calibration_samples", num_calibration_samples),
        ("max_seq_length", max_seq_length),
        ("batch_size", batch_size),
    ):
        if value < 1:
            raise ValueError(f"data: got {name}={value}, allowed are integers from 1 on")
    texts = _texts(data, text_column)
    if texts is None:
        return _tensor_batches(data, num_calibration_samples)
    if tokenizer is None:
        raise ValueError(
            "data: got text without a tokenizer; pass tokenizer=, or dicts of tensors that suit the model "
            "(a vision model needs pixel_values)"
        )
    windows = _windows(texts, tokenizer, num_calibration_samples, max_seq_length, seed)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows.split(batch_size)]


def for_model(batch: Mapping[str, Tensor], model: torch.nn.Module, labels: bool = False) -> dict[str, Tensor]:
    """The batch with what `model` needs beside `input_ids`.

    An encoder-decoder gets `decoder_input_ids`: the input ids shifted right by one behind the decoder's start token,
    so that the decoder learns to copy. Batches without `input_ids`, or that already hold these entries, keep theirs.

    Args:
        batch: int64 tensors (batch, length).
        model: any model; its config decides.
        labels: also add `labels`, the input ids with -100 where the attention mask is 0.

    Raises:
        ValueError: an encoder-decoder whose config names no start, pad or bos token.
    """
    out = dict(batch)
    ids = out.get("input_ids")
    if ids is None:
        return out
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in out:
        names = ("decoder_start_token_id", "pad_token_id", "bos_token_id")
        start = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
        if start is None:
            raise ValueError(
                f"data: the encoder-decoder's config sets none of {list(names)}; set one, or pass "
                "batches that hold decoder_input_ids"
            )
        out["decoder_input_ids"] = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
    if labels and "labels" not in out:
        mask = out.get("attention_mask")
        out["labels"] = ids.clone() if mask is None else ids.masked_fill(mask == 0, -100)
    return out


def check_labels(labels: Tensor, shape: Sequence[int], classes: int, who: str, ignored: bool = False) -> None:
    """Refuse labels that are not classes of a model's predictions.

    Args:
        labels: of one batch.
        shape: that they must have.
        classes: of the model.
        who: begins the message.
        ignored: -100 is allowed, too.

    Raises:
        ValueError: another dtype or shape, or a number that is no class.
    """
    if labels.dtype.is_floating_point or labels.dtype == torch.bool or labels.shape != torch.Size(shape):
        raise ValueError(
            f"{who}: got labels of shape {tuple(labels.shape)} and dtype {labels.dtype}, allowed are integers of shape "
            f"{tuple(shape)}, one class for each prediction"
        )
    wrong = labels[((labels < 0) | (labels >= classes)) & ~((labels == -100) & ignored)]
    if len(wrong):
        allowed = f"0 to {classes - 1}" + (", or -100 where there is none" if ignored else "")
        raise ValueError(f"{who}: got the label {int(wrong[0])}, allowed are {allowed}; correct the data")


def _windows(texts: list[str], tokenizer: Any, count: int, length: int, seed: int) -> Tensor:
    """(count, length) int64: windows on a grid over the tokens of all texts, drawn without replacement."""
    limit = length_limit(tokenizer)
    if limit is not None and length > limit:
        warnings.warn(
            f"data: the tokenizer's model takes {limit} tokens; windows shortened from {length}", stacklevel=3
        )
        length = limit
    first, last = frame(tokenizer) if length > 2 else ([], [])
    ids = torch.tensor(token_ids(tokenizer, " ".join(texts)), dtype=torch.int64)
    if not len(ids):
        raise ValueError("data: the text is empty (no tokens); pass text, or data=None for the bundled speeches")
    length = min(length - len(first) - len(last), len(ids))
    grid = len(ids) // length
    if grid < count:
        warnings.warn(
            f"data: the text has {len(ids)} tokens, {grid} windows of {length}; {count} were asked for", stacklevel=3
        )
    chosen = torch.randperm(grid, generator=torch.Generator().manual_seed(seed))[:count]
    windows = ids[chosen[:, None] * length + torch.arange(length)]
    rows = len(windows)
    head, tail = (torch.tensor(part, dtype=torch.int64).expand(rows, -1) for part in (first, last))
    return torch.cat([head, windows, tail], dim=1)


def _texts(data: Any, column: str) -> list[str] | None:
    """The texts of `data`, or None when it is an iterable of tensors."""
    if data is None:
        return calibration_text()
    if isinstance(data, str | Path):
        texts = _read_file(Path(data), column)
    elif type(data).__module__.partition(".")[0] == "datasets":
        texts = _dataset_column(data, column)
    elif isinstance(data, list | tuple) and (not data or isinstance(data[0], str)):
        texts = list(data)
    else:
        return None
    wrong = next((type(text).__name__ for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise TypeError(f"data: got a {wrong} among the texts, allowed are strings only")
    if not any(text.strip() for text in texts):
        raise ValueError("data: the text is empty; pass text, or data=None for the bundled speeches")
    return texts


def _read_file(path: Path, column: str) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"data: no file at {str(path)!r}; allowed are {FORMS}")
    if path.suffix == ".txt":
        try:
            return [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise ValueError(f"data: {path.name} is not UTF-8 text ({error}); convert it") from error
    if path.suffix == ".jsonl":
        return list(_read_jsonl(path, column))
    if path.suffix == ".parquet":
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise RuntimeError(
                f"data: reading {path.name} needs the package pyarrow; install tinycomp[data]"
            ) from error
        try:
            _check_column(column, parquet.read_schema(path).names, path.name)
            return parquet.read_table(path, columns=[column]).column(column).to_pylist()
        except ArrowException as error:
            raise ValueError(f"data: {path.name} cannot be read as parquet ({error}); write it again") from error
    raise ValueError(f"data: got a {path.suffix or 'nameless'} file ({path.name}), allowed are .txt, .jsonl, .parquet")


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"data: {path.name} line {number} is not JSON ({error}); one object a line") from error
            if not isinstance(row, dict):
                raise ValueError(f"data: {path.name} line {number} is a {type(row).__name__}; one object a line")
            _check_column(column, list(row), f"{path.name} line {number}")
            yield row[column]


def _dataset_column(data: Any, column: str) -> list[str]:
    if isinstance(data, Mapping):
        raise ValueError(f"data: got a dataset of splits {sorted(data)}; pass one of them")
    if not hasattr(data, "__len__"):
        raise TypeError("data: got a streaming dataset, allowed is one of known length; pass a list of its texts")
    if column not in data.column_names:
        raise ValueError(
            f"data: the dataset has no column {column!r}, it has {sorted(data.column_names)}; pass text_column=, or a "
            "DataLoader that yields dicts of tensors"
        )
    return list(data[column])


def _check_column(column: str, names: Iterable[str], where: str) -> None:
    if column not in names:
        raise ValueError(f"data: {where} has no column {column!r}, it has {sorted(names)}; pass text_column=")


def _tensor_batches(data: Any, rows: int) -> list[dict[str, Tensor]]:
    if isinstance(data, Mapping):
        raise TypeError("data: got one dict, allowed is an iterable of dicts of tensors; wrap it in a list")
    if not isinstance(data, Iterable):
        raise TypeError(f"data: got {type(data).__name__}, allowed are {FORMS}")
    out: list[dict[str, Tensor]] = []
    seen = 0
    for batch in data:
        out.append(_checked(batch, len(out)))
        seen += len(next(iter(batch.values())))
        if not isinstance(data, list | tuple) and seen >= rows:
            break
    if not out:
        raise ValueError(
            "data: got no batches; pass at least one dict of tensors, or data=None for the bundled speeches"
        )
    return out


def _checked(batch: Any, index: int) -> dict[str, Tensor]:
    if not isinstance(batch, Mapping) or not batch:
        raise TypeError(f"data: item {index} is a {type(batch).__name__}, allowed are {FORMS}")
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            raise TypeError(
                f"data: batch {index} holds {name!r} as {type(value).__name__}, allowed are tensors with a batch "
                "dimension; convert it, or drop the column"
            )
    return dict(batch)
