"""LoKr's factors: one Kronecker term, each side whole or a product."""

from __future__ import annotations

import torch
from torch import Tensor

from krontune.convert.updates import KronUpdate
from krontune.errors import CheckpointError
from krontune.kron import KronShape


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


def lokr_shape(m: int, n: int, factor: int = -1, lycoris: bool = False) -> KronShape:
    """The shapes that LoKr gives a weight: a left factor of `factor`, else the smaller of two near-equal ones.

    >>> lokr_shape(768, 3072), lokr_shape(768, 768, 4)
    (KronShape(m1=24, n1=48, m2=32, n2=64), KronShape(m1=4, n1=4, m2=192, n2=192))

    Args:
        m: rows of the weight.
        n: columns of the weight.
        factor: PEFT's decompose_factor, LyCORIS's factor; -1 takes near-equal factors.
        lycoris: LyCORIS puts the smaller factor left in any case, PEFT a factor that divides the size.
    """
    m1, n1 = (_left_size(size, factor, lycoris) for size in (m, n))
    return KronShape(m1, n1, m // m1, n // n1)


def _left_size(size: int, factor: int, lycoris: bool) -> int:
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor) if lycoris else factor
    limit = factor if factor > 0 else size
    return max(d for d in range(1, int(size**0.5) + 1) if size % d == 0 and d <= limit)
