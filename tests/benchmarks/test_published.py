"""docs/performance.md shows the committed results as they are: its tables are made from the file alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from benchmarks.calibrate import report
from benchmarks.plots import draw
from benchmarks.results import Results
from benchmarks.run import chosen_cases
from benchmarks.tables import (
    describe,
    energy_table,
    layer_table,
    memory_table,
    start_table,
    target_table,
    training_table,
)
from benchmarks.targets import TRAINING, figures, path_regrets, short_choices

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "results" / "performance"
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def results() -> Results:
    return Results.load(FOLDER / "cpu.json")


TABLES = [target_table, memory_table, start_table, energy_table, training_table, describe]
TABLES += [partial(layer_table, mode=mode) for mode in ("train", "eval")]


@pytest.mark.parametrize("table", TABLES)
def test_the_page_shows_the_file(results: Results, table) -> None:
    assert table(results) in PAGE


PROSE = " ".join(PAGE.split())  # without line breaks


def least_and_most(results: Results, cases: str, digits: int, *names: str) -> str:
    """The ratios over the frozen layer of all contenders whose names start so, as the page writes them."""
    found = [
        results.ratio(case, label, "base").median
        for case in results.matching(cases)
        for label in results.cases[case]
        if label in names or label.startswith(tuple(f"{name} " for name in names))
    ]
    low, high = f"{min(found):.{digits}f}", f"{max(found):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def test_the_sentences_on_layers_are_the_files(results: Results) -> None:
    many = partial(least_and_most, results, "layer/*/2048/train", 2)
    assert (
        f"{many('LSR')} times the frozen layer's with LSR, {many('LoRA')} with LoRA, {many('SoKA')} with SoKA" in PROSE
    )
    rebuilt = least_and_most(results, "layer/*/2048/train", 2, "LoKr")
    hooked = [results.ratio(c, "LyCORIS LoKr", "base").median for c in results.matching("layer/*/2048/train")]
    most = max(float(rebuilt.split()[-1]), *hooked)
    assert f"{many('FastKron')} with FastKron and {rebuilt.split()[0]} to {most:.2f} with LoKr" in PROSE
    widest = results.ratio("layer/11008x4096/2048/train", "SoKA square K=16", "base").median
    assert many("SoKA").endswith(f"{widest:.2f}")
    for mode, before in (("eval", "takes"), ("train", "In training it takes")):
        case = f"layer/768x768/1/{mode}"
        one = partial(least_and_most, results, case, 1)
        time = f"{before} {results.seconds(case, 'base').median * 1e3:.3f} ms"
        start = PROSE.index(time)
        said = PROSE[start : start + 230]
        assert f"LSR takes {one('LSR')} times that" in said
        assert f"LoRA {one('LoRA')} and SoKA {one('SoKA')}" in said


def test_the_table_on_the_gpu_is_its_file() -> None:
    gpu = Results.load(FOLDER / "h200.json")
    rivals = {"LSR r=4 s=16": "LoRA r=4", **dict.fromkeys(("SoKA p=4 K=8", "SoKA square K=16", "LoKr"), "LoRA r=8")}
    for label, lora in rivals.items():
        cells = []
        for mode in ("train", "eval"):
            cases = (case for case in gpu.matching(f"layer/*/{mode}") if gpu.has(case, label, lora))
            found = [gpu.ratio(case, label, lora).median for case in cases]
            cells.append(f"{min(found):.1f} to {max(found):.1f}")
        assert f"| {label}, over {lora} | {' | '.join(cells)} |" in PAGE
    assert f"the {len(gpu.cases)} cases" in PROSE


def test_the_sentences_on_what_was_missed_are_the_files(results: Results) -> None:
    missed = {target.text: figure for target, figure in figures(results) if figure and not target.reached(figure)}
    assert [text.split(",")[0] for text in missed] == ["SoKA p=4 K=16", "PEFT LoKr", "training step"]
    wide, lokr, step = missed.values()
    assert (
        f"missed by {wide.median / 1.08 - 1:.1%}: {wide.median:.3f}, between {wide.p20:.2f} and {wide.p80:.2f} in"
        in PROSE
    )
    assert f"and {lokr.median:.2f} was measured" in PROSE
    assert f"takes {step.median:.2f} times LoRA's with SoKA, not 1.10" in PROSE
    start = results.cases[TRAINING]["SoKA p=4 K=8"]["n_params"] / 2**20
    assert f"{2 * start:.1f} MiB in place of {4 * start:.1f}" in PROSE


def test_the_sentences_on_the_cost_model_are_the_files(results: Results) -> None:
    regrets, short = path_regrets(results), short_choices(results)
    bad = sorted((case for case in regrets if regrets[case] > 1.15), key=lambda case: -regrets[case])
    assert set(bad) <= set(short)
    assert f"In {len(bad)} of the {len(regrets)} path cases the chosen path takes more than 1.15 times" in PROSE
    assert all(f"{regrets[case]:.2f} (" in PROSE for case in bad)
    assert (
        f"In {len(short)} of the {len(regrets)} path cases, these {len(bad)} among them, the chosen path has" in PROSE
    )
    line, text = report(results).splitlines()
    assert line.removeprefix('"cpu": Device(').removesuffix("),") in PROSE
    in_force, fitted = (word for word in text.split() if word.startswith("1."))
    assert f"a mean regret of {fitted} against {in_force}" in PROSE


def test_the_file_holds_every_case_of_a_full_run(results: Results) -> None:
    assert {case.name for case in chosen_cases([], quick=False)} == set(results.cases)
    assert results.header["setting"]["threads"] == 1 and not results.header["setting"]["quick"]


def test_every_time_was_taken_twenty_times(results: Results) -> None:
    for name, contenders in results.cases.items():
        if name.startswith("energy/"):
            continue
        for label, record in contenders.items():
            dropped = name.startswith("paths/") and len(record.get("wall_s", ())) == 3  # hopeless: see benchmarks.paths
            assert "failed" in record or dropped or len(record["wall_s"]) >= 20, (name, label)


def test_the_plots_can_be_drawn_again(results: Results, tmp_path: Path) -> None:
    drawn = {path.name for path in draw(results, tmp_path)}
    assert drawn == {"layers.png", "memory.png", "paths.png"}
    assert all(f"images/performance/{name}" in PAGE for name in drawn)
