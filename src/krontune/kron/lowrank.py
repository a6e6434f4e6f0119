"""The best low-rank pair of a Kronecker sum: the bridge from a Kronecker adapter to a plain LoRA."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from krontune.errors import ConfigError, ShapeError
from krontune.kron.product import kron_sum, sum_shape


class LowRank(NamedTuple):
    """U @ V, the nearest matrix of its rank, with sqrt(singular value) on each side."""

    U: Tensor  # (m, k)
    V: Tensor  # (k, n)
    error: float  # ||M - U V||_F / ||M||_F; 0 for M = 0


def nearest_lowrank(A: Tensor, B: Tensor, rank: int | None = None, rel_error: float | None = None) -> LowRank:
    """The best U V of M = sum_k A_k (x) B_k, of a given rank, or of the least rank within a relative error.

    With A_k = Q_l A'_k Q_r^T for orthonormal bases Q_l, Q_r of all the A_k's columns and rows, and likewise for B,

        M = (Q_l (x) P_l) (sum_k A'_k (x) B'_k) (Q_r (x) P_r)^T

    so that the SVD is that of the small sum in the middle: at most (K*p^2, K*p^2) for the p-family. Exact; for square
    factors and many terms the small sum is as large as M.

    Args:
        A: (K, m1, n1), any float dtype; computed in float32, or in float64 if it is that.
        B: (K, m2, n2).
        rank: the rank k, >= 1; fewer where the factors' sizes already limit M's rank to fewer.
        rel_error: the largest ||M - U V||_F / ||M||_F allowed, in [0, 1). Give this or rank. Below about 1e-6 it asks
            for the rounding of float32 itself.

    Returns:
        LowRank(U (m, k), V (k, n), error), k >= 1, in the dtype computed in.

    Raises:
        ShapeError: the factors do not belong together.
        ConfigError: not exactly one of rank and rel_error, or one out of range.

    Cost: a QR of each side's factors side by side, such as (m1, K*n1), and an SVD of the small sum, cubic in its side.
    """
    if A.dim() != 3:
        raise ShapeError(
            f"A is {tuple(A.shape)}; nearest_lowrank takes one sum, (K, m1, n1) and (K, m2, n2), at a time."
        )
    sum_shape(A, B)
    if (rank is None) == (rel_error is None):
        raise ConfigError(f"rank is {rank} and rel_error is {rel_error}; give exactly one of them.")
    if (rank is not None and rank < 1) or (rel_error is not None and not 0 <= rel_error < 1):
        raise ConfigError(f"rank is {rank}, rel_error is {rel_error}; allowed: rank >= 1, rel_error in [0, 1).")
    dtype = torch.promote_types(A.dtype, torch.float32)
    with torch.no_grad():
        Ql, small_A, Qr = _compress(A.to(dtype))
        Pl, small_B, Pr = _compress(B.to(dtype))
        U, S, Vh = torch.linalg.svd(kron_sum(small_A, small_B), full_matrices=False)
        squares = S.double().square()
        tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])  # tails[k]: what rank k leaves out
        errors = (tails / tails[0].clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
        k = int((errors > rel_error).sum()) if rel_error is not None else rank or 1
        k = min(max(k, 1), len(S))
        root = S[:k].sqrt()
        left = _kron_times(Ql, Pl, U[:, :k] * root)
        right = _kron_times(Qr, Pr, Vh[:k].mT * root)
        return LowRank(left, right.mT.contiguous(), float(errors[k]))


def _kron_times(Q: Tensor, P: Tensor, u: Tensor) -> Tensor:
    """(Q (x) P) u for u (q*p, k), without forming the product: (q', q), (p', p) -> (q'*p', k)."""
    cube = u.view(Q.shape[1], P.shape[1], -1)
    return torch.einsum("aq,bp,qpk->abk", Q, P, cube).reshape(Q.shape[0] * P.shape[0], -1)


def _compress(stack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """stack_k = Q_l small_k Q_r^T with orthonormal Q_l, Q_r and as small as the number of terms allows."""
    K, rows, columns = stack.shape
    Ql = _basis(stack.transpose(0, 1).reshape(rows, K * columns))
    Qr = _basis(stack.permute(2, 0, 1).reshape(columns, K * rows))
    return Ql, Ql.mT @ stack @ Qr, Qr


def _basis(M: Tensor) -> Tensor:
    """An orthonormal basis that spans M's columns; the identity where that saves nothing."""
    if M.shape[1] >= M.shape[0]:
        return torch.eye(M.shape[0], dtype=M.dtype, device=M.device)
    return torch.linalg.qr(M).Q
