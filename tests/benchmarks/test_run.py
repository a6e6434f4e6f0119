"""A run from the command line to the file: one small case, measured for real."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.results import Results
from benchmarks.run import all_cases, chosen_cases

ROOT = Path(__file__).resolve().parents[2]
CASE = "paths/768x768/128/square K=1/train"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", "run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("bench") / "r.json"
    done = run("--quick", "--repetitions", "3", "--case", CASE, "--out", str(file))
    assert done.returncode == 0, done.stderr
    assert "### Paths of SoKA's product" in done.stdout
    return file


def test_the_file_has_every_raw_time_and_the_bytes(file: Path) -> None:
    results = Results.load(file)
    assert list(results.cases) == [CASE] and results.header["setting"]["threads"] == 1
    assert results.cases[CASE]["base"]["wall_s"] and not results.cases[CASE]["base"].get("chosen")
    paths = {name: record for name, record in results.cases[CASE].items() if name != "base"}
    assert sum(record["chosen"] for record in paths.values()) == 1
    for record in paths.values():
        assert len(record["wall_s"]) == len(record["cpu_s"]) == 3
        assert record["largest_saved"] == 0, "a path keeps more than x and the factors"


def test_another_setting_does_not_mix_into_a_file(file: Path) -> None:
    before = file.read_bytes()
    done = run("--quick", "--repetitions", "4", "--case", CASE, "--out", str(file))
    assert done.returncode == 1 and "another machine, version or setting" in done.stderr
    assert file.read_bytes() == before


def test_an_unknown_case_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"--case 'layers/\*' matches no case"):
        chosen_cases(["layers/*"], quick=False)


def test_names_are_unique_and_quick_is_a_sample() -> None:
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)
    assert 0 < len(chosen_cases([], quick=True)) < len(chosen_cases([], quick=False)) / 4
