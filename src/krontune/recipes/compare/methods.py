"""A method of a comparison: a PEFT config by name, or a baseline that trains parts of the model itself."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from peft import get_peft_model, get_peft_model_state_dict
from torch import nn

from krontune import preprocess_gradient
from krontune.errors import ConfigError
from krontune.kron.spectrum import RULES
from krontune.recipes.config import MethodSettings
from krontune.recipes.methods import peft_config
from krontune.recipes.problems import is_head

# Methods that PEFT has as a setting of another one.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rslora": ("lora", {"use_rslora": True}),
    "pissa": ("lora", {"init_lora_weights": "pissa"}),
    "dora": ("lora", {"use_dora": True}),
}
# Methods without an adapter: the parameters, by name, that are trained beside the head.
BASELINES: dict[str, str] = {"head": r"(?!)", "full": r"", "bitfit": r"(^|\.)bias$"}
NO_TARGETS = ("ln_tuning", *BASELINES)  # the layers they change are part of what they are
# The setting that a budget is solved for.
KNOBS = {"lsr": "separation_rank", "oft": "oft_block_size", "c3a": "block_size", "fourierft": "n_frequency"}
# Settings that only some values of suit the shapes: tried one by one.
BLOCK_SIZES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Args:
        label: what tables call it.
        name: PEFT's name of the method, a variant's, or a baseline's.
        settings: the method's own.
        norms: train the normalisation layers as well.
        rate: the first learning rate to try, or the one to use where it is not `tuned`.
        tuned: search for the learning rate.
        multipliers: {regex of a parameter's name: factor of the learning rate}; the first that matches counts.
    """

    label: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    norms: bool = False
    rate: float = 1e-3
    tuned: bool = True
    multipliers: dict[str, float] = field(default_factory=dict)

    @property
    def knob(self) -> str:
        """The setting that a budget is solved for."""
        return "budget" if self.shares_budget else KNOBS.get(self.name, "r")

    @property
    def norms_beside(self) -> bool:
        """Whether it trains the norm layers beside something else; alone they are the method itself."""
        return self.norms and self.name != "head"

    @property
    def shares_budget(self) -> bool:
        """Whether it shares a budget of its own out over the layers, by their weights."""
        return self.settings.get("rank_selection") == "budget"

    @property
    def sized_by_weights(self) -> bool:
        """Whether its ranks, and so its size, come from the weights alone."""
        return self.settings.get("rank_selection") in RULES


def adapt(method: Method, model: nn.Module, task_type: str, train_step: Callable[[], Any] | None = None) -> nn.Module:
    """Make the method's parameters trainable, and no other but the head's; `model` is changed in place.

    Args:
        method: what to apply.
        model: the base model.
        task_type: PEFT's.
        train_step: runs a few batches forward and backward, for starts that need a gradient.

    Raises:
        ConfigError: a setting that the method does not have, or that does not fit the model.
    """
    if method.name in BASELINES:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_head(name) or re.search(BASELINES[method.name], name) is not None)
        adapted = model
    else:
        name, preset = VARIANTS.get(method.name, (method.name, {}))
        config = peft_config(MethodSettings.model_validate({"name": name, **preset, **method.settings}), task_type)
        if getattr(config, "init_weights", None) == "gradient" and train_step is not None:
            preprocess_gradient(model, config, train_step)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # advice to a person with one model
                adapted = get_peft_model(model, config)
        except (ValueError, TypeError, RuntimeError, AssertionError) as error:
            raise ConfigError(f"{method.label}: {error}") from error
    if method.norms:
        for parameter in norm_parameters(adapted):
            parameter.requires_grad_(True)
    return adapted


def norm_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of the normalisation layers, by the classes' names."""
    for module in model.modules():
        if type(module).__name__.endswith("Norm"):
            yield from module.parameters(recurse=False)


def count_trainable(model: nn.Module) -> int:
    """Trainable parameters, the head's apart: every method has the same one."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and not is_head(name))


def adapter_bytes(model: nn.Module) -> int:
    """What a checkpoint of the trained part takes, the head apart."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = sum(p.numel() * p.element_size() for name, p in trained.items() if not is_head(name))
    if not hasattr(model, "peft_config"):
        return own
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    known = {tensor.data_ptr() for name, tensor in state.items() if not is_head(name)}
    saved = sum(t.numel() * t.element_size() for name, t in state.items() if not is_head(name))
    others = (p for name, p in trained.items() if not is_head(name) and p.data_ptr() not in known)
    return saved + sum(p.numel() * p.element_size() for p in others)


def parameter_groups(
    model: nn.Module, method: Method, rate: float, head_rate: float, norm_rate: float | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups: the head and norms beside an adapter at their own rates, the rest at multiples of `rate`."""
    norm_rates = {id(p): norm_rate for p in norm_parameters(model)} if norm_rate and method.norms_beside else {}

    def own_rate(name: str, parameter: nn.Parameter) -> float:
        if is_head(name):
            return head_rate
        if id(parameter) in norm_rates:
            return norm_rates[id(parameter)]
        return rate * next((factor for pattern, factor in method.multipliers.items() if re.search(pattern, name)), 1.0)

    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(own_rate(name, parameter), []).append(parameter)
    return [{"params": parameters, "lr": lr} for lr, parameters in groups.items()]


def solve(method: Method, budget: int, make_model: Callable[[], nn.Module], task_type: str) -> Method:
    """The method with the setting `knob` chosen so that it has as many parameters as `budget` allows, and no more.

    Args:
        method: what to size; norms are counted in.
        budget: trainable parameters in all, the head apart.
        make_model: a fresh copy of the model, on the meta device.
        task_type: PEFT's.

    Raises:
        ConfigError: it has no setting to solve for, or its smallest form is above the budget.
    """
    if method.name in NO_TARGETS:
        raise ConfigError(f"{method.label}: {method.name} has one size; leave its budget out.")
    if method.sized_by_weights:
        raise ConfigError(
            f"{method.label}: rank_selection={method.settings['rank_selection']!r} takes its ranks from the weights; "
            "leave its budget out, or use rank_selection='budget'."
        )

    if method.shares_budget:
        return with_knob(method, budget)

    def count(value: int) -> int:
        return count_trainable(adapt(sizing(with_knob(method, value)), make_model(), task_type))

    if method.knob in ("oft_block_size", "block_size"):
        value, least = _best_block(count, budget)
    else:
        value, least = _largest(count, budget)
    if value is None:
        raise ConfigError(
            f"{method.label}: its smallest form has {least:,} parameters, above the budget of {budget:,}."
        )
    return with_knob(method, value)


def with_knob(method: Method, value: int) -> Method:
    """The method at another size."""
    settings = {**method.settings, method.knob: value}
    if method.name == "oft":
        settings["r"] = 0  # OFT wants one of the two
    return replace(method, settings=settings)


def sizing(method: Method) -> Method:
    """The method with a start that needs neither weights nor data, for counting."""
    if method.name == "pissa":
        return replace(method, name="lora")
    if method.name in ("lsr", "soka"):
        settings = {name: value for name, value in method.settings.items() if name != "channel_sort"}
        return replace(method, settings={**settings, "init_weights": "zero"})
    return method


def _largest(count: Callable[[int], int], budget: int) -> tuple[int | None, int]:
    """The largest value whose count is within the budget (it grows with the value), and the count at 1."""
    least = count(1)
    if least > budget:
        return None, least
    low, step, before = 1, max(1, budget // least - 1), least  # most counts are proportional to the value
    while before < (now := count(low + step)) <= budget:  # some methods stop growing
        low, step, before = low + step, 1 if low == 1 else 2 * step, now
    high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= budget else (low, middle)
    return low, least


def _best_block(count: Callable[[int], int], budget: int) -> tuple[int | None, int]:
    """The block size whose count comes nearest to the budget from below, and the least count there is."""
    counts = {}
    for size in BLOCK_SIZES:
        try:
            counts[size] = count(size)
        except ConfigError:
            continue  # it does not divide the model's sizes
    within = {size: n for size, n in counts.items() if n <= budget}
    return max(within, key=partial(_get, within), default=None), min(counts.values(), default=0)


def _get(counts: dict[int, int], size: int) -> int:
    return counts[size]
