"""Separated representations: matrices written as a short sum of Kronecker products of d >= 1 small factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from krontune.errors import ShapeError
from krontune.kron.kpsvd import nearest_kron
from krontune.kron.product import kron_sum
from krontune.kron.shapes import KronShape


def separated_sum(factors: Sequence[Tensor], *, transposed: bool = False) -> Tensor:
    """The dense value of sum_{k<=s} F1_k (x) F2_k (x) ... (x) Fd_k.

    Definition 3.2 of arXiv:2502.13568; its adapters have d = 2. One small GEMM for d = 2; for d > 2 the
    first d - 1 factors of each term are multiplied out first.

    Args:
        factors: d >= 1 tensors (s, p_i, q_i) with the same s.
        transposed: return the transpose, contiguous; for d = 2 at no further cost.

    Returns:
        (p_1*...*p_d, q_1*...*q_d), dtype of the factors.

    Raises:
        ShapeError: no factor, or factors that do not have the same s.
    """
    check_factors(factors)
    if len(factors) == 2:
        P, Q = factors
        return _sum_of_pairs(P, Q, transposed)
    if transposed:
        return separated_sum([f.mT for f in factors])
    if len(factors) == 1:
        return factors[0].sum(0)
    left = factors[0]
    for factor in factors[1:-1]:
        left = kron_sum(left[:, None], factor[:, None])  # term by term: (s, P*p_i, Q*q_i)
    return kron_sum(left, factors[-1])


def _sum_of_pairs(P: Tensor, Q: Tensor, transposed: bool) -> Tensor:
    """sum_k P_k (x) Q_k. In every forward of every layer, and small: it is the number of operations that costs."""
    (_, p1, q1), (_, p2, q2) = P.shape, Q.shape
    R = (P.flatten(1).t() @ Q.flatten(1)).view(p1, q1, p2, q2)
    if transposed:
        return R.permute(1, 3, 0, 2).reshape(q1 * q2, p1 * p2)
    return R.permute(0, 2, 1, 3).reshape(p1 * p2, q1 * q2)


def separated_grads(factors: Sequence[Tensor], G: Tensor, *, transposed: bool = False) -> list[Tensor]:
    """The gradients of the factors, given G, the gradient of separated_sum(factors, transposed=transposed)."""
    if len(factors) == 2:
        P, Q = (f.to(G.dtype) for f in factors)
        return _grads_of_pairs(P, Q, G, transposed)
    if transposed:
        G = G.t()
    if len(factors) == 1:
        return [G.expand_as(factors[0])]
    with torch.enable_grad():
        leaves = [f.detach().requires_grad_() for f in factors]
        return list(torch.autograd.grad(separated_sum(leaves), leaves, G.to(leaves[0].dtype)))


def _grads_of_pairs(P: Tensor, Q: Tensor, G: Tensor, transposed: bool) -> list[Tensor]:
    """Of `_sum_of_pairs`: gP = Q_flat R^T, gQ = P_flat R with R the rearranged G."""
    (_, p1, q1), (_, p2, q2) = P.shape, Q.shape
    sizes, order = ((q1, q2, p1, p2), (2, 0, 3, 1)) if transposed else ((p1, p2, q1, q2), (0, 2, 1, 3))
    R = G.reshape(sizes).permute(order).reshape(p1 * q1, p2 * q2)
    return [(Q.flatten(1) @ R.t()).view(P.shape), (P.flatten(1) @ R).view(Q.shape)]


def separated_shape(factors: Sequence[Tensor]) -> tuple[int, int]:
    """The shape of separated_sum(factors)."""
    return math.prod([f.shape[1] for f in factors]), math.prod([f.shape[2] for f in factors])


def term_norms(factors: Sequence[Tensor]) -> Tensor:
    """lambda_k, the Frobenius norm of each term: the product of its factors' norms.

    Args:
        factors: d tensors (s, p_i, q_i), any float dtype.

    Returns:
        (s,), float64.

    Raises:
        ShapeError: the factors do not belong together.

    Cost: one pass over the factors.
    """
    check_factors(factors)
    norms = [torch.linalg.vector_norm(f, dim=(1, 2), dtype=torch.float64) for f in factors]
    return torch.stack(norms).prod(0)


def condition_number(factors: Sequence[Tensor]) -> float:
    """kappa = sqrt(sum_k lambda_k^2) / ||M||_F, Definition 3.3 of arXiv:2502.13568.

    kappa * eps(dtype) bounds the relative error that cancellation between the terms costs: 1 is harmless, orthogonal
    terms; inf means that terms cancel to nothing. A representation of zeros has kappa 1. ||M||_F comes from the
    factors' Gram matrices in float64; M is never formed.

    Args:
        factors: d tensors (s, p_i, q_i), any float dtype; M is their separated_sum.

    Raises:
        ShapeError: the factors do not belong together.

    Cost: s^2 * sum_i p_i*q_i multiply-adds.
    """
    lambdas = term_norms(factors)
    gram = torch.ones(len(lambdas), len(lambdas), dtype=torch.float64, device=lambdas.device)
    for f in factors:
        flat = f.detach().flatten(1).double()
        gram *= flat @ flat.T
    terms, total = float(lambdas.square().sum()), float(gram.sum().clamp_min(0))
    if terms == 0:
        return 1.0
    return math.sqrt(terms / total) if total > 0 else math.inf


def nearest_separated(M: Tensor, row_sizes: Sequence[int], col_sizes: Sequence[int], s: int) -> list[Tensor]:
    """A separated representation of M with s terms of d = len(row_sizes) factors.

    d = 2 is the KPSVD and optimal. d > 2 nests KPSVDs (the right factor of each term is split again); its candidate
    terms are mutually orthogonal and the s largest are kept: good, not optimal (the optimum is NP-hard to find).
    Each term's norm is spread evenly over its factors. Terms that M does not need are zero.

    Args:
        M: (p_1*...*p_d, q_1*...*q_d).
        row_sizes: (p_1, ..., p_d).
        col_sizes: (q_1, ..., q_d).
        s: the number of terms, >= 1.

    Returns:
        d tensors (s, p_i, q_i), float32.

    Raises:
        ShapeError: the sizes do not multiply to M's shape.

    Cost: the KPSVD of M (see `nearest_kron`); d > 2 also that of each of its terms' right factors, and so on.
    """
    if len(row_sizes) != len(col_sizes) or (math.prod(row_sizes), math.prod(col_sizes)) != tuple(M.shape) or s < 1:
        raise ShapeError(
            f"M is {tuple(M.shape)}; row_sizes {tuple(row_sizes)} and col_sizes {tuple(col_sizes)} must be of one "
            f"length and multiply to that, with s >= 1 (got {s})."
        )
    terms, norms = _split_terms(M.detach().float(), row_sizes, col_sizes, s)
    spread = norms.pow(1 / len(terms))[:, None, None]
    padding = s - len(norms)
    return [F.pad(unit * spread, (0, 0, 0, 0, 0, padding)) for unit in terms]


def _split_terms(M: Tensor, rows: Sequence[int], cols: Sequence[int], s: int) -> tuple[list[Tensor], Tensor]:
    """At most s orthogonal terms of M as unit-norm factors (t, p_i, q_i) and the terms' norms (t,), largest first."""
    if len(rows) == 1:
        norm = torch.linalg.vector_norm(M)
        return [(M / norm if norm > 0 else M)[None]], norm[None]
    shape = KronShape(rows[0], cols[0], math.prod(rows[1:]), math.prod(cols[1:]))
    top = nearest_kron(M, shape, s)
    root = top.sigma.sqrt().clamp_min(torch.finfo(torch.float32).tiny)[:, None, None]
    left, right = top.A / root, top.B / root
    if len(rows) == 2:
        return [left, right], top.sigma
    nested = [_split_terms(rest, rows[1:], cols[1:], s) for rest in right]
    norms = torch.cat([sigma * inner for sigma, (_, inner) in zip(top.sigma, nested)])
    firsts = torch.cat([unit.expand(len(inner), -1, -1) for unit, (_, inner) in zip(left, nested)])
    others = [torch.cat(group) for group in zip(*(terms for terms, _ in nested))]
    keep = norms.argsort(descending=True, stable=True)[:s]
    return [unit[keep] for unit in (firsts, *others)], norms[keep]


def check_factors(factors: Sequence[Tensor]) -> None:
    """Raise ShapeError unless factors are d >= 1 tensors (s, p_i, q_i) with one s."""
    if not factors or any(f.dim() != 3 or f.shape[0] != factors[0].shape[0] for f in factors):
        raise ShapeError(
            f"factors are {[tuple(f.shape) for f in factors]}; at least one is needed, each (s, p_i, q_i) with one s."
        )
