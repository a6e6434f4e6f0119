"""The folder of a run: what it holds, when it may be written to, and where to go on from.

OUTPUT/
  config.yaml        the config as resolved, defaults included
  environment.json   versions, hardware, command
  metrics.jsonl      one line a logged step, written as it happens
  checkpoints/       checkpoint-N of transformers' Trainer
  adapter/           the trained adapter, with its tokenizer
  record.json        the run in one record (krontune.report.RunRecord)
  loss.png           the loss curve
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from krontune.errors import ConfigError
from krontune.report.files import write_json, write_text

from .config import RunConfig
from .yaml_files import read_yaml

PACKAGES = ("krontune", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors")
# What has to stay as it was for a checkpoint to mean the same thing.
FIXED_ON_RESUME = ("model", "data", "method", "seed")


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and the rules for writing there."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def record(self) -> Path:
        return self.root / "record.json"

    @property
    def loss_curve(self) -> Path:
        return self.root / "loss.png"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    def check(self, config: RunConfig, force: bool) -> None:
        """Refuse what would lose or mix up somebody's files; nothing is changed.

        Raises:
            ConfigError: the folder holds a run and neither resume nor force is set, holds something else, or holds a
                run of another model, data set, method or seed than the one to resume.
        """
        if self.root.exists() and not self.root.is_dir():
            raise ConfigError(f"output {self.root} is a file; name a folder.")
        if not self.root.exists() or not any(self.root.iterdir()):
            return
        if not self.config.is_file():
            raise ConfigError(f"output {self.root} holds files that are not a run's; choose another folder.")
        if config.resume:
            self._check_same(config)
        elif not force:
            raise ConfigError(
                f"output {self.root} already holds a run. Go on with it (--resume), replace it (--force), or choose "
                "another folder (--set output=...)."
            )

    def start(self, config: RunConfig, force: bool) -> None:
        """Make the folder and write the config and the environment; with `force`, drop the run that was there."""
        if force and not config.resume:
            for folder in (self.checkpoints, self.adapter):
                shutil.rmtree(folder, ignore_errors=True)
            for file in (self.metrics, self.record, self.loss_curve):
                file.unlink(missing_ok=True)
        self.root.mkdir(parents=True, exist_ok=True)
        write_text(self.config, config.to_yaml())
        write_json(self.environment, environment())

    def latest_checkpoint(self) -> Path | None:
        """The complete checkpoint with the most steps; one that was cut short by a kill is passed over."""
        found = [path for path in self.checkpoints.glob("checkpoint-*") if checkpoint_step(path) and _complete(path)]
        return max(found, key=checkpoint_step, default=None)

    def _check_same(self, config: RunConfig) -> None:
        before, now = RunConfig.from_mapping(read_yaml(self.config), str(self.config)).to_mapping(), config.to_mapping()
        changed = [name for name in FIXED_ON_RESUME if before[name] != now[name]]
        if changed:
            raise ConfigError(
                f"cannot resume {self.root}: {', '.join(changed)} changed since it was started "
                f"(see {self.config}). Only the training settings may change; otherwise choose another output."
            )


def environment() -> dict[str, Any]:
    """What a result depends on beside the config: versions, hardware, the command."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        # the metadata of torch's CUDA wheel does not say which build it is
        "packages": {"torch": str(torch.__version__), **{name: _version(name) for name in PACKAGES}},
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def folder_bytes(folder: Path, pattern: str = "*") -> int:
    """Bytes of the files in a folder whose names match."""
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def checkpoint_step(checkpoint: Path) -> int:
    """The step in a checkpoint's name; 0 for a folder that is not named as one."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else 0


def _complete(checkpoint: Path) -> bool:
    """The trainer's state is the last file of a checkpoint, so one that parses vouches for the rest."""
    try:
        return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


@contextmanager
def locked(folder: Path, user: str) -> Iterator[None]:
    """Keep two processes from writing to one folder; the lock ends with its process.

    Raises:
        ConfigError: the folder is in use; `user` says by another what.
    """
    with (folder / ".lock").open("w") as file:
        try:
            import fcntl
        except ImportError:  # not on Windows
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{folder} is in use by another {user}; wait for it or choose another --output."
            ) from None
        yield


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
