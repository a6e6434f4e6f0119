"""The update of one weight, in the form that each method stores it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from krontune.kron import ChannelOrder, condition_number, kron_sum, nearest_lowrank, separated_sum
from krontune.kron.product import delta_terms


class Update(Protocol):
    """dW of one weight, scale included. Everything is float32."""

    @property
    def n_params(self) -> int:
        """Stored values."""

    @property
    def experts(self) -> int | None:
        """Number of matrices of a 3-D weight."""

    def dense(self) -> Tensor:
        """(m, n), or (experts, m, n)."""

    def lowrank(self, rank: int | None = None, error: float | None = None) -> LowRankPair:
        """The nearest B @ A of a rank, or of the least rank with a relative error. Not for experts.

        With neither, an update that is such a product gives it exactly.
        """

    def describe(self) -> dict[str, object]:
        """Sizes and condition, for people."""


@dataclass(frozen=True)
class LowRankPair:
    """B @ A in place of an update."""

    B: Tensor  # (m, r)
    A: Tensor  # (r, n)
    error: float  # ||dW - B A||_F / ||dW||_F; 0 where it is the same by construction
    sigma: Tensor | None = None  # all singular values of dW, where they were computed

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class LsrUpdate:
    """scale * separated_sum(b_factors) @ separated_sum(a_factors)."""

    a_factors: list[Tensor]  # each (s, r_i, n_i), or (experts, s, r_i, n_i)
    b_factors: list[Tensor]  # each (s, m_i, r_i)
    scale: float

    @property
    def n_params(self) -> int:
        return sum(f.numel() for f in (*self.a_factors, *self.b_factors))

    @property
    def experts(self) -> int | None:
        return len(self.a_factors[0]) if self.a_factors[0].dim() == 4 else None

    def pair(self) -> tuple[Tensor, Tensor]:
        """B (m, r) with the scale, and A (r, n)."""
        return self.scale * separated_sum(self.b_factors), separated_sum(self.a_factors)

    def dense(self) -> Tensor:
        if self.experts is None:
            B, A = self.pair()
            return B @ A
        each = zip(zip(*self.a_factors), zip(*self.b_factors))
        return torch.stack([LsrUpdate(list(a), list(b), self.scale).dense() for a, b in each])

    def lowrank(self, rank: int | None = None, error: float | None = None) -> LowRankPair:
        return truncate(*self.pair(), rank, error)

    def describe(self) -> dict[str, object]:
        sides = {"A": self.a_factors, "B": self.b_factors}
        described: dict[str, object] = {
            "r": math.prod(f.shape[-2] for f in self.a_factors),
            "separation_rank": self.a_factors[0].shape[-3],
            "factors": {name: _shapes(factors) for name, factors in sides.items()},
        }
        if self.experts is None:
            described["condition"] = {name: condition_number(factors) for name, factors in sides.items()}
        return described


@dataclass(frozen=True)
class KronUpdate:
    """scale * sum_k A_k (x) B_k. SoKA's update, 2K terms, and LoKr's, one; SoKA's may have its channels sorted."""

    A: Tensor  # (K, m1, n1), or (experts, K, m1, n1)
    B: Tensor  # (K, m2, n2)
    scale: float
    n_params: int
    r: int  # what the method calls its rank
    order: ChannelOrder | None = None

    @property
    def experts(self) -> int | None:
        return len(self.A) if self.A.dim() == 4 else None

    def dense(self) -> Tensor:
        W = self.scale * kron_sum(self.A, self.B)
        return W if self.order is None else self.order.unsort(W)

    def lowrank(self, rank: int | None = None, error: float | None = None) -> LowRankPair:
        m, n = self.A.shape[-2] * self.B.shape[-2], self.A.shape[-1] * self.B.shape[-1]
        U, V = nearest_lowrank(self.scale * self.A, self.B, rank=min(m, n))[:2]
        if self.order is not None:  # an order of rows and columns leaves the singular values alone
            U, V = U[self.order.rows], V[:, self.order.cols.argsort()]
        return _shorten(U, V, rank, error)

    def describe(self) -> dict[str, object]:
        return {"r": self.r, "factors": {"A": _shapes([self.A]), "B": _shapes([self.B])}}


@dataclass(frozen=True)
class LoraUpdate:
    """scale * B @ A."""

    A: Tensor  # (r, n)
    B: Tensor  # (m, r)
    scale: float

    @property
    def n_params(self) -> int:
        return self.A.numel() + self.B.numel()

    @property
    def experts(self) -> int | None:
        return None

    def dense(self) -> Tensor:
        return self.scale * (self.B @ self.A)

    def lowrank(self, rank: int | None = None, error: float | None = None) -> LowRankPair:
        return truncate(self.scale * self.B, self.A, rank, error)

    def describe(self) -> dict[str, object]:
        return {"r": self.A.shape[0], "factors": {"A": _shapes([self.A]), "B": _shapes([self.B])}}


def soka_update(
    dA: Tensor, dB: Tensor, A0: Tensor, B0: Tensor, scale: float, order: ChannelOrder | None = None
) -> KronUpdate:
    """SoKA's update as one Kronecker sum of 2K terms."""
    A, B = delta_terms(dA, dB, A0, B0)
    return KronUpdate(A, B, scale, dA.numel() + dB.numel(), dA.shape[-3], order)


def truncate(B: Tensor, A: Tensor, rank: int | None, error: float | None) -> LowRankPair:
    """The nearest product of a lower rank to B @ A, from their QR factors: nothing of (m, n) is formed.

    With neither rank nor error, or a rank that is not lower, B and A as they are.
    """
    if error is None and (rank is None or rank >= A.shape[0]):
        return LowRankPair(B, A, 0.0)
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT)
    root = S.sqrt()
    return _shorten((Q_B @ U * root).float(), (root[:, None] * Vh @ Q_A.mT).float(), rank, error)


def _shorten(U: Tensor, V: Tensor, rank: int | None, error: float | None) -> LowRankPair:
    """The first terms of an SVD given as U (m, k), V (k, n) with sqrt(sigma) on each side."""
    sigma = U.double().norm(dim=0) * V.double().norm(dim=1)
    left_out = sigma.square().flip(0).cumsum(0).flip(0).sqrt() / sigma.norm().clamp_min(torch.finfo(sigma.dtype).tiny)
    k = int((left_out > error).sum()) if error is not None else rank or len(sigma)
    k = max(1, min(k, len(sigma)))
    return LowRankPair(U[:, :k], V[:k], float(left_out[k]) if k < len(sigma) else 0.0, sigma)


def _shapes(tensors: list[Tensor]) -> list[list[int]]:
    """The sizes of each factor, without the number of terms."""
    return [list(t.shape[-2:]) for t in tensors]
