"""The LSR tuner."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from krontune.errors import ConfigError
from krontune.tuners.base_layer import KronLayer
from krontune.tuners.base_model import KronModel, Resolved, pattern_value
from krontune.tuners.lsr.config import LsrConfig, LsrSpec
from krontune.tuners.lsr.layer import LsrLayer, ParamWrapper
from krontune.tuners.lsr.start import Factors, lsr_start


class LsrModel(KronModel):
    """The PEFT tuner of LSR-Adapt; get_peft_model makes it from an LsrConfig."""

    prefix = "lsr_"
    tuner_layer_cls = LsrLayer
    layer_class = LsrLayer
    wrapper_class = ParamWrapper

    def resolve(self, config: LsrConfig, layers: dict[str, KronLayer]) -> dict[str, Resolved]:
        specs = {}
        for name, layer in layers.items():
            experts, m, n = layer.sizes
            specs[name] = config.spec_for(m, n, pattern_value(config.rank_pattern, name, config.r), experts)
        _warn_of_waste(specs)
        if isinstance(config.factor_shapes, dict):
            _warn_of_unused(config.factor_shapes, specs)
        return {name: Resolved(spec) for name, spec in specs.items()}

    def start(
        self, config: LsrConfig, name: str, layer: KronLayer, resolved: Resolved, gradient: Tensor | None
    ) -> Factors:
        spec: LsrSpec = resolved.spec
        if spec.experts is None:
            return lsr_start(spec, config.init_weights, gradient)
        starts = [
            lsr_start(spec, config.init_weights, None if gradient is None else gradient[e]) for e in range(spec.experts)
        ]
        A, B = ([torch.stack(same) for same in zip(*side, strict=True)] for side in zip(*starts, strict=True))
        return A, B

    def join(self, layer: LsrLayer, adapters: Sequence[str], weights: Sequence[float]) -> tuple[LsrSpec, Factors]:
        """A = [A_1; A_2; ...], B = [w_1 B_1, w_2 B_2, ...] block by block: r_1 and s add up, the rest must be equal."""
        specs = [layer.specs[a] for a in adapters]
        first = specs[0]
        for adapter, spec in zip(adapters, specs, strict=True):
            if (spec.rank_factors[1:], spec.in_factors, spec.out_factors) != (
                first.rank_factors[1:],
                first.in_factors,
                first.out_factors,
            ):
                raise ConfigError(
                    f"add_weighted_adapter: {adapter!r} has {spec} and {adapters[0]!r} has {first}. Adapters can be "
                    "joined where all but their first rank factor and their separation rank agree."
                )
        rank_factors = (sum(spec.rank_factors[0] for spec in specs), *first.rank_factors[1:])
        joined = LsrSpec(
            sum(spec.separation_rank for spec in specs),
            rank_factors,
            first.in_factors,
            first.out_factors,
            first.experts,
        )
        A = [[f.float() for f in layer.a_factors(a)] for a in adapters]
        B = [[f.float() for f in layer.b_factors(a)] for a in adapters]
        for factors, adapter, weight in zip(B, adapters, weights, strict=True):
            factors[0] = factors[0] * (weight * layer.scaling[adapter])
        rows, columns = _blocks([a[0] for a in A], -2), _blocks([b[0] for b in B], -1)
        others = range(1, len(first.rank_factors))
        return joined, (
            [rows, *(torch.cat([a[i] for a in A], -3) for i in others)],
            [columns, *(torch.cat([b[i] for b in B], -3) for i in others)],
        )


def _warn_of_waste(specs: dict[str, LsrSpec]) -> None:
    lora = {name: spec.r * sum(spec.matrix_shape[-2:]) * (spec.experts or 1) for name, spec in specs.items()}
    wasteful = [name for name, spec in specs.items() if spec.n_params > lora[name]]
    if wasteful:
        name, spec = wasteful[0], specs[wasteful[0]]
        warnings.warn(
            f"{len(wasteful)} of {len(specs)} modules have more parameters than the LoRA of their rank, which can do "
            f"at least as much: {name} has {spec.n_params} against {lora[name]}, with r={spec.r} and "
            f"separation_rank={spec.separation_rank}. Lower separation_rank or raise r.",
            stacklevel=2,
        )


def _warn_of_unused(factor_shapes: dict[int, tuple[int, ...]], specs: dict[str, LsrSpec]) -> None:
    sizes = {size for spec in specs.values() for size in (spec.r, *spec.matrix_shape[-2:])}
    unused = sorted(factor_shapes.keys() - sizes)
    if unused:
        warnings.warn(
            f"factor_shapes has no effect for {unused}: no adapted weight has a dimension, and no module a rank, of "
            f"that size. There are {sorted(sizes)}.",
            stacklevel=2,
        )


def _blocks(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Stack (..., s_i, p, q) along s, each part in rows (dim -2) or columns (dim -1) of its own, zero elsewhere."""
    total, offset, stacked = sum(p.shape[dim] for p in parts), 0, []
    for part in parts:
        shape = list(part.shape)
        shape[dim] = total
        block = part.new_zeros(shape)
        block.narrow(dim, offset, part.shape[dim]).copy_(part)
        stacked.append(block)
        offset += part.shape[dim]
    return torch.cat(stacked, -3)
