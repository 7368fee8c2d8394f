"""What a recovery does: which losses, which parameters, how long."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Healing as CURing does it (its released scripts): hidden states and labels, only the links train, no closed form.
PAPER = {
    "heal": False, "train": "u", "kl": 0.0, "ce": 0.1, "hidden": 0.9, "steps": 2001, "batch_size": 16,
    "learning_rate": 3e-4, "warmup_steps": 100, "weight_decay": 0.01,
}  # fmt: skip


# transformers' schedules that need no settings of their own
Schedule = Literal["cosine", "cosine_with_restarts", "linear", "constant", "constant_with_warmup", "inverse_sqrt"]


class Distill(BaseModel):
    """How `recover_` heals a compressed model. Errors name the field, what was got and what is allowed.

    The objective is kl·T²·KL(teacher_T || student_T) + ce·cross-entropy + hidden·MSE, each a mean over real tokens; the
    MSE is between block outputs, divided by the teacher's variance in that block, averaged over blocks.

    Args:
        preset: "default", or "paper": healing as the CURing release does it (the other fields still win).
        heal: first refit the linears that write the residual stream in closed form; kept only when it helps.
        heal_samples: samples that this reads.
        train: "u" (the links of CUR layers), "factors" (every weight of compressed layers), "lora" (adapters on the
            linears of the blocks, merged at the end), or "all".
        kl: weight of the divergence from the teacher's distribution.
        ce: weight of the cross-entropy on the labels (the text itself for language models).
        hidden: weight of the hidden-state loss.
        temperature: T of the divergence.
        top_k: the teacher's largest logits that are stored per prediction; all others share one bucket. 0 stores all.
        steps: optimizer steps; 0 stops after the closed form.
        batch_size: samples per forward pass, over all processes.
        gradient_accumulation: forward passes per optimizer step.
        learning_rate: peak of the schedule.
        schedule: of the learning rate, by the name transformers gives it.
        warmup_steps: steps over which the rate rises from zero.
        weight_decay: AdamW's decay at the first step.
        weight_decay_end: its value at the last step, reached linearly; None keeps it constant.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        dtype: "float32", or "bfloat16" for autocast (weights and optimizer stay in float32).
        lora_rank: rank of the adapters.
        lora_alpha: their scale is lora_alpha / lora_rank.
        held_out: fraction of the samples kept aside to judge by, where no held-out data is passed; at least one.
        eval_every: steps between judgements.
        patience: judgements without improvement after which training stops; 0 never stops early.
        seed: every random choice derives from it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Literal["default", "paper"] = "default"
    heal: bool = True
    heal_samples: int = Field(default=32, ge=2)
    train: Literal["u", "factors", "lora", "all"] = "all"
    kl: float = Field(default=1.0, ge=0.0)
    ce: float = Field(default=0.0, ge=0.0)
    hidden: float = Field(default=0.0, ge=0.0)
    temperature: float = Field(default=1.0, gt=0.0)
    top_k: int = Field(default=64, ge=0)
    steps: int = Field(default=200, ge=0)
    batch_size: int = Field(default=8, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=2e-5, gt=0.0)
    schedule: Schedule = "cosine"
    warmup_steps: int = Field(default=10, ge=0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    weight_decay_end: float | None = Field(default=None, ge=0.0)
    max_grad_norm: float = Field(default=1.0, ge=0.0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    held_out: float = Field(default=0.1, gt=0.0, lt=1.0)
    eval_every: int = Field(default=50, ge=1)
    patience: int = Field(default=3, ge=0)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") == "paper":
            return PAPER | values
        return values

    @model_validator(mode="after")
    def _some_loss(self) -> Distill:
        if not (self.kl or self.ce or self.hidden):
            raise ValueError("got kl, ce and hidden all 0, allowed is at least one above 0")
        return self
