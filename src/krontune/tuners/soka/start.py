"""The starts of a SoKA adapter."""

from __future__ import annotations

import torch
from torch import Tensor

from krontune.errors import ConfigError
from krontune.kron import Kpsvd, nearest_kron
from krontune.tuners.soka.config import SokaSpec
from krontune.tuners.soka.layer import SokaStart


def soka_start(spec: SokaSpec, init_weights: bool | str, kpsvd: Kpsvd | None, gradient: Tensor | None) -> SokaStart:
    """The four tensors that `init_weights` asks for, float32, for one matrix.

    Args:
        spec: the sizes.
        init_weights: see SokaConfig.
        kpsvd: at least spec.r terms of the weight, for the principal start; else None.
        gradient: the mean gradient of the loss for the weight, (m, n); for "gradient" alone.
    """
    # Rounded to bfloat16 whatever the dtype, so that half the bytes can hold the frozen terms without loss.
    A0, B0 = (terms.bfloat16().float() for terms in _frozen_terms(spec, init_weights, kpsvd, gradient))
    dA, dB = torch.zeros_like(A0), torch.zeros_like(B0)
    if init_weights is False:
        dB = torch.randn_like(dB) / (spec.r * spec.right[1]) ** 0.5
    return SokaStart(dA, dB, A0, B0)


def _frozen_terms(
    spec: SokaSpec, init_weights: bool | str, kpsvd: Kpsvd | None, gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    (m1, n1), (m2, n2) = spec.left, spec.right
    if init_weights in (True, "principal") and kpsvd is not None:
        return _pad(kpsvd.A.cpu(), spec.r), _pad(kpsvd.B.cpu(), spec.r)
    B0 = torch.zeros(spec.r, m2, n2)
    random = torch.randn(spec.r, m1, n1) / (spec.r * n1) ** 0.5
    if init_weights != "gradient":
        return random, B0
    if gradient is None:
        raise ConfigError(
            "init_weights='gradient' needs the mean gradient of a few batches. Call "
            "krontune.preprocess_gradient(model, config, train_step) before get_peft_model."
        )
    top = nearest_kron(-gradient, spec.shape, spec.r)
    A0 = _pad(top.A.cpu(), spec.r)
    return A0 * (random.norm() / A0.norm()), B0


def _pad(terms: Tensor, r: int) -> Tensor:
    """The first r terms; zero terms where there are fewer."""
    missing = r - len(terms)
    return terms[:r] if missing <= 0 else torch.cat([terms, terms.new_zeros(missing, *terms.shape[1:])])
