"""Separated representations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from krontune.errors import ShapeError
from krontune.kron import KronShape, condition_number, nearest_kron, nearest_separated, separated_sum, term_norms
from krontune.kron.separation import separated_grads
from tests.kron.truth import assert_near, dense_separated, normal, seeds

sides = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4)


def draw_factors(sizes, s, seed, dtype=torch.float64):
    return [normal(s, p, q, seed=seed + i, dtype=dtype) for i, (p, q) in enumerate(sizes)]


@given(sides, st.integers(1, 4), seeds, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_the_sum_is_that_of_torch_kron(sizes, s, seed, dtype):
    factors = draw_factors(sizes, s, seed, dtype)
    got = separated_sum(factors)
    assert got.dtype == dtype
    magnitude = dense_separated([f.abs() for f in factors])
    error = (got.double() - dense_separated(factors)).abs()
    assert (error <= 8 * len(sizes) * torch.finfo(dtype).eps * magnitude + 1e-300).all()


@given(sides, st.integers(1, 3), seeds)
def test_gradients_by_hand_are_those_of_autograd(sizes, s, seed):
    factors = [f.requires_grad_() for f in draw_factors(sizes, s, seed)]
    dense = separated_sum(factors)
    G = normal(*dense.shape, seed=seed)
    by_hand = separated_grads([f.detach() for f in factors], G)
    torch.testing.assert_close(by_hand, list(torch.autograd.grad(dense, factors, G)))


@given(sides, st.integers(1, 4), seeds)
def test_condition_number_is_its_definition(sizes, s, seed):
    factors = draw_factors(sizes, s, seed)
    each = [[f[k : k + 1] for f in factors] for k in range(s)]
    lambdas = torch.stack([dense_separated(term).norm() for term in each])
    torch.testing.assert_close(term_norms(factors), lambdas)
    kappa = lambdas.norm() / dense_separated(factors).norm()
    assert condition_number(factors) == pytest.approx(float(kappa), rel=1e-6)
    assert condition_number(factors) >= 1 / math.sqrt(s) - 1e-9  # s equal terms are the best there is


def test_condition_numbers_at_the_edges():
    P, Q = normal(2, 3, 2), normal(2, 2, 5)
    assert condition_number([torch.zeros_like(P), Q]) == 1.0
    assert condition_number([torch.stack([P[0], -P[0]]), torch.stack([Q[0], Q[0]])]) == math.inf
    nearly = [torch.stack([P[0], -P[0] + 1e-3 * P[1]]), torch.stack([Q[0], Q[0]])]
    assert 500 < condition_number(nearly) < 50_000


def test_the_error_of_cancellation_is_bounded_by_the_condition_number():
    P, Q = normal(2, 16, 8), normal(2, 8, 16)
    factors = [torch.stack([P[0], -P[0] + 1e-3 * P[1]]).float(), torch.stack([Q[0], Q[0]]).float()]
    truth = dense_separated(factors)
    error = float((separated_sum(factors).double() - truth).norm() / truth.norm())
    assert torch.finfo(torch.float32).eps < error < 4 * condition_number(factors) * torch.finfo(torch.float32).eps


@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 6), st.integers(2, 6), seeds)
def test_enough_terms_reproduce_any_lora(r1, r2, n1, n2, seed):
    """s = min(r1*n1, r2*n2) spans every (r, n) matrix, so that LSR with it is any LoRA of rank r."""
    M = normal(r1 * r2, n1 * n2, seed=seed)
    factors = nearest_separated(M, (r1, r2), (n1, n2), min(r1 * n1, r2 * n2))
    assert_near(separated_sum(factors), M, r1 * r2 * n1 * n2, torch.float32, steps=64)


def test_two_factors_are_the_kpsvd():
    M = normal(6, 20, dtype=torch.float32)
    factors = nearest_separated(M, (3, 2), (4, 5), 2)
    top = nearest_kron(M, KronShape(3, 4, 2, 5), 2)
    torch.testing.assert_close(factors, [top.A, top.B])


@given(st.integers(1, 12), seeds)
def test_nested_terms_are_orthogonal_and_balanced(s, seed):
    M = normal(12, 24, seed=seed)
    factors = nearest_separated(M, (3, 2, 2), (2, 3, 4), s)
    assert [tuple(f.shape) for f in factors] == [(s, 3, 2), (s, 2, 3), (s, 2, 4)]
    flat = torch.stack([dense_separated([f[k : k + 1] for f in factors]).flatten() for k in range(s)])
    gram = flat @ flat.mT
    assert (gram - torch.diag(gram.diag())).abs().max() <= 1e-4 * float(M.square().sum())
    # Orthogonal terms of an approximation: what is left is what they do not hold.
    left = float((M - dense_separated(factors)).square().sum())
    assert left == pytest.approx(float(M.square().sum() - gram.trace()), rel=1e-3, abs=1e-4)
    norms = [f.flatten(1).norm(dim=1) for f in factors]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-3, atol=1e-4)
    assert (term_norms(factors).diff() <= 1e-4).all()


def test_nested_terms_in_full_reproduce_the_matrix():
    M = normal(12, 24)
    assert_near(separated_sum(nearest_separated(M, (3, 2, 2), (2, 3, 4), 36)), M, 288, torch.float32, steps=64)


def test_one_factor_and_terms_that_are_not_needed():
    M = normal(3, 4)
    (only,) = nearest_separated(M, (3,), (4,), 3)
    torch.testing.assert_close(only.sum(0).double(), M, rtol=1e-6, atol=1e-6)
    assert not only[1:].any()
    factors = nearest_separated(M, (3, 1), (2, 2), 9)  # two terms already reproduce it
    assert_near(separated_sum(factors), M, 12, torch.float32, steps=64)
    assert all(f.shape[0] == 9 and not f[2:].any() for f in factors)


def test_a_zero_matrix_has_zero_terms():
    assert not any(f.any() for f in nearest_separated(torch.zeros(4, 6), (2, 2), (2, 3), 2))


@pytest.mark.parametrize("rows, cols, s", [((3, 2), (4, 5), 0), ((3, 2), (4, 4), 1), ((3, 2), (20,), 1), ((), (), 1)])
def test_sizes_that_do_not_multiply_to_the_matrix(rows, cols, s):
    with pytest.raises(ShapeError, match=r"M is \(6, 20\)"):
        nearest_separated(torch.ones(6, 20), rows, cols, s)


def test_the_papers_parameter_count():
    """Section 4 of arXiv:2502.13568: 3,584 parameters where LoRA r=8 has 12,288."""
    A = [torch.zeros(16, 2, 32), torch.zeros(16, 2, 24)]
    B = [torch.zeros(16, 32, 2), torch.zeros(16, 24, 2)]
    assert separated_sum(A).shape == (4, 768) and separated_sum(B).shape == (768, 4)
    assert sum(f.numel() for f in A + B) == 3_584
