"""Products with a sum of Kronecker terms: its dense value, and its rows."""

from __future__ import annotations

import torch
from torch import Tensor

from krontune.errors import ShapeError
from krontune.kron.rearrange import unrearrange
from krontune.kron.shapes import KronShape


def sum_shape(A: Tensor, B: Tensor) -> KronShape:
    """The shape of one term of the stacked factors A (..., K, m1, n1), B (..., K, m2, n2).

    Raises:
        ShapeError: the factors do not belong together.
    """
    if A.dim() < 3 or A.dim() != B.dim() or A.shape[:-2] != B.shape[:-2]:
        raise ShapeError(
            f"A is {tuple(A.shape)} and B is {tuple(B.shape)}; they must be (..., K, m1, n1) and (..., K, m2, n2) "
            "with the same leading sizes."
        )
    return KronShape(A.shape[-2], A.shape[-1], B.shape[-2], B.shape[-1])


def kron_sum(A: Tensor, B: Tensor) -> Tensor:
    """The dense value of sum_k A_k (x) B_k, by one GEMM: R^-1(A_flat^T B_flat).

    Args:
        A: (..., K, m1, n1).
        B: (..., K, m2, n2), dtype of A.

    Returns:
        (..., m1*m2, n1*n2), dtype of A.

    Raises:
        ShapeError: the factors do not belong together.

    Cost: K*m*n multiply-adds and a copy of (m, n).
    """
    shape = sum_shape(A, B)
    return unrearrange(A.flatten(-2).mT @ B.flatten(-2), shape)


def check_start(dA: Tensor, dB: Tensor, A0: Tensor, B0: Tensor) -> None:
    """Raise ShapeError unless the starting factors have the shapes of what is added to them."""
    if A0.shape != dA.shape or B0.shape != dB.shape:
        raise ShapeError(
            f"A0 is {tuple(A0.shape)} and B0 is {tuple(B0.shape)}; they must have the shapes of dA, {tuple(dA.shape)}, "
            f"and dB, {tuple(dB.shape)}."
        )


def delta_terms(dA: Tensor, dB: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """SoKA's update sum_k (A0_k + dA_k) (x) (B0_k + dB_k) - A0_k (x) B0_k as one sum of 2K terms.

    Written as dA (x) B0 + (A0 + dA) (x) dB, which is exactly zero at dA = dB = 0 in every dtype.

    Args:
        dA: (..., K, m1, n1), like A0.
        dB: (..., K, m2, n2), like B0.
        A0: the starting factors.
        B0: the starting factors.

    Returns:
        A (..., 2K, m1, n1) and B (..., 2K, m2, n2), for `kron_sum` and `kron_embedding`.

    Raises:
        ShapeError: A0 and B0 have not the shapes of dA and dB.
    """
    check_start(dA, dB, A0, B0)
    return torch.cat([dA, A0 + dA], -3), torch.cat([B0, dB], -3)


def kron_embedding(ids: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Rows `ids` of sum_k A_k (x) B_k, gathered from the factors: row (i1, i2) is sum_k A_k[i1] (x) B_k[i2].

    Args:
        ids: (...), integer, in [0, m1*m2).
        A: (K, m1, n1).
        B: (K, m2, n2).

    Returns:
        (..., n1*n2), dtype of A.

    Raises:
        ShapeError: the factors do not belong together.
        IndexError: an id out of range (on a GPU, torch's own assertion there).

    Cost per id: K*n multiply-adds.
    """
    shape = sum_shape(A, B)
    i1, i2 = ids.flatten() // shape.m2, ids.flatten() % shape.m2
    rows_A = A.permute(1, 2, 0)[i1]  # (T, n1, K)
    rows_B = B.permute(1, 0, 2)[i2]  # (T, K, n2)
    return (rows_A @ rows_B).reshape(*ids.shape, shape.n)
