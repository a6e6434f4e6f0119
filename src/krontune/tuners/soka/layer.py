"""The SoKA layers: W x + alpha * (sum_k A_k (x) B_k - A0_k (x) B0_k) x, exactly W x at the start."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from krontune.kron import ChannelOrder, delta_terms, kron_delta_linear, kron_embedding, kron_linear, kron_sum
from krontune.tuners import _peft
from krontune.tuners.base_layer import KronLayer, ParameterLayer
from krontune.tuners.soka.config import SokaSpec


class SokaStart(NamedTuple):
    """The four tensors of an adapter, (K, m1, n1) or (K, m2, n2) each, and the order of its channels."""

    dA: Tensor
    dB: Tensor
    A0: Tensor
    B0: Tensor
    order: ChannelOrder | None = None

    @classmethod
    def placeholder(cls, spec: SokaSpec) -> SokaStart:
        """NaN, and no order: what a checkpoint fills."""
        dA, dB, A0, B0, *orders = spec.tensor_shapes().values()
        order = ChannelOrder(*(torch.zeros(shape, dtype=torch.int32) for shape in orders)) if orders else None
        nan = [torch.full(shape, torch.nan) for shape in (dA, dB, A0, B0)]
        return cls(nan[0], nan[1], nan[2], nan[3], order)


class SokaLayer(KronLayer, nn.Module):
    """A layer with SoKA adapters.

    The differences dA = A - A0 and dB = B - B0 are what is trained and stored:

        sum_k A_k (x) B_k - A0_k (x) B0_k  =  sum_k dA_k (x) B0_k + (A0_k + dA_k) (x) dB_k

    is then exactly zero while dA = dB = 0, in every dtype, and a small update is not lost in A0's rounding. A0 and B0
    need no precision, only to stay what they are, so that they are kept in 16 bits. Where the channels are sorted,
    the sum is in the order of soka_rows and soka_cols (see ChannelOrder).
    """

    adapter_layer_names: tuple[str, ...] = ("soka_dA", "soka_dB")
    other_param_names: tuple[str, ...] = (
        *KronLayer.other_param_names,
        "soka_A0",
        "soka_B0",
        "soka_rows",
        "soka_cols",
    )

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)
        self.soka_dA = nn.ParameterDict()
        self.soka_dB = nn.ParameterDict()
        self.soka_A0 = _peft.BufferDict(persistent=True)
        self.soka_B0 = _peft.BufferDict(persistent=True)
        self.soka_rows = _peft.BufferDict(persistent=True)
        self.soka_cols = _peft.BufferDict(persistent=True)

    def allocate(
        self, adapter: str, spec: SokaSpec, start: SokaStart | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        start = start or SokaStart.placeholder(spec)
        self.soka_dA[adapter] = nn.Parameter(start.dA.to(device, dtype))
        self.soka_dB[adapter] = nn.Parameter(start.dB.to(device, dtype))
        start_dtype = getattr(torch, spec.start_dtype)
        self.soka_A0[adapter] = start.A0.to(device, start_dtype)
        self.soka_B0[adapter] = start.B0.to(device, start_dtype)
        if start.order is not None:
            self.soka_rows[adapter], self.soka_cols[adapter] = (index.to(device) for index in start.order)

    def start_like(self, adapter: str) -> SokaStart:
        dA, dB, A0, B0, *order = (f.detach().clone() for f in self.factors(adapter))
        return SokaStart(dA, dB, A0, B0, ChannelOrder(*order) if order else None)

    def factors(self, adapter: str) -> list[Tensor]:
        stored = [self.soka_dA, self.soka_dB, self.soka_A0, self.soka_B0, self.soka_rows, self.soka_cols]
        return [tensors[adapter] for tensors in stored if adapter in tensors]

    def order(self, adapter: str) -> ChannelOrder | None:
        """The order of the adapter's channels, where they are sorted."""
        return ChannelOrder(self.soka_rows[adapter], self.soka_cols[adapter]) if adapter in self.soka_rows else None

    def kron_terms(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The update, without its scale, as one Kronecker sum of 2K terms: (2K, m1, n1) and (2K, m2, n2)."""
        dA, dB, A0, B0 = self.factors(adapter)[:4]
        return delta_terms(dA, dB, A0, B0)

    def delta_matrix(self, adapter: str) -> Tensor:
        matrix, order = self.scaling[adapter] * kron_sum(*self.kron_terms(adapter)), self.order(adapter)
        return matrix if order is None else order.unsort(matrix)

    def delta_linear(self, x: Tensor, adapter: str, base: nn.Linear | None = None) -> Tensor:
        order = self.order(adapter)
        if order is None:
            return self._sum_linear(x, adapter, base)
        return self._sum_linear(x.index_select(-1, order.cols), adapter).index_select(-1, order.rows)

    def _takes_base(self, x: Tensor, adapter: str) -> bool:
        return adapter not in self.soka_rows and super()._takes_base(x, adapter)

    def _sum_linear(self, x: Tensor, adapter: str, base: nn.Linear | None = None) -> Tensor:
        """x @ S.T for the sum S of the terms, channels in the terms' own order."""
        weight, bias = (None, None) if base is None else (base.weight, base.bias)
        factors, scale = self.factors(adapter)[:4], self.scaling[adapter]
        built = self.remembered(x, adapter)
        if built is None:
            dA, dB, A0, B0 = factors
            return kron_delta_linear(x, dA, dB, A0, B0, weight, bias, scale)
        A, B = built.get(factors, (scale, x.dtype), lambda: self._scaled_terms(adapter, x.dtype))
        return kron_linear(x, A, B, weight, bias)

    def _scaled_terms(self, adapter: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        A, B = self.kron_terms(adapter)
        return (self.scaling[adapter] * A).to(dtype), B.to(dtype)

    def delta_rows(self, ids: Tensor, adapter: str) -> Tensor:
        order = self.order(adapter)
        if order is not None:
            ids = order.rows[ids].long()
        rows = self.scaling[adapter] * kron_embedding(ids, *self.kron_terms(adapter))
        return rows if order is None else rows.index_select(-1, order.cols.argsort())


class ParamWrapper(ParameterLayer, SokaLayer):
    """A SoKA adapter of a bare parameter; PEFT expects this name."""
