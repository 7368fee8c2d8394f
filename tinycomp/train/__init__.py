"""Recovery: closed-form healing and distillation of compressed models."""

from typing import Any

from tinycomp.train.config import Distill

__all__ = ["Distill", "RecoveryReport", "cache_teacher", "recover_"]


def __getattr__(name: str) -> Any:
    """What needs transformers' trainer, which takes a second to import, is imported when it is used."""
    if name not in __all__:
        raise AttributeError(f"module 'tinycomp.train' has no attribute {name!r}; it has {', '.join(__all__)}")
    from tinycomp.train import recover

    return getattr(recover, name)
