"""PEFT methods by name, and settings checked against the dataclass that takes them."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from pydantic import ConfigDict, ValidationError, create_model

from krontune.errors import ConfigError, suggest

from .config import NOT_SETTINGS, MethodSettings, reason


def method_names() -> list[str]:
    """Every method that PEFT knows, in lower case, ours included."""
    return sorted(peft_type.value.lower() for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING)


def peft_config(method: MethodSettings, task_type: str = "CAUSAL_LM") -> PeftConfig:
    """Build the method's own config.

    Raises:
        ConfigError: an unknown method or setting (the nearest known one is suggested), or a value that the
            method's config refuses.
    """
    config_class = _config_class(method.name)
    known = {f.name for f in dataclasses.fields(config_class) if f.init} - NOT_SETTINGS
    settings = check_settings(config_class, method.settings, section="method", known=known)
    try:
        return config_class(task_type=task_type, **settings)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"method {method.name}: {error}") from None


def check_settings(config_class: type, settings: Mapping[str, Any], section: str, known: set[str]) -> dict[str, Any]:
    """Check names and types of `settings` against a dataclass, converting as pydantic does (a list to a tuple).

    Raises:
        ConfigError: an unknown name or a value of the wrong type.
    """
    for name in settings:
        if name not in known:
            raise ConfigError(f"unknown setting '{section}.{name}'. {suggest(str(name), known)}")
    hints = _type_hints(config_class)
    # PEFT annotates many `= None` defaults without None, so None is always let through.
    fields: dict[str, Any] = {n: (Any if v is None else hints.get(n, Any), ...) for n, v in settings.items()}
    options = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())
    model = create_model(section, __config__=options, **fields)
    try:
        checked = model(**settings)
    except ValidationError as error:
        raise ConfigError(_describe(error, settings, section)) from None
    return {name: getattr(checked, name) for name in settings}


def _describe(error: ValidationError, settings: Mapping[str, Any], section: str) -> str:
    """One line a setting; the branches of a union are alternatives."""
    reasons: dict[str, list[str]] = {}
    for item in error.errors():
        reasons.setdefault(str(item["loc"][0]), []).append(reason(item["msg"]))
    return " ".join(
        f"'{section}.{name}' is {settings[name]!r}: {', or '.join(dict.fromkeys(found))}."
        for name, found in reasons.items()
    )


def _config_class(name: str) -> type[PeftConfig]:
    for peft_type, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if peft_type.value.lower() == name.lower():
            return config_class
    raise ConfigError(f"unknown method {name!r}. {suggest(name, method_names())}")


def _type_hints(config_class: type) -> dict[str, Any]:
    """Annotations as types; a class that annotates with names it does not import is taken at its word."""
    try:
        return typing.get_type_hints(config_class)
    except NameError:
        return {}
