"""The fields that LsrConfig and SokaConfig share: PEFT's common ones, and what krontune writes into a checkpoint."""

from __future__ import annotations

import math
import operator
import os
import re
from dataclasses import dataclass, field
from json import JSONDecodeError
from typing import Any, ClassVar

from peft import PeftConfig

from krontune.errors import CheckpointError, ConfigError, KrontuneError
from krontune.tuners import _peft
from krontune.tuners.checkpoint import FORMAT_VERSION, check_adapter_file, check_config


def check_choice(name: str, value: Any, allowed: tuple) -> None:
    """Raise ConfigError unless value is one of allowed (True and 1 are different things here)."""
    if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
        raise ConfigError(f"{name}={value!r} is unknown. Allowed: {', '.join(map(repr, allowed))}.")


def whole_number(value: Any) -> int:
    """The int that an integer of any library is. Raises TypeError for all else, a bool and a float included."""
    if isinstance(value, bool):
        raise TypeError(f"{value} is no number")
    return operator.index(value)


def check_positive_int(name: str, value: Any, *, or_none: bool = False) -> Any:
    """The value as an int; raises ConfigError unless it is an integer >= 1 (or None where allowed)."""
    if or_none and value is None:
        return None
    try:
        number = whole_number(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ConfigError(f"{name}={value!r} is not allowed. It must be an integer of at least 1.")
    return number


def check_number(name: str, value: Any) -> None:
    """Raise ConfigError unless value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name}={value!r} is not allowed. It must be a finite number.")


def check_pattern(name: str, value: Any) -> None:
    """Raise ConfigError unless value is a dict whose keys are regexes."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(
            f"{name}={value!r} is not allowed. It must be a dict {{regex of module name: value}}, or {{}}."
        )
    for key in value:
        try:
            re.compile(key)
        except re.error as error:
            raise ConfigError(f"{name}: {key!r} is no regex: {error}. Escape what is meant literally.") from None


def check_names(name: str, value: Any, *, or_text: bool = False) -> None:
    """Raise ConfigError unless value is None or a list of names (or, where allowed, one text)."""
    is_list = isinstance(value, (list, tuple, set)) and all(isinstance(v, str) for v in value)
    if not (value is None or is_list or (or_text and isinstance(value, str))):
        allowed = "a name, a pattern or a list of names" if or_text else "a list of names"
        raise ConfigError(f"{name}={value!r} is not allowed. It must be {allowed}, or None.")


@dataclass
class KronConfig(PeftConfig):
    """What both methods have in common; use LsrConfig or SokaConfig.

    Fields that PEFT users know mean what they mean in LoraConfig. Four are krontune's own: `train_norms`, and, written
    by krontune itself, `format_version`, `resolved` and `saved_tensors`.

    Args:
        alpha: the one multiplier of the update; nothing divides it.
        dropout: probability of dropping an entry of the update's input, in [0, 1).
        target_modules: names, a regex, or "all-linear"; None takes PEFT's default for the architecture.
        exclude_modules: names or a regex of modules to leave alone.
        layers_to_transform: layer index or indices to adapt; needs target_modules given as a list.
        layers_pattern: name of the list of layers, where it is not a usual one.
        rank_pattern: {regex of module name: r} for modules that differ from `r`.
        alpha_pattern: {regex of module name: alpha} for modules that differ from `alpha`.
        target_parameters: names of nn.Parameters to adapt (2-D, or 3-D expert weights), such as "experts.gate_up_proj".
        modules_to_save: modules trained and saved whole beside the adapter.
        bias: "none", "all", or "lsr_only" / "soka_only": which of the base model's biases are trained and saved.
        train_norms: also train every normalisation layer (saved with the adapter, as modules_to_save is).
        format_version: version of the checkpoint format; written by krontune.
        resolved: {full module name: rank, factor shapes, start, fingerprint of the weight}; written by krontune into
            its own copy of the config. A config that has it describes a checkpoint: nothing is chosen or computed anew.
            Set it to None to start afresh from a loaded config.
        saved_tensors: names of the tensors of modules that are saved whole; written by krontune.
    """

    alpha: float = field(default=1.0, metadata={"help": "The multiplier of the update; nothing divides it."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the update's input."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Module names, a regex, or 'all-linear'."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Module names or a regex to leave alone."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers, where it is not a usual one."}
    )
    rank_pattern: dict = field(default_factory=dict, metadata={"help": "{regex of module name: r}."})
    alpha_pattern: dict = field(default_factory=dict, metadata={"help": "{regex of module name: alpha}."})
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names of nn.Parameters to adapt (2-D, or 3-D expert weights)."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole beside the adapter."}
    )
    bias: str = field(default="none", metadata={"help": "'none', 'all', or '<method>_only'."})
    train_norms: bool = field(default=False, metadata={"help": "Also train every normalisation layer."})
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Checkpoint format; written by krontune."})
    resolved: dict[str, dict] | None = field(
        default=None, metadata={"help": "Rank, shapes and fingerprint per module; written by krontune."}
    )
    saved_tensors: list[str] | None = field(
        default=None, metadata={"help": "Names of the tensors of modules that are saved whole; written by krontune."}
    )

    method = ""  # "LSR" or "SOKA"
    source: ClassVar[str | None] = None  # the weights file beside a config that was loaded, for errors to name

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _peft.PeftType[self.method]
        for name in ("target_modules", "exclude_modules"):
            check_names(name, getattr(self, name), or_text=True)
        for name in ("target_parameters", "modules_to_save", "saved_tensors"):
            check_names(name, getattr(self, name))
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self._check_common()

    def _check_common(self) -> None:
        check_pattern("rank_pattern", self.rank_pattern)
        check_pattern("alpha_pattern", self.alpha_pattern)
        check_choice("train_norms", self.train_norms, (True, False))
        alphas = {f"alpha_pattern[{module!r}]": alpha for module, alpha in self.alpha_pattern.items()}
        for name, alpha in {"alpha": self.alpha, **alphas}.items():
            check_number(name, alpha)
            if alpha == 0:
                raise ConfigError(
                    f"{name}=0 switches the adapter off for good. Use another number, or exclude_modules."
                )
        check_number("dropout", self.dropout)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} is not allowed. It must be in [0, 1).")
        check_choice("bias", self.bias, ("none", "all", f"{self.method.lower()}_only"))
        if self.bias != "none" and not _peft.saves_biases():
            raise ConfigError(
                f"bias={self.bias!r} needs peft >= 0.21: older ones leave trained biases out of the file."
            )
        self.rank_pattern = {
            name: check_positive_int(f"rank_pattern[{name!r}]", rank) for name, rank in self.rank_pattern.items()
        }
        if self.target_parameters and self.dropout:
            raise ConfigError(
                f"dropout={self.dropout} cannot be applied to target_parameters: the parameter's input is not seen. "
                "Set dropout=0."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern has no effect without layers_to_transform. Set both or neither.")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ConfigError(
                f"layers_to_transform has no effect with a pattern as target_modules ({self.target_modules!r}). "
                "Give target_modules as a list of names."
            )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Load the config of a saved adapter and, where the adapter is a local folder, check its weights file.

        Raises:
            CheckpointError: a newer format, a setting that was edited into nonsense, a damaged or missing weights file.
        """
        folder = os.path.join(str(pretrained_model_name_or_path), subfolder or "")
        file = os.path.join(folder, "adapter_config.json")
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (KrontuneError, JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:  # of damage
            raise CheckpointError(f"{file} is damaged or was edited: {error}") from None
        if isinstance(config, KronConfig):
            check_config(config, file)
            check_adapter_file(config, folder)
            config.source = os.path.join(folder, _peft.SAFETENSORS_WEIGHTS_NAME)  # type: ignore[misc]
        return config
