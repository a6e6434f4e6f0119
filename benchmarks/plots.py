"""Plots of a results file, from the file alone."""

from __future__ import annotations

from pathlib import Path

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
        axes.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        axes.minorticks_off()
    return figure


def memory(results: Results) -> Figure | None:
    """Bytes that autograd keeps beyond the input and the parameters, at 2048 tokens."""
    shapes = _shapes(results, "layer/*/2048/train")
    if not shapes:
        return None
    figure = _figure(11, 4)
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for axes, shape in zip(panels, shapes, strict=True):
        records = results.cases[f"layer/{shape}/2048/train"]
        labels = [label for label in reversed(records) if "saved_bytes" in records[label]]
        axes.barh(
            [label if axes is panels[0] or True else "" for label in labels],
            [records[label]["saved_bytes"] / 2**20 for label in labels],
            color=[_colour(label) for label in labels],
        )
        axes.set(title=shape, xlabel="MiB saved for backward")
        axes.tick_params(axis="y", labelsize=7)
    return figure


def paths(results: Results) -> Figure | None:
    """Every path's time over the fastest one's, case by case; the cost model's choice is circled."""
    cases = list(path_regrets(results))
    if not cases:
        return None
    figure = _figure(11, 4.2)
    axes: Axes = figure.add_subplot()
    names = [label for label in results.cases[cases[0]] if label != "base"]
    markers = dict(zip(names, "osD^vP", strict=False))
    times = {
        case: {name: results.seconds(case, name).median for name in names if name in results.cases[case]}
        for case in cases
    }
    for name in names:
        axes.plot(
            range(len(cases)),
            [times[case][name] / min(times[case].values()) for case in cases],
            markers[name],
            markersize=4,
            alpha=0.6,
            label=name,
        )
    chosen = [next(name for name in names if results.cases[case][name]["chosen"]) for case in cases]
    regrets = [times[case][name] / min(times[case].values()) for case, name in zip(cases, chosen, strict=True)]
    axes.plot(range(len(cases)), regrets, "o", markersize=8, mfc="none", mec="#222222", label="chosen")
    axes.set(
        title="SoKA's product: every path in every case", xlabel="case", ylabel="time over the fastest", yscale="log"
    )
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
