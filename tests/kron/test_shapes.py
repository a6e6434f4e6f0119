"""Factor shapes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krontune.errors import ShapeError
from krontune.kron import KronShape, family_shape, resolve_shape, split_dim, square_shape

dims = st.integers(1, 5000)


@given(dims, st.integers(1, 4))
def test_split_dim_multiplies_back_largest_first(size, d):
    parts = split_dim(size, d)
    assert len(parts) == d and math.prod(parts) == size
    assert list(parts) == sorted(parts, reverse=True)


@given(st.integers(1, 400))
def test_split_dim_has_the_least_sum_of_all_splits(size):
    best = min(a + size // a for a in range(1, size + 1) if size % a == 0)
    assert sum(split_dim(size)) == best


def test_split_dim_of_three_has_the_least_sum():
    best = min(a + b + 768 // (a * b) for a in range(1, 769) for b in range(1, 769) if 768 % (a * b) == 0)
    assert sum(split_dim(768, 3)) == best


@pytest.mark.parametrize("size, d", [(0, 2), (-3, 2), (4, 0)])
def test_split_dim_refuses_sizes_below_one(size, d):
    with pytest.raises(ShapeError, match="at least 1"):
        split_dim(size, d)


@given(dims, dims, st.sampled_from(["auto", "square", 1]))
def test_every_size_has_a_shape(m, n, setting):
    shape = resolve_shape(m, n, setting)
    assert (shape.m, shape.n) == (m, n)
    assert shape.n_params == shape.m1 * shape.n1 + shape.m2 * shape.n2


@given(dims, dims)
def test_auto_is_the_largest_p_up_to_four(m, n):
    p = next(p for p in (4, 3, 2, 1) if m % p == 0 and n % p == 0)
    assert resolve_shape(m, n) == KronShape(m // p, p, p, n // p)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 8))
def test_the_family_has_m_plus_n_parameters_for_every_p(a, b, p):
    shape = family_shape(a * p, b * p, p)
    assert shape.n_params == a * p + b * p


def test_known_shapes():
    assert square_shape(768, 768) == (32, 32, 24, 24)
    assert square_shape(11008, 4096) == (128, 64, 86, 64)
    assert resolve_shape(4096, 4096, (64, 32)) == (64, 32, 64, 128)
    assert resolve_shape(7, 13, "square") == (7, 13, 1, 1)
    assert family_shape(768, 768, 1).max_terms == 768  # plain low rank: as many terms as rows
    assert square_shape(768, 768).max_terms == 576


@pytest.mark.parametrize(
    "setting, message",
    [
        ((48, 64), r"q_proj is \(4096, 4096\).*\(48, 64\) does not divide out=4096.*\(32, 64\), \(64, 64\)"),
        ((64, 48), r"does not divide in=4096.*\(64, 32\), \(64, 64\)"),
        ((0, 64), r"does not divide out=4096"),
        (3, r"p = 3 does not divide both 4096 and 4096. Nearest that do: 2, 4"),
        (0, r"p = 0"),
        (True, "not one of"),
        ("squre", "not one of"),
        ((1, 2, 3), "not one of"),
    ],
)
def test_a_shape_that_does_not_divide_names_the_nearest(setting, message):
    with pytest.raises(ShapeError, match=message):
        resolve_shape(4096, 4096, setting, name="q_proj")
