"""The SoKA tuner: spectra, ranks, starts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from krontune.errors import ConfigError
from krontune.kron import Kpsvd, budget_ranks, nearest_kron, select_rank
from krontune.tuners.base_layer import KronLayer
from krontune.tuners.base_model import KronModel, Resolved, pattern_value
from krontune.tuners.hosts import to_float_matrix
from krontune.tuners.soka.config import SokaConfig, SokaSpec
from krontune.tuners.soka.layer import ParamWrapper, SokaLayer, SokaStart
from krontune.tuners.soka.start import soka_start


class SokaModel(KronModel):
    """The PEFT tuner of SoKA; get_peft_model makes it from a SokaConfig."""

    prefix = "soka_"
    tuner_layer_cls = SokaLayer
    layer_class = SokaLayer
    wrapper_class = ParamWrapper

    # --------------------------------------------------------------------------------------------------------- ranks

    def resolve(self, config: SokaConfig, layers: dict[str, KronLayer]) -> dict[str, Resolved]:
        specs = {name: self._largest(config, name, layer) for name, layer in layers.items()}
        if config.rank_selection == "fixed" and config.init_weights not in (True, "principal"):
            return {name: Resolved(spec) for name, spec in specs.items()}
        progress = tqdm(layers.items(), desc="KPSVD of the weights", unit="weight", delay=2, leave=False)
        spectra = {name: _kpsvds(layer, specs[name]) for name, layer in progress}
        choices = self._choose(config, specs, spectra)
        return {
            name: Resolved(_with_rank(specs[name], choices[name]["rank"]), choices[name], spectra[name])
            for name in layers
        }

    def _largest(self, config: SokaConfig, name: str, layer: KronLayer) -> SokaSpec:
        """The spec at the largest rank that may be chosen."""
        experts, m, n = layer.sizes
        r = pattern_value(config.rank_pattern, name, config.max_r)
        spec = config.spec_for(m, n, r, experts, name)
        if spec.r < r and (config.rank_selection == "fixed"):
            warnings.warn(
                f"{name}: r={r} Kronecker terms were asked for, and {spec.r} of shape {spec.left} x {spec.right} "
                f"already make any ({m}, {n}) matrix. It gets {spec.r}.",
                stacklevel=2,
            )
        return spec

    def _choose(
        self, config: SokaConfig, specs: dict[str, SokaSpec], spectra: dict[str, list[Kpsvd] | None]
    ) -> dict[str, dict]:
        """{module: rule, rank, reason and what the rule looked at}, section "Choosing K" of docs/equations.md."""
        rule = config.rank_selection
        if rule == "fixed":
            return {name: {"rule": rule, "rank": spec.r, "reason": "fixed"} for name, spec in specs.items()}
        known = {name: kpsvds for name, kpsvds in spectra.items() if kpsvds}
        if len(known) < len(spectra):
            raise ConfigError(f"rank_selection={rule!r} looks at the weights, and the model is on the meta device.")
        sigma = {name: _joint_spectrum(kpsvds) for name, kpsvds in known.items()}
        energy = {name: float(sum(k.energy for k in kpsvds)) for name, kpsvds in known.items()}
        if rule == "budget":
            return self._within_budget(config, specs, sigma, energy)
        chosen = {}
        for name, spec in specs.items():
            least = min(config.min_r, spec.r)
            c = select_rank(sigma[name], energy[name], rule, config.energy_threshold, least, spec.r)
            chosen[name] = {"rule": rule, **c._asdict()}
        return chosen

    def _within_budget(
        self, config: SokaConfig, specs: dict[str, SokaSpec], sigma: dict[str, Tensor], energy: dict[str, float]
    ) -> dict[str, dict]:
        names = list(specs)
        ranks = budget_ranks(
            [sigma[n] for n in names],
            [energy[n] for n in names],
            [specs[n].n_params // specs[n].r for n in names],
            config.budget or 0,
            config.min_r,
        )
        return {
            name: {
                "rule": "budget",
                "rank": rank,
                "reason": f"{float(sigma[name][:rank].square().sum()) / max(energy[name], 1e-30):.1%} of the energy",
            }
            for name, rank in zip(names, ranks, strict=True)
        }

    # ---------------------------------------------------------------------------------------------------------- starts

    def start(
        self, config: SokaConfig, name: str, layer: KronLayer, resolved: Resolved, gradient: Tensor | None
    ) -> SokaStart:
        spec: SokaSpec = resolved.spec
        kpsvds = resolved.computed or [None] * (spec.experts or 1)
        if spec.experts is None:
            return soka_start(spec, config.init_weights, kpsvds[0], gradient)
        gradients = [None] * spec.experts if gradient is None else list(gradient)
        starts = [soka_start(spec, config.init_weights, k, g) for k, g in zip(kpsvds, gradients, strict=True)]
        return SokaStart(*(torch.stack(same) for same in zip(*starts, strict=True)))

    def join(self, layer: SokaLayer, adapters: Sequence[str], weights: Sequence[float]) -> tuple[SokaSpec, SokaStart]:
        """The terms side by side, each weight on the left factors: K adds up, the factor shapes must be equal."""
        specs = [layer.specs[a] for a in adapters]
        first = specs[0]
        for adapter, spec in zip(adapters, specs, strict=True):
            if spec.shape != first.shape:
                raise ConfigError(
                    f"add_weighted_adapter: {adapter!r} has {spec} and {adapters[0]!r} has {first}. Adapters can be "
                    "joined where their factor shapes agree."
                )
        parts: list[list[Tensor]] = []
        for adapter, weight in zip(adapters, weights, strict=True):
            dA, dB, A0, B0 = (f.detach().float() for f in layer.factors(adapter))
            scale = weight * layer.scaling[adapter]
            parts.append([scale * dA, dB, scale * A0, B0])
        joined = SokaSpec(sum(spec.r for spec in specs), first.left, first.right, first.experts)
        return joined, SokaStart(*(torch.cat(same, -3) for same in zip(*parts, strict=True)))


def _with_rank(spec: SokaSpec, rank: int) -> SokaSpec:
    return SokaSpec(rank, spec.left, spec.right, spec.experts)


def _kpsvds(layer: KronLayer, spec: SokaSpec) -> list[Kpsvd] | None:
    """The KPSVD of a layer's weight, one for each expert; None on the meta device, where there are no values."""
    if layer.base_parameter.is_meta:
        return None
    W = to_float_matrix(layer)
    matrices: Any = [W] if spec.experts is None else W
    return [nearest_kron(w, spec.shape, spec.r) for w in matrices]


def _joint_spectrum(kpsvds: Sequence[Kpsvd]) -> Tensor:
    """The spectrum that all experts of one weight share: sigma_k^2 summed over them, for they have one rank."""
    return torch.stack([k.sigma.double().square() for k in kpsvds]).sum(0).sqrt()
