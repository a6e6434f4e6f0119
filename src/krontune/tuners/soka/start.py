"""The starts of a SoKA adapter."""

from __future__ import annotations

import torch
from torch import Tensor

from krontune.kron import Kpsvd, nearest_kron
from krontune.kron.kpsvd import NOISE
from krontune.tuners.gradient import needed_gradient
from krontune.tuners.soka.config import SokaSpec
from krontune.tuners.soka.layer import SokaStart


def soka_start(spec: SokaSpec, init_weights: bool | str, kpsvd: Kpsvd | None, gradient: Tensor | None) -> SokaStart:
    """The four tensors that `init_weights` asks for, for one matrix: float32, the frozen ones bfloat16.

    Args:
        spec: the sizes.
        init_weights: see SokaConfig.
        kpsvd: at least spec.r terms of the weight, for the principal start; else None.
        gradient: the mean gradient of the loss for the weight, (m, n); for "gradient" alone.
    """
    A0, B0 = (terms.bfloat16() for terms in _frozen_terms(spec, init_weights, kpsvd, gradient))
    dA, dB = torch.zeros_like(A0, dtype=torch.float32), torch.zeros_like(B0, dtype=torch.float32)
    if init_weights is False:
        dB = torch.randn_like(dB) / (spec.r * spec.right[1]) ** 0.5
    return SokaStart(dA, dB, A0, B0)


def _frozen_terms(
    spec: SokaSpec, init_weights: bool | str, kpsvd: Kpsvd | None, gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    (m1, n1), (m2, n2) = spec.left, spec.right
    random, zero = torch.randn(spec.r, m1, n1) / (spec.r * n1) ** 0.5, torch.zeros(spec.r, m2, n2)
    if init_weights in (True, "principal") and kpsvd is not None:
        return _where_strong(kpsvd.sigma, kpsvd.A, kpsvd.B, random, zero)
    if init_weights != "gradient":
        return random, zero
    top = nearest_kron(-needed_gradient(gradient), spec.shape, spec.r)
    scale = random.norm() / top.A.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return _where_strong(top.sigma, top.A * scale.to(top.A.device), zero, random, zero)


def _where_strong(sigma: Tensor, A: Tensor, B: Tensor, other_A: Tensor, other_B: Tensor) -> tuple[Tensor, Tensor]:
    """The first r terms (A, B), and (other_A, other_B) for those that are no more than rounding errors.

    With A0 = B0 = 0 a term would never have a gradient.
    """
    r = len(other_A)
    strong = (sigma[:r] > NOISE * sigma[0]).cpu()[:, None, None]
    return torch.where(strong, A[:r].cpu(), other_A), torch.where(strong, B[:r].cpu(), other_B)
