"""Training and evaluation from a config: what `krontune train` and `krontune demo` do, as Python functions."""

from __future__ import annotations

from .callbacks import Interrupted
from .config import RunConfig, load_config
from .models import load_base
from .training import train

__all__ = ["Interrupted", "RunConfig", "load_base", "load_config", "train"]
