"""The errors krontune raises for a user's mistake: what was got, what is allowed, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KrontuneError(ValueError):
    """Base of all of them; also a ValueError, so that generic handlers keep working."""


class ShapeError(KrontuneError):
    """Sizes that do not fit together, such as a factor shape that does not divide a weight."""


class ConfigError(KrontuneError):
    """A setting that is out of range, unknown, or contradicts another."""


class CheckpointError(KrontuneError):
    """An adapter file that is damaged, of another format, or made for another base model."""


def suggest(name: str, known: Iterable[str]) -> str:
    """What an error says after an unknown name: the nearest known one, else all of them.

    >>> suggest("learning_rat", ["learning_rate", "max_steps"])
    "Did you mean 'learning_rate'?"
    >>> suggest("zzz", ["b", "a"])
    'Allowed: a, b.'
    """
    known = sorted(known)
    near = difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=1, cutoff=0.6)
    if near:
        return f"Did you mean {next(k for k in known if k.lower() == near[0])!r}?"
    return f"Allowed: {', '.join(known)}."
