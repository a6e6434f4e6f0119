"""Every layer that takes part, by the name that tables give it: a function from a frozen linear layer to the layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
from peft import LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from torch import nn

from benchmarks.baselines import FastKronLinear, LycorisLinear, MaterialisedLsr
from krontune import LsrConfig, SokaConfig
from krontune.kron import FactorShape, resolve_shape

Build = Callable[[nn.Linear], nn.Module]


def adapted(base: nn.Linear, config: PeftConfig) -> nn.Module:
    """The tuner layer that PEFT's users get: `get_peft_model` on a model that holds `base` alone."""
    holder = nn.Module()
    holder.linear = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    holder.linear.weight, holder.linear.bias = base.weight, base.bias
    config.target_modules = {"linear"}
    return get_peft_model(holder, config).base_model.model.linear


def lora(base: nn.Linear, r: int) -> nn.Module:
    """PEFT's LoRA."""
    return adapted(base, LoraConfig(r=r, lora_alpha=r))


def lokr(base: nn.Linear) -> nn.Module:
    """PEFT's LoKr with two full near-square factors, one Kronecker term."""
    return adapted(base, LoKrConfig(r=max(base.weight.shape), alpha=max(base.weight.shape), init_weights="lycoris"))


def lsr(base: nn.Linear, r: int, s: int) -> nn.Module:
    """krontune's LSR."""
    return adapted(base, LsrConfig(r=r, separation_rank=s))


def soka(base: nn.Linear, factor_shape: FactorShape, k: int) -> nn.Module:
    """krontune's SoKA, started from the KPSVD of the weight."""
    return adapted(base, SokaConfig(r=k, factor_shape=factor_shape))


def equal_rank(m: int, n: int, factor_shape: FactorShape, k: int) -> int:
    """The LoRA rank whose parameters come nearest to k Kronecker terms: exactly k in the p-family."""
    return max(1, round(k * resolve_shape(m, n, factor_shape).n_params / (m + n)))


_NAMED: dict[str, Build] = {
    "base": lambda base: base,
    "LoKr": lokr,
    "LyCORIS LoKr": partial(LycorisLinear, bypass=False),
    "LyCORIS LoKr, bypass": partial(LycorisLinear, bypass=True),
    "FastKron K=1": FastKronLinear,
}


def builder(label: str) -> Build:
    """The function that builds the contender of this name.

    Names with sizes in them are "LoRA r=8", "LSR r=4 s=16", "materialised LSR r=4 s=16", "SoKA p=4 K=8" and
    "SoKA square K=16".

    Raises:
        ValueError: no contender is called that.
    """
    if label in _NAMED:
        return _NAMED[label]
    sizes = [int(size) for size in re.findall(r"=(\d+)", label)]
    match re.sub(r"=\d+", "", label).split():
        case ["LoRA", "r"]:
            return partial(lora, r=sizes[0])
        case ["LSR", "r", "s"]:
            return partial(lsr, r=sizes[0], s=sizes[1])
        case ["materialised", "LSR", "r", "s"]:
            return partial(MaterialisedLsr, r=sizes[0], s=sizes[1])
        case ["SoKA", "p", "K"]:
            return partial(soka, factor_shape=sizes[0], k=sizes[1])
        case ["SoKA", "square", "K"]:
            return partial(soka, factor_shape="square", k=sizes[0])
    raise ValueError(
        f"no contender is called {label!r}. Named are {list(_NAMED)}, and those with sizes; see builder()."
    )


def frozen_linear(m: int, n: int, device: str, dtype: torch.dtype) -> nn.Linear:
    """The base that all contenders of a case share: random, of a real weight's size, without gradient."""
    linear = nn.Linear(n, m, bias=False, device=device, dtype=dtype)
    nn.init.normal_(linear.weight, std=0.02)
    return linear.requires_grad_(False)
