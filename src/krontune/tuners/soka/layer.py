"""The SoKA layers: W x + alpha * (sum_k A_k (x) B_k - A0_k (x) B0_k) x, exactly W x at the start."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from krontune.kron import kron_delta_linear, kron_embedding, kron_linear, kron_sum
from krontune.tuners import _peft
from krontune.tuners.base_layer import KronLayer, ParameterLayer
from krontune.tuners.soka.config import SokaSpec


class SokaStart(NamedTuple):
    """The four tensors of an adapter, (K, m1, n1) or (K, m2, n2) each, float32."""

    dA: Tensor
    dB: Tensor
    A0: Tensor
    B0: Tensor


class SokaLayer(KronLayer, nn.Module):
    """A layer with SoKA adapters.

    The differences dA = A - A0 and dB = B - B0 are what is trained and stored:

        sum_k A_k (x) B_k - A0_k (x) B0_k  =  sum_k dA_k (x) B0_k + (A0_k + dA_k) (x) dB_k

    is then exactly zero while dA = dB = 0, in every dtype, and a small update is not lost in A0's rounding.
    """

    adapter_layer_names: tuple[str, ...] = ("soka_dA", "soka_dB")
    other_param_names: tuple[str, ...] = (*KronLayer.other_param_names, "soka_A0", "soka_B0")

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)
        self.soka_dA = nn.ParameterDict()
        self.soka_dB = nn.ParameterDict()
        self.soka_A0 = _peft.BufferDict(persistent=True)
        self.soka_B0 = _peft.BufferDict(persistent=True)

    def allocate(
        self, adapter: str, spec: SokaSpec, start: SokaStart | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        if start is None:
            start = SokaStart(*(torch.full(shape, torch.nan) for shape in spec.tensor_shapes().values()))
        self.soka_dA[adapter] = nn.Parameter(start.dA.to(device, dtype))
        self.soka_dB[adapter] = nn.Parameter(start.dB.to(device, dtype))
        self.soka_A0[adapter] = start.A0.to(device, dtype)
        self.soka_B0[adapter] = start.B0.to(device, dtype)

    def start_like(self, adapter: str) -> SokaStart:
        return SokaStart(*(f.detach().clone() for f in self.factors(adapter)))

    def factors(self, adapter: str) -> list[Tensor]:
        return [self.soka_dA[adapter], self.soka_dB[adapter], self.soka_A0[adapter], self.soka_B0[adapter]]

    def kron_terms(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The update, without its scale, as one Kronecker sum of 2K terms: (2K, m1, n1) and (2K, m2, n2)."""
        dA, dB, A0, B0 = self.factors(adapter)
        return torch.cat([dA, A0 + dA], dim=-3), torch.cat([B0, dB], dim=-3)

    def delta_matrix(self, adapter: str) -> Tensor:
        return self.scaling[adapter] * kron_sum(*self.kron_terms(adapter))

    def delta_linear(self, x: Tensor, adapter: str, base: nn.Linear | None = None) -> Tensor:
        weight, bias = (None, None) if base is None else (base.weight, base.bias)
        factors, scale = self.factors(adapter), self.scaling[adapter]
        built = self.remembered(x, adapter)
        if built is None:
            return kron_delta_linear(x, *factors, weight, bias, scale)
        A, B = built.get(factors, (scale, x.dtype), lambda: self._scaled_terms(adapter, x.dtype))
        return kron_linear(x, A, B, weight, bias)

    def _scaled_terms(self, adapter: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        A, B = self.kron_terms(adapter)
        return (self.scaling[adapter] * A).to(dtype), B.to(dtype)

    def delta_rows(self, ids: Tensor, adapter: str) -> Tensor:
        return self.scaling[adapter] * kron_embedding(ids, *self.kron_terms(adapter))


class ParamWrapper(ParameterLayer, SokaLayer):
    """A SoKA adapter of a bare parameter; PEFT expects this name."""
