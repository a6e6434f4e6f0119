"""From a model and a budget to an adapter config, with its costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import nn

from krontune.amounts import parse_amount
from krontune.errors import ConfigError
from krontune.kron import FactorShape, budget_ranks, resolve_shape
from krontune.plan.budget import even_ranks, lsr_ranks, too_small
from krontune.plan.cost import LoraSpec, ModulePlan, training_bytes
from krontune.plan.spectra import spectrum
from krontune.plan.targets import Match, Target, base_weights, find_targets, rank_pattern
from krontune.report.files import write_json
from krontune.tuners import LsrConfig, SokaConfig
from krontune.tuners.lsr import LsrSpec
from krontune.tuners.soka import SokaSpec
from krontune.weights import Weights

METHODS = ("lsr", "soka", "lora")
#: Terms of a weight's spectrum that a budget is shared out over, at most.
MAX_TERMS = 64


@dataclass(frozen=True)
class Plan:
    """An adapter that fits a budget: the config that realises it, and what it costs module by module."""

    method: str
    config: PeftConfig
    modules: list[ModulePlan]
    tokens: int  # rows of the activations that the costs are given for
    base_params: int
    base_macs: int  # multiply-adds a token of the base's linear layers
    n_other: int = 0  # parameters trained beside the updates: heads, norms, biases
    budget: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def n_params(self) -> int:
        """Trained parameters of the updates: what the budget is for."""
        return sum(module.n_params for module in self.modules)

    @property
    def n_trainable(self) -> int:
        """All trained parameters, heads and norms included."""
        return self.n_params + self.n_other

    @property
    def n_bytes(self) -> int:
        """Bytes of the adapter's tensors on disk, float32."""
        return sum(module.n_bytes for module in self.modules) + 4 * self.n_other

    @property
    def macs(self) -> float:
        """Multiply-adds a token of all updates."""
        return sum(module.macs(self.tokens) for module in self.modules)

    @property
    def training_bytes(self) -> dict[str, int]:
        """Bytes that training takes beside the base model and the activations, by what holds them."""
        return training_bytes(self.modules, self.n_other)

    def kinds(self) -> list[list[ModulePlan]]:
        """The modules in groups of one kind and one set of sizes; kinds in the model's order."""
        kinds: dict[str, dict[Any, list[ModulePlan]]] = {}
        for module in self.modules:
            kinds.setdefault(module.target.kind, {}).setdefault(module.spec, []).append(module)
        return [group for kind in kinds.values() for group in kind.values()]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON-ready values."""
        return {
            "method": self.method,
            "budget": self.budget,
            "n_params": self.n_params,
            "n_trainable": self.n_trainable,
            "share_of_base": self.n_params / self.base_params,
            "n_bytes": self.n_bytes,
            "macs_per_token": self.macs,
            "share_of_base_macs": self.macs / self.base_macs,
            "training_bytes": self.training_bytes,
            "tokens": self.tokens,
            "notes": self.notes,
            "kinds": [_kind_record(group, self.tokens, self.base_macs) for group in self.kinds()],
            "config": config_dict(self.config),
        }

    def save(self, path: str | Path, force: bool = False) -> Path:
        """Write the config as a file that get_peft_model and `krontune train` take.

        Args:
            path: the file, or a folder for an adapter_config.json.
            force: overwrite what is there.

        Raises:
            ConfigError: the file exists and force is not set, or a folder's name is a file's.
        """
        file = config_file(path, force)
        write_json(file, config_dict(self.config))
        return file


def config_file(path: str | Path, force: bool = False) -> Path:
    """The file that a plan is written to: `path`, or the adapter_config.json in that folder.

    Raises:
        ConfigError: it exists and force is not set, or a folder's name is a file's, or the other way round.
    """
    given = Path(path)
    file = given if given.suffix == ".json" else given / "adapter_config.json"
    if file != given and given.exists() and not given.is_dir():
        raise ConfigError(f"--out {given} is a file. Name a .json file, or a folder for an adapter_config.json.")
    if file.is_dir():
        raise ConfigError(f"{file} is a folder. Choose another name.")
    if file.exists() and not force:
        raise ConfigError(f"{file} exists. Choose another name, or overwrite it with --force (force=True).")
    return file


def plan(
    model: nn.Module,
    method: str = "lsr",
    budget: int | str | None = None,
    *,
    r: int | None = None,
    separation_rank: int | None = None,
    factor_shape: FactorShape = "auto",
    channel_sort: str | None = None,
    tokens: int = 2048,
    name: str | None = None,
    ranks: Sequence[int] | None = None,
    match: Match | None = None,
    **matching: Any,
) -> Plan:
    """Choose ranks for a budget, and say what the adapter costs.

    Works on shapes alone: a model on the meta device is enough.

    Args:
        model: the base model.
        method: "lsr", "soka" or "lora".
        budget: trained parameters of the updates, such as 990000, "0.99M" or "0.5%" of the base; None plans
            the given or default ranks.
        r: a rank to keep: LSR's and LoRA's rank, SoKA's number of terms. LSR and SoKA take less for a weight that
            has no such rank.
        separation_rank: LSR's s to keep.
        factor_shape: SoKA's; an int is p.
        channel_sort: SoKA's.
        tokens: tokens a step, for the costs.
        name: base_model_name_or_path of the config.
        ranks: SoKA's number of terms for each module, where something better than shapes chose them.
        match: what find_targets found for `matching`, to save its time.
        matching: target_modules and its like, as find_targets takes them.

    Returns:
        A Plan whose parameter counts are exactly those of the adapter; with a budget, at or under it.

    Raises:
        ConfigError: an unknown method, a rank below 1, settings that leave nothing to choose, or a budget below the
            least possible.

    >>> from transformers import LlamaConfig
    >>> from krontune.weights import meta_model
    >>> made = plan(meta_model(LlamaConfig()), "lsr", "0.99M")  # LLaMA2-7B: q_proj and v_proj of 32 layers
    >>> made.config.r, made.config.separation_rank, made.n_params
    (25, 12, 983040)
    """
    if method not in METHODS:
        raise ConfigError(f"method {method!r} is unknown; allowed: {', '.join(METHODS)}.")
    for setting, value in (("r", r), ("separation_rank", separation_rank), ("tokens", tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{setting} is {value}; it must be at least 1, or left out.")
    targets, n_other = match or find_targets(model, **matching)
    base_params = sum(p.numel() for p in model.parameters())
    limit = None if budget is None else parse_amount(budget, whole=base_params)
    if limit is not None and r is not None and (method != "lsr" or separation_rank is not None):
        raise ConfigError("with these ranks given, the budget has nothing left to choose. Leave one of them out.")
    if separation_rank is not None and method != "lsr":
        raise ConfigError(f"separation_rank is LSR's; method {method!r} has none.")
    if factor_shape != "auto" and method != "soka":
        raise ConfigError(f"factor_shape (p) is SoKA's; method {method!r} has none.")
    if channel_sort is not None and method != "soka":
        raise ConfigError(f"channel_sort is SoKA's; method {method!r} has none.")
    common = {**matching, "base_model_name_or_path": name}
    if method == "lsr":
        config, modules = _plan_lsr(targets, limit, r, separation_rank, common)
    elif method == "soka":
        config, modules = _plan_soka(
            targets, limit, r, ranks, {**common, "factor_shape": factor_shape, "channel_sort": channel_sort}
        )
    else:
        config, modules = _plan_lora(targets, limit, r, common)
    notes = _notes(modules, limit, r)
    return Plan(method, config, modules, tokens, base_params, base_weights(model), n_other, limit, notes)


def _plan_lsr(
    targets: list[Target], budget: int | None, r: int | None, s: int | None, common: dict[str, Any]
) -> tuple[PeftConfig, list[ModulePlan]]:
    default = LsrConfig()
    if budget is None:
        s, ranks = s or default.separation_rank, [r or default.r] * len(targets)
    else:
        unit = LsrConfig(separation_rank=1)

        def cost(rank: int) -> list[int]:
            return [unit.spec_for(t.m, t.n, _capped(rank, t), t.experts).n_params for t in targets]

        s, ranks = lsr_ranks(cost, lambda rank: sum(_lora(t, _capped(rank, t)) for t in targets), budget, r, s)
    ranks = [_capped(rank, t) for rank, t in zip(ranks, targets)]
    common_rank = _most_common(ranks)
    pattern = rank_pattern(targets, ranks, common_rank)
    config = LsrConfig(r=common_rank, separation_rank=s, rank_pattern=pattern, **common)
    return config, [ModulePlan(t, config.spec_for(t.m, t.n, k, t.experts)) for t, k in zip(targets, ranks)]


def _capped(rank: int, target: Target) -> int:
    """A rank that the weight can have: no (m, n) matrix has more than min(m, n)."""
    return min(rank, target.m, target.n)


def _plan_soka(
    targets: list[Target],
    budget: int | None,
    r: int | None,
    ranks: Sequence[int] | None,
    settings: dict[str, Any],
) -> tuple[PeftConfig, list[ModulePlan]]:
    shapes = SokaConfig(r=1, factor_shape=settings["factor_shape"], channel_sort=settings["channel_sort"])
    units = [shapes.spec_for(t.m, t.n, 1, t.experts, t.name) for t in targets]
    if ranks is None:
        caps = [unit.shape.max_terms for unit in units]
        if budget is None:
            ranks = [min(r or SokaConfig().max_r, cap) for cap in caps]
        else:
            ranks = even_ranks([unit.n_params for unit in units], budget, caps)
    common_rank = _most_common(ranks)
    pattern = rank_pattern(targets, ranks, common_rank)
    config = SokaConfig(r=common_rank, rank_pattern=pattern, **settings)
    return config, [ModulePlan(t, shapes.spec_for(t.m, t.n, k, t.experts, t.name)) for t, k in zip(targets, ranks)]


def _plan_lora(
    targets: list[Target], budget: int | None, r: int | None, common: dict[str, Any]
) -> tuple[PeftConfig, list[ModulePlan]]:
    if budget is None:
        ranks = [r or LoraConfig().r] * len(targets)
    else:
        units = [_lora(t, 1) for t in targets]
        ranks = even_ranks(units, budget, [min(t.m, t.n) for t in targets])
    common_rank = _most_common(ranks)
    pattern = rank_pattern(targets, ranks, common_rank)
    if common.pop("train_norms", False):
        raise ConfigError("train_norms is krontune's; for a LoRA name the norms in modules_to_save.")
    config = LoraConfig(
        r=common_rank, lora_alpha=common_rank, rank_pattern=pattern, alpha_pattern=dict(pattern), **common
    )
    return config, [ModulePlan(t, LoraSpec(k, t.m, t.n, t.experts)) for t, k in zip(targets, ranks)]


def _most_common(ranks: Sequence[int]) -> int:
    """The rank of most modules; of two as common, the lower."""
    counts = Counter(ranks)
    return min(counts, key=lambda rank: (-counts[rank], rank))


def _notes(modules: list[ModulePlan], budget: int | None, r: int | None) -> list[str]:
    """What a person should know about this plan; `r` is the rank that was asked for."""
    notes = []
    lower = [module for module in modules if r is not None and module.spec.r < r]
    if lower:
        notes.append(
            f"{len(lower)} of {len(modules)} modules have less than rank {r}: their weights have no such rank."
        )
    used = sum(module.n_params for module in modules)
    if budget is not None and used < 0.98 * budget:
        notes.append(
            f"{used / budget:.1%} of the budget is used: the next step up does not fit. Leave r and separation_rank "
            "out, or change the budget, to come closer."
        )
    wasteful = [m for m in modules if isinstance(m.spec, LsrSpec) and m.n_params > _lora(m.target, m.spec.r)]
    if wasteful:
        notes.append(
            f"{len(wasteful)} of {len(modules)} modules have more parameters than the LoRA of their rank, which can do "
            "at least as much. Lower separation_rank or raise r."
        )
    prime = sorted({m.target.kind for m in modules if _has_no_structure(m)})
    if prime:
        notes.append(
            f"a factor of 1 in {', '.join(prime)}: the size does not split, so the term has no structure there."
        )
    return notes


def _has_no_structure(module: ModulePlan) -> bool:
    spec = module.spec
    if isinstance(spec, SokaSpec):
        return 1 in (*spec.left, *spec.right)
    return isinstance(spec, LsrSpec) and 1 in (*spec.in_factors, *spec.out_factors)


def _lora(target: Target, r: int) -> int:
    """Parameters of a LoRA of rank r."""
    return LoraSpec(r, target.m, target.n, target.experts).n_params


def _kind_record(group: list[ModulePlan], tokens: int, base_macs: int) -> dict[str, Any]:
    first = group[0]
    macs = sum(module.macs(tokens) for module in group)
    return {
        "kind": first.target.kind,
        "modules": [module.target.name for module in group],
        "weight": [first.target.m, first.target.n],
        "experts": first.target.experts,
        "r": first.spec.r,
        "separation_rank": getattr(first.spec, "separation_rank", None),
        "factors": first.factors,
        "n_params": sum(module.n_params for module in group),
        "n_bytes": sum(module.n_bytes for module in group),
        "macs_per_token": macs,
        "share_of_base_macs": macs / base_macs,
        "training_bytes": training_bytes(group),
        "path": first.path(tokens),
    }


def config_dict(config: PeftConfig) -> dict[str, Any]:
    """What PEFT writes into adapter_config.json."""
    values = config.to_dict()
    values.pop("runtime_config", None)
    return {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in sorted(values.items())
    }


def soka_ranks(
    weights: Weights,
    model: nn.Module,
    targets: Sequence[Target],
    budget: int,
    factor_shape: FactorShape = "auto",
    *,
    channel_sort: str | None = None,
    cache: str | Path | None = None,
    progress: Callable[[Iterable[Target]], Iterable[Target]] = iter,
) -> list[int]:
    """SoKA's number of terms for each weight under a budget, from the weights' own spectra.

    All weights get about the same share of their energy; see krontune.kron.budget_ranks.

    Args:
        weights, model, targets: as `spectrum` takes them.
        budget: parameters in all.
        factor_shape, channel_sort: SoKA's.
        cache, progress: as `spectrum` takes them.

    Raises:
        ConfigError: the budget is below one term everywhere.
    """
    shapes = [resolve_shape(t.m, t.n, factor_shape, t.name) for t in targets]
    units = [shape.n_params * (t.experts or 1) for shape, t in zip(shapes, targets)]
    if budget < sum(units):
        raise ConfigError(too_small(budget, sum(units), len(units)))
    k = min(MAX_TERMS, max(32, 8 * budget // sum(units)))
    settings: dict[str, Any] = {"channel_sort": channel_sort, "cache": cache, "progress": progress}
    every = spectrum(weights, model, targets, [factor_shape], k, **settings)
    found = [s for s in every if s.channel_sort == channel_sort]
    return budget_ranks([torch.tensor(s.sigma) for s in found], [s.energy for s in found], units, budget)
