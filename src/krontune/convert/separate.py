"""A product B A with both factors as short sums of Kronecker products: KPSVD, then alternating least squares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from krontune.kron import nearest_separated, separated_sum

#: Directions of a normal matrix below this share of the largest are not determined by the data, and get nothing.
_CUTOFF = 1e-11


class Separated(NamedTuple):
    """B' A' near B A, with A' = sum_k A1_k (x) A2_k and B' = sum_k B1_k (x) B2_k."""

    a_factors: list[Tensor]  # (s, r1, n1), (s, r2, n2), float32
    b_factors: list[Tensor]  # (s, m1, r1), (s, m2, r2), float32
    error: float  # ||B A - B' A'||_F / ||B A||_F


def separate(
    B: Tensor,
    A: Tensor,
    sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    s: int,
    sweeps: int = 8,
) -> Separated:
    """The nearest B' A' with s terms in each factor that this method finds.

    B A = (B G)(G^-1 A) for any invertible G, and some bases separate better than others. Two are tried, B and A as they
    are (exact where they already are separated sums) and balanced singular vectors; each start is the KPSVD of both
    factors. Then every sweep solves for one factor at a time: given A', the best B' is the fit of B G with
    G = A A'^+, so that the basis moves along. The error never rises. Exact when s is the number of terms that any
    factor of these sizes needs.

    Args:
        B: (m, r), any float dtype.
        A: (r, n).
        sizes: (m1, m2), (r1, r2), (n1, n2).
        s: terms of each factor.
        sweeps: at most; fewer where a sweep gains less than a thousandth.

    Cost of a sweep: r * s * (m + n) * (r + s) multiply-adds, and systems of s*max(r1, m1, ...) at most.
    """
    B, A = B.double(), A.double()
    starts = [(B, A), _balanced(B, A)]
    fits = [_fit(B, A, *start, sizes, s, sweeps) for start in starts]
    b, a, error = min(fits, key=lambda fit: fit[2])
    return Separated([f.float() for f in _even(a)], [f.float() for f in _even(b)], error)


def terms_for_exact(sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]) -> int:
    """The number of terms that reproduces any B and A of these sizes.

    >>> terms_for_exact(((32, 24), (2, 2), (32, 24)))
    48
    """
    (m1, m2), (r1, r2), (n1, n2) = sizes
    return max(min(r1 * n1, r2 * n2), min(m1 * r1, m2 * r2))


def _balanced(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The same product from its singular vectors, with the singular values split evenly."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT)
    r, root = A.shape[0], S.sqrt()
    pad = torch.nn.functional.pad
    left, right = Q_B @ U[:, : len(S)] * root, root[:, None] * Vh[: len(S)] @ Q_A.mT
    return pad(left, (0, r - len(S))), pad(right, (0, 0, 0, r - len(S)))


def _fit(
    B: Tensor, A: Tensor, B0: Tensor, A0: Tensor, sizes: tuple, s: int, sweeps: int
) -> tuple[list[Tensor], list[Tensor], float]:
    """(factors of B', factors of A', error), from the KPSVD of B0 and A0."""
    m, r, n = sizes
    b = [f.double() for f in nearest_separated(B0, m, r, s)]
    a = [f.double() for f in nearest_separated(A0, r, n, s)]
    error = _error(B, A, b, a)
    for _ in range(sweeps):
        b = _solve_side(B, A, b, separated_sum(a))
        # the other side is the same problem transposed: A^T B^T ~ A'^T B'^T
        a = [f.mT for f in _solve_side(A.mT, B.mT, [f.mT for f in a], separated_sum(b).mT)]
        last, error = error, _error(B, A, b, a)
        if error > 0.999 * last:
            break
    return b, a, error


def _solve_side(B: Tensor, A: Tensor, b: list[Tensor], A_fit: Tensor) -> list[Tensor]:
    """Minimise ||B A - B' A_fit|| over B' = sum_k b1_k (x) b2_k, first over b1, then over b2."""
    S, C = A_fit @ A_fit.mT, B @ (A @ A_fit.mT)  # the objective is tr(B' S B'^T) - 2 <C, B'>
    (_, m1, r1), (_, m2, r2) = b[0].shape, b[1].shape
    S4, C4 = S.view(r1, r2, r1, r2), C.view(m1, m2, r1, r2)
    first = _solve_left(b[1], S4, C4)
    return [first, _solve_left(first, S4.permute(1, 0, 3, 2), C4.permute(1, 0, 3, 2))]


def _solve_left(other: Tensor, S4: Tensor, C4: Tensor) -> Tensor:
    """The best left factors (s, m1, r1) for given right ones (s, m2, r2): one system of s*r1 for all m1 rows."""
    s, r1 = other.shape[0], S4.shape[0]
    gram = torch.einsum("kia,hib->khab", other, other)
    H = torch.einsum("khab,jalb->kjhl", gram, S4).reshape(s * r1, s * r1)
    rhs = torch.einsum("cija,kia->ckj", C4, other).flatten(1)  # (m1, s*r1)
    solved = rhs @ torch.linalg.pinv(H, hermitian=True, rtol=_CUTOFF)
    return solved.view(-1, s, r1).transpose(0, 1).contiguous()


def _error(B: Tensor, A: Tensor, b: list[Tensor], a: list[Tensor]) -> float:
    """||B A - B' A'||_F / ||B A||_F, from a QR of the stacked factors: exact to rounding, never dense."""
    left = torch.linalg.qr(torch.cat([B, -separated_sum(b)], 1)).R
    right = torch.linalg.qr(torch.cat([A, separated_sum(a)], 0).mT).R
    norm = torch.linalg.qr(B).R @ torch.linalg.qr(A.mT).R.mT
    return float((left @ right.mT).norm() / norm.norm().clamp_min(torch.finfo(B.dtype).tiny))


def _even(factors: list[Tensor]) -> list[Tensor]:
    """The same terms with each one's norm spread evenly over its two factors."""
    norms = [f.flatten(1).norm(dim=1).clamp_min(torch.finfo(f.dtype).tiny) for f in factors]
    root = (norms[0] * norms[1]).sqrt()
    return [f * (root / n)[:, None, None] for f, n in zip(factors, norms)]
