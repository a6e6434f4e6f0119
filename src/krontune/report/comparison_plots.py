"""The plots of a comparison, drawn from its records alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .comparison_tables import Scale, by_size, difference_to, mean_points
from .plots import COLORS, _colors, _figure, _save
from .statistics import Summary, pareto_front, spread

MARKERS = "osD^vP*X<>"
LINES = ("-", "--", ":", "-.")  # the next one where the colors begin again


def method_styles(summaries: Mapping[str, Summary]) -> dict[str, dict[str, Any]]:
    """One color and kind of line a method, the same in every plot."""
    labels = [label for label, _ in by_size(summaries)]
    return {
        label: {"color": color, "linestyle": LINES[i // len(COLORS) % len(LINES)]}
        for i, (label, color) in enumerate(zip(labels, _colors(len(labels)), strict=True))
    }


def pareto(summaries: Mapping[str, Summary], tasks: Sequence[str], scale: Scale, path: Path) -> None:
    """Draw the mean score against trainable parameters, with one standard deviation and the front."""
    every = mean_points(summaries, tasks)
    points = {label: point for label, point in every.items() if point[0] > 0}  # the axis is logarithmic
    figure = _figure(8.4, 4.8)
    axes = figure.add_subplot()
    front = [points[label] for label in pareto_front(every, scale.sign) if label in points]
    if front:
        axes.step(*np.array(front).T, where="post", color="#999999", linewidth=1, zorder=0)
    styles = method_styles(summaries)
    for i, label in enumerate(points):
        means = summaries[label].seed_means(tasks)
        error = spread(means) if len(means) > 1 else 0.0
        marker, color = MARKERS[i % len(MARKERS)], styles[label]["color"]
        axes.errorbar(*points[label], error, fmt=marker, color=color, label=label, capsize=2)
    axes.set(
        xscale="log",
        xlabel="trainable parameters (without the head)",
        ylabel="mean score" + (f" over {len(tasks)} tasks" if len(tasks) > 1 else ""),
    )
    _format(axes, scale)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def differences(
    summaries: Mapping[str, Summary], tasks: Sequence[str], reference: str, scale: Scale, path: Path
) -> None:
    """Draw every method's paired difference to the reference with its interval, the best at the top."""
    found = {
        label: difference_to(summaries, label, reference, tasks, scale) for label in summaries if label != reference
    }
    known = sorted(((d, label) for label, d in found.items() if d is not None), key=lambda pair: pair[0].mean)
    figure = _figure(7.4, 1.2 + 0.3 * len(known))
    axes = figure.add_subplot()
    factor = 100 if scale.higher_is_better else 1
    for i, (difference, _) in enumerate(known):
        axes.plot([factor * difference.low, factor * difference.high], [i, i], color="#3b6fb6", linewidth=2)
        axes.plot(factor * difference.mean, i, "o", color="#3b6fb6")
    axes.axvline(0, color="#888888", linewidth=1)
    axes.set_yticks(range(len(known)), [label for _, label in known])
    axes.set_xlabel(f"difference to {reference}, right is better, 95% interval")
    _save(figure, path)


def curves(summaries: Mapping[str, Summary], tasks: Sequence[str], quantity: str, title: str, path: Path) -> bool:
    """Draw one quantity of the histories against the step, a panel a task, mean over seeds; False if none has it."""
    drawn = False
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = _figure(4.6 * columns + 1.5, 3.4 * rows)
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    styles = method_styles(summaries)
    for axes, task in zip(panels, tasks):
        for label, summary in by_size(summaries):
            steps, values = mean_curve([run.history for run in summary.runs if run.task == task], quantity)
            if steps:
                axes.plot(steps, values, **styles[label], linewidth=1.5, label=label)
                drawn = True
        axes.set(title=task, xlabel="step", ylabel=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    if drawn:
        lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels())}
        figure.legend(lines.values(), lines, frameon=False, fontsize=7, loc="outside right center")
        _save(figure, path)
    return drawn


def mean_curve(
    histories: Sequence[Sequence[Mapping[str, float]]],
    quantity: str,
    mean: Callable[[Sequence[float]], float] = statistics.fmean,
) -> tuple[list[float], list[float]]:
    """Steps, and the mean over the histories at each."""
    at: dict[float, list[float]] = {}
    for history in histories:
        for row in history:
            if quantity in row:
                at.setdefault(row["step"], []).append(row[quantity])
    return sorted(at), [mean(at[step]) for step in sorted(at)]


def _format(axes: Axes, scale: Scale) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: scale.show(value)))
