"""Running cases: set up, time, take the memory, write the results after every case."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, Setting, layer_cases
from benchmarks.measure import Work, interleaved, peak_bytes, saved_bytes
from benchmarks.paths import path_cases
from benchmarks.results import Results, header
from benchmarks.starts import start_cases
from benchmarks.training import training_cases


def all_cases() -> list[Case]:
    """Every case there is."""
    return [*layer_cases(), *path_cases(), *start_cases(), *training_cases()]


def chosen_cases(patterns: Sequence[str], quick: bool) -> list[Case]:
    """The cases that a run makes: those of a full or of a quick run, as far as their names match a pattern.

    Raises:
        ValueError: a pattern matches nothing.
    """
    candidates = [case for case in all_cases() if (case.quick if quick else case.full)]
    for pattern in patterns:
        if not any(fnmatch(case.name, pattern) for case in candidates):
            raise ValueError(f"--case {pattern!r} matches no case. There are: {', '.join(c.name for c in candidates)}")
    return [c for c in candidates if not patterns or any(fnmatch(c.name, pattern) for pattern in patterns)]


def run(setting: Setting, patterns: Sequence[str], out: Path) -> Results:
    """Run the cases and write `out`. Cases that are in the file already are replaced, the others stay.

    Raises:
        ValueError: a pattern matches nothing, or the file was made with another machine, version or setting.
    """
    cases = chosen_cases(patterns, setting.quick)
    torch.set_num_threads(setting.threads)
    results = Results(_header(setting))
    if out.exists():
        before = Results.load(out)
        if before.header != results.header:
            raise ValueError(f"{out} was measured with another machine, version or setting. Give a new --out.")
        results = before
    start = time.perf_counter()
    for number, case in enumerate(cases, 1):
        _say(f"[{number}/{len(cases)}] {time.perf_counter() - start:5.0f} s  {case.name}")
        results.cases[case.name] = measured(case, setting)
        results.save(out)
    _say(f"done in {time.perf_counter() - start:.0f} s: {out}")
    return results


def measured(case: Case, setting: Setting) -> dict[str, dict[str, Any]]:
    """Set a case up, and take times and memory from the same setup."""
    works = case.setup(setting)
    failed = {label: reason for label, work in works.items() if (reason := _failure(work))}
    working = {label: work for label, work in works.items() if label not in failed}
    if case.once:
        records: dict[str, dict[str, Any]] = {label: {} for label in working}
    else:
        steps = {label: work.step for label, work in working.items()}
        rounds = case.rounds(setting)
        options = (setting.device, setting.seed, case.give_up, setting.seconds, case.aside)
        records = interleaved(steps, rounds, *options)
    for label, work in working.items():
        records[label].update(work.facts)
        if case.memory:
            records[label]["peak_bytes"] = peak_bytes(work.step, setting.device)
            if work.forward is not None:
                records[label].update(saved_bytes(work.forward, work.known))
    gc.collect()
    return records | {label: {"failed": reason} for label, reason in failed.items()}


def _failure(work: Work) -> str:
    """Call a contender once; why it does not work here, or "". Rivals may be missing, or not know this machine."""
    try:
        work.step()
    except Exception as error:
        _say(f"  cannot be measured: {type(error).__name__}: {error}")
        return f"{type(error).__name__}: {error}"
    return ""


def _header(setting: Setting) -> dict[str, Any]:
    found = header(asdict(setting))
    found["machine"]["vectors"] = torch.backends.cpu.get_cpu_capability()
    if setting.device == "cuda":
        found["machine"]["gpu"] = torch.cuda.get_device_name()
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
