"""Plots of a results file, from the file alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.results import Results
from benchmarks.tables import path_regrets

COLOURS = {"LSR": "#3b6fb6", "SoKA": "#d1495b", "LoRA": "#6c757d", "LoKr": "#8d6cab", "LyCORIS": "#e9a23b"}
OTHER = "#2a9d8f"


def draw(results: Results, folder: Path) -> list[Path]:
    """Write every plot that the results have the cases for, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in (("layers", layers(results)), ("memory", memory(results)), ("paths", paths(results))):
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=130)
            written.append(folder / f"{name}.png")
    return written


def layers(results: Results) -> Figure | None:
    """Time of forward and backward over the frozen layer's: one panel a shape, one group a number of tokens."""
    shapes = _shapes(results, "layer/*/128/train")
    if not shapes:
        return None
    figure = _figure(11, 2.6 * len(shapes))
    for axes, shape in zip(figure.subplots(len(shapes), 1, squeeze=False)[:, 0], shapes, strict=True):
        cases = [f"layer/{shape}/{tokens}/train" for tokens in (1, 128, 2048)]
        cases = [case for case in cases if case in results.cases]
        labels = [label for label in results.cases[cases[0]] if label != "base"]
        width = 0.8 / len(cases)
        for i, case in enumerate(cases):
            ratios = [results.ratio(case, label, "base") for label in labels]
            low = [r.median - r.p20 for r in ratios]
            high = [r.p80 - r.median for r in ratios]
            places = [x + (i - (len(cases) - 1) / 2) * width for x in range(len(labels))]
            bars = axes.bar(places, [r.median for r in ratios], width, color=[_colour(label) for label in labels])
            axes.errorbar(places, [r.median for r in ratios], [low, high], fmt="none", ecolor="#222222", linewidth=0.8)
            for bar in bars:
                bar.set_alpha((0.4, 0.7, 1.0)[i])
        axes.axhline(1, color="#222222", linewidth=0.8)
        axes.set_xticks(range(len(labels)), [label.replace(" ", "\n", 1) for label in labels], fontsize=7)
        axes.set(title=f"{shape}: 1, 128, 2048 tokens, light to dark", ylabel="time over base", yscale="log")
        top = axes.get_ylim()[1]
        ticks = [tick for tick in (1, 2, 4, 8, 16, 32, 64) if tick < top]
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    return figure


def memory(results: Results) -> Figure | None:
    """Bytes that autograd keeps beyond the input and the parameters, at 2048 tokens."""
    shapes = _shapes(results, "layer/*/2048/train")
    if not shapes:
        return None
    figure = _figure(11, 4)
    saved = {shape: _saved_mib(results.cases[f"layer/{shape}/2048/train"]) for shape in shapes}
    # One row a contender; the LoRA beside SoKA's longest sum has another rank in every shape.
    rows = [_common(sorted(set(labels))) for labels in zip(*saved.values(), strict=True)]
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for axes, shape in zip(panels, shapes, strict=True):
        axes.barh(range(len(rows)), list(saved[shape].values()), color=[_colour(label) for label in saved[shape]])
        axes.set(title=shape, xlabel="MiB saved for backward")
    panels[0].set_yticks(range(len(rows)), rows, fontsize=7)
    panels[0].invert_yaxis()
    return figure


def _common(labels: Sequence[str]) -> str:
    """LoRA r=15, LoRA r=16, LoRA r=17 -> LoRA r=15 to 17."""
    return labels[0] if len(labels) == 1 else f"{labels[0]} to {labels[-1].rpartition('=')[2]}"


def _saved_mib(records: Mapping[str, Any]) -> dict[str, float]:
    return {
        label: record["saved_bytes"] / 2**20
        for label, record in records.items()
        if label != "base" and "saved_bytes" in record
    }


def paths(results: Results) -> Figure | None:
    """Every path's time over the fastest one's, case by case; the cost model's choice is circled."""
    cases = list(path_regrets(results))
    if not cases:
        return None
    figure = _figure(11, 4.2)
    axes: Axes = figure.add_subplot()
    names = list(dict.fromkeys(label for case in cases for label in results.cases[case] if label != "base"))
    markers = dict(zip(names, "osD^vP", strict=False))
    times = {
        case: {name: results.seconds(case, name).median for name in names if name in results.cases[case]}
        for case in cases
    }
    for name in names:
        taken = [i for i, case in enumerate(cases) if name in times[case]]
        axes.plot(
            taken,
            [times[cases[i]][name] / min(times[cases[i]].values()) for i in taken],
            markers[name],
            markersize=4,
            alpha=0.6,
            label=name,
        )
    chosen = [next(name for name in times[case] if results.cases[case][name]["chosen"]) for case in cases]
    regrets = [times[case][name] / min(times[case].values()) for case, name in zip(cases, chosen, strict=True)]
    axes.plot(range(len(cases)), regrets, "o", markersize=8, mfc="none", mec="#222222", label="chosen")
    axes.set(
        title="SoKA's product: every path in every case",
        xlabel="from few tokens to many",
        ylabel="time over the fastest",
        yscale="log",
    )
    shapes = [case.split("/")[1] for case in cases]
    first = {shape: shapes.index(shape) for shape in dict.fromkeys(shapes)}
    for start in first.values():
        axes.axvline(start - 0.5, color="#cccccc", linewidth=0.8, zorder=0)
    axes.set_xticks(list(first.values()), [f"{shape} ..." for shape in first], ha="left")
    axes.legend(frameon=False, ncols=len(names) + 1)
    return figure


def _shapes(results: Results, pattern: str) -> list[str]:
    wide = [case for case in results.matching(pattern) if len(results.cases[case]) > 4]
    return list(dict.fromkeys(case.split("/")[1] for case in wide))


def _colour(label: str) -> str:
    return next((colour for name, colour in COLOURS.items() if label.startswith(name)), OTHER)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    return figure
