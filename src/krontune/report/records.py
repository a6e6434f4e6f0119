"""One record a run: everything that tables, plots and reports are made from."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from krontune.errors import CheckpointError

from .files import write_json

RECORD_VERSION = 1


@dataclass(frozen=True)
class RunRecord:
    """What one training run was, what it cost and what came out.

    `scores` maps a metric's name to its value: shares in [0, 1], by convention `<metric>_before` and `<metric>_after`,
    and held-out losses, whose names end in `loss`;
    `history` is the run's log, one mapping a logged step, with at least `step` and `loss`.
    """

    name: str  # what tables and legends call it
    method: str  # lsr, soka, lora, ...
    settings: dict[str, Any]  # the method's own settings, as resolved
    model: str
    seed: int
    learning_rate: float
    n_trainable: int
    n_base: int
    adapter_bytes: int
    steps: int
    step_ms: float  # median
    wall_s: float
    loss: float  # mean over the last tenth of the logged steps
    scores: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    version: int = RECORD_VERSION


def write_record(record: RunRecord, path: Path) -> None:
    """Write one record as JSON, whole or not at all."""
    write_json(path, dataclasses.asdict(record))


def read_record(path: Path) -> RunRecord:
    """Read a record that `write_record` wrote.

    Raises:
        CheckpointError: not JSON, of another version, or with fields missing or unknown.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable run record: {error}") from None
    version = raw.get("version") if isinstance(raw, dict) else None
    if version != RECORD_VERSION:
        raise CheckpointError(f"{path} has record version {version!r}; this krontune reads {RECORD_VERSION}.")
    try:
        for name in ("step_ms", "loss"):
            raw[name] = float("nan") if raw[name] is None else raw[name]
        return RunRecord(**raw)
    except KeyError as error:
        raise CheckpointError(f"{path} is not a run record: it has no {error}.") from None
    except TypeError as error:
        raise CheckpointError(f"{path} is not a run record: {error}") from None


def final_loss(history: list[dict[str, float]]) -> float:
    """Mean training loss over the last tenth of the logged steps (at least one); NaN without any.

    >>> final_loss([{"step": 1, "loss": 4.0}, {"step": 2, "loss": 2.0}])
    2.0
    """
    losses = [row["loss"] for row in history if "loss" in row]
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail) if tail else float("nan")
