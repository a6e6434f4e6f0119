"""The preprocessing call of the gradient start: one mean gradient for each weight that a config adapts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from krontune.errors import ConfigError
from krontune.tuners import _peft
from krontune.tuners.ranks import mean_over_ranks

if TYPE_CHECKING:
    from krontune.tuners.base_config import KronConfig
    from krontune.tuners.base_layer import KronLayer

_ATTRIBUTE = "_krontune_gradient"


def preprocess_gradient(model: nn.Module, config: KronConfig, train_step: Callable[[], Any]) -> None:
    """Estimate the gradient that `init_weights="gradient"` starts from. Call it before get_peft_model.

    Runs `train_step` with gradients enabled for the weights that `config` adapts, and for those alone, then keeps the
    sum of their gradients (its scale does not matter) until get_peft_model takes it. A few batches, 64 to 256 examples
    in all, are enough. The model is put in train mode for the time and left as it was, weights included.

    Where torch.distributed is initialised, every rank must call it, each with batches of its own: the mean over the
    ranks is kept, so that all start alike (the random numbers that a start also draws are the caller's to seed).

    Args:
        model: the base model, not yet wrapped.
        config: an LsrConfig or SokaConfig with init_weights="gradient".
        train_step: runs forward and backward over the batches: `loss.backward()`, no optimizer step.

    Raises:
        ConfigError: another init_weights, quantised weights, nothing matched, no gradient came, or one with NaN or Inf.

    Memory: one gradient for every adapted weight, as full fine-tuning of those weights would take.
    """
    if config.init_weights != "gradient":
        raise ConfigError(
            f"preprocess_gradient needs init_weights='gradient'; the config says {config.init_weights!r}."
        )
    targets = dict(_targets(model, config))
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    was_training = model.training
    for parameter, _ in trainable:
        parameter.requires_grad_(False)
    for parameter in targets.values():
        parameter.requires_grad_(True)
        parameter.grad = None
    try:
        model.train()
        with torch.enable_grad():
            train_step()
        _keep_gradients(model, targets)
    finally:
        for parameter in targets.values():
            parameter.grad = None
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        model.train(was_training)


def _keep_gradients(model: nn.Module, targets: dict[str, nn.Parameter]) -> None:
    for name, parameter in targets.items():
        # Before any check: a rank that raised would leave the others waiting, and NaN reaches them all in the mean.
        reached = mean_over_ranks(torch.full((1,), float(parameter.grad is not None), device=parameter.device))
        parameter.grad = mean_over_ranks(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        if not reached.item():
            raise ConfigError(f"No gradient reached {name}. train_step must run loss.backward() through the model.")
        if not bool(torch.isfinite(parameter.grad).all()):
            raise ConfigError(f"The gradient of {name} holds NaN or Inf. Use float32 or bfloat16 and a finite loss.")
    for name, parameter in targets.items():
        module_name, _, weight_name = name.rpartition(".")
        module = model.get_submodule(module_name)
        kept = module.__dict__.setdefault(_ATTRIBUTE, {})
        kept[weight_name] = parameter.grad


def _targets(model: nn.Module, config: KronConfig) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of every weight that the config adapts, matched as PEFT does."""
    config = copy.deepcopy(config)  # PEFT fills in target_modules
    tuner = _tuner_class(config)
    config = tuner._prepare_adapter_config(config, tuner.get_model_config(model))
    config = _peft.include_all_linear_layers(config, model)
    found = False
    for name, module in model.named_modules():
        for weight_name, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{weight_name}"
            is_target = weight_name == "weight" and bool(_peft.check_target_module_exists(config, name))
            if is_target or any(full == t or full.endswith(f".{t}") for t in config.target_parameters or ()):
                if not parameter.is_floating_point():
                    raise ConfigError(f"{full} is quantised, and has no gradient. Use another init_weights.")
                found = True
                yield full, parameter
    if not found:
        raise ConfigError(
            f"target_modules={config.target_modules} and target_parameters={config.target_parameters} matched nothing. "
            "preprocess_gradient takes the base model, before get_peft_model."
        )


def _tuner_class(config: KronConfig) -> Any:
    from peft import PEFT_TYPE_TO_TUNER_MAPPING

    return PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]


def needed_gradient(gradient: Tensor | None) -> Tensor:
    """The gradient that a start is made from; raises ConfigError where preprocess_gradient left none."""
    if gradient is None:
        raise ConfigError(
            "init_weights='gradient' needs the mean gradient of a few batches. Call "
            "krontune.preprocess_gradient(model, config, train_step) before get_peft_model."
        )
    return gradient


def kept_gradient(layer: KronLayer) -> Tensor | None:
    """The gradient that preprocess_gradient left for a layer, as a matrix; None if there is none."""
    gradient = layer.get_base_layer().__dict__.get(_ATTRIBUTE, {}).get(layer.weight_name)
    return None if gradient is None else layer.host.to_matrix(gradient)


def drop_gradient(layer: KronLayer) -> None:
    """Forget that gradient: the start has been made from it."""
    kept = layer.get_base_layer().__dict__.get(_ATTRIBUTE, {})
    kept.pop(layer.weight_name, None)
    if not kept:
        layer.get_base_layer().__dict__.pop(_ATTRIBUTE, None)
