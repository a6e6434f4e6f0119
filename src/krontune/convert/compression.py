"""Any LoRA as an LSR adapter: fewer parameters, at an error that is shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from krontune.amounts import parse_amount
from krontune.convert.adapter import PREFIX, Adapter, open_adapter
from krontune.convert.output import check_output, output_folder, save_tensors
from krontune.convert.separate import Separated, separate, terms_for_exact
from krontune.convert.to_lora import anchored, product_norm
from krontune.convert.updates import LowRankPair
from krontune.errors import ConfigError
from krontune.kron import condition_number, split_dim
from krontune.tuners import LsrConfig
from krontune.tuners._peft import SAFETENSORS_WEIGHTS_NAME
from krontune.tuners.checkpoint import spec_to_dict
from krontune.tuners.lsr import LsrSpec

#: Sweeps for the points of the curve that are only shown.
_CURVE_SWEEPS = 2
_NO_FINGERPRINT = {"storage": "float32", "digest": None, "sample": None}


class CurvePoint(NamedTuple):
    """What one separation rank would give."""

    separation_rank: int
    n_params: int
    n_bytes: int
    error: float  # of all updates together


@dataclass(frozen=True)
class ModuleCompression:
    """What became of one module."""

    name: str
    r: int
    error: float
    norm: float
    condition: float  # the worse of the two factors'


@dataclass(frozen=True)
class Compression:
    """What a compression wrote."""

    out: Path
    separation_rank: int
    exact_rank: int  # the separation rank that loses nothing
    modules: list[ModuleCompression]
    n_params: int
    n_params_before: int
    n_bytes: int
    curve: list[CurvePoint]
    notes: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        """The relative error of all updates together."""
        return _overall([(m.error, m.norm) for m in self.modules])

    @property
    def condition(self) -> float:
        """The largest condition number: times 1e-7, the relative error that float32 adds."""
        return max(m.condition for m in self.modules)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON-ready values."""
        curve = [point._asdict() for point in self.curve]
        return {**asdict(self), "out": str(self.out), "curve": curve, "error": self.error, "condition": self.condition}


def compress(
    adapter: str | Path,
    out: str | Path,
    *,
    separation_rank: int | None = None,
    budget: int | str | None = None,
    sweeps: int = 8,
    curve: bool = True,
    force: bool = False,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> Compression:
    """Write a LoRA adapter as LSR: both factors become sums of `separation_rank` Kronecker products.

    `krontune export --to lora` goes back.

    Args:
        adapter: a LoRA's folder.
        out: the folder to write.
        separation_rank: s, the terms of each factor; what is more than an exact result needs is left out, with a note.
        budget: parameters in all, such as 20000, "20k" or "0.25x" of the LoRA's; takes the largest s that fits.
        sweeps: of alternating least squares, at most.
        curve: also compute the error of other separation ranks, roughly.
        force: replace `out`.
        progress: wraps the modules' names, for a progress bar.

    Raises:
        ConfigError: not a LoRA, neither or both of separation_rank and budget, or a budget below s = 1.
        CheckpointError: a damaged file.
    """
    opened = open_adapter(adapter)
    if opened.method != "lora":
        raise ConfigError(
            f"{opened.folder} is a {opened.method} adapter; compress takes a LoRA. krontune export makes one."
        )
    if (separation_rank is None) == (budget is None) or (separation_rank is not None and separation_rank < 1):
        raise ConfigError("give a separation rank of at least 1, or a budget, and not both.")
    check_output(out, force, [opened.folder])
    factors = {name: opened.update(name).lowrank() for name in opened.modules}
    specs = {name: _spec(pair) for name, pair in factors.items()}
    before = sum(pair.A.numel() + pair.B.numel() for pair in factors.values())
    asked = _terms_within(budget, specs, before) if budget is not None else separation_rank or 1
    exact = max(terms_for_exact(_sizes(spec)) for spec in specs.values())
    s = min(asked, exact)
    notes = [f"{s} terms lose nothing, so that {asked} would be no better: s = {s} was taken."] if asked > s else []
    found, modules = {}, []
    for name in progress(list(factors)):
        fit = _separate(factors[name], specs[name], s, sweeps)
        worst = max(condition_number(fit.a_factors), condition_number(fit.b_factors))
        found[name] = fit
        modules.append(ModuleCompression(name, specs[name].r, fit.error, product_norm(factors[name]), worst))
    with output_folder(out, force, [opened.folder]) as folder:
        tensors = _tensors(opened, found)
        save_tensors(tensors, folder / SAFETENSORS_WEIGHTS_NAME)
        _config(opened, specs, s).save_pretrained(str(folder))
    n_params = sum(spec.n_params for spec in specs.values()) * s
    n_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    points = _curve(factors, specs, exact) if curve else []
    return Compression(Path(out), s, exact, modules, n_params, before, n_bytes, points, notes)


def _spec(pair: LowRankPair, s: int = 1) -> LsrSpec:
    """Balanced factors for a LoRA's sizes."""
    (r, n), m = pair.A.shape, pair.B.shape[0]
    return LsrSpec(s, split_dim(r), split_dim(n), split_dim(m))


def _sizes(spec: LsrSpec) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    return spec.out_factors, spec.rank_factors, spec.in_factors  # type: ignore[return-value]


def _separate(pair: LowRankPair, spec: LsrSpec, s: int, sweeps: int) -> Separated:
    return separate(pair.B, pair.A, _sizes(spec), s, sweeps)


def _terms_within(budget: int | str, specs: dict[str, LsrSpec], before: int) -> int:
    limit = parse_amount(budget, whole=before, unit="x")
    one = sum(spec.n_params for spec in specs.values())
    if limit < one:
        raise ConfigError(
            f"the budget of {limit:,} parameters is below that of separation rank 1, {one:,} "
            f"({one / before:.3f}x of the LoRA's {before:,}). Raise it."
        )
    return limit // one


def _curve(factors: dict[str, LowRankPair], specs: dict[str, LsrSpec], exact: int) -> list[CurvePoint]:
    """The error of separation ranks from 1 to the exact one, doubling, with few sweeps."""
    one = sum(spec.n_params for spec in specs.values())
    ranks = [2**i for i in range(exact.bit_length()) if 2**i < exact] + [exact]
    points = []
    for s in ranks:
        fits = ((_separate(pair, specs[n], s, _CURVE_SWEEPS).error, product_norm(pair)) for n, pair in factors.items())
        points.append(CurvePoint(s, one * s, 4 * one * s, _overall(list(fits))))
    return points


def _overall(parts: list[tuple[float, float]]) -> float:
    """The relative error of many updates from each one's error and norm."""
    total = sum(norm**2 for _, norm in parts)
    return math.sqrt(sum((error * norm) ** 2 for error, norm in parts) / total) if total else 0.0


def _tensors(adapter: Adapter, found: dict[str, Separated]) -> dict[str, Tensor]:
    tensors = {}
    for name, fit in found.items():
        for side, factors in (("A", fit.a_factors), ("B", fit.b_factors)):
            for i, factor in enumerate(factors):
                tensors[f"{PREFIX}{name}.lsr_{side}.{i}"] = factor.contiguous()
    return tensors | {PREFIX + key: adapter.read(key) for key in adapter.others}


def _config(adapter: Adapter, specs: dict[str, LsrSpec], s: int) -> LsrConfig:
    """The config of a finished LSR adapter, as if it had been trained."""
    source = adapter.config
    ranks = [spec.r for spec in specs.values()]
    common = max(set(ranks), key=ranks.count)
    resolved = {}
    for name, spec in specs.items():
        whole = LsrSpec(s, spec.rank_factors, spec.in_factors, spec.out_factors)
        layer = {"layer": "linear", **adapter.layer(name), "shape": list(whole.matrix_shape)}
        resolved[name] = {"spec": spec_to_dict(whole), **layer, "base": dict(_NO_FINGERPRINT)}
    return LsrConfig(
        r=common,
        separation_rank=s,
        alpha=1.0,
        target_modules=sorted(specs),
        rank_pattern={anchored(name): spec.r for name, spec in specs.items() if spec.r != common},
        modules_to_save=source.modules_to_save,
        bias="lsr_only" if source.bias == "lora_only" else source.bias,
        task_type=source.task_type,
        base_model_name_or_path=source.base_model_name_or_path,
        revision=source.revision,
        inference_mode=True,
        resolved=resolved,
        saved_tensors=list(adapter.others) or None,
    )
