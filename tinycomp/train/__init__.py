"""Recovery: closed-form healing and distillation of compressed models."""

from tinycomp.train.config import Distill
from tinycomp.train.recover import RecoveryReport, cache_teacher, recover_

__all__ = ["Distill", "RecoveryReport", "cache_teacher", "recover_"]
