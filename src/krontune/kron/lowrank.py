"""The best low-rank pair of a Kronecker sum: the bridge from a Kronecker adapter to a plain LoRA."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from krontune.errors import ConfigError
from krontune.kron.product import kron_sum


class LowRank(NamedTuple):
    """U @ V, the nearest matrix of its rank, with the singular values split evenly."""

    U: Tensor  # (m, k)
    V: Tensor  # (k, n)
    error: float  # ||M - U V||_F / ||M||_F


def nearest_lowrank(A: Tensor, B: Tensor, rank: int | None = None, rel_error: float | None = None) -> LowRank:
    """The best U V of kron_sum(A, B), of a given rank or of the least rank with a given relative error."""
    if (rank is None) == (rel_error is None):
        raise ConfigError("give either rank or rel_error, not both and not none.")
    U, S, Vh = torch.linalg.svd(kron_sum(A.float(), B.float()), full_matrices=False)
    tails = (S.double().square().flip(0).cumsum(0).flip(0)).sqrt() / S.double().norm().clamp_min(1e-300)
    k = rank if rank is not None else int((tails > rel_error).sum())
    k = max(1, min(k, len(S)))
    root = S[:k].sqrt()
    return LowRank(U[:, :k] * root, root[:, None] * Vh[:k], float(tails[k]) if k < len(S) else 0.0)
