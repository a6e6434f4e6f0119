"""Files of JSON lines that survive a kill: written by one process, in whole lines, each on the disk before the next."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from krontune.errors import CheckpointError


class JsonLines:
    """A file with one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All objects, in their order. A last line that a kill cut short is passed over.

        Raises:
            CheckpointError: a line in the middle is damaged.
        """
        if not self.path.exists():
            return []
        whole, _, _ = self.path.read_bytes().rpartition(b"\n")
        lines = whole.decode("utf-8", errors="replace").split("\n") if whole else []
        return [self._parse(line, number) for number, line in enumerate(lines, start=1)]

    def repair(self) -> None:
        """Drop a last line that a kill cut short, so that the next one starts on a line of its own."""
        if self.path.exists():
            whole, newline, rest = self.path.read_bytes().rpartition(b"\n")
            if rest:
                os.truncate(self.path, len(whole) + len(newline))

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add objects; they are on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with self.path.open("ab") as file:
            file.write(text.encode("utf-8", errors="replace"))
            file.flush()
            os.fsync(file.fileno())

    def _parse(self, line: str, number: int) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except ValueError as error:
            raise CheckpointError(f"{self.path}, line {number}: not JSON ({error}).") from None
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.path}, line {number}: not a JSON object.")
        return value
