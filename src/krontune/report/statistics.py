"""What a comparison's records say: means, spreads, and paired differences with their uncertainty."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .compared import ComparedRun

DRAWS = 100_000
MOVES = 0.02
Scores = dict[tuple[str, int], float]  # by task and seed


@dataclass(frozen=True)
class Difference:
    """A mean paired difference and its interval (NaN where unknown); a positive one means better than the reference."""

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


def tasks_of(summaries: Mapping[str, Summary]) -> list[str]:
    """Every task that occurs, in the order of the records."""
    return list(dict.fromkeys(run.task for summary in summaries.values() for run in summary.runs))


def constant_score(summaries: Mapping[str, Summary], task: str) -> float | None:
    """The best score on a task of an answer that is always the same, where the records know it."""
    runs = (run for summary in summaries.values() for run in summary.runs if run.task == task)
    return next((run.scores["constant"] for run in runs if "constant" in run.scores), None)


def moving_tasks(summaries: Mapping[str, Summary], tasks: Sequence[str]) -> list[str]:
    """The tasks on which some method's mean beats a constant answer by `MOVES`; all of them if none does.

    On the others every method scores what a constant scores, so that they would only draw differences towards zero.
    """
    moving = []
    for task in tasks:
        floor = constant_score(summaries, task)
        means = [statistics.fmean(s) for s in (summary.task_scores(task) for summary in summaries.values()) if s]
        if floor is None or (means and max(means) > floor + MOVES):
            moving.append(task)
    return moving or list(tasks)


def spread(values: Sequence[float]) -> float:
    """Standard deviation with n - 1; NaN for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def paired_difference(ours: Scores, theirs: Scores, sign: int = 1, level: float = 0.95) -> Difference | None:
    """Mean difference over tasks of the mean over seeds, on the tasks and seeds that both have.

    The interval is Student's over the seeds of one task; over several tasks, the distribution of the mean of their t
    variables (Behrens-Fisher), by simulation. A percentile bootstrap of three seeds holds the truth 75% of the time
    where it says 95%. The tasks are kept as they are. It is NaN where a task has a single seed.

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
    mean = statistics.fmean(statistics.fmean(values) for values in by_task.values())
    pairs = sum(map(len, by_task.values()))
    if min(map(len, by_task.values())) < 2:
        return Difference(mean, math.nan, math.nan, pairs)
    draw = np.random.default_rng(0)
    noise = sum(
        spread(values) / math.sqrt(len(values)) * draw.standard_t(len(values) - 1, size=DRAWS)
        for values in by_task.values()
    )
    half = float(np.quantile(np.abs(noise), level)) / len(by_task)
    return Difference(mean, mean - half, mean + half, pairs)


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
