"""The Van Loan-Pitsianis rearrangement R, which turns a Kronecker product into an outer product."""

from __future__ import annotations

from torch import Tensor

from krontune.errors import ShapeError
from krontune.kron.shapes import KronShape


def rearrange(W: Tensor, shape: KronShape) -> Tensor:
    """R(W): the (m1*n1, m2*n2) matrix with R(A (x) B) = vec(A) vec(B)^T.

    Row (i1, j1) of R(W) is block (i1, j1) of W, read row by row. A copy unless a factor is trivial.

    Args:
        W: (..., m, n), any dtype.
        shape: the factor shapes.

    Returns:
        (..., m1*n1, m2*n2), dtype of W.

    Raises:
        ShapeError: W's last two sizes are not (m, n).
    """
    m1, n1, m2, n2 = shape
    if W.shape[-2:] != (shape.m, shape.n):
        raise ShapeError(f"the matrix is {tuple(W.shape)}; {shape} needs (..., {shape.m}, {shape.n}).")
    blocks = W.reshape(*W.shape[:-2], m1, m2, n1, n2).transpose(-3, -2)
    return blocks.reshape(*W.shape[:-2], m1 * n1, m2 * n2)


def unrearrange(R: Tensor, shape: KronShape) -> Tensor:
    """The inverse of `rearrange`: (..., m1*n1, m2*n2) -> (..., m, n).

    Raises:
        ShapeError: R's last two sizes are not (m1*n1, m2*n2).
    """
    m1, n1, m2, n2 = shape
    if R.shape[-2:] != (m1 * n1, m2 * n2):
        raise ShapeError(f"the matrix is {tuple(R.shape)}; {shape} needs (..., {m1 * n1}, {m2 * n2}).")
    blocks = R.reshape(*R.shape[:-2], m1, n1, m2, n2).transpose(-3, -2)
    return blocks.reshape(*R.shape[:-2], shape.m, shape.n)
