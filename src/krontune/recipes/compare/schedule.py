"""Which runs are due: a function of the grid and the records alone, so that a comparison goes on from any kill."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from krontune.report.compared import ComparedRun

from .grid import Grid, RunSpec, run_spec, tuning_tasks
from .methods import Method
from .tuning import best_rate, next_rate


def due(grid: Grid, methods: Sequence[Method], records: Mapping[str, ComparedRun]) -> list[RunSpec]:
    """The runs that can start now and are not recorded: trials first, then final runs seed by seed."""
    trials: dict[str, RunSpec] = {}
    finals: list[tuple[int, RunSpec]] = []
    for task in grid.tasks:
        for method in methods:
            rate: float | None = method.rate
            if method.tuned:
                waiting, rate = _search(grid, method, task, records)
                trials |= {spec.key: spec for spec in waiting}
            if rate is not None:
                finals += [(i, run_spec(grid, method, "final", task, rate, s)) for i, s in enumerate(grid.seeds)]
    finals = [(i, spec) for i, spec in finals if spec.key not in records]
    return [*trials.values(), *(spec for _, spec in sorted(finals, key=lambda pair: pair[0]))]


def _search(
    grid: Grid, method: Method, task: str, records: Mapping[str, ComparedRun]
) -> tuple[list[RunSpec], float | None]:
    """The trials that are missing for the next rate, or else the rate that was found."""
    tuning, scores = grid.tuning, dict[float, float]()
    while (rate := next_rate(scores, method.rate, tuning.factor, tuning.trials)) is not None:
        specs = list(_trials(grid, method, task, rate))
        missing = [spec for spec in specs if spec.key not in records]
        if missing:
            return missing, None
        scores[rate] = sum(worth(records[spec.key]) for spec in specs) / len(specs)
    return [], best_rate(scores)


def _trials(grid: Grid, method: Method, task: str, rate: float) -> Iterator[RunSpec]:
    for name in tuning_tasks(grid, task):
        for seed in grid.tuning.seeds:
            yield run_spec(grid, method, "tune", name, rate, seed)


def worth(run: ComparedRun) -> float:
    """A run's score with higher as better; -inf where there is none."""
    if run.score is None or not math.isfinite(run.score):
        return -math.inf
    return run.score if run.higher_is_better else -run.score
