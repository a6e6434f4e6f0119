"""The Kronecker-product SVD: the nearest sum of k Kronecker products to a matrix, in the Frobenius norm."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from krontune.errors import ConfigError
from krontune.kron.rearrange import rearrange
from krontune.kron.shapes import KronShape

#: Up to this smaller side of R(W), the exact method is used: Gram + eigh costs seconds beyond it.
EXACT_MAX = 1536
#: Columns of a Krylov block beyond k: they make the k-th term converge about as fast as the first ones.
OVERSAMPLE = 8
#: Terms below this share of the first are rounding errors.
NOISE = 1e-5
#: A Krylov basis of more blocks than this would cost more than it gains.
MAX_BLOCKS = 24


class Kpsvd(NamedTuple):
    """The top k terms of a KPSVD: W ~ sum_k A_k (x) B_k, terms mutually orthogonal, ||A_k||_F = ||B_k||_F."""

    A: Tensor  # (k, m1, n1), float32: sqrt(sigma_k) times a unit factor
    B: Tensor  # (k, m2, n2), float32
    sigma: Tensor  # (k,), float32, descending: the Frobenius norm of each term
    energy: float  # ||W||_F^2, of the whole of W


def nearest_kron(
    W: Tensor, shape: KronShape, k: int, *, method: str = "auto", tol: float = 0.03, seed: int = 0
) -> Kpsvd:
    """The nearest sum of k Kronecker products to W: the top k singular triples of R(W).

    ||W - sum A_k (x) B_k||_F = ||R(W) - sum vec(A_k) vec(B_k)^T||_F (Van Loan and Pitsianis, 1993), so that the
    squared error of the exact method is `energy - sum(sigma**2)`. Works in float32 whatever W's dtype; deterministic
    for a seed; each A_k's entry of largest size is positive.

    Args:
        W: (m, n), any float dtype.
        shape: the factor shapes.
        k: number of terms, >= 1; clamped to min(R(W).shape).
        method: "exact" (Gram matrix + eigh), "krylov" (block Krylov with an adaptive stop) or "auto" (exact up to a
            smaller side of R(W) of about 1,500).
        tol: Krylov stops when a further block raises the captured energy by less than this fraction.
        seed: of the Krylov start.

    Returns:
        Kpsvd(A, B, sigma, energy) on W's device.

    Raises:
        ShapeError: W is not (m, n).
        ConfigError: k < 1, an unknown method, or NaN/Inf in W.

    Cost, for R (p, q) with p >= q: exact p*q^2 multiply-adds + an eigh of (q, q); krylov about 2*p*q*(k + 8) a block.
    """
    if k < 1:
        raise ConfigError(f"k is {k}; a KPSVD needs at least 1 term.")
    if method not in ("auto", "exact", "krylov"):
        raise ConfigError(f'method {method!r} is unknown; allowed: "auto", "exact", "krylov".')
    with torch.no_grad():
        R = rearrange(W.detach().float(), shape)
        # Row by row in float32, and only then in float64: all in float64 would take longer than half of the iteration.
        energy = float(torch.linalg.vector_norm(R, dim=1).double().square().sum())
        if not math.isfinite(energy):
            raise ConfigError(f"the weight {tuple(W.shape)} holds NaN or Inf; repair or exclude it.")
        k = min(k, *R.shape)
        if method == "auto":
            method = "exact" if min(R.shape) <= EXACT_MAX else "krylov"
        tall = R if R.shape[0] >= R.shape[1] else R.mT
        US, V = _top_exact(tall, k) if method == "exact" else _top_krylov(tall, k, tol, seed)
        left, right = (US, V) if tall is R else (V, US)
        return _as_terms(left, right, shape, energy)


def _as_terms(left: Tensor, right: Tensor, shape: KronShape, energy: float) -> Kpsvd:
    """Split left_k right_k^T, whose norm is sigma_k, evenly over A_k and B_k, with the signs fixed."""
    norms_l, norms_r = left.norm(dim=0), right.norm(dim=0)
    sigma, order = (norms_l * norms_r).sort(descending=True, stable=True)
    left, right = left[:, order], right[:, order]
    peak = left.gather(0, left.abs().argmax(0, keepdim=True))  # (1, k)
    sign = torch.where(peak < 0, -1.0, 1.0)
    tiny = torch.finfo(left.dtype).tiny
    root = sigma.sqrt()
    A = (left * (sign * root / norms_l[order].clamp_min(tiny))).mT
    B = (right * (sign * root / norms_r[order].clamp_min(tiny))).mT
    return Kpsvd(
        A.reshape(-1, shape.m1, shape.n1).contiguous(), B.reshape(-1, shape.m2, shape.n2).contiguous(), sigma, energy
    )


def _top_exact(R: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(U S, V) of the top k singular triples of R (p, q), p >= q, from the eigenvectors of R^T R."""
    _, vectors = torch.linalg.eigh(R.mT @ R)  # ascending
    V = vectors[:, -k:].flip(1)
    return R @ V, V


def _top_krylov(R: Tensor, k: int, tol: float, seed: int) -> tuple[Tensor, Tensor]:
    """(U S, V) of about the top k triples of R (p, q), p >= q, from a block Krylov space of R^T R.

    Rayleigh-Ritz on span{V_0, R^T R V_0, ...} with V_0 = orth(R^T noise); each block costs two passes over R and the
    basis is orthogonalised in full (Musco and Musco, 2015).
    """
    p, q = R.shape
    block = min(k + OVERSAMPLE, q)
    generator = torch.Generator(R.device).manual_seed(seed)
    noise = torch.randn(p, block, generator=generator, device=R.device, dtype=R.dtype)
    V = torch.linalg.qr((noise.mT @ R).mT).Q  # (q, block); R^T U as (U^T R)^T, which reads R along its rows
    RV = R @ V
    captured = 0.0
    for _ in range(MAX_BLOCKS):
        values, vectors = torch.linalg.eigh(RV.mT @ RV)
        last, captured = captured, float(values[-k:].sum())
        if captured - last <= tol * captured or V.shape[1] + block > q:
            break
        grown = (RV[:, -block:].mT @ R).mT
        for _ in range(2):  # twice is enough: one projection loses digits when the block is nearly in the basis
            grown = grown - V @ (V.mT @ grown)
            grown = torch.linalg.qr(grown).Q
        V, RV = torch.cat([V, grown], 1), torch.cat([RV, R @ grown], 1)
    top = vectors[:, -k:].flip(1)
    return RV @ top, V @ top
