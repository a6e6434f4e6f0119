"""One entrance to all exports."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from krontune.convert.adapter import Adapter, open_adapter
from krontune.convert.lokr import export_lokr, export_soka, open_lycoris
from krontune.convert.results import Export
from krontune.convert.to_lora import export_lora
from krontune.errors import ConfigError

FORMATS = ("lora", "soka", "lokr", "lycoris")


def export(
    adapter: str | Path,
    out: str | Path,
    to: str = "lora",
    *,
    rank: int | None = None,
    error: float | None = None,
    vllm_rank: bool = False,
    base: str | None = None,
    force: bool = False,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> Export:
    """Write an adapter in another format.

    Args:
        adapter: an adapter's folder, or a LyCORIS file of LoKr modules.
        out: the folder to write.
        to: "lora" (from all; exact from LSR), "soka" (from LoKr, exact), "lokr" or "lycoris" (the nearest single term).
        rank, error, vllm_rank: for "lora"; see export_lora.
        base: the base model that a LyCORIS file is for: its names are looked up there.
        force: replace `out`.
        progress: wraps the modules' names, for a progress bar.

    Raises:
        ConfigError: a format that the adapter cannot be written in, or settings that do not go together.
        CheckpointError: a damaged file.
    """
    if to not in FORMATS:
        raise ConfigError(f"format {to!r} is unknown; allowed: {', '.join(FORMATS)}.")
    if to != "lora" and (rank is not None or error is not None or vllm_rank):
        raise ConfigError(f"rank, error and vllm_rank are settings of a LoRA; to={to!r} has none.")
    opened = open_any(adapter, base)
    if to == "lora":
        return export_lora(opened, out, rank=rank, error=error, vllm_rank=vllm_rank, force=force, progress=progress)
    if to == "soka":
        return export_soka(opened, out, force=force)
    return export_lokr(opened, out, lycoris=to == "lycoris", force=force, progress=progress)


def open_any(adapter: str | Path, base: str | None = None) -> Adapter:
    """An adapter's folder, or a LyCORIS file.

    Raises:
        ConfigError: it is neither, or a LyCORIS file without a base.
    """
    path = Path(adapter)
    if not path.is_file():
        return open_adapter(path)
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path} is no adapter: give an adapter's folder, or a LyCORIS .safetensors file.")
    if base is None:
        raise ConfigError(f"{path} is a single file, as LyCORIS writes them: name its base model with --base (base=).")
    return open_lycoris(path, base)
