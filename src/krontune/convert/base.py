"""The base model that an adapter goes with, as far as a conversion needs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

from krontune.convert.adapter import Adapter
from krontune.errors import CheckpointError, ConfigError
from krontune.tuners.hosts import LinearHost, host_of
from krontune.weights import Source, Weights, find_model, load_config, meta_model, open_weights

#: Where the number of classes of a trained head can be read off.
_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight", "qa_outputs.weight")


@dataclass
class Base:
    """A base model, its weights still on disk."""

    source: Source
    config: PretrainedConfig
    model: nn.Module  # on the meta device, with the head of the adapter's task
    weights: Weights

    def place(self, name: str) -> Place:
        """Where in the model an adapted weight is.

        Raises:
            CheckpointError: the model has no such module.
        """
        modules = dict(self.model.named_modules())
        if name in modules:
            return Place(modules[name], f"{name}.weight", host_of(modules[name], name, False))
        module_name, _, parameter = name.rpartition(".")
        module = modules.get(module_name)
        if module is None or not hasattr(module, parameter):
            raise CheckpointError(
                f"the base model has no module {name!r}, which the adapter adapts: it was made for another "
                "architecture. Give the right model with --base."
            )
        return Place(module, name, host_of(module, name, False, parameter))

    def load(self, source: Source | None = None) -> Any:
        """The whole model in float32, from its own files or from those of a merged copy."""
        source = source or self.source
        options: dict[str, Any] = {"dtype": torch.float32, **source.loading_options}
        if hasattr(self.config, "num_labels"):
            options["num_labels"] = self.config.num_labels
        if source.gguf_file and hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        cls: Any = type(self.model)
        return cls.from_pretrained(source.name_or_path, **options).eval()


@dataclass(frozen=True)
class Place:
    """An adapted weight in its model."""

    module: nn.Module
    weight: str  # its name in the state dict
    host: LinearHost

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, n), or (experts, m, n)."""
        return tuple(self.host.matrix_shape(self.module))


def open_base(adapter: Adapter, name: str | None = None) -> Base:
    """Open the model that an adapter was made for.

    Args:
        adapter: the adapter.
        name: another name for the model than the adapter's config has.

    Raises:
        ConfigError: no name, no such model, or one that is stored quantised.
    """
    name = name or adapter.config.base_model_name_or_path
    if not name:
        raise ConfigError("the adapter's config names no base model. Give it with --base (base=).")
    source = find_model(str(name))
    config = load_config(source)
    quantisation = getattr(config, "quantization_config", None)
    if quantisation and not source.gguf_file:
        kind = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
        what = kind.get("bnb_4bit_quant_type") or kind.get("quant_method") or "quantised"
        raise ConfigError(
            f"{source.name} is stored as {what}: merging would round the update to that format, which loses most of a "
            "small one. Merge into the unquantised model with --base, or serve the adapter beside the base "
            "(krontune export --to lora)."
        )
    labels = next((adapter.read(key).shape[0] for key in adapter.others if key.endswith(_HEADS)), None)
    if labels is not None:
        config.num_labels = labels
    task = adapter.config.task_type
    model = meta_model(config, getattr(task, "value", task))
    return Base(source, config, model, open_weights(source, model))
