"""The records of a comparison: one line of JSON a run, appended once, read back whatever was killed."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from krontune.errors import CheckpointError

from .files import write_text
from .json_lines import JsonLines

COMPARED_VERSION = 1


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison.

    `phase` is "tune" (scored on rows set aside from the training split) or "final" (scored on the evaluation split).
    `score` is the metric that counts, as it is; None where the run diverged or failed, and `error` says why.
    `history` has a row every few steps with the mean `loss` and `grad_norm` since the row before, and rows with
    `held_out` where the score was taken on the way.
    """

    key: str  # of everything that decides the result
    phase: str
    task: str
    label: str  # the method, as tables call it
    method: str
    settings: dict[str, Any]
    norms: bool
    seed: int
    learning_rate: float
    metric: str
    higher_is_better: bool
    score: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    n_trainable: int = 0  # the head apart
    adapter_bytes: int = 0
    steps: int = 0
    step_ms: float = 0.0  # median
    wall_s: float = 0.0
    peak_mem_bytes: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    error: str | None = None
    version: int = COMPARED_VERSION


class Journal:
    """The file of a comparison's records. One process writes it, in whole lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = JsonLines(path)

    def read(self) -> list[ComparedRun]:
        """All records, in their order. A last line that a kill cut short is passed over.

        Raises:
            CheckpointError: a line in the middle is damaged, a record is of another version, or occurs twice.
        """
        runs = [self._parse(raw, number) for number, raw in enumerate(self._lines.read(), start=1)]
        keys = [run.key for run in runs]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise CheckpointError(f"{self.path} holds the run {twice} twice.")
        return runs

    def repair(self) -> None:
        """Drop a last line that a kill cut short, so that the next one starts on a line of its own."""
        self._lines.repair()

    def append(self, run: ComparedRun) -> None:
        """Add a record; it is on the disk when this returns."""
        self._lines.append([dataclasses.asdict(run)])

    def drop_failed(self) -> int:
        """Forget the runs that failed, so that they are tried again; how many there were."""
        runs = self.read()
        kept = [run for run in runs if run.error is None]
        write_text(self.path, "".join(json.dumps(dataclasses.asdict(r), ensure_ascii=False) + "\n" for r in kept))
        return len(runs) - len(kept)

    def _parse(self, raw: dict[str, Any], number: int) -> ComparedRun:
        version = raw.get("version")
        if version != COMPARED_VERSION:
            raise CheckpointError(f"{self.path}, line {number}: version {version!r}, not {COMPARED_VERSION}.")
        try:
            return ComparedRun(**raw)
        except TypeError as error:
            raise CheckpointError(f"{self.path}, line {number}: not a record of a run ({error}).") from None
