"""Which weights a choice of modules means, and how large each is."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from krontune.errors import ConfigError
from krontune.tuners import LsrConfig

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Target:
    """One weight to adapt."""

    name: str
    m: int  # outputs
    n: int  # inputs
    experts: int | None = None

    @property
    def kind(self) -> str:
        """The name with its layer's index left out: all modules of one role share it.

        >>> Target("model.layers.3.self_attn.q_proj", 8, 8).kind
        'model.layers.*.self_attn.q_proj'
        """
        return _INDEX.sub("*", self.name)

    @property
    def indices(self) -> tuple[int, ...]:
        """The numbers that `kind` leaves out."""
        return tuple(int(i) for i in _INDEX.findall(self.name))

    @property
    def n_weights(self) -> int:
        """Entries of the weight."""
        return self.m * self.n * (self.experts or 1)


class Match(NamedTuple):
    """What a choice of modules comes to."""

    targets: list[Target]  # in the model's order
    n_other: int  # parameters trained beside the updates: heads, norms, biases


def find_targets(model: nn.Module, **matching: Any) -> Match:
    """The weights that PEFT adapts for `target_modules` and its like.

    PEFT itself decides, on a throwaway adapter; the model comes back as it was. Free on the meta device.

    Args:
        model: any model that get_peft_model takes.
        matching: target_modules, exclude_modules, layers_to_transform, layers_pattern, target_parameters,
            modules_to_save, task_type, train_norms, bias.

    Raises:
        ConfigError: nothing matches, or the settings contradict each other.
    """
    config = LsrConfig(r=1, separation_rank=1, init_weights="zero", **copy.deepcopy(matching))
    with _unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what such a small adapter deserves to hear
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        try:
            resolved = adapted.peft_config["default"].resolved
            n_trainable, _ = adapted.get_nb_trainable_parameters()
        finally:
            adapted.unload()
    targets = []
    for name, entry in resolved.items():
        *experts, m, n = entry["shape"]
        targets.append(Target(name, m, n, *experts))
    n_updates = sum(config.spec_for(t.m, t.n, experts=t.experts).n_params for t in targets)
    return Match(targets, n_trainable - n_updates)


def base_weights(model: nn.Module) -> int:
    """Entries of all matrices that a token is multiplied with: the base's multiply-adds a token, attention apart."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, (nn.Linear, Conv1D)))


def rank_pattern(targets: Sequence[Target], ranks: Sequence[int], default: int) -> dict[str, int]:
    """PEFT's {regex: rank} for the targets whose rank is not the default; one key for a kind and rank.

    >>> q = [Target(f"layers.{i}.q", 8, 8) for i in range(3)]
    >>> rank_pattern(q, [1, 2, 2], default=1)
    {'^layers\\\\.(1|2)\\\\.q$': 2}
    """
    groups: dict[tuple[str, int], list[Target]] = {}
    for target, rank in zip(targets, ranks):
        if rank != default:
            groups.setdefault((target.kind, rank), []).append(target)
    pattern = {}
    for (kind, rank), members in groups.items():
        for key in _keys(kind, members, all_of_kind=sum(t.kind == kind for t in targets) == len(members)):
            pattern[key] = rank
    return pattern


def _keys(kind: str, members: list[Target], all_of_kind: bool) -> Iterator[str]:
    """Anchored regexes that match exactly the members, among the targets."""
    parts = [re.escape(part) for part in kind.split("*")]
    if all_of_kind:
        yield "^" + r"\d+".join(parts) + "$"
    elif len(parts) == 2:
        yield f"^{parts[0]}({'|'.join(str(t.indices[0]) for t in members)}){parts[1]}$"
    else:
        yield from (f"^{re.escape(t.name)}$" for t in members)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put back what get_peft_model changes beside the modules it wraps: requires_grad, the config's own record."""
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    before = set(vars(model))
    try:
        yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        for name in set(vars(model)) - before:
            delattr(model, name)
