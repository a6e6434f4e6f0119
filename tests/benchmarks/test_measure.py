"""The measuring: turns, counts and bytes. Nothing here depends on how fast the machine is."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.measure import interleaved, peak_bytes, saved_bytes
from benchmarks.paths import path_cases


def test_every_step_takes_its_turn_in_every_round() -> None:
    turns: list[str] = []
    steps = {name: (lambda name=name: turns.append(name)) for name in "abc"}
    samples = interleaved(steps, repetitions=5)
    for name, record in samples.items():
        assert len(record["wall_s"]) == len(record["cpu_s"]) == 5
        assert turns.count(name) >= 5 * record["calls"]
    runs = [turns[0]] + [name for before, name in itertools.pairwise(turns) if name != before]
    assert len(runs) > 5, "the steps ran one after the other"


def test_a_hopeless_step_leaves_after_three_rounds() -> None:
    slow = torch.randn(900, 900)
    samples = interleaved({"quick": lambda: None, "slow": lambda: slow @ slow}, repetitions=6, give_up=3.0)
    assert len(samples["slow"]["wall_s"]) == 3 and len(samples["quick"]["wall_s"]) == 6


def test_what_all_contain_neither_leaves_nor_makes_others_leave() -> None:
    """A frozen layer alone is faster than any path around it: the paths are compared with each other."""
    slow, slower = torch.randn(400, 400), torch.randn(1600, 1600)
    steps = {"base": lambda: None, "path": lambda: slow @ slow, "hopeless": lambda: slower @ slower}
    samples = interleaved(steps, repetitions=6, give_up=3.0, aside=("base",))
    assert {label: len(record["wall_s"]) for label, record in samples.items()} == {"base": 6, "path": 6, "hopeless": 3}
    assert all(case.aside == ("base",) for case in path_cases())


def test_peak_bytes_counts_what_lives_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.empty(1000, dtype=torch.float32)

    def together() -> None:
        held = [torch.empty(1000, dtype=torch.float32) for _ in range(3)]
        assert len(held) == 3

    assert peak_bytes(one_after_the_other) == pytest.approx(4000, abs=200)
    assert peak_bytes(together) == pytest.approx(12000, abs=600)


def test_saved_bytes_leaves_out_what_lives_anyway() -> None:
    x, w = torch.randn(10, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    assert saved_bytes(lambda: x @ w, [x, w]) == {"saved_bytes": 0, "largest_saved": 0}
    assert saved_bytes(lambda: (x @ w).exp(), [x, w]) == {"saved_bytes": 160, "largest_saved": 40}
