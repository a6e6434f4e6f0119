"""Rivals that no installed package offers as a PEFT layer: each is one linear layer over a frozen base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krontune.kron import split_dim, square_shape


class MaterialisedLsr(nn.Module):
    """LSR as its published code computes it: every Kronecker term of both factors is formed, then they are summed.

    The algorithm of arXiv:2502.13568's repository, written anew, with krontune's sizes.
    """

    def __init__(self, base: nn.Linear, r: int, s: int) -> None:
        super().__init__()
        self.base = base
        ranks, outs, ins = split_dim(r), split_dim(base.out_features), split_dim(base.in_features)
        like = {"device": base.weight.device}  # the factors are float32, as every adapter's
        self.A = nn.ParameterList(torch.randn(s, p, q, **like) / 10 for p, q in zip(ranks, ins, strict=True))
        self.B = nn.ParameterList(torch.randn(s, p, q, **like) / 10 for p, q in zip(outs, ranks, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) -> (..., m)."""
        A, B = (_sum_of_terms(*factors).to(x.dtype) for factors in (self.A, self.B))
        return self.base(x) + F.linear(F.linear(x, A), B)


def _sum_of_terms(P: Tensor, Q: Tensor) -> Tensor:
    """sum_k P_k (x) Q_k with all s terms in memory: P (s, p1, q1), Q (s, p2, q2) -> (p1*p2, q1*q2)."""
    terms = torch.einsum("kab,kcd->kacbd", P, Q)
    return terms.reshape(len(P), P.shape[1] * Q.shape[1], P.shape[2] * Q.shape[2]).sum(0)


class FastKronLinear(nn.Module):
    """One Kronecker term of near-square factors by pyfastkron, beside the frozen base."""

    def __init__(self, base: nn.Linear) -> None:
        from pyfastkron import fastkrontorch

        super().__init__()
        shape = square_shape(base.out_features, base.in_features)
        self.base = base
        self.product: Callable[..., Tensor] = fastkrontorch.gemkm
        device = base.weight.device
        self.At = nn.Parameter(torch.randn(shape.n1, shape.m1, device=device) / 10)  # it multiplies from the right
        self.Bt = nn.Parameter(torch.randn(shape.n2, shape.m2, device=device) / 10)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, n) -> (T, m)."""
        factors = [factor.to(x.dtype).view_as(factor) for factor in (self.At, self.Bt)]  # it takes plain tensors alone
        return self.base(x) + self.product(x, factors)


class LycorisLinear(nn.Module):
    """LyCORIS's own LoKr module with full factors, hooked onto a linear layer as its users do.

    Args:
        base: the linear layer.
        bypass: False rebuilds the weight in each forward, LyCORIS's default; True applies the factors to x.
    """

    def __init__(self, base: nn.Linear, bypass: bool) -> None:
        from lycoris.modules.lokr import LokrModule

        super().__init__()
        self.hooked = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.hooked.weight, self.hooked.bias = base.weight, base.bias
        adapter: Any = LokrModule("bench", self.hooked, full_matrix=True, bypass_mode=bypass)
        adapter.apply_to()
        self.adapter = adapter.to(base.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) -> (..., m)."""
        return self.hooked(x)
