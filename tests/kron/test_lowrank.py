"""The best low-rank pair of a Kronecker sum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from krontune.errors import ConfigError, ShapeError
from krontune.kron import KronShape, family_shape, nearest_lowrank
from tests.kron.truth import assert_near, dense_sum, draw_terms, seeds, shapes


@given(shapes, st.integers(1, 4), st.integers(1, 12), seeds)
def test_it_is_the_truncated_svd(shape, K, rank, seed):
    A, B = draw_terms(shape, K, seed)
    M = dense_sum(A, B)
    S = torch.linalg.svdvals(M)
    low = nearest_lowrank(A, B, rank=rank)
    k = low.U.shape[1]
    assert low.U.shape == (shape.m, k) and low.V.shape == (k, shape.n) and k <= rank
    tail = S[rank:].norm() if rank < len(S) else S.new_zeros(())
    torch.testing.assert_close((M - low.U @ low.V).norm(), tail, rtol=1e-6, atol=1e-10 * float(S[0]))
    assert low.error == pytest.approx(float(tail / S.norm()), abs=1e-10)
    torch.testing.assert_close(low.U.norm(dim=0), low.V.norm(dim=1))


@given(shapes, st.integers(1, 4), st.floats(0.0, 0.99), seeds)
def test_the_least_rank_within_an_error(shape, K, error, seed):
    A, B = draw_terms(shape, K, seed)
    low = nearest_lowrank(A, B, rel_error=error)
    assert low.error <= error + 1e-12
    k = low.U.shape[1]
    if k > 1:
        assert nearest_lowrank(A, B, rank=k - 1).error > error


def test_the_family_is_exact_at_its_rank_without_a_large_svd(monkeypatch):
    A, B = draw_terms(family_shape(2000, 1600, 4), 2, 0)
    sizes = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda M, **options: sizes.append(M.shape) or svd(M, **options))
    low = nearest_lowrank(A, B, rank=32)  # K * p^2
    assert sizes == [(32, 32)] and low.error == 0
    assert_near(low.U @ low.V, dense_sum(A, B), 32)


@pytest.mark.parametrize("dtype, computed", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_dtypes(dtype, computed):
    A, B = draw_terms(KronShape(3, 2, 2, 4), 2, 0, dtype)
    low = nearest_lowrank(A, B, rank=8)
    assert low.U.dtype == low.V.dtype == computed
    assert_near(low.U @ low.V, dense_sum(A, B), 8, computed, steps=64)


def test_zero():
    low = nearest_lowrank(torch.zeros(2, 3, 2), torch.zeros(2, 2, 4), rel_error=0.1)
    assert low.error == 0 and not low.U.any() and low.U.shape == (6, 1)


def test_bad_arguments():
    A, B = draw_terms(KronShape(3, 2, 2, 4), 2, 0)
    for options in ({}, {"rank": 2, "rel_error": 0.1}):
        with pytest.raises(ConfigError, match="exactly one"):
            nearest_lowrank(A, B, **options)
    for options in ({"rank": 0}, {"rel_error": 1.0}, {"rel_error": -0.1}):
        with pytest.raises(ConfigError, match="allowed"):
            nearest_lowrank(A, B, **options)
    with pytest.raises(ShapeError, match="one sum"):
        nearest_lowrank(A[None], B[None], rank=1)
