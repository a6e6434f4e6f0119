"""The nearest Kronecker sum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from krontune.errors import ConfigError, ShapeError
from krontune.kron import KronShape, family_shape, kron_sum, nearest_kron, rearrange, square_shape
from tests.kron.truth import assert_near, dense_sum, draw_terms, normal, seeds, shapes

F32 = torch.float32
METHODS = ("exact", "krylov")


def decaying(shape, seed=0, power=1.0):
    """A weight whose R(W) has the singular values 1, 2^-power, 3^-power, ..."""
    k = shape.max_terms
    U = torch.linalg.qr(normal(shape.m1 * shape.n1, k, seed=seed)).Q
    V = torch.linalg.qr(normal(shape.m2 * shape.n2, k, seed=seed + 1)).Q
    A, B = U.mT.reshape(k, shape.m1, shape.n1), V.mT.reshape(k, shape.m2, shape.n2)
    sigma = torch.arange(1, k + 1, dtype=torch.float64) ** -power
    return kron_sum(sigma[:, None, None] * A, B), sigma


@given(shapes, st.integers(1, 8), seeds)
def test_the_error_is_the_tail_of_the_spectrum(shape, k, seed):
    W = normal(shape.m, shape.n, seed=seed)
    top = nearest_kron(W, shape, k)
    spectrum = torch.linalg.svdvals(rearrange(W, shape))
    k = min(k, shape.max_terms)
    assert top.A.shape == (k, shape.m1, shape.n1) and top.B.shape == (k, shape.m2, shape.n2)
    assert top.energy == pytest.approx(float(W.square().sum()), rel=1e-5)
    # Gram + eigh squares the condition: singular values below sqrt(eps) of the first are rounding.
    scale = float(spectrum[0])
    torch.testing.assert_close(top.sigma.double(), spectrum[:k], rtol=1e-4, atol=1e-3 * scale)
    error = (W - dense_sum(top.A, top.B)).square().sum()
    assert float(error) == pytest.approx(float(spectrum[k:].square().sum()), abs=1e-5 * top.energy)


@pytest.mark.parametrize("method", METHODS)
@given(shapes, st.integers(1, 4), seeds)
def test_a_sum_of_k_products_is_recovered(method, shape, k, seed):
    W = dense_sum(*draw_terms(shape, k, seed))
    top = nearest_kron(W, shape, k, method=method)
    # The smallest term comes out of the squared spectrum: half the digits of float32 for what is tiny beside the first.
    assert_near(kron_sum(top.A, top.B), W, 1, F32, steps=2**12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [KronShape(6, 5, 4, 3), KronShape(2, 3, 8, 9), family_shape(40, 24, 4)])
def test_terms_are_orthogonal_balanced_ordered_and_of_a_fixed_sign(method, shape):
    W, sigma = decaying(shape)
    top = nearest_kron(W, shape, 4, method=method, tol=1e-4)
    torch.testing.assert_close(top.sigma, sigma[:4].float(), rtol=1e-3, atol=0)
    for factors in (top.A, top.B):
        gram = factors.flatten(1) @ factors.flatten(1).mT
        torch.testing.assert_close(gram, torch.diag(top.sigma), rtol=1e-3, atol=2e-3)
    peaks = top.A.flatten(1).gather(1, top.A.flatten(1).abs().argmax(1, keepdim=True))
    assert (peaks > 0).all()
    assert top.A.is_contiguous() and top.B.is_contiguous()


@pytest.mark.parametrize("power", [0.3, 1.0])
def test_krylov_comes_as_near_as_its_tolerance_says(power):
    shape = square_shape(240, 240)
    W, sigma = decaying(shape, power=power)
    best = float(sigma[:12].square().sum())
    loose, tight = (nearest_kron(W, shape, 12, method="krylov", tol=tol) for tol in (0.1, 1e-3))
    captured = [float(top.sigma.double().square().sum()) / best for top in (loose, tight)]
    assert 0.95 <= captured[0] <= captured[1] <= 1 + 1e-5
    assert captured[1] >= 0.995
    # What it claims to hold is what its terms hold.
    error = float((W - dense_sum(tight.A, tight.B)).square().sum())
    assert error == pytest.approx(tight.energy - float(tight.sigma.double().square().sum()), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits(method):
    W = normal(48, 40, dtype=F32)
    shape = square_shape(48, 40)
    state = torch.get_rng_state()
    first, second = (nearest_kron(W, shape, 3, method=method, seed=7) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3]))
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are left alone


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_dtype_is_worked_on_in_float32(dtype):
    W = normal(24, 20, dtype=dtype)
    shape = square_shape(24, 20)
    top, reference = nearest_kron(W, shape, 3), nearest_kron(W.float(), shape, 3)
    assert {t.dtype for t in top[:3]} == {F32}
    assert torch.equal(top.A, reference.A)


def test_one_by_one_factors_are_the_svd():
    W = normal(12, 9)
    top = nearest_kron(W, family_shape(12, 9, 1), 5)
    torch.testing.assert_close(top.sigma.double(), torch.linalg.svdvals(W)[:5], rtol=1e-5, atol=1e-5)
    U, S, Vh = torch.linalg.svd(W)
    assert_near(kron_sum(top.A, top.B), U[:, :5] * S[:5] @ Vh[:5], 1, F32, steps=64)


def test_zero_and_rank_deficient_weights():
    shape = KronShape(4, 3, 2, 5)
    for method in METHODS:
        zero = nearest_kron(torch.zeros(8, 15), shape, 3, method=method)
        assert not zero.A.any() and not zero.sigma.any() and zero.energy == 0
        W = dense_sum(*draw_terms(shape, 1, 0))
        top = nearest_kron(W, shape, 3, method=method)
        assert torch.isfinite(top.A).all() and top.sigma[1] < 1e-2 * top.sigma[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused(value):
    W = torch.ones(8, 15)
    W[3, 4] = value
    with pytest.raises(ConfigError, match="NaN or Inf"):
        nearest_kron(W, KronShape(4, 3, 2, 5), 1)


def test_bad_arguments():
    W, shape = torch.ones(8, 15), KronShape(4, 3, 2, 5)
    with pytest.raises(ConfigError, match="k is 0"):
        nearest_kron(W, shape, 0)
    with pytest.raises(ConfigError, match="'svd' is unknown"):
        nearest_kron(W, shape, 1, method="svd")
    with pytest.raises(ShapeError, match="15, 8"):
        nearest_kron(W.mT, shape, 1)
