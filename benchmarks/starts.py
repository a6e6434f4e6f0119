"""Starting an adapter from the pretrained weight: SoKA's KPSVD beside PEFT's PiSSA, and how good the fast KPSVD is."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor, nn

from benchmarks.cases import Case, Setting
from benchmarks.contenders import adapted, frozen_linear
from benchmarks.measure import Work
from benchmarks.targets import LLAMA2_7B
from krontune import SokaConfig
from krontune.kron import FactorShape, nearest_kron, resolve_shape

RANK = 16
PISSA = "pissa_niter_4"


def start_works(setting: Setting, m: int, n: int) -> dict[str, Work]:
    """Setup of a start case: the decomposition alone, and the whole of get_peft_model around it."""
    torch.manual_seed(setting.seed)
    base = frozen_linear(m, n, setting.device, setting.torch_dtype)
    own = nn.Linear(n, m, bias=False, device="meta")
    own.weight = nn.Parameter(base.weight.clone(), requires_grad=False)  # PiSSA writes into its weight
    pissa = adapted(own, LoraConfig(r=RANK, lora_alpha=RANK))

    def whole(config: PeftConfig) -> object:
        own.weight.data.copy_(base.weight)  # a thousandth of the work
        return adapted(own, config)

    return {
        "KPSVD p=4": Work(lambda: nearest_kron(base.weight, resolve_shape(m, n, 4), RANK)),
        "KPSVD square": Work(lambda: nearest_kron(base.weight, resolve_shape(m, n, "square"), RANK)),
        "PiSSA": Work(lambda: pissa.pissa_init("default", PISSA)),  # type: ignore[operator]
        "get_peft_model, SoKA p=4": Work(lambda: whole(SokaConfig(r=RANK, factor_shape=4))),
        "get_peft_model, PiSSA": Work(lambda: whole(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=PISSA))),
    }


def energy_works(setting: Setting, factor_shape: FactorShape) -> dict[str, Work]:
    """Setup of an energy case: the top terms of every linear weight of SmolLM2, exact and by the fast method.

    The facts hold the energy, the sum of sigma_k^2 over the top terms, of each weight.
    """
    weights = _real_weights(step=29 if setting.quick else 1)

    def energies(method: str) -> dict[str, list[float]]:
        found = [nearest_kron(w, resolve_shape(*w.shape, factor_shape), RANK, method=method) for w in weights]
        return {"energy": [float(f"{k.sigma.double().square().sum():.7g}") for k in found]}

    works = {}
    for method in ("exact", "krylov"):
        work = Work(lambda: None)
        work.step = partial(lambda work, method: work.facts.update(energies(method)), work, method)
        works[method] = work
    return works


def _real_weights(step: int) -> list[Tensor]:
    from benchmarks.training import smollm2

    linears = [module for module in smollm2().modules() if isinstance(module, nn.Linear)]
    return [linear.weight.detach() for linear in linears if linear.out_features < 10_000][::step]


def start_cases() -> list[Case]:
    """The three shapes of LLaMA2-7B, and both factor shapes on SmolLM2's weights."""
    shapes = [
        Case(f"start/{m}x{n}", partial(start_works, m=m, n=n), quick=m == n, quick_rounds=3, memory=False)
        for m, n in LLAMA2_7B
    ]
    forms: Mapping[str, FactorShape] = {"p=4": 4, "square": "square"}
    energy = [
        Case(f"energy/smollm2/{name}", partial(energy_works, factor_shape=form), quick=True, once=True, memory=False)
        for name, form in forms.items()
    ]
    return shapes + energy
