"""Every private PEFT symbol that krontune uses, and the registration of a method that PEFT does not know.

PEFT has no entry point for methods of other packages: its registry refuses a name that is not a member of the enum
`PeftType`. `register_method` adds the member first, checks that it behaves as PEFT's own do, and registers the method.
"""

from __future__ import annotations

from typing import Any

import peft
from packaging.version import Version
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
    check_target_module_exists,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    PeftType,
    get_quantization_kwargs,
    register_peft_method,
)
from peft.utils import resolve_quantization_backend as _resolve_quantization_backend
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.save_and_load import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn

from krontune.errors import ConfigError

__all__ = [
    "SAFETENSORS_WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "BufferDict",
    "ModulesToSaveWrapper",
    "PeftType",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "get_quantization_kwargs",
    "include_all_linear_layers",
    "register_method",
    "resolve_quantization_backend",
    "saves_biases",
]

include_all_linear_layers = _maybe_include_all_linear_layers


def resolve_quantization_backend(base: nn.Module, **kwargs: Any) -> Any:
    """PEFT's quantisation backend of a layer, or None.

    PEFT 0.20 asks torchao for a name that torchao 0.18 no longer has, for every layer. A layer whose weight is not
    torchao's does not need the answer.

    Raises:
        ConfigError: the weight is torchao's, and the two versions do not fit.
    """
    try:
        return _resolve_quantization_backend(base, **kwargs)
    except ImportError as error:
        if type(getattr(base, "weight", None)).__module__.startswith("torchao"):
            raise ConfigError(
                f"peft {peft.__version__} does not work with the installed torchao: {error}. Install peft >= 0.21, or "
                "torchao < 0.18."
            ) from None
        return None


def saves_biases() -> bool:
    """Whether this PEFT writes trained biases of any method into the checkpoint (0.21 and later do)."""
    return Version(peft.__version__) >= Version("0.21.0")


def _add_enum_member(name: str) -> PeftType:
    """Make `name` a member of PeftType, a (str, Enum), as if it had been written in its class body."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    # EnumMeta refuses setattr on a known member, so the attribute goes in before the name is in the member map.
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):  # Python >= 3.12
        PeftType._hashable_values_.append(name)
    return member


def _behaves_like_a_member(name: str) -> bool:
    return PeftType(name) is PeftType[name] is getattr(PeftType, name) and name in list(PeftType)


def register_method(name: str, config_cls: type, model_cls: type) -> None:
    """Register a tuner with PEFT under `name` (upper case), once; a second call does nothing.

    Raises:
        ImportError: this version of PEFT or Python keeps its enum in another way.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    member = _add_enum_member(name)
    if not _behaves_like_a_member(name):
        raise ImportError(
            f"krontune could not register the method {name} with peft {peft.__version__}; "
            "supported are peft>=0.20,<0.22. Install one of those."
        )
    if member not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls)
