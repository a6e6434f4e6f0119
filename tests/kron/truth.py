"""What the tests of krontune.kron hold it against: torch.kron in float64, and how far a dtype may be off."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from krontune.kron import KronShape

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

sizes = st.integers(1, 6)
shapes = st.builds(KronShape, sizes, sizes, sizes, sizes)
seeds = st.integers(0, 2**31 - 1)


def dense_sum(A: Tensor, B: Tensor) -> Tensor:
    """sum_k A_k (x) B_k by torch.kron, in float64."""
    return torch.stack([torch.kron(a.double(), b.double()) for a, b in zip(A, B)]).sum(0)


def dense_separated(factors: Sequence[Tensor]) -> Tensor:
    """sum_k F1_k (x) ... (x) Fd_k by torch.kron, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for term in zip(*factors):
        product = term[0].double()
        for factor in term[1:]:
            product = torch.kron(product, factor.double())
        total = total + product
    return total


def draw_terms(shape: KronShape, K: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Random A (K, m1, n1) and B (K, m2, n2)."""
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(K, shape.m1, shape.n1, generator=g, dtype=torch.float64)
    B = torch.randn(K, shape.m2, shape.n2, generator=g, dtype=torch.float64)
    return A.to(dtype), B.to(dtype)


def normal(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_near(got: Tensor, truth: Tensor, terms: int, dtype: torch.dtype | None = None, steps: float = 8.0) -> None:
    """Relative Frobenius error within steps * eps * sqrt(terms): `terms` products are summed for one entry."""
    dtype = dtype or got.dtype
    assert got.shape == truth.shape
    error = torch.linalg.vector_norm(got.double() - truth.double())
    allowed = steps * torch.finfo(dtype).eps * math.sqrt(max(terms, 1))
    assert error <= allowed * torch.linalg.vector_norm(truth.double()), f"relative error {error}, allowed {allowed}"


def relayout(tensor: Tensor, layout: str) -> Tensor:
    """Another memory layout of the same values; "expanded" repeats the first row instead."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "strided":
        wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if layout == "expanded":
        return tensor[..., :1, :].expand_as(tensor)
    return tensor.contiguous()
