"""What a comparison's records say: means, spreads, and paired differences with their uncertainty."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .compared import ComparedRun

RESAMPLES = 10_000
Scores = dict[tuple[str, int], float]  # by task and seed


@dataclass(frozen=True)
class Difference:
    """A mean paired difference and its interval; a positive one means better than the reference."""

    mean: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True)
class Summary:
    """A method over its final runs."""

    label: str
    runs: tuple[ComparedRun, ...]

    @property
    def scores(self) -> Scores:
        """The scores of the runs that have one."""
        return {(r.task, r.seed): r.score for r in self.runs if r.score is not None}

    @property
    def n_trainable(self) -> int:
        return max(run.n_trainable for run in self.runs)

    @property
    def n_failed(self) -> int:
        """Runs that failed or diverged."""
        return sum(run.score is None for run in self.runs)

    def task_scores(self, task: str) -> list[float]:
        """The scores on one task, by seed."""
        return [score for (name, _), score in sorted(self.scores.items()) if name == task]

    def seed_means(self, tasks: Sequence[str]) -> list[float]:
        """The mean over the tasks of every seed that has them all."""
        scores = self.scores
        seeds = sorted({seed for _, seed in scores})
        complete = [seed for seed in seeds if all((task, seed) in scores for task in tasks)]
        return [statistics.fmean(scores[task, seed] for task in tasks) for seed in complete]

    def median(self, quantity: str) -> float:
        """The median over the runs of one of their measurements."""
        return statistics.median(getattr(run, quantity) for run in self.runs)


def summarise(runs: Sequence[ComparedRun]) -> dict[str, Summary]:
    """The final runs by method, in the order of the records' labels."""
    groups: dict[str, list[ComparedRun]] = {}
    for run in runs:
        if run.phase == "final":
            groups.setdefault(run.label, []).append(run)
    return {label: Summary(label, tuple(group)) for label, group in groups.items()}


def spread(values: Sequence[float]) -> float:
    """Standard deviation with n - 1; NaN for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def paired_difference(ours: Scores, theirs: Scores, sign: int = 1, level: float = 0.95) -> Difference | None:
    """Mean difference over tasks of the mean over seeds, on the tasks and seeds that both have.

    The interval is the percentile bootstrap over seeds, drawn for each task by itself; the tasks are kept as they are.
    With a handful of seeds such an interval is too narrow rather than too wide.

    Args:
        ours, theirs: scores by task and seed; the same seed means the same head, data order and dropout.
        sign: 1 where higher is better, -1 where lower is.
        level: of the interval.

    >>> a = {("t", 0): 0.9, ("t", 1): 0.8}; b = {("t", 0): 0.8, ("t", 1): 0.7}
    >>> round(paired_difference(a, b).mean, 6)
    0.1
    """
    by_task: dict[str, list[float]] = {}
    for task, seed in sorted(ours.keys() & theirs.keys()):
        by_task.setdefault(task, []).append(sign * (ours[task, seed] - theirs[task, seed]))
    if not by_task:
        return None
    draw = np.random.default_rng(0)
    means = np.zeros(RESAMPLES)
    for differences in by_task.values():
        values = np.array(differences)
        means += values[draw.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means / len(by_task), [(1 - level) / 2, (1 + level) / 2])
    mean = statistics.fmean(statistics.fmean(values) for values in by_task.values())
    return Difference(mean, float(low), float(high), sum(map(len, by_task.values())))


def pareto_front(points: Mapping[str, tuple[float, float]], sign: int = 1) -> list[str]:
    """The labels that no other one beats with as few or fewer parameters, from few parameters to many.

    >>> pareto_front({"a": (1, 0.5), "b": (2, 0.4), "c": (3, 0.6)})
    ['a', 'c']
    """
    front: list[str] = []
    best = -math.inf
    for label, (_, score) in sorted(points.items(), key=lambda item: (item[1][0], -sign * item[1][1])):
        if sign * score > best:
            best = sign * score
            front.append(label)
    return front


def tried_rates(runs: Sequence[ComparedRun]) -> dict[str, dict[str, dict[float, float | None]]]:
    """The trials: {method: {task: {rate: mean score, None where one diverged}}}."""
    found: dict[str, dict[str, dict[float, list[float | None]]]] = {}
    for run in runs:
        if run.phase == "tune":
            rates = found.setdefault(run.label, {}).setdefault(run.task, {})
            rates.setdefault(run.learning_rate, []).append(run.score)
    return {
        label: {task: {rate: _mean(scores) for rate, scores in sorted(rates.items())} for task, rates in tasks.items()}
        for label, tasks in found.items()
    }


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return statistics.fmean(known) if len(known) == len(scores) else None
