"""The search for a learning rate: the same number of trials for every method, around and beyond its best one."""

from __future__ import annotations

import math
from collections.abc import Mapping


def next_rate(scores: Mapping[float, float], first: float, factor: float, trials: int) -> float | None:
    """The learning rate to try next, given what has been tried; None when all trials are spent.

    The first one, then a factor above and below it. From then on, while the best so far is at an end, one more factor
    beyond that end, so that every method is followed until it gets worse; otherwise the geometric middle between the
    best and its better neighbour.

    Args:
        scores: what was reached with each rate tried, higher is better; -inf where training diverged.
        first: the method's usual rate.
        factor: distance of the trials on the way out.
        trials: how many there are in all.

    >>> next_rate({}, 1e-3, 3, 5), next_rate({1e-3: 0.5}, 1e-3, 3, 5), next_rate({1e-3: 0.5, 3e-3: 0.6}, 1e-3, 3, 5)
    (0.001, 0.003, 0.00033)
    >>> next_rate({3.3e-4: 0.4, 1e-3: 0.5, 3e-3: 0.6}, 1e-3, 3, 5)
    0.009
    >>> next_rate({3.3e-4: 0.4, 1e-3: 0.5, 3e-3: 0.6, 9e-3: 0.1}, 1e-3, 3, 5)
    0.0017
    """
    if len(scores) >= trials:
        return None
    for rate in (first, _round(first * factor), _round(first / factor)):
        if rate not in scores:
            return rate
    rates = sorted(scores)
    i = rates.index(best_rate(scores))
    if i == len(rates) - 1:
        return _round(rates[i] * factor)
    if i == 0:
        return _round(rates[i] / factor)
    neighbour = max(rates[i - 1], rates[i + 1], key=lambda rate: scores[rate])
    between = _round(math.sqrt(rates[i] * neighbour))
    return between if between not in scores else None


def best_rate(scores: Mapping[float, float]) -> float:
    """The rate with the highest score; of equal ones, the lower."""
    return max(sorted(scores), key=lambda rate: scores[rate])


def _round(rate: float) -> float:
    """Two significant digits: a rate that people can read, and the same number on every machine."""
    return float(f"{rate:.1e}")
