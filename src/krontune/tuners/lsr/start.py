"""The starts of an LSR adapter: where A and B stand before the first step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from krontune.kron import nearest_separated, separated_sum, term_norms
from krontune.kron.kpsvd import NOISE
from krontune.tuners.gradient import needed_gradient
from krontune.tuners.lsr.config import LsrSpec

Factors = tuple[list[Tensor], list[Tensor]]  # those of A and those of B

_PAPER_STD = 0.01


def lsr_start(spec: LsrSpec, init_weights: bool | str, gradient: Tensor | None = None) -> Factors:
    """The factors of A and B that `init_weights` asks for, float32, for one matrix.

    Args:
        spec: the sizes.
        init_weights: see LsrConfig.
        gradient: the mean gradient of the loss for the weight, (m, n); for "gradient" alone.
    """
    if init_weights == "paper":
        return _normal_factors(spec, _PAPER_STD, _PAPER_STD)
    A, B = _balanced(spec)
    if init_weights is False:
        return A, B
    B[-1] = torch.zeros_like(B[-1])
    return (_gradient_factors(spec, gradient, A) if init_weights == "gradient" else A), B


def _balanced(spec: LsrSpec) -> Factors:
    """Factors that give A's entries the variance 1/(3n), as in a fresh LoRA, whatever s and d are, and B's about 1."""
    d, s, n = len(spec.in_factors), spec.separation_rank, math.prod(spec.in_factors)
    std_a = (3 * n * s) ** (-1 / (2 * d))
    std_b = s ** (-1 / (2 * max(d - 1, 1)))
    return _normal_factors(spec, std_a, std_b)


def _normal_factors(spec: LsrSpec, std_a: float, std_b: float) -> Factors:
    s = spec.separation_rank
    A = [torch.randn(s, r, n) * std_a for r, n in zip(spec.rank_factors, spec.in_factors, strict=True)]
    B = [torch.randn(s, m, r) * std_b for m, r in zip(spec.out_factors, spec.rank_factors, strict=True)]
    return A, B


def _gradient_factors(spec: LsrSpec, gradient: Tensor | None, random: list[Tensor]) -> list[Tensor]:
    """A from the gradient: the top r right singular vectors of -G, as s Kronecker terms, at the random start's norm.

    Terms that the singular vectors do not need keep a tenth of the random start, so that they can be trained.
    """
    gradient, r = needed_gradient(gradient), spec.r
    _, _, Vh = torch.linalg.svd(-gradient.float(), full_matrices=False)
    rows = torch.zeros(r, gradient.shape[1])
    rows[: len(Vh[:r])] = Vh[:r].cpu()
    terms = nearest_separated(rows, spec.rank_factors, spec.in_factors, spec.separation_rank)
    ratio = separated_sum(random).norm() / separated_sum(terms).norm()
    scale = float(ratio) ** (1 / len(terms))
    norms = term_norms(terms)
    spare = (norms <= NOISE * norms.max()).to(terms[0].device)[:, None, None]
    tenth = 0.1 ** (1 / len(terms))
    return [torch.where(spare, noise * tenth, term * scale) for term, noise in zip(terms, random, strict=True)]
