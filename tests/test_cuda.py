"""On a CUDA device everything computes what it does on the CPU; skipped where there is none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from krontune.kron import PATHS, KronShape, kron_delta_linear, nearest_kron, separated_linear
from tests.kron.truth import assert_near, dense_separated, dense_sum, draw_terms, normal
from tests.tuners.helpers import METHODS, adapted, kron_layers, true_delta

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SHAPE = KronShape(16, 12, 8, 24)
GPU = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["auto", *PATHS])
def test_a_sum_is_that_of_the_dense_matrix_and_so_are_its_gradients(path, dtype):
    K = 3
    dA, dB = (t.to(dtype) for t in draw_terms(SHAPE, K, 0))
    A0, B0 = (t.to(dtype) for t in draw_terms(SHAPE, K, 1))
    x, g = normal(5, 7, SHAPE.n, dtype=dtype), normal(5, 7, SHAPE.m, seed=9, dtype=dtype)
    leaves = [t.to(GPU).requires_grad_() for t in (x, dA, dB)]
    y = kron_delta_linear(*leaves, A0.to(GPU), B0.to(GPU), path=path)
    y.backward(g.to(GPU))

    exact = [t.detach().double().requires_grad_() for t in (x, dA, dB)]
    A, B = A0.double() + exact[1], B0.double() + exact[2]
    truth = exact[0] @ (dense_sum(A, B) - dense_sum(A0, B0)).mT
    truth.backward(g.double())
    assert y.device.type == "cuda" and y.dtype == dtype
    assert_near(y.detach().cpu(), truth.detach(), K * SHAPE.n)
    for got, expected in zip(leaves, exact):
        assert_near(got.grad.cpu(), expected.grad, 35 * SHAPE.n)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_separated_update_is_that_of_the_dense_matrix_and_so_are_its_gradients(dtype):
    a = [normal(5, 4, 12, seed=1, dtype=dtype), normal(5, 2, 16, seed=2, dtype=dtype)]
    b = [normal(5, 8, 4, seed=3, dtype=dtype), normal(5, 16, 2, seed=4, dtype=dtype)]
    x, g = normal(6, 192, dtype=dtype), normal(6, 128, seed=9, dtype=dtype)
    leaves = [t.to(GPU).requires_grad_() for t in (x, *a, *b)]
    y = separated_linear(leaves[0], leaves[1:3], leaves[3:])
    y.backward(g.to(GPU))

    exact = [t.detach().double().requires_grad_() for t in (x, *a, *b)]
    truth = exact[0] @ (dense_separated(exact[3:]) @ dense_separated(exact[1:3])).mT
    truth.backward(g.double())
    assert_near(y.detach().cpu(), truth.detach(), 192 * 8)
    for got, expected in zip(leaves, exact):
        assert_near(got.grad.cpu(), expected.grad, 192 * 8)


def test_the_nearest_sum_is_as_near():
    """The singular vectors of close values mix: cuSOLVER's float32 eigenvectors are good to 1e-4 of the largest."""
    W = normal(SHAPE.m, SHAPE.n, dtype=torch.float32)
    here, there = nearest_kron(W, SHAPE, 6), nearest_kron(W.to(GPU), SHAPE, 6)
    assert there.A.device.type == "cuda"
    torch.testing.assert_close(there.sigma.cpu(), here.sigma, rtol=1e-4, atol=1e-4)
    missed = [(W - dense_sum(found.A.cpu(), found.B.cpu())).norm() for found in (here, there)]
    torch.testing.assert_close(missed[1], missed[0], rtol=1e-4, atol=0.0)


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 32))


@pytest.mark.parametrize("name", METHODS)
def test_an_adapted_model_computes_and_merges_as_on_the_cpu(name):
    x = normal(4, 48, dtype=torch.float32)
    model = adapted(_net(), METHODS[name](target_modules=["0", "2"]))
    expected = model(x)
    moved = copy.deepcopy(model).to(GPU)
    torch.testing.assert_close(moved(x.to(GPU)).cpu(), expected, rtol=1e-4, atol=1e-4)
    for here, there in zip(kron_layers(model).values(), kron_layers(moved).values()):
        assert there.get_delta_weight("default").device.type == "cuda"
        assert_near(there.get_delta_weight("default").detach().cpu(), true_delta(here), 64, torch.float32)
    merged = moved.merge_and_unload()
    torch.testing.assert_close(merged(x.to(GPU)).cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_started_on_the_gpu_learns_there_alone(name, dtype):
    """Its start is computed where the weight is, and a base in 16 bits can be trained beside."""
    base = _net().to(GPU, dtype)
    model = adapted(base, METHODS[name](target_modules=["0", "2"]), trained=False)
    factors = [f for layer in kron_layers(model).values() for f in layer.factors("default")]
    assert {f.device.type for f in factors} == {"cuda"}
    x, target = normal(64, 48).to(GPU, dtype), normal(64, 32, seed=1).to(GPU, dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(60):
        loss = (model(x) - target).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
