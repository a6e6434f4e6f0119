"""Amounts as people write them: 0.99M parameters, 0.5% of the model, 0.25x of a LoRA."""

from __future__ import annotations

import re

from krontune.errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


def parse_amount(text: str | int | float, whole: int | None = None, unit: str = "%") -> int:
    """A number of parameters from what a person wrote, rounded down.

    >>> parse_amount("0.99M"), parse_amount("12k"), parse_amount(3584), parse_amount("0.5%", whole=1_000_000)
    (990000, 12000, 3584, 5000)
    >>> parse_amount("0.25x", whole=4000, unit="x")
    1000

    Args:
        text: a number, with k, M, B or G after it, or a share of `whole`.
        whole: what a share is a share of; None allows none.
        unit: how a share is written: "%" or "x".

    Raises:
        ConfigError: not an amount, or not a positive one.
    """
    match = re.fullmatch(r"\s*([\d_.]+(?:[eE][+-]?\d+)?)\s*([a-zA-Z%]?)\s*", str(text))
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    suffix = match[2].lower() if match else ""
    factor = float(_UNITS.get(suffix, 0))
    if suffix == unit and whole is not None:
        factor = whole / 100 if unit == "%" else whole
    amount = int(round(number * factor, 6))
    if amount < 1:
        share = "" if whole is None else f" or a share such as 0.5{unit}"
        raise ConfigError(f"{text!r} is not an amount. Write a number such as 990000, 990k or 0.99M{share}.")
    return amount


def human_count(n: float) -> str:
    """A count in the unit a person would choose.

    >>> human_count(3584), human_count(986_000), human_count(6_738_415_616)
    ('3,584', '986.0k', '6.74B')
    """
    if n < 10_000:
        return f"{n:,.0f}"
    if n < 10**6:
        return f"{n / 10**3:.1f}k"
    return f"{n / 10**6:.2f}M" if n < 10**9 else f"{n / 10**9:.2f}B"
