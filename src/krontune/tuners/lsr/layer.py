"""The LSR layers: W x + alpha * B A x with A and B as separated representations."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krontune.kron import separated_linear, separated_sum
from krontune.tuners.base_layer import KronLayer, ParameterLayer
from krontune.tuners.lsr.config import LsrSpec
from krontune.tuners.lsr.start import Factors


class LsrLayer(KronLayer, nn.Module):
    """A layer with LSR adapters. lsr_A[adapter][i] is (s, r_i, n_i), lsr_B[adapter][i] is (s, m_i, r_i)."""

    adapter_layer_names: tuple[str, ...] = ("lsr_A", "lsr_B")

    def __init__(self, base_layer: nn.Module, *args, **kwargs) -> None:
        super().__init__(base_layer, *args, **kwargs)
        self.lsr_A = nn.ModuleDict()
        self.lsr_B = nn.ModuleDict()

    def allocate(
        self, adapter: str, spec: LsrSpec, start: Optional[Factors], dtype: torch.dtype, device: torch.device
    ) -> None:
        if start is None:
            placeholders = [torch.full(shape, torch.nan) for shape in spec.tensor_shapes().values()]
            d = len(spec.rank_factors)
            start = placeholders[:d], placeholders[d:]
        for container, factors in zip((self.lsr_A, self.lsr_B), start):
            container[adapter] = nn.ParameterList(nn.Parameter(f.to(device, dtype)) for f in factors)

    def factors(self, adapter: str) -> list[Tensor]:
        return [*self.lsr_A[adapter], *self.lsr_B[adapter]]

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A (r, n) and B (m, r), with a leading experts dimension where the weight has one: the LoRA that this is."""
        build = separated_sum if self.specs[adapter].experts is None else torch.vmap(lambda *f: separated_sum(f))
        A, B = list(self.lsr_A[adapter]), list(self.lsr_B[adapter])
        return (build(A), build(B)) if build is separated_sum else (build(*A), build(*B))

    def delta_matrix(self, adapter: str) -> Tensor:
        A, B = self.lora_factors(adapter)
        return self.scaling[adapter] * (B @ A)

    def delta_linear(self, x: Tensor, adapter: str) -> Tensor:
        return self.scaling[adapter] * separated_linear(x, list(self.lsr_A[adapter]), list(self.lsr_B[adapter]))

    def delta_rows(self, ids: Tensor, adapter: str) -> Tensor:
        A, B = self.lora_factors(adapter)
        return self.scaling[adapter] * (F.embedding(ids, B) @ A)


class ParamWrapper(ParameterLayer, LsrLayer):
    """An LSR adapter of a bare parameter; PEFT expects this name."""
