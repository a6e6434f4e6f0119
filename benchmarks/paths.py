"""The paths of a Kronecker product side by side: what the cost model chooses, and what it should have chosen."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from benchmarks.cases import SHAPES, Case, Setting
from benchmarks.contenders import frozen_linear
from benchmarks.measure import Work
from krontune.kron import FactorShape, choose_path, kron_delta_linear, path_costs, resolve_shape
from krontune.kron.cost import prices_of

BASE = "base"
FORMS: tuple[tuple[FactorShape, int], ...] = ((4, 8), (4, 16), ("square", 1), ("square", 16))
#: A path slower than the best path by this factor is dropped after three rounds: no choice depends on its exact time.
GIVE_UP = 3.0
#: A path that is modelled to cost this many times the cheapest, frozen weight included, is not run: it may also need
#: gigabytes (the a side of the p-family holds (T, m, K*n/p) intermediates).
HOPELESS = 8.0


def path_works(
    setting: Setting, m: int, n: int, tokens: int, factor_shape: FactorShape, k: int, train: bool
) -> dict[str, Work]:
    """Setup of a path case: SoKA's whole layer, frozen weight included, by every path, and the frozen weight alone.

    The chosen path's facts say `chosen`; every record holds the sizes that the cost model is fitted to.
    """
    torch.manual_seed(setting.seed)
    shape = resolve_shape(m, n, factor_shape)
    base = frozen_linear(m, n, setting.device, setting.torch_dtype)
    like = {"device": setting.device, "dtype": setting.torch_dtype}
    dA, A0 = (torch.randn(k, shape.m1, shape.n1, **like).requires_grad_(train and i == 0) for i in range(2))
    dB, B0 = (torch.randn(k, shape.m2, shape.n2, **like).requires_grad_(train and i == 0) for i in range(2))
    x, gradient = torch.randn(tokens, n, **like).requires_grad_(train), torch.randn(tokens, m, **like)
    leaves = [t for t in (x, dA, dB) if t.requires_grad]

    def step(path: str) -> object:
        for leaf in leaves:
            leaf.grad = None
        with torch.set_grad_enabled(train):
            y = base(x) if path == BASE else kron_delta_linear(x, dA, dB, A0, B0, base.weight, path=path)
        if train:
            y.backward(gradient)
        return y

    def forward(path: str) -> torch.Tensor:
        return kron_delta_linear(x, dA, dB, A0, B0, base.weight, path=path)

    terms, trained = 2 * k, k if train else 0
    prices = prices_of(setting.device)
    fold = x.itemsize >= 4  # as krontune.kron does: added into a weight of 16 bits, a small update is rounded away
    chosen = choose_path(tokens, shape, terms, trained, fold_weight=fold, prices=prices)
    sizes = {"tokens": tokens, "shape": list(shape), "terms": terms, "trained": trained, "fold_weight": fold}
    known = [x, dA, dB, A0, B0, base.weight]
    costs = path_costs(tokens, shape, terms, trained, fold_weight=fold, prices=prices)
    works = {
        path: Work(
            partial(step, path), partial(forward, path) if train else None, known, {**sizes, "chosen": path == chosen}
        )
        for path in _sensible(costs, tokens * m * n * (1 + train))
    }
    return {BASE: Work(partial(step, BASE), None, known, sizes), **works}


def _sensible(costs: Mapping[str, float], base: float) -> list[str]:
    """The paths that are not hopeless, given their costs beyond the base's."""
    least = min(costs.values())
    return [path for path, cost in costs.items() if base + cost <= HOPELESS * (base + least)]


def path_cases() -> list[Case]:
    """Every form of a sum on every shape of the grid; fewer tokens where a single product takes a second."""
    return [
        path_case(m, n, tokens, factor_shape, k, train)
        for m, n in SHAPES
        for tokens in ((1, 128, 2048) if n < 4096 else (1, 128, 512) if m == n else (1, 128))
        for factor_shape, k in FORMS
        for train in (False, True)
    ]


def path_case(m: int, n: int, tokens: int, factor_shape: FactorShape, k: int, train: bool) -> Case:
    """The case called paths/{m}x{n}/{tokens}/{form} K={k}/{eval or train}."""
    form = f"p={factor_shape}" if isinstance(factor_shape, int) else factor_shape
    setup = partial(path_works, m=m, n=n, tokens=tokens, factor_shape=factor_shape, k=k, train=train)
    name = f"paths/{m}x{n}/{tokens}/{form} K={k}/{'train' if train else 'eval'}"
    return Case(name, setup, quick=(m, n, tokens) == (768, 768, 128), give_up=GIVE_UP, aside=(BASE,))
