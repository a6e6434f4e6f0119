"""Mixed batches: every row of a batch through an adapter of its own, for the time of one forward or generate call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from krontune.errors import ConfigError
from krontune.tuners import _peft
from krontune.tuners.base_layer import KronLayer, ParameterLayer

BASE = "__base__"  # PEFT's name for a row that no adapter is applied to


@contextmanager
def adapter_by_row(tuner: nn.Module, names: Sequence[str], arguments: dict[str, Any]) -> Iterator[None]:
    """While this context lasts, row i of every batch goes through the adapter names[i].

    Args:
        tuner: a KronModel, in eval mode.
        names: one adapter's name, or "__base__", for each row.
        arguments: of the forward or generate call; those of generate say how often it repeats a row.

    Raises:
        ConfigError: training, unknown names, merged adapters, target_parameters, or another number of rows.
    """
    if tuner.training:
        raise ConfigError("adapter_names is for inference. Call model.eval() first.")
    layers = [m for m in tuner.modules() if isinstance(m, KronLayer)]
    _check(layers, names)
    copies = _copies_of_a_row(tuner.model, arguments)
    to_layer, after_module = (partial(f, names=names, copies=copies) for f in (_hand_over, _mix_saved_modules))
    handles = [layer.register_forward_pre_hook(to_layer, with_kwargs=True) for layer in layers]
    saved = [m for m in tuner.modules() if isinstance(m, _peft.ModulesToSaveWrapper)]
    handles += [module.register_forward_hook(after_module, with_kwargs=True) for module in saved]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check(layers: Sequence[KronLayer], names: Sequence[str]) -> None:
    known = {adapter for layer in layers for adapter in layer.specs}
    unknown = sorted(set(names) - known - {BASE})
    if unknown:
        raise ConfigError(f"adapter_names holds {unknown}. Known are {sorted(known)} and {BASE!r}.")
    enabled = [layer for layer in layers if not layer.disable_adapters]
    if any(layer.merged for layer in enabled):
        raise ConfigError("adapter_names cannot be used with merged adapters. Call unmerge_adapter() first.")
    if any(isinstance(layer, ParameterLayer) for layer in enabled):
        raise ConfigError("adapter_names (mixed batches) does not work with target_parameters.")


def _copies_of_a_row(model: Any, arguments: dict[str, Any]) -> int:
    """How many rows of a decoder's batch generate makes of one: its beams, or the sequences to return."""
    config = arguments.get("generation_config") or getattr(model, "generation_config", None)
    sizes = (arguments.get(n) or getattr(config, n, None) or 1 for n in ("num_beams", "num_return_sequences"))
    return max(sizes)


def _by_row(x: Tensor, names: Sequence[str], copies: int) -> Sequence[str]:
    """The adapter of every row of x; rows that generate has repeated stand side by side."""
    if len(x) == len(names) * copies:
        return [name for name in names for _ in range(copies)]
    if len(x) != len(names):  # an encoder's rows are not repeated
        raise ConfigError(f"adapter_names has {len(names)} entries for a batch of {len(x)}. Give one name a row.")
    return names


def _hand_over(
    layer: KronLayer, args: tuple, kwargs: dict, *, names: Sequence[str], copies: int
) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": _by_row(args[0], names, copies)}


def _mix_saved_modules(
    module: Any, args: tuple, kwargs: dict, output: Tensor, *, names: Sequence[str], copies: int
) -> Tensor:
    """The output of a module that is trained whole; PEFT's own mixing knows no norms, and ignores inactive adapters."""
    if module.disable_adapters:
        return output
    x, *rest = args
    rows = _by_row(x, names, copies)
    mixed = module.original_module(x, *rest, **kwargs)
    for adapter in set(rows) & set(module.modules_to_save):
        index = torch.tensor([i for i, name in enumerate(rows) if name == adapter], device=x.device)
        mixed = mixed.index_copy(0, index, module.modules_to_save[adapter](x[index], *rest, **kwargs))
    return mixed
