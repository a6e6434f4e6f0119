"""`krontune demo`."""

from __future__ import annotations


def command() -> None:
    """Compare LoRA, LSR and SoKA on a small task."""
