"""Products with a sum of Kronecker terms: its dense value, and its action on activations and on token ids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from krontune.errors import ConfigError, ShapeError
from krontune.kron.rearrange import unrearrange
from krontune.kron.shapes import KronShape

PATHS = ("b-first", "a-first", "b-fold", "merged")


def sum_shape(A: Tensor, B: Tensor) -> KronShape:
    """The shape of one term of the stacked factors A (..., K, m1, n1), B (..., K, m2, n2)."""
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


def kron_linear(x: Tensor, A: Tensor, B: Tensor, weight: Tensor | None = None, *, path: str = "auto") -> Tensor:
    """x @ (weight + sum_k A_k (x) B_k)^T.

    Args:
        x: (..., n1*n2).
        A: (K, m1, n1).
        B: (K, m2, n2).
        weight: (m1*m2, n1*n2), or None for the sum alone.
        path: "b-first", "a-first", "b-fold", "merged", or "auto".

    Returns:
        (..., m1*m2).

    Raises:
        ShapeError: sizes that do not fit together.
        ConfigError: an unknown path.
    """
    shape = sum_shape(A, B)
    if x.shape[-1] != shape.n:
        raise ShapeError(f"x is {tuple(x.shape)}; its last size must be n1*n2 = {shape.n}.")
    if path not in (*PATHS, "auto"):
        raise ConfigError(f"path {path!r} is unknown; allowed: auto, {', '.join(PATHS)}.")
    if path == "merged":
        dense = kron_sum(A, B)
        return F.linear(x, dense if weight is None else weight + dense)
    X = x.reshape(-1, shape.n1, shape.n2)
    y = torch.einsum("kab,kcd,tbd->tac", A, B, X).reshape(*x.shape[:-1], shape.m)
    return y if weight is None else F.linear(x, weight) + y


def kron_embedding(ids: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Rows `ids` of sum_k A_k (x) B_k, gathered from the factors: row (i1, i2) is sum_k A_k[i1] (x) B_k[i2].

    Args:
        ids: (...), integer, in [0, m1*m2).
        A: (K, m1, n1).
        B: (K, m2, n2).

    Returns:
        (..., n1*n2), dtype of A.

    Cost per id: K*n multiply-adds.
    """
    shape = sum_shape(A, B)
    i1, i2 = ids.flatten() // shape.m2, ids.flatten() % shape.m2
    rows_A = A.permute(1, 2, 0)[i1]  # (T, n1, K)
    rows_B = B.permute(1, 0, 2)[i2]  # (T, K, n2)
    return (rows_A @ rows_B).reshape(*ids.shape, shape.n)


def kron_delta_linear(
    x: Tensor,
    dA: Tensor,
    dB: Tensor,
    A0: Tensor,
    B0: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    path: str = "auto",
) -> Tensor:
    """x @ (weight + scale * dW)^T + bias with SoKA's dW = sum_k dA_k (x) B0_k + (A0_k + dA_k) (x) dB_k."""
    A, B = torch.cat([dA, A0 + dA]), torch.cat([B0, dB])
    y = scale * kron_linear(x, A, B, path=path)
    if weight is not None:
        return F.linear(x, weight, bias) + y
    return y if bias is None else y + bias
