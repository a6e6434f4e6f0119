"""The trainer's arguments out of a run config: what may be set, what it is otherwise, and what is refused early."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from krontune.errors import ConfigError

from .config import RunConfig
from .methods import check_settings
from .runs import RunFolder

Arguments = TypeVar("Arguments", bound=TrainingArguments)

# Set by the run config itself, in one place each.
OWN_SETTINGS = {
    "output_dir": "output",
    "seed": "seed",
    "report_to": "report_to",
    "resume_from_checkpoint": "resume",
    "model_init_kwargs": "model",
    "trust_remote_code": "model.trust_remote_code",
}
# TRL's 2e-5 is for full fine-tuning. Where a method's useful range lies is in docs/train.md.
LEARNING_RATES = {"lsr": 6e-3, "soka": 2e-3}
LEARNING_RATE = 2e-4
# What TRL and torch would only complain about deep inside, or not at all.
LEAST = {
    "learning_rate": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 0,
    "max_length": 1,
}


def trainer_arguments(
    kind: type[Arguments], config: RunConfig, folder: RunFolder, defaults: dict[str, Any] | None = None
) -> Arguments:
    """Arguments from `config.training`, with defaults that suit adapters and the hardware.

    Args:
        kind: the dataclass whose fields `config.training` may set.
        config: the run.
        folder: where its checkpoints go.
        defaults: more defaults, which go before the common ones.

    Raises:
        ConfigError: a setting that `kind` does not have (the nearest is suggested), that the run config holds
            elsewhere, or whose value is refused.
    """
    for name, place in OWN_SETTINGS.items():
        if name in config.training:
            raise ConfigError(f"training.{name} belongs elsewhere in the file: set '{place}' instead.")
    known = {f.name for f in dataclasses.fields(kind) if f.init} - OWN_SETTINGS.keys()
    settings = check_settings(kind, config.training, "training", known)
    _check_ranges(settings)
    common: dict[str, Any] = {
        "learning_rate": LEARNING_RATES.get(config.method.name.lower(), LEARNING_RATE),
        "dataloader_pin_memory": on_gpu(settings),
        "ddp_broadcast_buffers": False,  # frozen, and equal everywhere: one seed, one base, one mean gradient
        "disable_tqdm": True,  # krontune.recipes.callbacks has a bar of its own
    }
    if config.data.task or config.data.eval or config.data.eval_split:
        common["eval_strategy"] = "epoch"
    try:
        return kind(
            output_dir=str(folder.checkpoints),
            seed=config.seed,
            report_to=config.report_to,
            **{**common, **(defaults or {}), **settings},
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training settings: {str(error).strip()}") from None


def on_gpu(settings: dict[str, Any]) -> bool:
    """Whether a run with these training settings uses a GPU."""
    return torch.cuda.is_available() and not settings.get("use_cpu", False)


def _check_ranges(settings: dict[str, Any]) -> None:
    for name, least in LEAST.items():
        value = settings.get(name)
        if value is not None and not value >= least:
            raise ConfigError(f"training.{name} is {value}; it must be at least {least}.")
    if settings.get("max_steps", -1) < 1 and settings.get("max_steps", -1) != -1:
        raise ConfigError(
            f"training.max_steps is {settings['max_steps']}; it must be at least 1, or -1 for whole epochs."
        )
