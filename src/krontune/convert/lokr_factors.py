"""LoKr's factors: one Kronecker term, each side whole or a product."""

from __future__ import annotations

import torch
from torch import Tensor

from krontune.convert.updates import KronUpdate
from krontune.errors import CheckpointError


def lokr_update(tensors: dict[str, Tensor], scale: float) -> KronUpdate:
    """scale * w1 (x) w2 from LoKr's own tensors, whichever of them there are.

    Args:
        tensors: "w1" (m1, n1) or "w1_a" (m1, r) and "w1_b" (r, n1); "w2" (m2, n2, *kernel), or "w2_a" and "w2_b", and
            with "t2" (r, r, *kernel) the Tucker form.
        scale: alpha / r, which for whole factors is whatever the file's author meant.

    Raises:
        CheckpointError: a factor is missing.
    """
    w1 = _whole(tensors, "w1")
    if "t2" in tensors:
        w2 = torch.einsum("ij...,ip,jr->pr...", tensors["t2"], tensors["w2_a"], tensors["w2_b"])
    else:
        w2 = _whole(tensors, "w2")
    n_params = sum(t.numel() for t in tensors.values())
    return KronUpdate(w1[None], w2.flatten(1)[None], scale, n_params, r=1)


def _whole(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name in tensors:
        return tensors[name]
    if f"{name}_a" not in tensors or f"{name}_b" not in tensors:
        raise CheckpointError(f"a LoKr factor is missing: neither {name} nor {name}_a and {name}_b are there.")
    return tensors[f"{name}_a"] @ tensors[f"{name}_b"]
