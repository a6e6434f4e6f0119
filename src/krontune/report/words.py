"""Short texts for tables: names of modules, runs of layers, ranges of numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def short_names(kinds: Iterable[str]) -> dict[str, str]:
    """{kind: as much of its end as tells it from the others}.

    >>> short_names(["model.layers.*.self_attn.q_proj", "model.layers.*.mlp.up_proj"])
    {'model.layers.*.self_attn.q_proj': 'q_proj', 'model.layers.*.mlp.up_proj': 'up_proj'}
    >>> short_names(["layer.*.attention.dense", "layer.*.dense"])["layer.*.dense"]
    '*.dense'
    """
    parts = {kind: kind.split(".") for kind in kinds}
    short = {}
    for kind, words in parts.items():
        lengths = (n for n in range(1, len(words)) if sum(other[-n:] == words[-n:] for other in parts.values()) == 1)
        short[kind] = ".".join(words[-next(lengths, len(words)) :])
    return short


def range_text(values: Sequence[int]) -> str:
    """One number, or the least and the largest of several.

    >>> range_text([3, 3]), range_text([4, 1, 2])
    ('3', '1-4')
    """
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def layers_text(names: Sequence[str]) -> str:
    """The layers of modules of one kind, in short.

    >>> layers_text([f"h.{i}.q" for i in (0, 1, 2, 5)]), layers_text(["score"])
    ('0-2, 5', '-')
    """
    found = (re.search(r"\.(\d+)\.", f".{name}.") for name in names)
    indices = sorted({int(match[1]) for match in found if match})
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "-"


def by_kind(items: Iterable[Item], name: Callable[[Item], str]) -> dict[str, list[Item]]:
    """Items in groups of one kind of module: names that differ in a layer's index alone.

    >>> by_kind(["h.0.q", "h.0.v", "h.1.q"], str)
    {'h.*.q': ['h.0.q', 'h.1.q'], 'h.*.v': ['h.0.v']}
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name(item)), []).append(item)
    return groups


def error_text(error: float) -> str:
    """A relative error for people; what is below the rounding of float32 is said to be so.

    >>> error_text(0), error_text(0.1234), error_text(2e-6), error_text(1e-15)
    ('0', '12.3%', '2e-06', '<1e-07')
    """
    if error < 1e-7:
        return "<1e-07" if error else "0"
    return f"{error:.1%}" if error >= 1e-3 else f"{error:.0e}"
