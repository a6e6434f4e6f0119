"""Markdown tables of a results file, from the file alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.results import Results, Spread
from benchmarks.targets import LLAMA2_7B, Target, energy_shares, figures, path_regrets


def all_tables(results: Results) -> str:
    """Everything the file holds."""
    parts = [
        _section("Measured on", describe(results)),
        _section("Figures to reach", target_table(results)),
        _section("A layer in eval mode, forward", layer_table(results, "eval")),
        _section("A layer in training, forward and backward", layer_table(results, "train")),
        _section("Memory of a layer's training", memory_table(results)),
        _section("Starts", start_table(results)),
        _section("Energy of the fast KPSVD over the exact one, 16 terms", energy_table(results)),
        _section("Training steps", training_table(results)),
        _section("Paths of SoKA's product", path_table(results)),
    ]
    return "\n".join(part for part in parts if part)


def describe(results: Results) -> str:
    """Machine, versions and setting in a sentence or two."""
    machine, versions, setting = (results.header[key] for key in ("machine", "versions", "setting"))
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores, {machine.get('vectors', '')}"
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    clock = {
        "cpu_s": "the process's own time, which on one thread is what a clock on the wall shows when nothing else runs",
        "wall_s": "by a clock on the wall",
    }[results.clock]
    return (
        f"{where}; {setting['threads']} thread(s), {setting['dtype']}. {packages}.\n"
        f"Times are {clock}: medians of at least {setting['repetitions']} interleaved rounds (of 3 for "
        "a path of SoKA's product that was dropped as hopeless); "
        "a ratio is the median over the rounds of the ratio within a round, with its 20th and 80th percentile.\n"
    )


def target_table(results: Results) -> str:
    """The figures to reach with the measured column."""
    rows = [
        [target.text, _limit(target), _measured(target, figure), target.note] for target, figure in figures(results)
    ]
    return markdown(
        ["case (time ratios; forward and backward unless said)", "to reach", "measured", "limit"], rows, "lrrl"
    )


def layer_table(results: Results, mode: str) -> str:
    """Every shape and number of tokens: the base's time, and the others' over it."""
    cases = list(results.matching(f"layer/*/{mode}"))
    common = _labels(results, cases)
    rows = []
    for case in cases:
        _, shape, tokens, _ = case.split("/")
        cells = [_ratio(results.ratio(case, label, "base")) if results.has(case, label) else "" for label in common]
        rows.append([shape, tokens, f"{results.seconds(case, 'base').median * 1e3:.3g} ms", *cells])
    return markdown(["out x in", "tokens", "base", *common], rows)


def memory_table(results: Results) -> str:
    """Bytes saved for backward beyond the input and the parameters, and the peak of one forward and backward."""
    cases = list(results.matching("layer/*/2048/train"))
    base = {case: results.cases[case]["base"]["peak_bytes"] for case in cases}

    def cell(case: str, label: str) -> str:
        record = results.cases[case].get(label, {})
        if "saved_bytes" not in record:
            return ""
        return f"{record['saved_bytes'] / 2**20:.2f} / {(record['peak_bytes'] - base[case]) / 2**20:+.1f}"

    rows = [["the frozen layer alone", *(f"{base[case] / 2**20:.1f}" for case in cases)]] if cases else []
    rows += [[label, *(cell(case, label) for case in cases)] for label in _labels(results, cases)]
    return markdown(["2048 tokens; MiB saved / peak", *(case.split("/")[1] for case in cases)], rows)


def start_table(results: Results) -> str:
    """Seconds of every start, for each shape and for LLaMA2-7B's 224 matrices."""
    cases = list(results.matching("start/*"))
    labels = _labels(results, cases, without="")
    rows = []
    for label in labels:
        medians = [results.seconds(case, label).median for case in cases]
        counts = [LLAMA2_7B.get(_sizes(case), 0) for case in cases]
        total = f"{sum(c * t for c, t in zip(counts, medians, strict=True)):.0f} s" if all(counts) else ""
        rows.append([label, *(f"{t:.2f} s" for t in medians), total])
    return markdown(["r = 16", *(case.split("/")[1] for case in cases), "224 matrices"], rows)


def energy_table(results: Results) -> str:
    """Mean and least share of the exact energy."""
    rows = [
        [case.split("/", 1)[1], str(len(shares)), f"{sum(shares) / len(shares):.4f}", f"{min(shares):.4f}"]
        for case, shares in energy_shares(results).items()
    ]
    return markdown(["weights, factors", "matrices", "mean", "least"], rows)


def training_table(results: Results) -> str:
    """A step's time and memory for each method."""
    rows = []
    for case in results.matching("training/*"):
        for label, record in results.cases[case].items():
            held, peak = record["held_bytes"], record["peak_bytes"]
            time = results.seconds(case, label)
            row = [case.split("/", 1)[1], label, f"{record['n_params']:,}", f"{time.median:.2f} s"]
            row += [f"{time.p20:.2f} to {time.p80:.2f}", f"{held / 2**20:.0f} MiB", f"{(held + peak) / 2**20:.0f} MiB"]
            rows.append(row)
    header = ["case", "method", "parameters", "step", "20 to 80 %", "held between steps", "peak"]
    return markdown(header, rows, "ll")


def path_table(results: Results) -> str:
    """For each case the chosen path, the fastest one and the regret: the former's time over the latter's.

    The samples are the chosen path's.
    """
    rows = []
    for case, regret in path_regrets(results).items():
        paths = {label: record for label, record in results.cases[case].items() if "chosen" in record}
        times = {label: results.seconds(case, label).median for label in paths}
        chosen = next(label for label, record in paths.items() if record["chosen"])
        _, shape, tokens, form, mode = case.split("/")
        base = results.seconds(case, "base").median
        best = min(times, key=times.__getitem__)
        rows.append([shape, tokens, form, mode, chosen, best, f"{times[chosen] / base:.2f}", f"{regret:.2f}"])
        rows[-1].append(str(len(paths[chosen]["wall_s"])))
    header = ["out x in", "tokens", "factors", "mode", "chosen", "fastest", "chosen over base", "regret", "samples"]
    return markdown(header, rows, "llllll")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "l") -> str:
    """A table; `align` has one of l and r a column, and r for the rest. Empty without rows."""
    lines = [list(row) for row in rows]
    if not lines:
        return ""
    rule = ["---" if side == "l" else "--:" for side in align.ljust(len(header), "r")]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *lines))


def _section(title: str, body: str) -> str:
    return f"### {title}\n\n{body}" if body else ""


def _limit(target: Target) -> str:
    return f"{'≥' if target.at_least else '≤'} {target.limit:.{target.digits}f}"


def _measured(target: Target, figure: Spread | None) -> str:
    if figure is None:
        return "-"
    text = f"{figure.median:.{target.digits}f}" if figure.p20 == figure.p80 else _ratio(figure)
    if target.reached(figure):
        return f"**{text}**"
    by = abs(figure.median / target.limit - 1)
    return f"{text} (missed by {by:.0%})" if by >= 0.01 else f"{text} (missed by {by:.1%})"


def _ratio(figure: Spread) -> str:
    return f"{figure.median:.2f} ({figure.p20:.2f} to {figure.p80:.2f})"


def _labels(results: Results, cases: Sequence[str], without: str = "base") -> list[str]:
    """Contenders of these cases, each once, in order of appearance."""
    return list(dict.fromkeys(label for case in cases for label in results.cases[case] if label != without))


def _sizes(case: str) -> tuple[int, int]:
    m, n = case.split("/")[1].split("x")
    return int(m), int(n)
