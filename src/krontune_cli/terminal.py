"""What every command shares: where text goes, how errors look, and which noise is kept off the screen."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

EXTRA_PACKAGES = {"accelerate", "datasets", "gguf", "matplotlib", "pydantic", "trl", "yaml"}


def console(*, stderr: bool = False) -> Console:
    """A console that prints in the first process only."""
    from rich.console import Console

    return Console(stderr=stderr, quiet=not is_main_process(), highlight=False)


def is_main_process() -> bool:
    """Whether this is the only or the first process of a launch."""
    return os.environ.get("RANK", "0") == "0"


def print_json(value: Any) -> None:
    """The one thing on standard output when a machine asked."""
    from krontune.report.files import to_json

    if is_main_process():
        typer.echo(to_json(value))


def quiet_libraries(progress: bool) -> None:
    """Keep the libraries' advice to their developers off the screen, and give a warning one line; call it before they
    are imported.

    Args:
        progress: leave their bars for loading and tokenising.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not progress:
        os.environ.setdefault("TQDM_DISABLE", "1")
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    libraries = r"(transformers|trl|peft|torch|accelerate|datasets)\b"
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=libraries)
    warnings.showwarning = _show_warning


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program on an expected error with one line and the right exit code; let a bug show its traceback."""
    try:
        yield
    except KeyboardInterrupt as stop:
        signum = getattr(stop, "signum", signal.SIGINT)
        _fail(str(stop) or "stopped", 128 + signum)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA_PACKAGES:
            raise
        _fail(f"this command needs {error.name}; install it with: pip install 'krontune[train]'", 1)
    except OSError as error:
        _fail(str(error), 1)
    except ValueError as error:
        # krontune.errors is not imported here: it would import torch. Its errors are all ValueErrors.
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if "KrontuneError" not in kinds:
            raise
        _fail(str(error), 2 if kinds & {"ConfigError", "ShapeError"} else 1)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    if is_main_process():
        print(f"warning: {message}", file=sys.stderr)


def _fail(message: str, code: int) -> None:
    if is_main_process():
        print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(code)
