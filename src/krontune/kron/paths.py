"""The ways to multiply a Kronecker sum with activations, and their gradients, as plain torch operations.

Indices: t token, k term, (i1, j1) of A_k, (i2, j2) of B_k. X = x.view(T, n1, n2), Y = y.view(T, m1, m2), and G is the
gradient of Y.

    b side:  Z[t,j1,k,i2] = sum_{j2} X[t,j1,j2] B[k,i2,j2]      Y[t,i1,i2] = sum_{j1,k} A[k,i1,j1] Z[t,j1,k,i2]
    a side:  Z[t,i1,k,j2] = sum_{j1} A[k,i1,j1] X[t,j1,j2]      Y[t,i1,i2] = sum_{k,j2} Z[t,i1,k,j2] B[k,i2,j2]

Of the two contractions of a side, one is over the last axis: a single GEMM on a view. The other is over the middle axis
of a (T, q, c) tensor: a small GEMM for each token ("b-first", "a-first"; good when c is large), or a single GEMM on a
transposed copy ("b-fold", "a-fold"; good when c is small, as in the p-family). "merged" forms the (m, n) matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

#: Elements of a block of rows on the path "merged". A new (4096, 4096) tensor costs more in page faults than in
#: arithmetic; a block of this size comes from the heap again and again, and stays in the cache until it is used.
BLOCK_ELEMENTS = 2**21

PATHS = ("b-first", "a-first", "b-fold", "a-fold", "merged")


class Terms(NamedTuple):
    """A stacked Kronecker sum."""

    A: Tensor  # (K, m1, n1)
    B: Tensor  # (K, m2, n2)


class Grads(NamedTuple):
    """Gradients of x, A and B; None where not wanted."""

    x: Tensor | None  # (T, n)
    A: Tensor | None  # (k, m1, n1)
    B: Tensor | None  # (k, m2, n2)


def apply_terms(x: Tensor, terms: Terms, path: str, weight: Tensor | None = None) -> Tensor:
    """x (T, n) times the sum's transpose: (T, m), contiguous. "merged" can add a weight (m, n) to the sum."""
    if path == "merged":
        return _merged_forward(x, terms, weight)
    forward = _b_forward if path.startswith("b") else _a_forward
    return forward(x, terms, path.endswith("fold"))


def terms_grads(
    x: Tensor,
    g: Tensor,
    value: Terms,
    trained: Terms,
    path: str,
    wanted: tuple[bool, bool, bool],
    weight: Tensor | None = None,
) -> Grads:
    """Gradients of y = x @ kron_sum(*value)^T, and of x through `weight` too, as in `apply_terms`.

    `trained` are the k terms that A and B stand for in the derivative: kron_sum(*value) = kron_sum(*trained) - const.
    On the b side the last k of value.A must be trained.A, on the a side the last k of value.B trained.B, so that their
    share of the gradient of Z is a slice.

    Args:
        x: (T, n).
        g: (T, m), the gradient of y.
        wanted: which of the gradients of x, A and B to compute.
    """
    if path == "merged":
        return _merged_backward(x, g, value, trained, weight, wanted)
    backward = _b_backward if path.startswith("b") else _a_backward
    return backward(x, g, value, trained, path.endswith("fold"), wanted)


def _b_forward(x: Tensor, terms: Terms, fold: bool) -> Tensor:
    K, m1, n1 = terms.A.shape
    _, m2, n2 = terms.B.shape
    T = len(x)
    Z = x.reshape(T * n1, n2) @ terms.B.reshape(K * m2, n2).mT
    Y = _middle(_b_matrix(terms.A), Z.view(T, n1 * K, m2), fold)
    return Y.reshape(T, m1 * m2)


def _b_backward(
    x: Tensor, g: Tensor, value: Terms, trained: Terms, fold: bool, wanted: tuple[bool, bool, bool]
) -> Grads:
    (K, m1, n1), (k, m2, n2), T = value.A.shape, trained.B.shape, len(x)
    X, G = x.reshape(T * n1, n2), g.reshape(T, m1, m2)
    columns = _columns(G)
    gx = gA = gB = None
    if wanted[0] or wanted[2]:
        gZ = _middle(_b_matrix(value.A).mT, G, fold, columns).reshape(T * n1, K * m2)
        if wanted[0]:
            gx = (gZ @ value.B.reshape(K * m2, n2)).view(T, n1 * n2)
        if wanted[2]:
            gB = (gZ[:, (K - k) * m2 :].mT @ X).view(k, m2, n2)
    if wanted[1]:
        Z = (X @ trained.B.reshape(k * m2, n2).mT).view(T, n1 * k, m2)
        gA = (columns.mT @ _columns(Z)).view(m1, n1, k).permute(2, 0, 1)
    return Grads(gx, gA, gB)


def _a_forward(x: Tensor, terms: Terms, fold: bool) -> Tensor:
    K, m1, n1 = terms.A.shape
    _, m2, n2 = terms.B.shape
    T = len(x)
    Z = _middle(_a_matrix(terms.A), x.reshape(T, n1, n2), fold)
    Y = Z.reshape(T * m1, K * n2) @ terms.B.mT.reshape(K * n2, m2)
    return Y.view(T, m1 * m2)


def _a_backward(
    x: Tensor, g: Tensor, value: Terms, trained: Terms, fold: bool, wanted: tuple[bool, bool, bool]
) -> Grads:
    (K, m1, n1), (k, m2, n2), T = value.A.shape, trained.B.shape, len(x)
    X, G = x.reshape(T, n1, n2), g.reshape(T * m1, m2)
    columns = _columns(X)
    gx = gA = gB = None
    if wanted[0] or wanted[1]:
        gZ = (G @ value.B.mT.reshape(K * n2, m2).mT).view(T, m1, K, n2)
        if wanted[0]:
            gx = _middle(_a_matrix(value.A).mT, gZ.view(T, m1 * K, n2), fold).reshape(T, n1 * n2)
        if wanted[1]:
            mine = gZ[:, :, K - k :].reshape(T, m1 * k, n2)
            gA = (_columns(mine).mT @ columns).view(m1, k, n1).transpose(0, 1)
    if wanted[2]:
        Z = _middle(_a_matrix(trained.A), X, fold, columns).reshape(T * m1, k * n2)
        gB = (G.mT @ Z).view(m2, k, n2).transpose(0, 1)
    return Grads(gx, gA, gB)


def _b_matrix(A: Tensor) -> Tensor:
    """(K, m1, n1) -> (m1, n1*K): the b side's contraction over (j1, k)."""
    return A.permute(1, 2, 0).reshape(A.shape[1], -1)


def _a_matrix(A: Tensor) -> Tensor:
    """(K, m1, n1) -> (m1*K, n1): the a side's expansion into (i1, k)."""
    return A.transpose(0, 1).reshape(-1, A.shape[2])


def _middle(M: Tensor, Z: Tensor, fold: bool, columns: Tensor | None = None) -> Tensor:
    """M @ Z_t for every token: (q', q), (T, q, c) -> (T, q', c). `columns`: _columns(Z), if it is there already."""
    T, _, c = Z.shape
    if not fold:
        return torch.bmm(M.expand(T, -1, -1), Z)
    columns = _columns(Z) if columns is None else columns
    return (columns @ M.mT).view(T, c, len(M)).mT


def _columns(Z: Tensor) -> Tensor:
    """(T, q, c) -> (T*c, q): the columns of every token's matrix, as rows."""
    T, q, c = Z.shape
    return Z.mT.reshape(T * c, q)


def _merged_forward(x: Tensor, terms: Terms, weight: Tensor | None) -> Tensor:
    y = x.new_empty(len(x), terms.A.shape[1] * terms.B.shape[1])
    for rows, block in _merged_blocks(weight, terms):
        torch.mm(x, block.mT, out=y[:, rows])
    return y


def _merged_backward(
    x: Tensor, g: Tensor, value: Terms, trained: Terms, weight: Tensor | None, wanted: tuple[bool, bool, bool]
) -> Grads:
    gx = gA = gB = None
    if wanted[0]:
        for rows, block in _merged_blocks(weight, value):
            gx = g[:, rows] @ block if gx is None else gx.addmm_(g[:, rows], block)
    if wanted[1] or wanted[2]:
        (k, m1, n1), (_, m2, n2) = trained.A.shape, trained.B.shape
        B = trained.B.reshape(k, m2 * n2)
        gA = torch.empty_like(trained.A)
        for i1, rows in _row_blocks(m1, m2, n1 * n2, x):
            dW = g[:, rows].mT @ x
            R = dW.view(-1, m2, n1, n2).transpose(1, 2).reshape(-1, m2 * n2)  # R(dW), of these rows
            gA[:, i1] = (B @ R.mT).view(k, -1, n1)
            A = trained.A[:, i1].reshape(k, -1)
            gB = A @ R if gB is None else gB.addmm_(A, R)
    return Grads(gx, gA, gB if gB is None else gB.view_as(trained.B))


def _merged_blocks(weight: Tensor | None, terms: Terms) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of weight + sum_k A_k (x) B_k, one after the other in one buffer: (rows, (len(rows), n)).

    A block is R^-1(A_flat^T B_flat) for its i1's: one product, and one permuted addition. Not differentiable.
    """
    (K, m1, n1), (_, m2, n2) = terms.A.shape, terms.B.shape
    B = terms.B.reshape(K, m2 * n2)
    W = None if weight is None else weight.detach().reshape(m1, m2, n1, n2)
    buffer = None
    for i1, rows in _row_blocks(m1, m2, n1 * n2, B):
        R = terms.A[:, i1].reshape(K, -1).mT @ B
        blocks = R.view(-1, n1, m2, n2).transpose(1, 2)  # (i1, i2, j1, j2)
        buffer = torch.empty(blocks.shape, dtype=R.dtype, device=R.device) if buffer is None else buffer
        block = buffer[: len(blocks)]
        if W is None:
            block.copy_(blocks)
        else:
            torch.add(W[i1], blocks, out=block)
        yield rows, block.view(-1, n1 * n2)


def _row_blocks(m1: int, m2: int, n: int, like: Tensor) -> Iterator[tuple[slice, slice]]:
    """(i1, rows): ranges of i1, and of the rows of W that they are; all at once where memory is not paged in anew."""
    step = m1 if like.device.type != "cpu" else max(1, BLOCK_ELEMENTS // (m2 * n))
    for start in range(0, m1, step):
        stop = min(start + step, m1)
        yield slice(start, stop), slice(start * m2, stop * m2)
