"""The SoKA tuner: spectra, ranks, starts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from krontune.errors import ConfigError
from krontune.kron import ChannelOrder, Kpsvd, budget_ranks, channel_order, nearest_kron, select_rank
from krontune.tuners.base_layer import KronLayer
from krontune.tuners.base_model import KronModel, Resolved, pattern_value
from krontune.tuners.hosts import to_float_matrix
from krontune.tuners.ranks import shared_out
from krontune.tuners.soka.config import SokaConfig, SokaSpec
from krontune.tuners.soka.layer import ParamWrapper, SokaLayer, SokaStart
from krontune.tuners.soka.start import soka_start


class Seen(NamedTuple):
    """What was computed from a weight and serves the start."""

    order: ChannelOrder | None = None
    kpsvds: list[Kpsvd] | None = None  # one, or one for each expert; of the weight in that order


class SokaModel(KronModel):
    """The PEFT tuner of SoKA; get_peft_model makes it from a SokaConfig."""

    prefix = "soka_"
    tuner_layer_cls = SokaLayer
    layer_class = SokaLayer
    wrapper_class = ParamWrapper

    # --------------------------------------------------------------------------------------------------------- ranks

    def resolve(self, config: SokaConfig, layers: dict[str, KronLayer]) -> dict[str, Resolved]:
        specs = {name: self._largest(config, name, layer) for name, layer in layers.items()}
        with_kpsvd = config.rank_selection != "fixed" or config.init_weights in (True, "principal")
        if not with_kpsvd and config.channel_sort is None:
            return {name: Resolved(spec) for name, spec in specs.items()}
        progress = partial(tqdm, desc="KPSVD of the weights", unit="weight", delay=2, leave=False)
        pairs = {name: (layer, specs[name]) for name, layer in layers.items()}
        seen = shared_out(pairs, lambda pair: _look(*pair, config.channel_sort, with_kpsvd), progress)
        if any(seen[name] == Seen() and not layer.base_parameter.is_meta for name, layer in layers.items()):
            raise ConfigError("another rank holds its weights on the meta device, so that it cannot do its share.")
        choices = self._choose(config, specs, {name: s.kpsvds for name, s in seen.items()})
        return {
            name: Resolved(replace(specs[name], r=choices[name]["rank"]), choices[name], seen[name]) for name in layers
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
        order, found = resolved.computed or Seen()
        if spec.is_sorted and order is None:
            raise ConfigError(
                f"channel_sort={config.channel_sort!r} looks at the weights, and {name} is on the meta device. Load "
                "the model first, or leave channel_sort out."
            )
        if order is not None and gradient is not None:
            gradient = order.sort(gradient.cpu())
        kpsvds = found or [None] * (spec.experts or 1)
        if spec.experts is None:
            return soka_start(spec, config.init_weights, kpsvds[0], gradient)._replace(order=order)
        gradients = [None] * spec.experts if gradient is None else list(gradient)
        starts = [soka_start(spec, config.init_weights, k, g) for k, g in zip(kpsvds, gradients, strict=True)]
        dA, dB, A0, B0 = (torch.stack(same) for same in list(zip(*starts, strict=True))[:4])
        return SokaStart(dA, dB, A0, B0, order)

    def join(self, layer: SokaLayer, adapters: Sequence[str], weights: Sequence[float]) -> tuple[SokaSpec, SokaStart]:
        """The terms side by side, each weight on the left factors: K adds up; shapes and orders must be equal."""
        specs = [layer.specs[a] for a in adapters]
        first = specs[0]
        for adapter, spec in zip(adapters, specs, strict=True):
            if spec.shape != first.shape:
                raise ConfigError(
                    f"add_weighted_adapter: {adapter!r} has {spec} and {adapters[0]!r} has {first}. Adapters can be "
                    "joined where their factor shapes agree."
                )
        order, *others = (layer.order(a) for a in adapters)
        if not all(_same_order(order, other) for other in others):
            raise ConfigError(
                f"add_weighted_adapter: {list(adapters)} have their channels in different orders. Adapters of one base "
                "with the same channel_sort can be joined."
            )
        parts: list[list[Tensor]] = []
        for adapter, weight in zip(adapters, weights, strict=True):
            dA, dB, A0, B0 = (f.detach().float() for f in layer.factors(adapter)[:4])
            scale = weight * layer.scaling[adapter]
            parts.append([scale * dA, dB, scale * A0, B0])
        dA, dB, A0, B0 = (torch.cat(same, -3) for same in zip(*parts, strict=True))
        # A start that was multiplied by a weight is no 16-bit number any more.
        joined = replace(first, r=sum(spec.r for spec in specs), start_dtype="float32")
        return joined, SokaStart(dA, dB, A0, B0, order)


def _look(layer: KronLayer, spec: SokaSpec, channel_sort: str | None, with_kpsvd: bool) -> Seen:
    """The order of a layer's channels, and the KPSVD of its weight; nothing on the meta device, which has no values."""
    if layer.base_parameter.is_meta:
        return Seen()
    W, order = to_float_matrix(layer), None
    if channel_sort is not None:
        order = channel_order(W, channel_sort)
        W = order.sort(W)
        order = ChannelOrder(*(index.cpu() for index in order))
    matrices: Any = [W] if spec.experts is None else W
    return Seen(order, [_on_cpu(nearest_kron(w, spec.shape, spec.r)) for w in matrices] if with_kpsvd else None)


def _on_cpu(kpsvd: Kpsvd) -> Kpsvd:
    """Only the terms: K/n of the weight's size, where the weight's device has better things to hold."""
    return Kpsvd(kpsvd.A.cpu(), kpsvd.B.cpu(), kpsvd.sigma.cpu(), kpsvd.energy)


def _same_order(a: ChannelOrder | None, b: ChannelOrder | None) -> bool:
    return a is b if a is None or b is None else all(map(torch.equal, a, b))


def _joint_spectrum(kpsvds: Sequence[Kpsvd]) -> Tensor:
    """The spectrum that all experts of one weight share: sigma_k^2 summed over them, for they have one rank."""
    return torch.stack([k.sigma.double().square() for k in kpsvds]).sum(0).sqrt()
