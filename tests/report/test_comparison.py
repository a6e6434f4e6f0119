"""Statistics, tables and plots of a comparison, from records alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krontune.errors import CheckpointError
from krontune.report import statistics
from krontune.report.compared import ComparedRun, Journal
from krontune.report.comparison import write_comparison
from krontune.report.statistics import paired_difference, pareto_front, spread, summarise, tried_rates


def record(label: str, task: str, seed: int, score: float | None, **more: Any) -> ComparedRun:
    defaults: dict[str, Any] = {"phase": "final", "n_trainable": 100, "learning_rate": 1e-3}
    values = {**defaults, **more}
    key = f"{values['phase']}-{label}-{task}-{seed}-{values['learning_rate']}"
    return ComparedRun(
        key, task=task, label=label, method="lora", settings={}, norms=False, seed=seed, metric="score",
        higher_is_better=True, score=score, **values,
    )  # fmt: skip


def test_the_paired_interval_is_students_on_one_task() -> None:
    draw = np.random.default_rng(1)
    noise = draw.normal(0.02, 0.05, size=4)
    shared = draw.normal(0.7, 0.2, size=4)  # what pairing takes out
    theirs = {("t", i): float(value) for i, value in enumerate(shared)}
    ours = {("t", i): float(value + change) for i, (value, change) in enumerate(zip(shared, noise, strict=True))}
    found = paired_difference(ours, theirs)
    half = 3.1824 * noise.std(ddof=1) / math.sqrt(4)  # Student's t, 3 degrees of freedom
    assert found is not None
    assert found.mean == pytest.approx(noise.mean())
    assert found.high - found.mean == pytest.approx(found.mean - found.low) == pytest.approx(half, rel=0.02)
    worse = paired_difference(ours, theirs, sign=-1)
    assert worse is not None and worse.mean == pytest.approx(-found.mean)


@pytest.mark.parametrize(("tasks", "seeds"), [(1, 3), (3, 5)])
def test_the_paired_interval_covers_as_often_as_it_says(tasks: int, seeds: int, monkeypatch: Any) -> None:
    """Tasks of unequal noise, many times over. Several tasks together are covered a little more often than 95%."""
    monkeypatch.setattr(statistics, "DRAWS", 4000)
    draw = np.random.default_rng(2)
    covered = 0
    for _ in range(1000):
        ours = {(f"t{t}", s): 0.01 + draw.normal(0, 0.01 * (t + 1)) for t in range(tasks) for s in range(seeds)}
        found = paired_difference(ours, dict.fromkeys(ours, 0.0))
        covered += found is not None and found.low < 0.01 < found.high
    assert 0.93 < covered / 1000 < 0.99


def test_one_seed_has_no_interval() -> None:
    found = paired_difference({("t", 0): 0.9}, {("t", 0): 0.8})
    assert found is not None and found.mean == pytest.approx(0.1) and math.isnan(found.low)


def test_tasks_weigh_the_same_however_many_seeds_they_have() -> None:
    ours = {("a", 0): 0.9, ("b", 0): 0.5, ("b", 1): 0.5, ("c", 9): 1.0}
    theirs = {("a", 0): 0.7, ("b", 0): 0.5, ("b", 1): 0.5}
    found = paired_difference(ours, theirs)
    assert found is not None
    assert (found.mean, found.pairs) == (pytest.approx(0.1), 3)
    assert paired_difference({("a", 0): 1.0}, {("a", 1): 1.0}) is None


def test_a_seed_counts_only_with_all_its_tasks() -> None:
    runs = [record("x", "a", 0, 0.4), record("x", "b", 0, 0.6), record("x", "a", 1, 0.9), record("x", "b", 1, None)]
    summary = summarise(runs)["x"]
    assert summary.seed_means(["a", "b"]) == [0.5]
    assert summary.n_failed == 1
    assert summary.task_scores("a") == [0.4, 0.9]
    assert spread([0.4, 0.9]) == pytest.approx(np.std([0.4, 0.9], ddof=1))
    assert math.isnan(spread([0.4]))


def test_the_front_of_losses_is_their_lower_edge() -> None:
    points = {"a": (1.0, 3.0), "b": (2.0, 2.0), "c": (3.0, 2.5), "d": (2.0, 2.2)}
    assert pareto_front(points, sign=-1) == ["a", "b"]


def test_a_rate_that_diverged_once_is_not_averaged_away() -> None:
    runs = [record("x", "a", seed, score, phase="tune") for seed, score in ((1, 0.5), (2, None))]
    assert tried_rates(runs) == {"x": {"a": {1e-3: None}}}


def write_runs(folder: Path) -> None:
    history = [{"step": step, "loss": 1 / step, "grad_norm": 1.0} for step in (10, 20)]
    journal = Journal(folder / "runs.jsonl")
    for i, label in enumerate(("LoRA r=8", "LSR | 0.29x")):
        journal.append(record(label, "stsb", 1000, 0.5, phase="tune"))
        for task in ("stsb", "cola"):
            for seed in range(3):
                score = 0.6 + 0.01 * i + 0.001 * seed
                journal.append(record(label, task, seed, score, n_trainable=1000 - 700 * i, history=history))
    journal.append(record("broken", "stsb", 0, None, error="ConfigError: no", n_trainable=5))


def test_the_report_shows_every_method_and_draws_every_plot(tmp_path: Path) -> None:
    write_runs(tmp_path)
    markdown, page = write_comparison(tmp_path, "A comparison", "LoRA r=8")
    text = markdown.read_text()
    assert r"| LSR \| 0.29x * | 300 | 0.30x | 61.1 | 0.1 | +1.00 [+1.00, +1.00] | 6 |" in text
    assert "| LoRA r=8 | 1,000 | 1.00x | 60.1 | 0.1 | reference | 6 |" in text
    assert "| broken | 5 | 0.01x | - | - | - | 0 (1 failed) |" in text
    assert "1 runs failed: broken: ConfigError: no" in text
    for name in ("pareto", "differences", "loss", "grad_norm"):
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 5000
        assert f"plots/{name}.png" in text
    assert page.read_text().count("data:image/png") == 4
    assert "LSR | 0.29x" in page.read_text()


def test_tasks_at_the_floor_are_left_out_of_the_means(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "runs.jsonl")
    for label, gain in (("LoRA r=8", 0.2), ("LSR", 0.3)):
        for seed in range(2):
            for task, score in (("sst2", 0.5 + gain + 0.01 * seed), ("rte", 0.515)):
                journal.append(record(label, task, seed, score, scores={"score": score, "constant": 0.5}))
    text = write_comparison(tmp_path, "t", "LoRA r=8")[0].read_text()
    assert "mean over sst2," in text and "Left out of the means: rte, where no method beats a constant" in text
    assert "| a constant answer | 50.0 | 50.0 |" in text
    assert "| LSR * | 100 | 1.00x | 80.5 | 0.7 | +10.00 [+10.00, +10.00] | 4 |" in text
    assert "| LSR | 80.5 ± 0.7 | 51.5 ± 0.0 |" in text


def test_runs_are_chosen_and_named_by_their_keys(tmp_path: Path) -> None:
    write_runs(tmp_path)
    runs = [run for run in Journal(tmp_path / "runs.jsonl").read() if run.label == "LoRA r=8"]
    text = write_comparison(tmp_path, "t", "rank 8", {run.key: "rank 8" for run in runs})[0].read_text()
    assert "| rank 8 * | 1,000 |" in text and "LSR" not in text


def test_without_final_runs_there_is_no_report(tmp_path: Path) -> None:
    Journal(tmp_path / "runs.jsonl").append(record("x", "a", 0, 0.1, phase="tune"))
    with pytest.raises(CheckpointError, match="no final run"):
        write_comparison(tmp_path, "t", "x")
