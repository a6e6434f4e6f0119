"""Runs in parallel processes. One hands them out and writes the records; killing any of them loses no record."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from krontune.errors import ConfigError
from krontune.recipes.runs import environment, locked
from krontune.recipes.yaml_files import dump_yaml
from krontune.report.compared import ComparedRun, Journal
from krontune.report.files import write_json, write_text

from .grid import Grid, RunSpec, resolve_methods
from .schedule import due, planned

JOURNAL = "runs.jsonl"


def _nothing() -> None:
    pass


class Worker:
    """A process that does one run at a time. It ends when the process that started it does."""

    def __init__(self, grid: Grid, threads: int, prepare: Callable[[], None]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit the locks of torch's threads
        self.connection, theirs = context.Pipe()
        raw_grid = grid.model_dump(mode="json")
        self.process = context.Process(target=_serve, args=(theirs, raw_grid, threads, prepare), daemon=True)
        self.process.start()
        theirs.close()
        self.spec: RunSpec | None = None

    def start(self, spec: RunSpec) -> None:
        """Hand it a run."""
        self.spec = spec
        self.connection.send(spec)

    def result(self) -> ComparedRun:
        """The record of its run.

        Raises:
            EOFError, OSError: the process has ended without one.
            ConfigError: the task or its model could not be loaded.
        """
        record: ComparedRun | ConfigError = self.connection.recv()
        self.spec = None
        if isinstance(record, ConfigError):
            raise record
        return record

    def stop(self) -> None:
        """End it, in the middle of a run if need be."""
        self.connection.close()  # an idle one ends by itself
        if self.spec:
            self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def compare(
    grid: Grid,
    output: Path,
    *,
    jobs: int | None = None,
    minutes: float | None = None,
    retry: bool = False,
    on_run: Callable[[ComparedRun, int], None] = lambda run, left: None,
    prepare: Callable[[], None] = _nothing,
) -> list[ComparedRun]:
    """Do every run of the grid that OUTPUT/runs.jsonl does not hold yet, and return all the grid's records.

    Args:
        grid: the comparison.
        output: its folder; a run that is recorded there is never done again, one that was cut short is.
        jobs: processes; the number of cores if None. The cores are shared out among them.
        minutes: start no run after so many; go on with the same command.
        retry: forget the runs that failed, and try them again.
        on_run: called with every new record, and the number of runs known to be due after it.
        prepare: called first in every process, before the libraries are imported; a function that can be pickled.

    Raises:
        ConfigError: settings that do not fit, a folder in use, or a process that died twice on one run.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = jobs or cores
    journal = Journal(output / JOURNAL)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output, "comparison"):
        journal.repair()
        if retry:
            journal.drop_failed()
        methods = resolve_methods(grid)
        write_text(output / "grid.yaml", dump_yaml(grid.model_dump(mode="json")))
        write_json(output / "environment.json", environment())
        records = {run.key: run for run in journal.read()}
        give_up = time.monotonic() + 60 * minutes if minutes is not None else float("inf")

        left = due(grid, methods, records)

        def next_specs() -> list[RunSpec]:
            return left if time.monotonic() < give_up else []

        def make_worker() -> Worker:
            return Worker(grid, max(1, cores // jobs), prepare)

        for run in _results(make_worker, jobs, next_specs):
            journal.append(run)
            records[run.key] = run
            left = due(grid, methods, records)
            on_run(run, len(left))
    return [records[key] for key in planned(grid, methods, records) if key in records]


def labels(grid: Grid, output: Path) -> dict[str, str]:
    """The method's label of every run that the grid asks for, by the run's key. OUTPUT may hold runs of other grids.

    Raises:
        ConfigError: settings that do not fit.
        CheckpointError: damaged records.
    """
    records = {run.key: run for run in Journal(output / JOURNAL).read()}
    return {key: spec.method.label for key, spec in planned(grid, resolve_methods(grid), records).items()}


def _results(
    make_worker: Callable[[], Worker], jobs: int, next_specs: Callable[[], list[RunSpec]]
) -> Iterator[ComparedRun]:
    """Records as they come, until nothing is due and nothing is under way."""
    workers: list[Worker] = []
    deaths: dict[str, int] = {}
    try:
        while True:
            busy = {worker.spec.key for worker in workers if worker.spec}
            waiting = [spec for spec in next_specs() if spec.key not in busy]
            idle = [worker for worker in workers if not worker.spec]
            while len(idle) < len(waiting) and len(workers) < jobs:
                workers.append(make_worker())
                idle.append(workers[-1])
            for worker, spec in zip(idle, waiting):
                worker.start(spec)
            active = {worker.connection: worker for worker in workers if worker.spec}
            if not active:
                return
            for connection in wait(list(active)):
                worker = active[connection]  # type: ignore[index]
                try:
                    yield worker.result()
                except (EOFError, OSError):
                    workers.remove(worker)
                    _note_death(worker, deaths)
    finally:
        for worker in workers:
            worker.stop()


def _note_death(worker: Worker, deaths: dict[str, int]) -> None:
    worker.stop()
    spec = worker.spec
    if spec is None:
        return
    deaths[spec.key] = deaths.get(spec.key, 0) + 1
    if deaths[spec.key] > 1:
        raise ConfigError(
            f"the process of {spec.method.label} on {spec.task} ended twice without a record (exit code "
            f"{worker.process.exitcode}); most often it ran out of memory. Use fewer --jobs or a smaller batch_size."
        )


def _serve(connection: Connection, raw_grid: dict[str, Any], threads: int, prepare: Callable[[], None]) -> None:
    """The worker's side: a task's data is encoded once, and every run starts from a copy of the loaded model."""
    prepare()
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    import transformers

    from krontune.recipes.problems import Problem

    from .training import load_problem, run

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    grid = Grid.from_mapping(raw_grid)
    problems: dict[str, Problem] = {}
    while True:
        try:
            spec: RunSpec = connection.recv()
        except EOFError:
            return
        try:
            if spec.task not in problems:
                problems[spec.task] = load_problem(grid, spec.task)
        except ConfigError as error:
            connection.send(error)
            continue
        connection.send(run(spec, problems[spec.task]))


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
