"""Plots of run records as PNG files, drawn from the records alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .files import whole_file
from .records import RunRecord

COLORS = ("#3b6fb6", "#d1495b", "#2a9d8f", "#8d6cab", "#e9a23b", "#6c757d")


def loss_curve(records: Sequence[RunRecord], path: Path, title: str = "training loss") -> None:
    """Draw loss against step, one curve a record: a smoothed line over the logged values."""
    figure = _figure(6.4, 3.8)
    axes = figure.add_subplot()
    for record, color in zip(records, _colors(len(records)), strict=True):
        draw_loss(axes, record, color)
    axes.set(title=title, xlabel="step", ylabel="loss")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    _save(figure, path)


def comparison(records: Sequence[RunRecord], metric: str, path: Path) -> None:
    """Draw three panels side by side: loss curves, trainable parameters, and `metric` before and after."""
    figure = _figure(11.0, 3.8)
    losses, sizes, scores = figure.subplots(1, 3, width_ratios=(1.7, 1, 1.3))
    colors = _colors(len(records))
    for record, color in zip(records, colors, strict=True):
        draw_loss(losses, record, color)
    losses.set(title="training loss", xlabel="step", ylabel="loss")
    losses.legend(frameon=False)
    _bars(sizes, records, [r.n_trainable / 1e6 for r in records], colors, "{:.2f}")
    sizes.set(title="trainable parameters (millions)")
    draw_before_after(scores, records, metric, colors)
    _save(figure, path)


def draw_loss(axes: Axes, record: RunRecord, color: str) -> None:
    """Draw one record's logged losses faintly, their moving average strongly, and its held-out losses as dots."""
    logged = [(row["step"], row["loss"]) for row in record.history if "loss" in row]
    if logged:
        steps, losses = np.array(logged).T
        axes.plot(steps, losses, color=color, alpha=0.25, linewidth=1)
        axes.plot(steps, _smooth(losses), color=color, linewidth=2, label=record.name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    held_out = [(row["step"], row["eval_loss"]) for row in record.history if "eval_loss" in row]
    if held_out:
        axes.plot(*np.array(held_out).T, "o", color=color, markersize=4, label=f"{record.name}, held out")
    axes.set_ylim(bottom=0)


def draw_before_after(axes: Axes, records: Sequence[RunRecord], metric: str, colors: Sequence[str]) -> None:
    """Draw `<metric>_before` as hollow bars and `<metric>_after` as filled ones, in percent."""
    after = [100 * record.scores[f"{metric}_after"] for record in records]
    before = [100 * record.scores[f"{metric}_before"] for record in records]
    _bars(axes, records, after, colors, "{:.0f}")
    axes.bar(range(len(records)), before, color="none", edgecolor="#222222", linewidth=1, linestyle="--")
    axes.set(title=f"{metric.replace('_', ' ')} on unseen items (%)", ylim=(0, 110), yticks=range(0, 101, 25))


def _bars(axes: Axes, records: Sequence[RunRecord], values: list[float], colors: Sequence[str], label: str) -> None:
    bars = axes.bar(range(len(records)), values, color=colors, width=0.65)
    axes.bar_label(bars, labels=[label.format(value) for value in values], padding=2)
    axes.set_xticks(range(len(records)), [record.name for record in records])
    axes.margins(y=0.15)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a tenth of the curve (none below 20 values); its window shrinks at the ends."""
    half = len(values) // 20
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _colors(n: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(n)]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed, and no global pyplot state is touched
    return figure


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=150)
