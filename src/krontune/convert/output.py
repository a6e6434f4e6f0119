"""Where results are written: whole or not at all, and never over somebody's files."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from krontune.errors import ConfigError
from krontune.report.files import whole_folder

#: What an export or a compression writes: --force may replace a folder that holds nothing else.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "lokr.safetensors")


@contextmanager
def output_folder(
    out: str | Path, force: bool, inputs: Sequence[str | Path] = (), written: Sequence[str] = ADAPTER_FILES
) -> Iterator[Path]:
    """Yield an empty temporary folder, which becomes `out` when the block ends without an error.

    Args:
        out: the folder to write.
        force: replace it.
        inputs: what is read.
        written: names or patterns of the files that are written.

    Raises:
        ConfigError: `out` holds something and force is not set; is a file; holds anything that is not `written`; or is
            one of the inputs, or around one.
    """
    check_output(out, force, inputs, written)
    with _stopped_by_sigterm(), whole_folder(Path(out)) as partial:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # safetensors writes files that nobody else can read


class Stopped(KeyboardInterrupt):
    """SIGTERM came while a folder was being written."""

    signum = signal.SIGTERM


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exception within the block, so that what is half written is cleared away.

    Only where nobody else handles it, and where Python delivers signals: in the main thread.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(*_: object) -> None:
        raise Stopped("stopped by SIGTERM")

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file as PEFT and transformers expect it.

    Raises:
        OSError: the disk is full, say; safetensors' own error is no OSError.
    """
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {file.name}: {error}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_output(
    out: str | Path, force: bool, inputs: Sequence[str | Path] = (), written: Sequence[str] = ADAPTER_FILES
) -> None:
    """Raise as `output_folder` does, before any work is done."""
    folder = Path(out)
    for given in map(Path, inputs):
        if given.exists() and given.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"--out {folder} is, or holds, the input {given}. Choose another folder.")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file; name a folder.")
    others = sorted(
        entry.name
        for entry in folder.iterdir()
        if not (entry.is_file() and any(fnmatch(entry.name, pattern) for pattern in written))
    )
    if others:
        raise ConfigError(
            f"--out {folder} holds {_some(others)}, which this command does not write and does not delete. Choose "
            "another folder."
        )
    if not force:
        raise ConfigError(f"--out {folder} exists. Choose another folder, or replace it with --force (force=True).")


def _some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
