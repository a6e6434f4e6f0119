"""The cost model: its counts against the operations that really run, and its choices."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from krontune.kron import PATHS, KronShape, choose_path, family_shape, kron_delta_linear, path_costs, square_shape
from krontune.kron.cost import DEVICES, path_work, prices_of
from tests.kron.truth import draw_terms, normal

SHAPES = [KronShape(4, 3, 2, 5), KronShape(8, 6, 6, 10), family_shape(48, 40, 4), KronShape(4, 10, 12, 4)]


class MultiplyAdds(TorchDispatchMode):
    """Counts the multiply-adds of all matrix products that run, in whatever form."""

    PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_")

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.PRODUCTS:
            left, right = args[-2:]
            self.total += left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


def multiply_adds(shape, K, T, path, backward):
    """Those of the update, the frozen weight's own taken off."""
    A0, B0 = draw_terms(shape, K, 0)
    dA, dB = (t.requires_grad_(backward) for t in draw_terms(shape, K, 1))
    x = normal(T, shape.n).requires_grad_(backward)
    weight = normal(shape.m, shape.n)
    with MultiplyAdds() as counter:
        y = kron_delta_linear(x, dA, dB, A0, B0, weight, path=path)
        if backward:
            y.sum().backward()
    return counter.total - T * shape.m * shape.n * (2 if backward else 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("backward", [False, True])
def test_the_counted_multiply_adds_are_those_that_run(shape, path, backward):
    K, T = 3, 7
    work = path_work(path, T, shape, 2 * K, K if backward else 0)
    assert work.gemm + work.batched == multiply_adds(shape, K, T, path, backward)


@pytest.mark.parametrize("path", ["b-first", "a-first"])
def test_structured_paths_cost_what_the_docstring_says(path):
    m1, n1, m2, n2 = shape = KronShape(8, 6, 6, 10)
    K, T = 5, 3
    work = path_work(path, T, shape, K, 0)
    per_row = n1 * m2 * (m1 + n2) if path == "b-first" else m1 * n2 * (n1 + m2)
    assert work.gemm + work.batched == K * T * per_row
    trained = path_work(path, T, shape, K, K)
    assert trained.gemm + trained.batched == 3 * K * T * per_row + K * T * (
        n1 * m2 * n2 if path == "b-first" else m1 * n1 * n2  # the intermediate is not kept, so computed again
    )


def test_the_choices_of_the_known_cases():
    """The fastest paths on one CPU core, measured; see docs/performance.md."""
    family, square = family_shape(768, 768, 4), square_shape(768, 768)
    assert choose_path(2048, family, 16, 8) == "b-fold"
    assert choose_path(2048, square, 32, 16) == "merged"
    assert choose_path(2048, KronShape(4, 192, 192, 4), 16, 8) == "a-fold"
    assert choose_path(1, square_shape(4096, 4096), 16) in ("a-first", "b-first")
    assert choose_path(128, square_shape(4096, 4096), 2, 1) in ("a-first", "b-first")


def test_more_tokens_never_make_a_structured_path_cheaper():
    for shape in SHAPES:
        for before, after in zip((1, 8, 64), (8, 64, 512)):
            costs = [path_costs(T, shape, 4, 2) for T in (before, after)]
            assert all(costs[0][path] < costs[1][path] for path in PATHS if path != "merged")


def test_the_choice_is_the_least_cost_and_prices_can_be_replaced():
    shape = square_shape(768, 768)
    costs = path_costs(512, shape, 8, 4)
    assert choose_path(512, shape, 8, 4) == min(costs, key=costs.__getitem__)
    dear = DEVICES["cpu"]._replace(batched=1e9)
    assert not choose_path(512, shape, 8, 4, prices=dear).endswith("first")
    assert prices_of("cpu") == DEVICES["cpu"] and prices_of("xpu") == DEVICES["cuda"]


def test_a_weight_that_cannot_take_the_sum_makes_merging_dearer():
    shape = square_shape(768, 768)
    folded, apart = (path_costs(2048, shape, 32, 16, fold_weight=fold)["merged"] for fold in (True, False))
    assert apart - folded >= 2 * 2048 * 768 * 768


def test_auto_takes_the_chosen_path(monkeypatch):
    from krontune.kron import linear

    taken = []

    def record(x, terms, path, weight):
        taken.append(path)
        return x.new_zeros(len(x), 48)

    monkeypatch.setattr(linear, "apply_terms", record)
    factors = [t for seed in (1, 0) for t in draw_terms(family_shape(48, 40, 4), 2, seed, torch.float32)]
    linear.kron_delta_linear(torch.ones(64, 40), *factors)
    assert taken == [choose_path(64, family_shape(48, 40, 4), 4, fold_weight=False)]
