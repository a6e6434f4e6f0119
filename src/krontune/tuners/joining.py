"""Joining adapters into one: what KronModel.add_weighted_adapter does beside each method's own sum."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from krontune.errors import ConfigError
from krontune.tuners import _peft
from krontune.tuners.base_config import check_choice, check_number


def check_join(
    configs: Mapping[str, Any],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
) -> None:
    """Raise ConfigError unless `adapters` of a model, which has `configs`, can be joined under a new name."""
    check_choice("combination_type", combination_type, ("linear", "cat"))
    if len(adapters) != len(weights) or not adapters:
        raise ConfigError(f"Got {len(adapters)} adapters and {len(weights)} weights. Give one weight an adapter.")
    for adapter, weight in zip(adapters, weights, strict=True):
        check_number(f"the weight of {adapter!r}", weight)
    missing = [a for a in adapters if a not in configs]
    if missing or adapter_name in configs:
        wrong = f"{missing} do not exist" if missing else f"{adapter_name!r} exists already"
        raise ConfigError(f"add_weighted_adapter: {wrong}. The model has {sorted(configs)}.")
    biased = [a for a in adapters if configs[a].bias != "none"]
    if biased:
        raise ConfigError(f"add_weighted_adapter: {biased} trained biases, which all adapters of a model share.")


def joined_config(configs: Sequence[Any]) -> Any:
    """The first config without the settings that `resolved` replaces; modules will go by their full names."""
    joined = copy.deepcopy(configs[0])
    joined.resolved, joined.target_modules, joined.exclude_modules = {}, set(), None
    joined.layers_to_transform = joined.layers_pattern = None
    joined.rank_pattern, joined.alpha_pattern, joined.alpha, joined.dropout = {}, {}, 1.0, 0.0
    joined.target_parameters = next((c.target_parameters for c in configs if c.target_parameters), None)
    joined.modules_to_save = list(dict.fromkeys(name for c in configs for name in c.modules_to_save or [])) or None
    joined.train_norms = any(c.train_norms for c in configs)
    return joined


def join_saved_modules(model: Any, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Give every module that is trained whole the copy N_0 + sum_i weights_i * (N_i - N_0)."""
    for wrapper in [m for m in model.modules() if isinstance(m, _peft.ModulesToSaveWrapper)]:
        copies = wrapper.modules_to_save
        present = [(copies[a].state_dict(), w) for a, w in zip(adapters, weights, strict=True) if a in copies]
        if present:
            wrapper.update(adapter_name)
            start = wrapper.original_module.state_dict()
            for key, tensor in copies[adapter_name].requires_grad_(False).state_dict().items():
                if tensor.is_floating_point():
                    tensor += sum(w * (trained[key] - start[key]) for trained, w in present)
