"""Where results are written: whole or not at all, and never over somebody's files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from krontune.errors import ConfigError
from krontune.report.files import whole_folder

#: Files that show a folder to hold an adapter or a model, so that --force may replace it.
MARKERS = ("adapter_config.json", "config.json", "lokr.safetensors")


@contextmanager
def output_folder(out: str | Path, force: bool, inputs: Sequence[str | Path] = ()) -> Iterator[Path]:
    """Yield an empty temporary folder, which becomes `out` when the block ends without an error.

    Raises:
        ConfigError: `out` holds something and force is not set; is a file; holds anything but an adapter or a model; or
            is one of the inputs, or around one.
    """
    check_output(out, force, inputs)
    with whole_folder(Path(out)) as partial:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # safetensors writes files that nobody else can read


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


def check_output(out: str | Path, force: bool, inputs: Sequence[str | Path] = ()) -> None:
    """Raise as `output_folder` does, before any work is done."""
    folder = Path(out)
    for given in map(Path, inputs):
        if given.exists() and given.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"--out {folder} is, or holds, the input {given}. Choose another folder.")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file; name a folder.")
    if not any((folder / name).is_file() for name in MARKERS):
        raise ConfigError(
            f"--out {folder} holds files that are neither an adapter's nor a model's; choose another folder."
        )
    if not force:
        raise ConfigError(f"--out {folder} exists. Choose another folder, or replace it with --force (force=True).")
