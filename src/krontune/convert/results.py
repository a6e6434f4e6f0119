"""What an export wrote, module by module."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModuleExport:
    """What became of one module."""

    name: str
    rank: int  # of the matrices, before padding
    error: float  # ||dW - exported||_F / ||dW||_F
    norm: float  # ||dW||_F


@dataclass(frozen=True)
class Export:
    """What an export wrote."""

    out: Path
    method: str  # of the adapter that was exported
    to: str
    modules: list[ModuleExport]
    n_params: int
    n_bytes: int
    padded_rank: int | None = None
    notes: list[str] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)  # (rank, error of all updates together)

    @property
    def error(self) -> float:
        """The relative error of all updates together."""
        total = sum(m.norm**2 for m in self.modules)
        return (sum((m.error * m.norm) ** 2 for m in self.modules) / total) ** 0.5 if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON-ready values."""
        return {**asdict(self), "out": str(self.out), "error": self.error}
