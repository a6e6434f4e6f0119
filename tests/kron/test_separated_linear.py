"""LSR's product: values, gradients, dtypes, what is kept, what torch.compile sees."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from krontune.errors import ShapeError
from krontune.kron import separated_linear, separated_sum
from tests.kron.test_linear import kept_for_backward
from tests.kron.truth import assert_near, dense_separated, normal, seeds

RANKS = {1: (4,), 2: (2, 2), 3: (2, 1, 2)}
INPUTS = {1: (6,), 2: (2, 3), 3: (3, 1, 2)}
OUTPUTS = {1: (8,), 2: (4, 2), 3: (2, 2, 2)}


def factors_of(d, s=3, dtype=torch.float64, seed=0):
    """a_factors, b_factors of an update of an (8, 6) weight with r = 4."""
    a = [normal(s, r, n, seed=seed + i, dtype=dtype) for i, (r, n) in enumerate(zip(RANKS[d], INPUTS[d]))]
    b = [normal(s, m, r, seed=seed + 9 + i, dtype=dtype) for i, (m, r) in enumerate(zip(OUTPUTS[d], RANKS[d]))]
    return [t.requires_grad_() for t in a], [t.requires_grad_() for t in b]


def dense_update(a, b):
    return dense_separated([f.detach() for f in b]) @ dense_separated([f.detach() for f in a])


@given(
    st.sampled_from([1, 2, 3]),
    st.integers(1, 5),
    st.sampled_from([(), (4,), (2, 3), (0,)]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seeds,
)
def test_values_are_those_of_the_dense_matrix(d, s, batch, with_weight, with_bias, dtype, seed):
    a, b = factors_of(d, s, dtype, seed)
    x = normal(*batch, 6, seed=seed + 1, dtype=dtype)
    weight = normal(8, 6, seed=seed + 2, dtype=dtype) if with_weight else None
    bias = normal(8, seed=seed + 3, dtype=dtype) if with_bias else None
    update = 0.5 * dense_update(a, b)
    truth = F.linear(x.double(), update + (weight.double() if with_weight else 0), bias.double() if with_bias else None)
    y = separated_linear(x, a, b, weight, bias, 0.5).detach()
    assert y.dtype == dtype and y.shape == truth.shape
    parts = x.double().norm() * (s * update.norm() + 8) + 8 * max(1, x[..., 0].numel()) ** 0.5
    assert (y.double() - truth).norm() <= 8 * torch.finfo(dtype).eps * (s * 6) ** 0.5 * parts


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("with_weight", [False, True])
def test_gradcheck_and_second_derivatives(d, with_weight):
    a, b = factors_of(d)
    x, bias = normal(2, 3, 6).requires_grad_(), normal(8, seed=4).requires_grad_()
    weight = (normal(8, 6, seed=5).requires_grad_(),) if with_weight else ()

    def layer(x, bias, *tensors):
        factors, weight = tensors[: 2 * d], tensors[2 * d :]
        return separated_linear(x, factors[:d], factors[d:], weight[0] if weight else None, bias, 0.7)

    assert gradcheck(layer, (x, bias, *a, *b, *weight))
    assert gradgradcheck(layer, (x, bias, *a, *b, *weight))


@pytest.mark.parametrize("d", [2, 3])
def test_the_backward_keeps_x_and_the_factors_alone(d):
    a, b = factors_of(d)
    x, weight = normal(50, 6).requires_grad_(), normal(8, 6)
    y, kept = kept_for_backward(lambda: separated_linear(x, a, b, weight))
    assert {t.untyped_storage().data_ptr() for t in kept} == {
        t.untyped_storage().data_ptr() for t in (x, weight, *a, *b)
    }
    y.sum().backward()


def test_only_what_is_wanted_gets_a_gradient():
    a, b = factors_of(2)
    x = normal(5, 6)
    for f in a:
        f.requires_grad_(False)
    separated_linear(x, a, b).sum().backward()
    assert x.grad is None and all(f.grad is None for f in a) and all(f.grad is not None for f in b)


def test_an_update_of_zero_leaves_the_layer_as_it_is():
    a, b = factors_of(2)
    x, weight, bias = normal(5, 6), normal(8, 6), normal(8)
    with torch.no_grad():
        b[1].zero_()
    assert torch.equal(separated_linear(x, a, b, weight, bias), F.linear(x, weight, bias))


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_factors():
    a, b = factors_of(2, dtype=torch.float32)
    x = normal(5, 6, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = separated_linear(x, a, b)
        y.float().sum().backward()
    assert (y.dtype, x.grad.dtype, a[0].grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert_near(y, x.detach().double() @ dense_update(a, b).mT, 6)


def test_compile_sees_one_graph_of_plain_operations():
    a, b = factors_of(2, dtype=torch.float32)
    weight = normal(8, 6, dtype=torch.float32)
    compiled = torch.compile(
        lambda x: separated_linear(x, a, b, weight, scale=0.7), fullgraph=True, backend="aot_eager"
    )
    for T in (3, 40):  # the second makes T symbolic
        x = normal(T, 6, dtype=torch.float32).requires_grad_()
        got = torch.autograd.grad(compiled(x).square().sum(), (x, *a, *b))
        expected = torch.autograd.grad(separated_linear(x, a, b, weight, scale=0.7).square().sum(), (x, *a, *b))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_it_is_the_lora_of_its_own_factors():
    a, b = factors_of(2)
    x = normal(5, 6)
    torch.testing.assert_close(separated_linear(x, a, b), x @ separated_sum(a).mT @ separated_sum(b).mT)


def test_errors_name_what_was_got():
    a, b = factors_of(2)
    x = normal(5, 6)
    with pytest.raises(ShapeError, match=r"x is \(5, 5\), A \(4, 6\), B \(8, 4\)"):
        separated_linear(x[:, 1:], a, b)
    with pytest.raises(ShapeError, match="one s"):
        separated_linear(x, [a[0], a[1][:2]], b)
    with pytest.raises(ShapeError, match="at least one"):
        separated_linear(x, [], b)
    with pytest.raises(ShapeError, match=r"weight \(6, 8\)"):
        separated_linear(x, a, b, normal(6, 8))
