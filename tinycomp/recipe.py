"""Method configurations from names and `key=value` settings, and the recipe that repeats a job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from tinycomp.errors import UsageError
from tinycomp.methods import METHODS
from tinycomp.methods._base import MethodConfig


def _config_class(name: str) -> type[MethodConfig]:
    classes = {key.lower(): method.config for key, method in METHODS.items()}
    found = classes.get(name.lower().replace("-", "").replace("_", ""))
    if found is None:
        raise UsageError(f"method: got {name!r}, allowed: {', '.join(sorted(classes))}")
    return found


def _settings(settings: Sequence[str], name: str, names: Sequence[str]) -> dict[str, Any]:
    """Values of `key=value` (all methods) and `method.key=value` (that method), parsed as YAML scalars."""
    out = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise UsageError(f"--set: got {setting!r}, allowed: FIELD=VALUE or METHOD.FIELD=VALUE")
        owner, dot, field = key.partition(".")
        if dot and owner.lower() not in names:
            raise UsageError(f"--set: {setting!r} names the method {owner!r}, but --method gives {', '.join(names)}")
        if not dot or owner.lower() == name:
            text = ":" in value and value.replace(":", "").isdigit()  # YAML reads 2:4 as a number of base 60
            out[(field if dot else key).replace("-", "_")] = value if text else yaml.safe_load(value)
    return out


def make_configs(methods: str, settings: Sequence[str] = (), **fields: Any) -> list[MethodConfig]:
    """One configuration per name in `methods`, in order.

    Args:
        methods: names separated by commas, any case: "cur" or "width-prune,svd".
        settings: `FIELD=VALUE`, or `METHOD.FIELD=VALUE` for one of several methods.
        fields: values that every method gets; None means the method's own default.

    Raises:
        UsageError: unknown method or field, or a value outside its range; says what is allowed.
    """
    names = [name.strip().lower() for name in methods.split(",") if name.strip()]
    if not names:
        raise UsageError(f"method: got none, allowed: {', '.join(sorted(key.lower() for key in METHODS))}")
    shared = {key: value for key, value in fields.items() if value is not None}
    configs = []
    for name in names:
        cls = _config_class(name)
        try:
            configs.append(cls(**(shared | _settings(settings, name, names))))
        except ValidationError as error:
            known = ", ".join(cls.model_fields)
            details = "; ".join(
                f"{'.'.join(map(str, problem['loc'])) or cls.__name__}: got {problem['input']!r}, {problem['msg']}"
                for problem in error.errors()
            )
            raise UsageError(f"{cls.__name__}: {details}; the fields are {known}") from error
    return configs


def make_recipe(
    source: str, configs: Sequence[MethodConfig], command: str, model: Any, **inputs: Any
) -> dict[str, Any]:
    """What repeats the job: base model, configurations, calibration inputs, command line."""
    compressed = getattr(model.config, "quantization_config", None) is not None
    return {
        "model": source,
        "model_class": type(model).__name__,
        "method_names": [type(config).__name__ for config in configs],
        "methods": [config.model_dump(mode="json") for config in configs],
        "calibration": {key: value for key, value in inputs.items() if value is not None},
        "command": command,
        "quant_method": "tinycomp" if compressed else None,
    }
