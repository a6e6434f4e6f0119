"""kron_linear and kron_delta_linear: values, gradients, dtypes, layouts, what is kept, what torch.compile sees."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from krontune.errors import ConfigError, ShapeError
from krontune.kron import PATHS, KronShape, kron_delta_linear, kron_linear, resolve_shape
from krontune.kron import paths as kron_paths
from tests.kron.truth import FLOATS, assert_near, dense_sum, draw_terms, normal, relayout, seeds, shapes

paths = st.sampled_from(("auto", *PATHS))
SHAPE = KronShape(4, 3, 2, 5)


def delta_factors(shape=SHAPE, K=3, dtype=torch.float64, seed=0):
    """dA, dB (small, trained), A0, B0."""
    dA, dB = draw_terms(shape, K, seed, dtype)
    return (0.1 * dA).requires_grad_(), (0.1 * dB).requires_grad_(), *draw_terms(shape, K, seed + 1, dtype)


def dense_delta(dA, dB, A0, B0):
    A, B = A0.double() + dA.double(), B0.double() + dB.double()
    return dense_sum(A, B) - dense_sum(A0, B0)


@given(
    shape=shapes,
    K=st.integers(1, 4),
    batch=st.sampled_from([(), (1,), (5,), (2, 3), (0,), (2, 0)]),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
    dtype=st.sampled_from(FLOATS),
    with_weight=st.booleans(),
    with_bias=st.booleans(),
    path=paths,
    seed=seeds,
)
def test_values_are_those_of_the_dense_matrix(shape, K, batch, layout, dtype, with_weight, with_bias, path, seed):
    A, B = draw_terms(shape, K, seed, dtype)
    x = normal(*batch, shape.n, seed=seed + 1, dtype=dtype)
    x = relayout(x, layout) if len(batch) > 1 else x
    weight = normal(shape.m, shape.n, seed=seed + 2, dtype=dtype) if with_weight else None
    bias = normal(shape.m, seed=seed + 3, dtype=dtype) if with_bias else None
    dense = 0.5 * dense_sum(A, B) + (weight.double() if with_weight else 0)
    truth = F.linear(x.double(), dense, bias.double() if with_bias else None)
    y = kron_linear(x, A, B, weight, bias, 0.5, path=path)
    assert y.dtype == dtype
    # What may cancel in the sum is bounded by the sizes of its parts, not by the result.
    parts = x.double().norm() * (dense.norm() + dense_sum(A.abs(), B.abs()).norm())
    parts = parts + (bias.double().norm() * max(1, x[..., 0].numel()) ** 0.5 if with_bias else 0)
    assert y.shape == truth.shape
    assert (y.double() - truth).norm() <= 8 * torch.finfo(dtype).eps * (K * shape.n) ** 0.5 * parts


@given(shapes, st.integers(1, 3), st.integers(0, 4), paths, st.booleans(), seeds)
def test_gradients_of_every_path_are_those_of_the_dense_matrix(shape, K, T, path, with_weight, seed):
    factors = delta_factors(shape, K, seed=seed)
    x = normal(T, shape.n, seed=seed + 2).requires_grad_()
    weight = normal(shape.m, shape.n, seed=seed + 3) if with_weight else None
    g = normal(T, shape.m, seed=seed + 4)
    dA, dB, A0, B0 = factors
    W = torch.einsum("kab,kcd->acbd", A0 + dA, B0 + dB) - torch.einsum("kab,kcd->acbd", A0, B0)
    W = W.reshape(shape.m, shape.n) + (weight if with_weight else 0)
    inputs = (x, dA, dB)
    expected = torch.autograd.grad(x @ W.mT, inputs, g)
    got = torch.autograd.grad(kron_delta_linear(x, *factors, weight, path=path), inputs, g)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [KronShape(7, 3, 2, 5), KronShape(3, 4, 6, 2), KronShape(1, 3, 8, 2)])
@pytest.mark.parametrize("elements", [1, 100, 10**9])
def test_merging_in_blocks_of_any_size(monkeypatch, shape, elements):
    monkeypatch.setattr(kron_paths, "BLOCK_ELEMENTS", elements)
    factors = delta_factors(shape)
    x = normal(4, shape.n).requires_grad_()
    weight = normal(shape.m, shape.n, seed=1)
    inputs = (x, *factors[:2])
    y = kron_delta_linear(x, *factors, weight, path="merged")
    expected = kron_delta_linear(x, *factors, weight, path="b-first")
    torch.testing.assert_close(y, expected)
    grads = (torch.autograd.grad(out.square().sum(), inputs) for out in (y, expected))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("with_weight", [False, True])
def test_gradcheck_and_second_derivatives(path, with_weight):
    dA, dB, A0, B0 = delta_factors(KronShape(3, 2, 2, 2), 2)
    x = normal(1, 2, 4).requires_grad_()
    weight = normal(6, 4, seed=1).requires_grad_() if with_weight else None
    bias = normal(6, seed=2).requires_grad_()
    trained = (x, dA, dB, bias) if weight is None else (x, dA, dB, bias, weight)

    def delta(x, dA, dB, bias, weight=None):
        return kron_delta_linear(x, dA, dB, A0, B0, weight, bias, 0.7, path)

    def plain(x, A, B, bias, weight=None):
        return kron_linear(x, A, B, weight, bias, 0.7, path=path)

    for layer in (delta, plain):
        assert gradcheck(layer, trained)
        assert gradgradcheck(layer, trained)


@pytest.mark.parametrize("path", ("auto", *PATHS))
@pytest.mark.parametrize("wanted", ["x", "dA", "dB"])
def test_each_gradient_alone(path, wanted):
    factors = delta_factors()
    x = normal(4, 15).requires_grad_()
    every = dict(zip(("x", "dA", "dB"), (x, *factors[:2])))
    expected = torch.autograd.grad(kron_delta_linear(x, *factors, path=path).square().sum(), every[wanted])[0]
    for name, tensor in every.items():
        tensor.requires_grad_(name == wanted)
    kron_delta_linear(x, *factors, path=path).square().sum().backward()
    torch.testing.assert_close(every[wanted].grad, expected)
    assert all(t.grad is None for name, t in every.items() if name != wanted)


def test_the_starting_factors_are_constants():
    dA, dB, A0, B0 = delta_factors()
    A0.requires_grad_()
    kron_delta_linear(normal(4, 15), dA, dB, A0, B0).sum().backward()
    assert A0.grad is None and dA.grad is not None


@pytest.mark.parametrize("path", ("auto", *PATHS))
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_update_is_exactly_zero_at_the_start(path, dtype):
    A0, B0 = draw_terms(SHAPE, 3, 0, dtype)
    x, weight, bias = normal(6, 15, dtype=dtype), normal(8, 15, dtype=dtype), normal(8, dtype=dtype)
    zeros = torch.zeros_like(A0), torch.zeros_like(B0)
    assert not kron_delta_linear(x, *zeros, A0, B0, path=path).any()
    fused = kron_delta_linear(x, *zeros, A0, B0, weight, bias, path=path)
    assert torch.equal(fused, F.linear(x, weight, bias))


def kept_for_backward(build):
    """The tensors that autograd keeps for the backward of build()."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = build()
    return y, kept


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_the_backward_keeps_x_and_the_factors_alone(path, layout):
    factors = delta_factors(dtype=torch.float32)
    x = relayout(normal(50, 15, dtype=torch.float32), layout).requires_grad_()
    weight = normal(8, 15, dtype=torch.float32)
    y, kept = kept_for_backward(lambda: kron_delta_linear(x, *factors, weight, path=path))
    inputs = {t.untyped_storage().data_ptr() for t in (x, weight, *factors)}
    assert {t.untyped_storage().data_ptr() for t in kept} == inputs  # the very tensors, no copies and nothing else
    y.sum().backward()


@pytest.mark.parametrize("path", [p for p in PATHS if p != "merged"])
def test_structured_paths_never_form_the_matrix(path):
    # m*n is far above every other size here, so that an (m, n) tensor would stand out.
    shape = resolve_shape(400, 300, 4 if path.startswith("b") else (4, 75))
    factors = delta_factors(shape, 2, torch.float32)
    x = normal(3, 300, dtype=torch.float32).requires_grad_()
    weight = normal(400, 300, dtype=torch.float32)
    with LargestTensor() as largest:
        kron_delta_linear(x, *factors, weight, path=path).sum().backward()
    assert largest.made < shape.m * shape.n / 4


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the most elements of any tensor that an operation makes, views of what was there left out."""

    def __init__(self):
        super().__init__()
        self.made, self.seen = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        self.seen |= {t.untyped_storage().data_ptr() for t in flat if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.seen:
                self.made = max(self.made, t.numel())
        return out


@pytest.mark.parametrize("path", ("auto", *PATHS))
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_factors(path, factor_dtype):
    dA, dB, A0, B0 = (t.detach().to(factor_dtype) for t in delta_factors())
    dA.requires_grad_(), dB.requires_grad_()
    x = normal(2, 6, 15, dtype=torch.float32).requires_grad_()
    weight = normal(8, 15, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = kron_delta_linear(x, dA, dB, A0, B0, weight, path=path)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert_near(y, x.detach().double() @ (weight.double() + dense_delta(dA, dB, A0, B0).detach()).mT, 15)
    assert (x.grad.dtype, dA.grad.dtype) == (torch.float32, factor_dtype)
    exact = [t.detach().double().requires_grad_() for t in (x, dA, dB)]
    kron_delta_linear(*exact, A0.double(), B0.double(), weight.double()).square().sum().backward()
    for got, truth in zip((x, dA, dB), exact):
        assert_near(got.grad, truth.grad, 15 * 12, torch.bfloat16)


@pytest.mark.parametrize("path", ("auto", *PATHS))
def test_a_small_update_of_a_16_bit_weight_is_not_rounded_away(path):
    A, B = draw_terms(SHAPE, 2, 0)
    x, weight = normal(6, 15, dtype=torch.bfloat16), normal(8, 15, dtype=torch.bfloat16)
    x.abs_()
    weight.fill_(1.0)  # the next number above 1 in bfloat16 is 1 + 2^-7: far above the update
    with_update = kron_linear(x, 1e-4 * A.abs().float(), B.abs().float(), weight, path=path)
    update = kron_linear(x, 1e-4 * A.abs().float(), B.abs().float(), path=path)
    assert (update > 0).all()
    truth = x.double() @ (weight.double() + dense_sum(1e-4 * A.abs(), B.abs())).mT
    assert_near(with_update, truth, 1, torch.bfloat16, steps=2)
    assert_near(update, x.double() @ dense_sum(1e-4 * A.abs(), B.abs()).mT, 15, torch.bfloat16)


@pytest.mark.parametrize("x_dtype, factor_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_the_product_is_computed_in_the_dtype_of_x(x_dtype, factor_dtype):
    dA, dB, A0, B0 = (t.detach().to(factor_dtype).requires_grad_() for t in delta_factors())
    x = normal(6, 15, dtype=x_dtype).requires_grad_()
    y = kron_delta_linear(x, dA, dB, A0, B0)
    y.float().sum().backward()
    assert (y.dtype, x.grad.dtype, dB.grad.dtype) == (x_dtype, x_dtype, factor_dtype)
    assert_near(y, x.detach().double() @ dense_delta(dA, dB, A0, B0).detach().mT, 15, torch.bfloat16)


def test_compile_sees_one_graph_of_plain_operations():
    factors = delta_factors(dtype=torch.float32)
    weight = normal(8, 15, dtype=torch.float32)

    def layer(x):
        return kron_delta_linear(x, *factors, weight, scale=0.7)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for T in (3, 40):  # the second makes T symbolic
        x = normal(2, T, 15, dtype=torch.float32).requires_grad_()
        inputs = (x, *factors[:2])
        torch.testing.assert_close(compiled(x), layer(x))
        grads = [torch.autograd.grad(f(x).square().sum(), inputs) for f in (compiled, layer)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients():
    factors = delta_factors()
    x = normal(4, 15).requires_grad_()
    plain = torch.autograd.grad(kron_delta_linear(x, *factors).square().sum(), (x, *factors[:2]))
    y = torch.utils.checkpoint.checkpoint(kron_delta_linear, x, *factors, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), (x, *factors[:2])), plain)


def test_errors_name_what_was_got_and_what_is_needed():
    dA, dB, A0, B0 = delta_factors()
    x = normal(4, 15)
    with pytest.raises(ConfigError, match="path 'fastest' is unknown; allowed: auto, b-first"):
        kron_linear(x, dA, dB, path="fastest")
    with pytest.raises(ShapeError, match=r"x is \(4, 14\).*x \(\.\.\., 15\)"):
        kron_linear(x[:, 1:], dA, dB)
    with pytest.raises(ShapeError, match=r"weight \(15, 8\)"):
        kron_linear(x, dA, dB, normal(15, 8))
    with pytest.raises(ShapeError, match="same leading sizes"):
        kron_linear(x, dA, dB[:2])
    with pytest.raises(ShapeError, match=r"factors \(1, 3, 4, 3\)"):
        kron_linear(x, dA[None], dB[None])
    with pytest.raises(ShapeError, match=r"A0 is \(2, 4, 3\)"):
        kron_delta_linear(x, dA, dB, A0[:2], B0)


@pytest.mark.parametrize("path", PATHS)
def test_functional_transforms(path):
    """torch.func sees torch's own operations on every path."""
    factors, x, weight = delta_factors(), normal(5, SHAPE.n, seed=2), normal(SHAPE.m, SHAPE.n, seed=3)

    def loss(dA, dB, x):
        return kron_delta_linear(x, dA, dB, *factors[2:], weight, path=path).square().sum()

    expected = torch.autograd.grad(loss(*factors[:2], x), factors[:2])
    dA, dB = (f.detach() for f in factors[:2])
    each = torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, None, 0))(dA, dB, x)
    _, slope = torch.func.jvp(lambda dA, dB: loss(dA, dB, x), (dA, dB), expected)
    for got, truth in zip(each, expected, strict=True):
        assert_near(got.sum(0), truth, terms=1000)
    assert_near(slope, sum(truth.square().sum() for truth in expected), terms=1000)
