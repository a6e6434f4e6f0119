"""The spectrum report: KPSVD spectra of a model's weights on one page, drawn from its JSON alone."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from .html import heading, paragraph, table, write_page
from .plots import COLORS
from .words import range_text, short_names

Layer = dict[str, Any]
#: Terms at which energies are compared: LoRA's usual rank.
AT = 8


def write_spectrum_page(path: Path, report: dict[str, Any], model: str) -> None:
    """Write the report as one HTML file with everything inside it.

    Args:
        path: the file; written whole or not at all.
        report: what krontune.plan.spectrum_report returned.
        model: the model's name, for the title.
    """
    main, at = main_layers(report), compared_terms(report)
    sections = [
        paragraph(introduction(report)),
        table(*kind_table(report)),
        heading("Chosen rank, layer by layer"),
        _picture(_draw_heat_map, main, "Heat map of the chosen rank: layers across, kinds of module down"),
        heading("Spectra"),
        paragraph(
            "Singular values of the rearranged weight over its norm; one line a layer, dark to light from the first to "
            "the last. Dashed: the noise edge, above which a value is more than noise of that size would give."
        ),
        _picture(_draw_spectra, main, "Singular values against the term's number, one panel a kind of module"),
        heading("Cumulative energy"),
        paragraph(
            f"The share of the weight's energy that the first k terms hold. Dashed: the threshold "
            f"{report['settings']['theta']:g}. Dots: elbows, filled where strong enough to be accepted."
        ),
        _picture(_draw_energy, main, "Cumulative energy against the number of terms, one panel a kind of module"),
    ]
    if len(report["shapes"]) > 1:
        sections += [
            heading("Energy per parameter against the factor shape"),
            paragraph(
                f"What {at} terms hold, for every million parameters they take, mean over the layers; p = 1 is "
                "the plain SVD, a LoRA's shape. Energy is not quality: it says how well the start resembles the weight."
            ),
            _picture(_draw_shapes, unsorted_layers(report), "Energy per parameter against p, a line a kind of module"),
        ]
    if report["channel_sort"]:
        sections += [
            heading(f"Channel sort ({report['channel_sort']})"),
            paragraph(
                f"The share of the energy that {at} terms hold, before and after sorting the channels, by layer."
            ),
            table(*sort_table(report)),
            _picture(
                _draw_sorting, report, f"Energy of {at} terms before and after sorting, one panel a kind of module"
            ),
        ]
    write_page(path, f"Spectra of {model}", sections)


def main_layers(report: dict[str, Any]) -> list[Layer]:
    """The layers of the first factor shape, channels as they are: what ranks were chosen for."""
    return [layer for layer in unsorted_layers(report) if layer["label"] == report["shapes"][0]]


def unsorted_layers(report: dict[str, Any]) -> list[Layer]:
    """The layers with their channels as they are, all factor shapes."""
    return [layer for layer in report["layers"] if layer["channel_sort"] is None]


def kind_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]], list[bool]]:
    """Header, rows and which columns are numbers: one row a kind of module, for the first factor shape.

    >>> layer = {"name": "h.0.q", "kind": "h.*.q", "label": "p=4", "shape": [2, 4, 4, 2], "channel_sort": None,
    ...          "energy": 5.0,
    ...          "sigma": [2.0, 1.0], "energy_rank": None, "elbow_rank": 2, "elbow_strength": 0.2, "above_noise": 1,
    ...          "rank": 2}
    >>> header, rows, numeric = kind_table({"shapes": ["p=4"], "channel_sort": None, "layers": [layer]})
    >>> dict(zip(header, rows[0]))["energy rank"], dict(zip(header, rows[0]))["energy at 2"]
    ('not reached', '100.0%')
    """
    at = compared_terms(report)
    header = ["module", "factors", f"energy at {at}", "energy rank", "elbow (strength)", "above noise", "rank"]
    rows, groups = [], _by_kind(main_layers(report))
    names = short_names(groups)
    for kind, layers in groups.items():
        m1, n1, m2, n2 = layers[0]["shape"]
        row = [
            names[kind],
            f"{m1}x{n1}\N{NO-BREAK SPACE}(x)\N{NO-BREAK SPACE}{m2}x{n2}",
            f"{statistics.mean(share(layer, at) for layer in layers):.1%}",
            _reached(layers),
            _elbow(layers),
            range_text([layer["above_noise"] for layer in layers]),
            range_text([layer["rank"] for layer in layers]),
        ]
        rows.append(row)
    return header, rows, [False, False, *[True] * (len(header) - 2)]


def sort_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]], list[bool]]:
    """What sorting the channels gains, for the first factor shape: header, rows and which columns are numbers."""
    after, rows, at = _sorted_shares(report), [], compared_terms(report)
    groups = _by_kind(main_layers(report))
    names = short_names(groups)
    for kind, layers in groups.items():
        before = [share(layer, at) for layer in layers]
        gains = [100 * (after[layer["name"]] - b) for layer, b in zip(layers, before, strict=True)]
        mean = statistics.mean(after[layer["name"]] for layer in layers)
        each = f"{min(gains):+.1f} to {max(gains):+.1f}"
        rows.append([names[kind], f"{statistics.mean(before):.1%}", f"{mean:.1%}", each])
    return ["module", f"energy at {at}", "sorted", "gain by layer, points"], rows, [False, True, True, True]


def compared_terms(report: dict[str, Any]) -> int:
    """The number of terms at which energies are compared: AT, or all that were computed where they are fewer."""
    return min(AT, max((len(layer["sigma"]) for layer in main_layers(report)), default=AT))


def share(layer: Layer, k: int) -> float:
    """The share of the energy that the first k terms hold."""
    total = sum(s * s for s in layer["sigma"][:k])
    return total / layer["energy"] if layer["energy"] else 0.0


def introduction(report: dict[str, Any]) -> str:
    """What was looked at, which rule was used, and how often it found something."""
    settings, main = report["settings"], main_layers(report)
    reached = sum(layer["energy_rank"] is not None for layer in main)
    rule = {
        "energy": f"the least rank that holds {settings['theta']:.0%} of the energy",
        "elbow": "the elbow of the spectrum",
        "spectrum": f"the smaller of the rank that holds {settings['theta']:.0%} of the energy and the elbow",
        "budget": f"the largest share of all energies that {settings['budget'] or 0:,} parameters pay for",
    }[settings["rule"]]
    return (
        f"{len(main)} weights, factor shape {report['shapes'][0]}, the first {settings['terms']} terms of each. "
        f"Rule: {rule}. The threshold of {settings['theta']:.0%} is reached by {reached} of {len(main)} weights, and "
        f"{sum(_accepted(layer) for layer in main)} have an elbow strong enough to be accepted; where neither "
        "holds, the rank is the largest allowed. Weights of trained transformers are usually nearly flat in this view."
    )


# ------------------------------------------------------------------------------------------------------- pictures


def _draw_heat_map(figure: Figure, main: list[Layer]) -> None:
    kinds = list(_by_kind(main))
    indices = sorted({layer["layer"] or 0 for layer in main})
    grid = np.full((len(kinds), len(indices)), np.nan)
    for layer in main:
        grid[kinds.index(layer["kind"]), indices.index(layer["layer"] or 0)] = layer["rank"]
    figure.set_size_inches(max(6.0, 0.34 * len(indices) + 2.2), max(1.8, 0.42 * len(kinds) + 1.2))
    axes = figure.add_subplot()
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=1)
    axes.set_yticks(range(len(kinds)), list(short_names(kinds).values()))
    step = max(1, len(indices) // 16)
    axes.set_xticks(range(0, len(indices), step), [str(i) for i in indices[::step]])
    axes.set(xlabel="layer")
    if grid.size <= 400:
        middle = (1 + float(np.nanmax(grid))) / 2
        for (y, x), rank in np.ndenumerate(grid):
            if not np.isnan(rank):
                axes.text(
                    x, y, f"{rank:.0f}", ha="center", va="center", fontsize=7, color="w" if rank < middle else "k"
                )
    figure.colorbar(image, ax=axes, label="rank", fraction=0.03, pad=0.02)


def _draw_spectra(figure: Figure, main: list[Layer]) -> None:
    def draw(axes: Axes, layers: list[Layer]) -> None:
        for layer, color in zip(layers, _depth_colors(len(layers))):
            norm = layer["energy"] ** 0.5 or 1.0
            axes.plot(range(1, len(layer["sigma"]) + 1), np.array(layer["sigma"]) / norm, color=color, linewidth=1)
        edge = statistics.median(layer["noise_edge"] / (layer["energy"] ** 0.5 or 1.0) for layer in layers)
        axes.axhline(edge, color="#555555", linestyle="--", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))

    _panels(figure, main, draw, "term k", "sigma_k / ||W||")


def _draw_energy(figure: Figure, main: list[Layer]) -> None:
    def draw(axes: Axes, layers: list[Layer]) -> None:
        for layer, color in zip(layers, _depth_colors(len(layers))):
            energy = np.cumsum(np.square(layer["sigma"])) / (layer["energy"] or 1.0)
            axes.plot(range(1, len(energy) + 1), energy, color=color, linewidth=1)
            k = layer["elbow_rank"]
            face = color if _accepted(layer) else "none"
            axes.plot(k, energy[k - 1], "o", markersize=4, markeredgecolor=color, markerfacecolor=face)
        axes.axhline(layers[0]["theta"], color="#d1495b", linestyle="--", linewidth=1)
        axes.set(ylim=(0, 1.02))

    _panels(figure, main, draw, "terms k", "share of the energy")


def _draw_shapes(figure: Figure, layers: list[Layer]) -> None:
    figure.set_size_inches(7.0, 4.2)
    axes = figure.add_subplot()
    labels: list[str] = []
    groups = _by_kind(layers)
    names_of = short_names(groups)
    for (kind, members), color in zip(groups.items(), _kind_colors(len(groups))):
        points: dict[float, list[float]] = {}
        for layer in members:
            k = min(AT, len(layer["sigma"]))
            value = 1e6 * share(layer, k) / (k * layer["n_params_per_term"])
            points.setdefault(_place(layer), []).append(value)
        family = sorted(p for p in points if p != float("inf"))
        means = [statistics.mean(points[p]) for p in family]
        axes.plot([np.log2(p) for p in family], means, "o-", color=color, markersize=4, label=names_of[kind])
        labels = [f"{p:g}" for p in family] if len(family) > len(labels) else labels
        if float("inf") in points:
            axes.plot(_other_place(layers), statistics.mean(points[float("inf")]), "s", color=color, markersize=5)
    ticks, names = [float(np.log2(float(p))) for p in labels], labels
    others = sorted({layer["label"] for layer in layers if _place(layer) == float("inf")})
    if others:
        ticks, names = [*ticks, _other_place(layers)], [*names, " / ".join(others)]
    axes.set_xticks(ticks, names)
    axes.set(xlabel="p", ylabel="share of the energy per million parameters", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_sorting(figure: Figure, report: dict[str, Any]) -> None:
    after, at = _sorted_shares(report), compared_terms(report)

    def draw(axes: Axes, layers: list[Layer]) -> None:
        x = [layer["layer"] or 0 for layer in layers]
        axes.plot(x, [share(layer, at) for layer in layers], "o-", color=COLORS[0], markersize=3, label="as they are")
        axes.plot(x, [after[layer["name"]] for layer in layers], "o-", color=COLORS[1], markersize=3, label="sorted")
        axes.set(ylim=(0, None))

    _panels(figure, main_layers(report), draw, "layer", f"energy of {at} terms")
    figure.axes[0].legend(frameon=False, fontsize=8)


def _panels(
    figure: Figure, layers: list[Layer], draw: Callable[[Axes, list[Layer]], None], xlabel: str, ylabel: str
) -> None:
    """One small plot a kind of module, all with the same axes."""
    groups = _by_kind(layers)
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    figure.set_size_inches(max(4.0, 2.7 * columns), 2.3 * rows + 0.4)
    names = short_names(groups)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, (kind, members) in zip(panels.flat, groups.items()):
        draw(axes, members)
        axes.set_title(names[kind], fontsize=9)
    for axes in list(panels.flat)[len(groups) :]:
        axes.set_visible(False)
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(ylabel, fontsize=9)


def _picture(draw: Callable[[Figure, Any], None], data: Any, alt: str) -> str:
    """What `draw` puts on a figure, as an img element with the picture inside."""
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed, and no global pyplot state is touched
    draw(figure, data)
    for axes in figure.axes:
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_fontsize(9)
        axes.yaxis.label.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{escape(alt, quote=True)}" src="data:image/png;base64,{encoded}">'


# ---------------------------------------------------------------------------------------------------------- words


def _by_kind(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer["kind"], []).append(layer)
    return groups


def _sorted_shares(report: dict[str, Any]) -> dict[str, float]:
    """{module: energy of the compared terms with sorted channels}, for the first factor shape."""
    label, at = report["shapes"][0], compared_terms(report)
    return {x["name"]: share(x, at) for x in report["layers"] if x["channel_sort"] and x["label"] == label}


def _accepted(layer: Layer) -> bool:
    return layer["elbow_strength"] >= layer.get("elbow_accepted", 0.4)


def _reached(layers: list[Layer]) -> str:
    ranks = [layer["energy_rank"] for layer in layers if layer["energy_rank"] is not None]
    if not ranks:
        return "not reached"
    missing = len(layers) - len(ranks)
    return range_text(ranks) + (f" (not reached in {missing})" if missing else "")


def _elbow(layers: list[Layer]) -> str:
    strengths = [layer["elbow_strength"] for layer in layers]
    low, high = f"{min(strengths):.2f}", f"{max(strengths):.2f}"
    return f"{range_text([x['elbow_rank'] for x in layers])} ({low if low == high else f'{low}-{high}'})"


def _depth_colors(n: int) -> list[Any]:
    return [colormaps["viridis"](0.9 * i / max(n - 1, 1)) for i in range(n)]


def _kind_colors(n: int) -> list[Any]:
    return [COLORS[i] if n <= len(COLORS) else colormaps["tab10"](i % 10) for i in range(n)]


def _place(layer: Layer) -> float:
    """p of a shape of the family; infinity for one that was asked for in another way."""
    named = layer["label"] == "auto" or layer["label"].startswith("p=")
    return float(layer["p"]) if named else float("inf")


def _other_place(layers: list[Layer]) -> float:
    """Where shapes outside the family stand on the axis of log2 p: one step after the largest p."""
    family = [_place(layer) for layer in layers if _place(layer) != float("inf")]
    return float(np.log2(max(family))) + 1 if family else 0.0
