"""The LSR layers: W x + alpha * B A x with A and B as separated representations."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krontune.kron import low_rank_linear, low_rank_pair, separated_linear, separated_sum
from krontune.tuners.base_layer import KronLayer, ParameterLayer
from krontune.tuners.lsr.config import LsrSpec
from krontune.tuners.lsr.start import Factors


class LsrLayer(KronLayer, nn.Module):
    """A layer with LSR adapters. lsr_A[adapter][i] is (s, r_i, n_i), lsr_B[adapter][i] is (s, m_i, r_i)."""

    adapter_layer_names: tuple[str, ...] = ("lsr_A", "lsr_B")

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)
        self.lsr_A = nn.ModuleDict()
        self.lsr_B = nn.ModuleDict()

    def allocate(
        self, adapter: str, spec: LsrSpec, start: Factors | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        if start is None:
            placeholders = [torch.full(shape, torch.nan) for shape in spec.tensor_shapes().values()]
            d = len(spec.rank_factors)
            start = placeholders[:d], placeholders[d:]
        for container, factors in zip((self.lsr_A, self.lsr_B), start, strict=True):
            container[adapter] = nn.ParameterList(nn.Parameter(f.to(device, dtype)) for f in factors)

    def start_like(self, adapter: str) -> Factors:
        A, B = ([f.detach().clone() for f in side(adapter)] for side in (self.a_factors, self.b_factors))
        return A, B

    def a_factors(self, adapter: str) -> list[Tensor]:
        """The factors of A, each (s, r_i, n_i)."""
        return _entries(self.lsr_A[adapter])

    def b_factors(self, adapter: str) -> list[Tensor]:
        """The factors of B, each (s, m_i, r_i)."""
        return _entries(self.lsr_B[adapter])

    def factors(self, adapter: str) -> list[Tensor]:
        return self.a_factors(adapter) + self.b_factors(adapter)

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A (r, n) and B (m, r), with a leading experts dimension where the weight has one: the LoRA that this is."""
        A, B = self.a_factors(adapter), self.b_factors(adapter)
        if self.specs[adapter].experts is None:
            return separated_sum(A), separated_sum(B)
        each = torch.vmap(lambda *factors: separated_sum(factors))
        return each(*A), each(*B)

    def delta_matrix(self, adapter: str) -> Tensor:
        A, B = self.lora_factors(adapter)
        return self.scaling[adapter] * (B @ A)

    def delta_linear(self, x: Tensor, adapter: str, base: nn.Linear | None = None) -> Tensor:
        weight, bias = (None, None) if base is None else (base.weight, base.bias)
        A, B, scale = self.a_factors(adapter), self.b_factors(adapter), self.scaling[adapter]
        built = self.remembered(x, adapter)
        if built is None:
            return separated_linear(x, A, B, weight, bias, scale)
        down, up = built.get([*A, *B], (scale, x.dtype), lambda: low_rank_pair(A, B, scale, x.dtype))
        return low_rank_linear(x, down, up, weight, bias)

    def delta_rows(self, ids: Tensor, adapter: str) -> Tensor:
        A, B = self.lora_factors(adapter)
        return self.scaling[adapter] * (F.embedding(ids, B) @ A)


def _entries(factors: nn.Module) -> list[Tensor]:
    """A ParameterList as a list, in a tenth of the time that iterating over it takes: this is in every forward."""
    return list(cast(dict[str, nn.Parameter], factors._parameters).values())


class ParamWrapper(ParameterLayer, LsrLayer):
    """An LSR adapter of a bare parameter; PEFT expects this name."""
