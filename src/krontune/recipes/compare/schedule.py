"""Which runs are due: a function of the grid and the records alone, so that a comparison goes on from any kill."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from krontune.report.compared import ComparedRun

from .grid import Grid, RunSpec, run_spec, tuning_tasks
from .methods import Method
from .tuning import best_rate, next_rate


def planned(grid: Grid, methods: Sequence[Method], records: Mapping[str, ComparedRun]) -> dict[str, RunSpec]:
    """Every run that the grid asks for, by its key, as far as the records tell: trials first, then final runs seed by
    seed. Final runs join once their rate is known."""
    trials: list[RunSpec] = []
    finals: list[tuple[int, RunSpec]] = []
    for task in grid.tasks:
        for method in methods:
            rate: float | None = method.rate
            if method.tuned:
                asked, rate = _search(grid, method, task, records)
                trials += asked
            if rate is not None:
                finals += [(i, run_spec(grid, method, "final", task, rate, s)) for i, s in enumerate(grid.seeds)]
    ordered = [*trials, *(spec for _, spec in sorted(finals, key=lambda pair: pair[0]))]
    return {spec.key: spec for spec in ordered}


def due(grid: Grid, methods: Sequence[Method], records: Mapping[str, ComparedRun]) -> list[RunSpec]:
    """The runs that can start now and are not recorded."""
    return [spec for key, spec in planned(grid, methods, records).items() if key not in records]


def _search(
    grid: Grid, method: Method, task: str, records: Mapping[str, ComparedRun]
) -> tuple[list[RunSpec], float | None]:
    """The trials of every rate asked for so far, and the rate that was found once none is missing."""
    tuning, scores = grid.tuning, dict[float, float]()
    asked: list[RunSpec] = []
    while (rate := next_rate(scores, method.rate, tuning.factor, tuning.trials)) is not None:
        specs = list(_trials(grid, method, task, rate))
        asked += specs
        if any(spec.key not in records for spec in specs):
            return asked, None
        scores[rate] = sum(worth(records[spec.key]) for spec in specs) / len(specs)
    return asked, best_rate(scores)


def _trials(grid: Grid, method: Method, task: str, rate: float) -> Iterator[RunSpec]:
    for name in tuning_tasks(grid, task):
        for seed in grid.tuning.seeds:
            yield run_spec(grid, method, "tune", name, rate, seed)


def worth(run: ComparedRun) -> float:
    """A run's score with higher as better; -inf where there is none."""
    if run.score is None or not math.isfinite(run.score):
        return -math.inf
    return run.score if run.higher_is_better else -run.score
