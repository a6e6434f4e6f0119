"""The whole kron API once, against torch.kron in float64."""

from __future__ import annotations

import torch

from krontune.kron import (
    KronShape,
    kron_embedding,
    kron_linear,
    kron_sum,
    nearest_kron,
    nearest_lowrank,
    nearest_separated,
    rearrange,
    separated_linear,
    separated_sum,
    unrearrange,
)

torch.set_num_threads(1)
torch.manual_seed(0)
SHAPE = KronShape(4, 3, 2, 5)
A = torch.randn(3, 4, 3, dtype=torch.float64)
B = torch.randn(3, 2, 5, dtype=torch.float64)
DENSE = sum(torch.kron(a, b) for a, b in zip(A, B))


def test_kron_sum_is_the_sum_of_torch_kron():
    torch.testing.assert_close(kron_sum(A, B), DENSE)
    batched = kron_sum(torch.stack([A, 2 * A]), torch.stack([B, B]))
    torch.testing.assert_close(batched, torch.stack([DENSE, 2 * DENSE]))


def test_every_path_is_the_dense_product():
    x, W = torch.randn(2, 7, 15, dtype=torch.float64), torch.randn(8, 15, dtype=torch.float64)
    for path in ("auto", "b-first", "a-first", "b-fold", "merged"):
        torch.testing.assert_close(kron_linear(x, A, B, path=path), x @ DENSE.T)
        torch.testing.assert_close(kron_linear(x, A, B, W, path=path), x @ (W + DENSE).T)


def test_embedding_gathers_rows():
    ids = torch.tensor([[0, 7], [3, 3]])
    torch.testing.assert_close(kron_embedding(ids, A, B), DENSE[ids])


def test_rearrangement_round_trip_and_outer_product():
    W = torch.randn(8, 15)
    assert torch.equal(unrearrange(rearrange(W, SHAPE), SHAPE), W)
    outer = torch.outer(A[0].flatten(), B[0].flatten())
    torch.testing.assert_close(rearrange(torch.kron(A[0], B[0]), SHAPE), outer)


def test_kpsvd_recovers_a_kronecker_sum():
    for method in ("exact", "krylov"):
        top = nearest_kron(DENSE, SHAPE, 3, method=method)
        torch.testing.assert_close(kron_sum(top.A, top.B), DENSE.float(), atol=1e-5, rtol=1e-5)


def test_separated_representations():
    C = torch.randn(3, 2, 3, dtype=torch.float64)
    dense = sum(torch.kron(torch.kron(a, b), c) for a, b, c in zip(A, B, C))
    torch.testing.assert_close(separated_sum([A, B, C]), dense)
    factors = nearest_separated(DENSE, (4, 2), (3, 5), 3)
    torch.testing.assert_close(separated_sum(factors), DENSE.float(), atol=1e-5, rtol=1e-5)
    x = torch.randn(6, 15, dtype=torch.float64)
    up = torch.randn(2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(separated_linear(x, [A, B], [up]), x @ DENSE.T @ up.sum(0).T)


def test_lowrank_is_the_truncated_svd():
    low = nearest_lowrank(A, B, rank=2)
    S = torch.linalg.svdvals(DENSE)
    torch.testing.assert_close(low.error, float(S[2:].norm() / S.norm()), atol=1e-5, rtol=1e-5)
