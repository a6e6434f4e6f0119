"""A results file: what was measured, on what, with every raw time. Reading one needs neither torch nor krontune."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = 1
PACKAGES = ("torch", "peft", "transformers", "lycoris-lora", "pyfastkron", "krontune")


class Spread(NamedTuple):
    """A median with the 20th and 80th percentile around it."""

    median: float
    p20: float
    p80: float


def spread(values: Sequence[float]) -> Spread:
    """The median and its spread.

    >>> spread([3.0, 1.0, 2.0])
    Spread(median=2.0, p20=1.4, p80=2.6)
    """
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(statistics.median(values), round(fifths[0], 12), round(fifths[3], 12))


class Results:
    """The content of a results file.

    Args:
        header: `machine`, `versions` and `setting`.
        cases: {case name: {contender: its record}}; a record may have `wall_s`, `cpu_s`, `calls`, `peak_bytes`,
            `saved_bytes`, `largest_saved`, `n_params`, or `failed`, the reason why it could not be measured.
    """

    def __init__(self, header: Mapping[str, Any], cases: Mapping[str, dict[str, dict[str, Any]]] | None = None):
        self.header = dict(header)
        self.cases = dict(cases or {})

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file that `save` wrote.

        Raises:
            ValueError: the file is of another format.
        """
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.get("format") != FORMAT:
            raise ValueError(f"{path} has the format {raw.get('format')!r}; this reads {FORMAT}. Run the cases again.")
        return cls({key: raw[key] for key in ("machine", "versions", "setting")}, raw["cases"])

    def save(self, path: Path) -> None:
        """Write the file: indented, but for the lists of raw times."""
        path.parent.mkdir(parents=True, exist_ok=True)
        cases = ",\n".join(
            f"  {json.dumps(name)}: {{\n"
            + ",\n".join(f"   {json.dumps(label)}: {json.dumps(record)}" for label, record in contenders.items())
            + "\n  }"
            for name, contenders in self.cases.items()
        )
        head = json.dumps({"format": FORMAT, **self.header}, indent=1)[:-2]
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(f'{head},\n "cases": {{\n{cases}\n }}\n}}\n', encoding="utf-8")
        partial.replace(path)

    def matching(self, pattern: str) -> Iterator[str]:
        """Names of the cases that match a glob pattern, in the file's order."""
        return (name for name in self.cases if fnmatch(name, pattern))

    def has(self, case: str, *labels: str) -> bool:
        """Whether all of these contenders were timed in the case."""
        return all("wall_s" in self.cases.get(case, {}).get(label, {}) for label in labels)

    @property
    def clock(self) -> str:
        """The times that tables show: the process's own on one CPU thread, which other programs on the machine do not
        lengthen, else the wall's."""
        setting = self.header["setting"]
        return "cpu_s" if setting["device"] == "cpu" and setting["threads"] == 1 else "wall_s"

    def seconds(self, case: str, label: str, clock: str | None = None) -> Spread:
        """Time of one call."""
        return spread(self.cases[case][label][clock or self.clock])

    def ratio(self, case: str, label: str, over: str, clock: str | None = None) -> Spread:
        """How many times as long one contender took as another, over the rounds that both took part in.

        The first rounds are those: who leaves does so for good.
        """
        ours, theirs = (self.cases[case][name][clock or self.clock] for name in (label, over))
        return spread([a / b for a, b in zip(ours, theirs, strict=False)])


def header(setting: Mapping[str, Any]) -> dict[str, Any]:
    """Machine, versions and setting, without anything that names the machine or its owner."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    machine = {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
    }
    return {"machine": machine, "versions": versions, "setting": dict(setting)}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    model = fields.get("model name") or platform.processor() or "unknown"
    numbers = ", ".join(f"{name} {fields[name]}" for name in ("cpu family", "model") if name in fields)
    return f"{model} ({numbers})" if numbers else model
