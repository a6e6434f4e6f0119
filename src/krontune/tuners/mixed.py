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
def adapter_by_row(tuner: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """While this context lasts, row i of every batch goes through the adapter names[i].

    Args:
        tuner: a KronModel, in eval mode.
        names: one adapter's name, or "__base__", for each row; generate may repeat the rows.

    Raises:
        ConfigError: training, unknown names, merged adapters, target_parameters, or another number of rows.
    """
    if tuner.training:
        raise ConfigError("adapter_names is for inference. Call model.eval() first.")
    layers = [m for m in tuner.modules() if isinstance(m, KronLayer)]
    _check(layers, names)
    rows = _Rows(names)
    to_layer, after_module = (partial(f, rows=rows) for f in (_hand_over, _mix_saved_modules))
    handles = [layer.register_forward_pre_hook(to_layer, with_kwargs=True) for layer in layers]
    saved = [m for m in tuner.modules() if isinstance(m, _peft.ModulesToSaveWrapper)]
    handles += [module.register_forward_hook(after_module, with_kwargs=True) for module in saved]
    try:
        with _counting_beams(tuner.model, rows):
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


class _Rows:
    """The adapters of a batch's rows, each of which generate makes `copies` of, side by side."""

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.copies = 1

    def of(self, x: Tensor) -> Sequence[str]:
        """The adapter of every row of x."""
        if len(x) == len(self.names) * self.copies:
            return [name for name in self.names for _ in range(self.copies)]
        if len(x) != len(self.names):  # an encoder's rows are not repeated
            raise ConfigError(f"adapter_names has {len(self.names)} entries for a batch of {len(x)}. Give one a row.")
        return self.names


@contextmanager
def _counting_beams(model: Any, rows: _Rows) -> Iterator[None]:
    """Set rows.copies while model.generate runs. PEFT says no more than that the model is used, not how."""
    generate, own = getattr(model, "generate", None), vars(model).get("generate")
    if generate is None:
        yield
        return

    def counting(*args: Any, **kwargs: Any) -> Any:
        rows.copies = _copies_of_a_row(model, *args, **kwargs)
        try:
            return generate(*args, **kwargs)
        finally:
            rows.copies = 1

    model.generate = counting
    try:
        yield
    finally:
        if own is None:
            del model.generate
        else:
            model.generate = own


def _copies_of_a_row(model: Any, inputs: Any = None, generation_config: Any = None, *_: Any, **arguments: Any) -> int:
    """How many rows of a decoder's batch generate makes of one: its beams, or the sequences to return.

    What a call leaves open is taken from its generation_config, and what that leaves open from the model's.
    """
    configs = (generation_config, getattr(model, "generation_config", None))

    def setting(name: str) -> int:
        return next((v for v in (arguments.get(name), *(getattr(c, name, None) for c in configs)) if v is not None), 1)

    return max(setting("num_beams"), setting("num_return_sequences"))


def _hand_over(layer: KronLayer, args: tuple, kwargs: dict, *, rows: _Rows) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": rows.of(args[0])}


def _mix_saved_modules(module: Any, args: tuple, kwargs: dict, output: Tensor, *, rows: _Rows) -> Tensor:
    """The output of a module that is trained whole; PEFT's own mixing knows no norms, and ignores inactive adapters."""
    if module.disable_adapters:
        return output
    x, *rest = args
    names = rows.of(x)
    mixed = module.original_module(x, *rest, **kwargs)
    for adapter in set(names) & set(module.modules_to_save):
        index = torch.tensor([i for i, name in enumerate(names) if name == adapter], device=x.device)
        mixed = mixed.index_copy(0, index, module.modules_to_save[adapter](x[index], *rest, **kwargs))
    return mixed
