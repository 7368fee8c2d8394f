"""Text to token ids, with a transformers tokenizer or a bare `tokenizers.Tokenizer`."""

from __future__ import annotations

from typing import Any

# Tokenizers without a limit of their own report a sentinel of about 1e30.
NO_LIMIT = 1 << 24


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """All token ids of `text`: no special tokens, no truncation, no padding.

    Raises:
        TypeError: `tokenizer` is neither callable nor a `tokenizers.Tokenizer`.
    """
    if _is_bare(tokenizer):
        return _unlimited(tokenizer).encode(text, add_special_tokens=False).ids
    if not callable(tokenizer):
        raise TypeError(
            f"tokenizer: got {type(tokenizer).__name__}, allowed are a transformers tokenizer and tokenizers.Tokenizer"
        )
    # verbose=False: the text is cut into windows later, so "longer than the maximum" does not apply
    return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids an encoder expects around every sequence: ([CLS], [SEP]) where the tokenizer has both, else ([], [])."""
    if _is_bare(tokenizer):
        first, last = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    else:
        first, last = getattr(tokenizer, "cls_token_id", None), getattr(tokenizer, "sep_token_id", None)
    return ([], []) if first is None or last is None else ([first], [last])


def length_limit(tokenizer: Any) -> int | None:
    """Longest sequence the tokenizer says its model takes, or None."""
    limit = getattr(tokenizer, "model_max_length", None)
    return limit if isinstance(limit, int) and limit < NO_LIMIT else None


def _is_bare(tokenizer: Any) -> bool:
    return type(tokenizer).__module__.partition(".")[0] == "tokenizers"


def _unlimited(tokenizer: Any) -> Any:
    """The tokenizer without truncation and padding; a copy, because those are settings of the object."""
    if tokenizer.truncation is None and tokenizer.padding is None:
        return tokenizer
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy
