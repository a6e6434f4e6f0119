"""Dense Kronecker sums, their rearrangement, their rows; the laws of the Kronecker product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from krontune.errors import ShapeError
from krontune.kron import KronShape, delta_terms, kron_embedding, kron_sum, rearrange, unrearrange
from tests.kron.truth import FLOATS, assert_near, dense_sum, draw_terms, normal, seeds, shapes

terms = st.integers(1, 5)


@given(shapes, terms, seeds, st.sampled_from(FLOATS))
def test_kron_sum_is_the_sum_of_torch_kron(shape, K, seed, dtype):
    A, B = draw_terms(shape, K, seed, dtype)
    got = kron_sum(A, B)
    assert got.dtype == dtype
    assert_near(got, dense_sum(A, B), K)


@given(shapes, terms, seeds)
def test_leading_dimensions_are_batches(shape, K, seed):
    A, B = draw_terms(shape, 6 * K, seed)
    A, B = A.unflatten(0, (2, 3, K)), B.unflatten(0, (2, 3, K))
    each = torch.stack([dense_sum(a, b) for a, b in zip(A.flatten(0, 1), B.flatten(0, 1))])
    assert_near(kron_sum(A, B), each.unflatten(0, (2, 3)), K)


@given(shapes, terms, seeds)
def test_laws_of_the_kronecker_product(shape, K, seed):
    A, B = draw_terms(shape, K, seed)
    C, _ = draw_terms(shape, K, seed + 1)
    dense = kron_sum(A, B)
    assert_near(kron_sum(A + 2 * C, B), dense + 2 * kron_sum(C, B), K)  # linear in each factor
    assert_near(kron_sum(A.mT, B.mT), dense.mT, K)
    a, b, c, d = A[0], B[0], normal(shape.n1, 3, seed=seed), normal(shape.n2, 2, seed=seed)  # mixed product
    assert_near(torch.kron(a, b) @ torch.kron(c, d), kron_sum((a @ c)[None], (b @ d)[None]), shape.n)


@given(shapes, seeds)
def test_rank_of_a_product_is_the_product_of_the_ranks(shape, seed):
    A, B = draw_terms(shape, 1, seed)
    A[0, -1], B[0, :, -1] = A[0, 0], B[0, :, 0]  # not all of full rank
    rank = torch.linalg.matrix_rank
    assert rank(kron_sum(A, B)) == rank(A[0]) * rank(B[0])


@given(shapes, seeds)
def test_rearrangement_round_trip_and_outer_product(shape, seed):
    A, B = draw_terms(shape, 1, seed)
    W = normal(2, shape.m, shape.n, seed=seed)
    assert torch.equal(unrearrange(rearrange(W, shape), shape), W)
    assert torch.equal(rearrange(torch.kron(A[0], B[0]), shape), torch.outer(A.flatten(), B.flatten()))


@given(shapes, terms, seeds, st.lists(st.integers(0, 10**6), max_size=7))
def test_embedding_gathers_rows(shape, K, seed, ids):
    A, B = draw_terms(shape, K, seed)
    index = torch.tensor(ids, dtype=torch.long).remainder(shape.m)
    assert_near(kron_embedding(index, A, B), dense_sum(A, B)[index], K)
    assert kron_embedding(index[:, None, None], A, B).shape == (len(ids), 1, 1, shape.n)


def test_embedding_gradients():
    A, B = (t.requires_grad_() for t in draw_terms(KronShape(3, 2, 2, 4), 2, 0))
    ids = torch.tensor([[0, 5], [5, 3]])  # a repeated row must add up
    assert torch.autograd.gradcheck(lambda A, B: kron_embedding(ids, A, B), (A, B))


def test_gradients_of_kron_sum():
    A, B = (t.requires_grad_() for t in draw_terms(KronShape(3, 2, 2, 4), 2, 0))
    assert torch.autograd.gradcheck(kron_sum, (A, B))


@given(shapes, terms, seeds, st.sampled_from(FLOATS))
def test_the_update_is_its_definition_and_exactly_zero_at_the_start(shape, K, seed, dtype):
    A0, B0 = draw_terms(shape, K, seed, dtype)
    zeros = torch.zeros_like(A0), torch.zeros_like(B0)
    assert not kron_sum(*delta_terms(*zeros, A0, B0)).any()
    dA, dB = (0.1 * t for t in draw_terms(shape, K, seed + 1, dtype))
    truth = dense_sum(A0.double() + dA.double(), B0.double() + dB.double()) - dense_sum(A0, B0)
    assert_near(kron_sum(*delta_terms(dA, dB, A0, B0)), truth, 2 * K, steps=32)


@pytest.mark.parametrize("A, B", [((2, 3, 4), (3, 3, 4)), ((3, 4), (3, 4)), ((2, 3, 4), (1, 2, 3, 4))])
def test_factors_that_do_not_belong_together(A, B):
    with pytest.raises(ShapeError, match="same leading sizes"):
        kron_sum(torch.ones(A), torch.ones(B))


def test_a_start_of_another_shape():
    """torch would repeat a single starting term for all."""
    (dA, dB), (A0, B0) = (draw_terms(KronShape(3, 2, 2, 4), K, 0) for K in (2, 1))
    with pytest.raises(ShapeError, match=r"A0 is \(1, 3, 2\).*must have the shapes of dA, \(2, 3, 2\)"):
        delta_terms(dA, dB, A0, B0)


def test_a_row_that_is_not_there():
    A, B = draw_terms(KronShape(3, 2, 2, 4), 2, 0)
    with pytest.raises(IndexError):
        kron_embedding(torch.tensor([6]), A, B)


def test_rearranging_a_matrix_of_another_shape():
    with pytest.raises(ShapeError, match=r"\(8, 14\).*\(\.\.\., 8, 15\)"):
        rearrange(torch.ones(8, 14), KronShape(4, 3, 2, 5))
    with pytest.raises(ShapeError, match=r"\(12, 9\).*\(\.\.\., 12, 10\)"):
        unrearrange(torch.ones(12, 9), KronShape(4, 3, 2, 5))
