"""Save and load compressed models through transformers: the config, the quantizer plug-in, and what keeps them honest.

A plan travels inside `config.json` as `quantization_config` with `quant_method: tinycomp`. Loading builds the stock
class on meta, replays the plan with the same `apply_` that compressed the model, and fills in the tensors. A result
that a stock class can hold keeps no plan and no trace of tinycomp.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tinycomp.edits import Drop, Edit, Plan, Slice, Tie
from tinycomp.layers import elastic_layers, group_, set_ratio_
from tinycomp.models import spec_of
from tinycomp.surgery import apply_

QUANT_METHOD = "tinycomp"


class TinycompConfig(QuantizationConfigMixin):
    """What `config.json` says about a compressed model: a plan, in JSON.

    Args:
        format_version: version of the plan's format.
        edits: the edits, in the order they run.
        methods: one provenance record per method that contributed.
        unknown: fields of a newer tinycomp, ignored.
    """

    def __init__(
        self,
        format_version: int | None = None,
        edits: list[dict[str, Any]] | None = None,
        methods: list[dict[str, Any]] | None = None,
        **unknown: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.format_version, self.edits, self.methods = format_version, edits or [], methods or []

    @classmethod
    def from_plan(cls, plan: Plan) -> TinycompConfig:
        return cls(**plan.to_dict())

    @property
    def plan(self) -> Plan:
        return Plan.from_dict(self.to_dict())


class TinycompQuantizer(HfQuantizer):
    """Replays the plan of a checkpoint on the empty model that transformers is about to fill.

    Tied modules are stored once. While weights load, the tied places are empty, so that the guard tensors stored under
    their names belong to nothing and are skipped; the modules are tied afterwards.
    """

    requires_calibration = True  # refuses `quantization_config=TinycompConfig(...)` on a model that is not compressed
    quantization_config: TinycompConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        plan = _fitted(self.quantization_config.plan, model)
        self.quantization_config = TinycompConfig.from_plan(plan)
        apply_(model, plan, replay=True)
        for edit in _ties(plan):
            parent, name = _parent(model, edit.path)
            parent._modules[name] = nn.Identity()
            model._keys_to_ignore_on_load_unexpected = {
                *(model._keys_to_ignore_on_load_unexpected or ()),
                rf"(^|\.){re.escape(edit.path)}\.",  # the file of a model with a head has a prefix
            }
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for edit in _ties(self.quantization_config.plan):
            parent, name = _parent(model, edit.path)
            parent._modules[name] = model.get_submodule(edit.to)
        for module in model.modules():
            if getattr(module, "is_tinycomp_layer", False):
                module.freeze_()  # type: ignore[operator]
        if elastic_layers(model):
            set_ratio_(model, getattr(model.config, "ratio", 1.0))
        group_(model, spec_of(model).shared_inputs)
        model.is_quantized = False  # type: ignore[assignment]  # `.half()` and training work
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """The state dict with each tied module stored once, and a guard under one of its other names."""
        _keep_tensors_apart(model)
        ties = _ties(self.quantization_config.plan)
        if not ties:
            return None, {}
        state = dict(model.state_dict())
        for edit in ties:
            names = [n for n in state if n.startswith(f"{edit.path}.")]
            guard = _guard_name(model, edit)
            dtype = state[guard].dtype
            for name in names:
                del state[name]
            state[guard] = torch.empty(0, dtype=dtype)
        return state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _keep_tensors_apart(model: PreTrainedModel) -> None:
    """Save tensors as modules hold them: where files of a family fuse weights (q, k, v), factors do not fit together.

    Names still follow the file's conventions, and the loader takes unfused tensors as they are.
    """
    found = getattr(model, "_weight_conversions", None)
    if found is None:  # what `save_pretrained` does for a model that was not loaded
        found = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
    model._weight_conversions = [c for c in found if not isinstance(c, WeightConverter)]  # type: ignore[assignment]


def register() -> None:
    """Make transformers load `quant_method: tinycomp`. Safe to call again."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(TinycompConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(TinycompQuantizer)


def plan_of(model: nn.Module) -> Plan | None:
    """The plan a model carries, None when it is uncompressed or plain."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(config, dict) and config.get("quant_method") == QUANT_METHOD:
        config = TinycompConfig.from_dict(config)
    if isinstance(config, TinycompConfig):
        return config.plan
    return getattr(model, "tinycomp_plan", None)


def check_compressible(model: nn.Module) -> None:
    """Refuse models whose compressed form could not be saved, before any work is done.

    Raises:
        ValueError: adapters are attached, another library has quantised the weights, the model is compiled, or its
            modules are not those of its config.
    """
    if hasattr(model, "_orig_mod"):
        raise ValueError("compress: got a compiled model, allowed is the module itself; pass model._orig_mod")
    adapters = any(hasattr(m, "base_layer") and hasattr(m, "merge") for m in model.modules())
    if adapters or hasattr(model, "peft_config"):
        raise ValueError(
            "compress: got a model with adapters attached, allowed are plain weights; "
            "call merge_and_unload() on the peft model, or compress first and attach adapters afterwards"
        )
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    if method is not None and method != QUANT_METHOD:
        raise ValueError(
            f"compress: got weights quantised by {getattr(method, 'value', method)}, allowed are floating-point ones; "
            "call model.dequantize(), or load the original checkpoint"
        )
    if isinstance(model, PreTrainedModel):
        problem = _mismatch(model, plan_of(model) or Plan(), _shapes(model), {})
        if problem:
            raise ValueError(
                f"compress: got a model that its own config does not describe ({problem}), so no checkpoint of it "
                "could be loaded; undo the change made to its modules, or compress before making it"
            )


def edit_(model: nn.Module, steps: Sequence[tuple[Plan, dict[str, Tensor]]]) -> None:
    """`apply_` every plan with its tensors, then `attach_` them; the model is left as it was when any of it fails."""
    undo: list[Callable[[], None]] = []
    try:
        for plan, tensors in steps:
            undo.append(apply_(model, plan, tensors))
        edits, methods = ([x for plan, _ in steps for x in getattr(plan, name)] for name in ("edits", "methods"))
        attach_(model, Plan(edits, methods))
        group_(model, spec_of(model).shared_inputs)
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def attach_(model: nn.Module, plan: Plan) -> None:
    """Make `model.save_pretrained` write a checkpoint that loads as this model; call it after `apply_`.

    The plan extends the one that the model carries. Edits that the final config expresses are marked `in_config`. If it
    expresses all of them, the model is plain and its config keeps no trace of tinycomp.

    Args:
        model: the edited model. Modules other than transformers models only remember the plan.
        plan: the edits that `apply_` just ran.

    Raises:
        ValueError: a reader could not rebuild the model from config and plan, or could mistake it for another one.
    """
    whole = (plan_of(model) or Plan()).extended(plan)
    if not isinstance(model, PreTrainedModel):
        model.tinycomp_plan = whole  # type: ignore[assignment]
        return
    register()
    whole = Plan([replace(e, in_config=True) if isinstance(e, Drop) else e for e in whole.edits], whole.methods)
    shapes, before = _shapes(model), dict(model.config.__dict__)
    for field, width in _uniform_widths(whole).items():
        marked = Plan([_marked(e, field) for e in whole.edits], whole.methods)
        if hasattr(model.config, field) and not _mismatch(model, marked, shapes, {field: width}):
            setattr(model.config, field, width)
            whole = marked
    problem = _mismatch(model, whole, shapes, {})
    if problem:
        model.config.__dict__.clear()
        model.config.__dict__.update(before)
        raise ValueError(f"attach_: a reader could not rebuild this model: {problem}; undo the edit that caused it")
    set_plan_(model, whole)


def set_plan_(model: PreTrainedModel, plan: Plan) -> None:
    """Make the model carry this plan, which describes it; nothing of tinycomp where the config expresses all of it."""
    plain = all(edit.in_config for edit in plan.edits)
    if plain:
        for owner, name in (
            (model, "hf_quantizer"),
            (model, "quantization_method"),
            (model.config, "quantization_config"),
        ):
            if hasattr(owner, name):
                delattr(owner, name)
        return
    config = TinycompConfig.from_plan(plan)
    model.config.quantization_config = config  # type: ignore[union-attr]
    model.hf_quantizer = TinycompQuantizer(config, pre_quantized=True)  # type: ignore[assignment]


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _uniform_widths(plan: Plan) -> dict[str, int]:
    """Config field -> width, where all slices that name the field end with the same width."""
    keeps: dict[str, dict[tuple[str, int], int]] = {}
    for edit in plan.edits:
        if isinstance(edit, Slice) and edit.config_field:
            keeps.setdefault(edit.config_field, {})[edit.path, edit.dim] = edit.keep
    return {field: min(k.values()) for field, k in keeps.items() if len(set(k.values())) == 1}


def _marked(edit: Edit, field: str) -> Edit:
    return replace(edit, in_config=True) if isinstance(edit, Slice) and edit.config_field == field else edit


def _mismatch(model: PreTrainedModel, plan: Plan, shapes: dict[str, torch.Size], fields: dict[str, Any]) -> str:
    """How the model differs from what a reader builds from its plan and its config with `fields` set; "" if not at all.

    The reader's model is built on meta. A reader without tinycomp must be able to notice the plan, too.
    """
    try:
        skeleton = stock_skeleton(model, fields)
        stock = _shapes(skeleton)
        apply_(skeleton, plan, replay=True)
    except (ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        return str(error)
    built = _shapes(skeleton)
    for name in sorted(shapes.keys() | built.keys()):
        here, there = (tuple(s[name]) if name in s else "absent" for s in (shapes, built))
        if here != there:
            return f"{name} is {here} in the model and {there} for the reader"
    noticed = _ties(plan) or any(name in shapes and shapes[name] != shape for name, shape in stock.items())
    if not noticed and not all(edit.in_config for edit in plan.edits):
        return "every tensor has the stock model's shape, so a reader without tinycomp would not notice the plan"
    return ""


def stock_skeleton(model: PreTrainedModel, fields: dict[str, Any] | None = None) -> PreTrainedModel:
    """What the stock class makes of the model's config with `fields` set, on meta."""
    config = type(model.config).from_dict({**model.config.to_dict(), **(fields or {})})
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        return type(model)._from_config(config)


def _ties(plan: Plan) -> list[Tie]:
    return [edit for edit in plan.edits if isinstance(edit, Tie) and not edit.in_config]


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    head, _, name = path.rpartition(".")
    return model.get_submodule(head), name


def _guard_name(model: nn.Module, edit: Tie) -> str:
    """A tensor that the stock model has under the tied path."""
    for name, module in model.get_submodule(edit.path).named_modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            return f"{edit.path}.{name}.weight" if name else f"{edit.path}.weight"
    raise ValueError(f"tie {edit.path}: it holds no weight, so nothing can be stored once; remove the edit")


def _fitted(plan: Plan, model: PreTrainedModel) -> Plan:
    """The plan with paths for this class: the bare model lacks the prefix that a model with a head has, or the reverse.

    Edits of parts that this class does not have (a head, a decoder) fall away.
    """
    prefix = f"{model.base_model_prefix}."
    base = model._modules.get(model.base_model_prefix)

    def fit(path: str) -> str | None:
        if path.split(".")[0] in model._modules:
            return path
        if path.startswith(prefix) and path.removeprefix(prefix).split(".")[0] in model._modules:
            return path.removeprefix(prefix)
        return prefix + path if base is not None and path.split(".")[0] in base._modules else None

    edits = []
    for edit in plan.edits:
        path = fit(edit.path)
        if path is None:
            continue
        fitted = replace(edit, path=path)
        if isinstance(fitted, Tie):
            to = fit(fitted.to)
            fitted = replace(fitted, to=to or fitted.to)
        edits.append(fitted)
    return Plan(edits, plan.methods)
