"""The tables of a comparison, as plain cells: the report sets them in Markdown and HTML alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .compared import ComparedRun
from .statistics import (
    MOVES,
    Difference,
    Summary,
    constant_score,
    moving_tasks,
    paired_difference,
    pareto_front,
    spread,
    tasks_of,
    tried_rates,
)
from .tables import human_bytes


@dataclass(frozen=True)
class Cells:
    """A table: a title, a line about it, a header, rows."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table under its title, ending in a newline."""
        lines = [self.header, ["---", *("--:" for _ in self.header[1:])], *self.rows]
        table = "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
        return f"## {self.title}\n\n{self.note}\n\n{table}"


@dataclass(frozen=True)
class Scale:
    """How scores are shown: in points of a hundred, or as a loss."""

    higher_is_better: bool

    @property
    def sign(self) -> int:
        return 1 if self.higher_is_better else -1

    def show(self, value: float) -> str:
        if math.isnan(value):
            return "-"
        return f"{100 * value:.1f}" if self.higher_is_better else f"{value:.4f}"

    def show_difference(self, value: float) -> str:
        return f"{100 * value:+.2f}" if self.higher_is_better else f"{value:+.4f}"


def all_tables(runs: Sequence[ComparedRun], summaries: Mapping[str, Summary], reference: str) -> list[Cells]:
    """Every table of the report."""
    tasks = tasks_of(summaries)
    scale = Scale(next(iter(summaries.values())).runs[0].higher_is_better)
    tables = [main_table(summaries, tasks, reference, scale)]
    if len(tasks) > 1:
        tables.append(task_table(summaries, tasks, scale))
    tables.append(cost_table(summaries))
    if any(run.phase == "tune" for run in runs):
        tables.append(rate_table(runs, scale))
    return tables


def main_table(summaries: Mapping[str, Summary], tasks: Sequence[str], reference: str, scale: Scale) -> Cells:
    """Parameters, mean score, and the paired difference to the reference, over the tasks that move."""
    moving = moving_tasks(summaries, tasks)
    whole = summaries[reference].n_trainable if reference in summaries else 0
    front = pareto_front(mean_points(summaries, moving), scale.sign)
    rows = []
    for label, summary in by_size(summaries):
        means = summary.seed_means(moving)
        rows.append(
            [
                label + (" *" if label in front else ""),
                f"{summary.n_trainable:,}",
                f"{summary.n_trainable / whole:.2f}x" if whole else "-",
                scale.show(statistics.fmean(means)) if means else "-",
                scale.show(spread(means)) if len(means) > 1 else "-",
                "reference" if label == reference else _difference(summaries, label, reference, moving, scale),
                str(len(summary.scores)) + (f" ({summary.n_failed} failed)" if summary.n_failed else ""),
            ]
        )
    header = ["method", "parameters", "of reference", "mean", "sd", "difference", "runs"]
    return Cells("Results", _about_means(moving, tasks, reference, scale), header, rows)


def _about_means(moving: Sequence[str], tasks: Sequence[str], reference: str, scale: Scale) -> str:
    kind = "points of 100, higher is better" if scale.higher_is_better else "loss, lower is better"
    note = f"Scores: {kind}; mean over {', '.join(moving)}, standard deviation over seeds. "
    if still := [task for task in tasks if task not in moving]:
        note += (
            f"Left out of the means: {', '.join(still)}, where no method beats a constant answer by "
            f"{scale.show(MOVES)} points after this training. "
        )
    return note + (
        f"The difference is paired by task and seed against {reference}, positive where better, with a 95% interval "
        "(Student's t over seeds). * no method with as few parameters scores better."
    )


def _difference(
    summaries: Mapping[str, Summary], label: str, reference: str, tasks: Sequence[str], scale: Scale
) -> str:
    found = difference_to(summaries, label, reference, tasks, scale)
    if found is None:
        return "-"
    if math.isnan(found.low):
        return scale.show_difference(found.mean)
    low, high = scale.show_difference(found.low), scale.show_difference(found.high)
    return f"{scale.show_difference(found.mean)} [{low}, {high}]"


def difference_to(
    summaries: Mapping[str, Summary], label: str, reference: str, tasks: Sequence[str], scale: Scale
) -> Difference | None:
    """The paired difference of a method to the reference, over some tasks."""
    if reference not in summaries:
        return None
    ours, theirs = (
        {key: score for key, score in summaries[name].scores.items() if key[0] in tasks} for name in (label, reference)
    )
    return paired_difference(ours, theirs, scale.sign)


def task_table(summaries: Mapping[str, Summary], tasks: Sequence[str], scale: Scale) -> Cells:
    """Mean and standard deviation on every task, and what a constant answer scores."""
    rows = []
    floors = [constant_score(summaries, task) for task in tasks]
    if any(floor is not None for floor in floors):
        rows.append(["a constant answer", *("-" if floor is None else scale.show(floor) for floor in floors)])
    for label, summary in by_size(summaries):
        cells = [label]
        for task in tasks:
            scores = summary.task_scores(task)
            plus_minus = f" ± {scale.show(spread(scores))}" if len(scores) > 1 else ""
            cells.append(scale.show(statistics.fmean(scores)) + plus_minus if scores else "-")
        rows.append(cells)
    return Cells("By task", "Mean ± standard deviation over seeds.", ["method", *tasks], rows)


def cost_table(summaries: Mapping[str, Summary]) -> Cells:
    """What a method costs: adapter size, time of a step, memory, and the rates that were chosen."""
    rows = []
    for label, summary in by_size(summaries):
        rates = sorted({run.learning_rate for run in summary.runs})
        rows.append(
            [
                label,
                human_bytes(summary.median("adapter_bytes")),
                f"{summary.median('step_ms'):.0f} ms",
                human_bytes(summary.median("peak_mem_bytes")),
                ", ".join(f"{rate:g}" for rate in rates),
            ]
        )
    note = (
        "Medians over runs. Times and memory are those of the machine in environment.json, shared with other processes."
    )
    return Cells("Costs", note, ["method", "adapter", "step", "peak memory", "learning rate"], rows)


def rate_table(runs: Sequence[ComparedRun], scale: Scale) -> Cells:
    """Every trial of the search for learning rates."""
    rows = []
    for label, tasks in tried_rates(runs).items():
        for task, rates in tasks.items():
            shown = (f"{rate:g}: {'diverged' if s is None else scale.show(s)}" for rate, s in rates.items())
            rows.append([label, task, ", ".join(shown)])
    note = "Scores on rows set aside from the training split, with seeds that no final run uses."
    return Cells("Learning rates tried", note, ["method", "task", "rate: score"], rows)


def mean_points(summaries: Mapping[str, Summary], tasks: Sequence[str]) -> dict[str, tuple[float, float]]:
    """(parameters, mean score) of the methods that have a seed with all tasks, in the order of `by_size`."""
    found = {label: (summary, summary.seed_means(tasks)) for label, summary in by_size(summaries)}
    return {label: (float(s.n_trainable), statistics.fmean(means)) for label, (s, means) in found.items() if means}


def by_size(summaries: Mapping[str, Summary]) -> list[tuple[str, Summary]]:
    """Methods from few parameters to many."""
    return sorted(summaries.items(), key=lambda item: item[1].n_trainable)
