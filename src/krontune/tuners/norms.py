"""The normalisation layers that train_norms adds to modules_to_save."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from krontune.errors import ConfigError
from krontune.tuners import _peft

_TORCH_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)


def norm_names(model: nn.Module, saved_whole: Sequence[str]) -> list[str]:
    """Full names of a model's normalisation layers with parameters, those inside modules of `saved_whole` left out."""
    found, new = False, []
    for name, module in model.named_modules():
        if isinstance(module, _peft.ModulesToSaveWrapper):
            module = module.original_module
        elif ".modules_to_save." in name or ".original_module" in name:
            continue
        own = next(module.parameters(recurse=False), None)
        if own is not None and (type(module).__name__.endswith("Norm") or isinstance(module, _TORCH_NORMS)):
            found = True
            if not any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in saved_whole):
                new.append(name)
    if not found:
        raise ConfigError("train_norms=True, and the model has no normalisation layer with parameters. Leave it out.")
    return new
