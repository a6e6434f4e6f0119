"""Tables, figures, plots and the fit of the cost model, from files made here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command_line
from benchmarks.calibrate import fit, mean_regret
from benchmarks.plots import draw
from benchmarks.results import Results, header, spread
from benchmarks.tables import all_tables, target_table
from benchmarks.targets import TARGETS
from krontune.kron import PATHS, KronShape
from krontune.kron.cost import Device, choose_path, path_costs

ROOT = Path(__file__).resolve().parents[2]
SETTING = {"device": "cpu", "dtype": "float32", "threads": 1, "repetitions": 3, "seed": 0, "seconds": 0, "quick": True}


def timed(*seconds: float, **facts: object) -> dict:
    return {"calls": 1, "wall_s": [9 * s for s in seconds], "cpu_s": list(seconds), **facts}


@pytest.fixture
def results() -> Results:
    train = {
        "base": timed(1, 1, 2, peak_bytes=0),
        "LSR r=4 s=16": timed(2, 3, 4, peak_bytes=2**20, saved_bytes=0),
        "LoRA r=4": timed(2, 2, 2, peak_bytes=2**20, saved_bytes=2**19),
        "materialised LSR r=4 s=16": timed(2, 3, 4.4, peak_bytes=2**20, saved_bytes=0),
        "LoKr": timed(4, 4, 4, peak_bytes=2**20, saved_bytes=2**20),
    }
    return Results(header(SETTING), {"layer/768x768/128/train": train, "layer/768x768/2048/train": train})


def test_a_ratio_is_the_median_of_the_rounds_ratios(results: Results) -> None:
    assert results.ratio("layer/768x768/128/train", "LSR r=4 s=16", "base") == spread([2, 3, 2])
    assert results.ratio("layer/768x768/128/train", "LSR r=4 s=16", "base", "wall_s").median == pytest.approx(2)


def test_a_ratio_is_over_the_rounds_that_both_took_part_in() -> None:
    case = {"base": timed(1, 1, 2, 8, 8), "left after three": timed(2, 3, 4)}
    assert Results(header(SETTING), {"c": case}).ratio("c", "left after three", "base") == spread([2, 3, 2])


def test_save_and_load(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path / "r.json")
    again = Results.load(tmp_path / "r.json")
    assert again.cases == results.cases and again.header == results.header
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    raw = json.loads((tmp_path / "r.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps({**raw, "format": 0}))
    with pytest.raises(ValueError, match="has the format 0; this reads 1"):
        Results.load(tmp_path / "r.json")


def test_figures_say_reached_missed_or_nothing(results: Results) -> None:
    lines = target_table(results).splitlines()
    assert lines[2].startswith(
        "| LSR r=4 s=16, 768², 128 tokens, over LoRA r=4 | ≤ 1.05 | 1.50 (1.20 to 1.80) (missed by 43%) | 1.00: LoRA's"
    )
    assert "| ≥ 1.40 | 1.00 (1.00 to 1.06) (missed by 29%) |" in lines[4]
    assert sum("| - |" in line for line in lines) == len(TARGETS) - 2
    faster = results.cases["layer/768x768/128/train"] | {"LSR r=4 s=16": timed(2, 2, 2)}
    better = Results(results.header, {"layer/768x768/128/train": faster})
    assert "| **1.00** |" in target_table(better)


def test_a_figure_is_not_reached_by_rounding() -> None:
    train = {"LSR r=4 s=16": timed(1.052, 1.052), "LoRA r=4": timed(1, 1)}
    table = target_table(Results(header(SETTING), {"layer/768x768/128/train": train}))
    assert "| ≤ 1.05 | 1.05 (missed by 0.2%) |" in table


def test_tables_and_plots_need_the_file_alone(results: Results, tmp_path: Path) -> None:
    tables = all_tables(results)
    assert "| 768x768 | 128 | 1e+03 ms |" in tables and "0.00 / +1.0" in tables
    results.save(tmp_path / "r.json")
    code = (
        "import sys\nfrom benchmarks.__main__ import main\n"
        f"assert main(['table', {str(tmp_path / 'r.json')!r}]) == 0\n"
        "assert 'torch' not in sys.modules and 'krontune' not in sys.modules"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == tables.strip()
    assert {path.name for path in draw(results, tmp_path / "plots")} == {"layers.png", "memory.png"}


def priced_paths(prices: Device) -> Results:
    """A file in which every path takes exactly what the model with these prices says."""
    cases = {}
    for tokens in (1, 64, 512, 4096):
        for shape in (KronShape(192, 4, 4, 192), KronShape(32, 32, 24, 24), KronShape(144, 4, 384, 4)):
            for terms, trained in ((16, 0), (16, 8), (2, 1)):
                costs = path_costs(tokens, shape, terms, trained, prices=prices)
                sizes = {"tokens": tokens, "shape": list(shape), "terms": terms, "trained": trained}
                best = choose_path(tokens, shape, terms, trained, prices=prices)
                cases[f"paths/{shape}/{tokens}/{terms}/{trained}"] = {
                    "base": timed(1e-3, **sizes),
                    **{path: timed(1e-3 + 1e-11 * costs[path], chosen=path == best, **sizes) for path in PATHS},
                }
    return Results(header(SETTING), cases)


def test_the_fit_finds_the_prices_that_made_the_times() -> None:
    prices = Device(gemm=1.0, batched=2.5, touched=7.0, copied=31.0, calls=4e4)
    results = priced_paths(prices)
    assert fit(results) == pytest.approx(prices, rel=1e-3)
    assert mean_regret(results, prices) == 1.0
    assert mean_regret(results, Device(gemm=1.0, batched=0.0, touched=0.0, copied=0.0, calls=0.0)) > 1.0


def test_bad_command_lines(tmp_path: Path, results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["table", str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err
    results.save(tmp_path / "r.json")
    assert command_line.main(["calibrate", str(tmp_path / "r.json")]) == 1
    assert "no case called paths/*" in capsys.readouterr().err
