"""From a budget of parameters to ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from krontune.errors import ConfigError
from krontune.kron import split_dim

#: A choice that leaves less than this share of the budget unused is good enough to need no rank of its own anywhere.
SLACK = 0.01
#: Terms for each unit of rank in LSR where both are free: r = 16 with s = 8 did best for its parameters when measured.
TERMS_PER_RANK = 0.5
#: What a choice that needs ranks of their own for some modules is worth: a factor of 1.5 away from that ratio.
UNEVEN = math.log(1.5)
MAX_LSR_RANK = 256


def even_ranks(unit_costs: Sequence[int], budget: int, caps: Sequence[int]) -> list[int]:
    """One rank for all, then one more for the last modules while it fits. For methods whose cost is rank * unit.

    >>> even_ranks([10, 10, 10], 80, [9, 9, 9])
    [2, 3, 3]

    Args:
        unit_costs: parameters a unit of rank takes, per module.
        budget: parameters in all.
        caps: the largest rank of each module.

    Raises:
        ConfigError: the budget is below rank 1 everywhere.
    """
    least = sum(unit_costs)
    if budget < least:
        raise ConfigError(too_small(budget, least, len(unit_costs)))
    ranks = [0] * len(unit_costs)
    rank = 0
    while rank < max(caps) and sum(c * min(rank + 1, cap) for c, cap in zip(unit_costs, caps)) <= budget:
        rank += 1
    ranks = [min(rank, cap) for cap in caps]
    left = budget - sum(c * r for c, r in zip(unit_costs, ranks))
    for i in reversed(range(len(ranks))):
        if unit_costs[i] <= left and ranks[i] < caps[i]:
            ranks[i] += 1
            left -= unit_costs[i]
    return ranks


def lsr_ranks(
    cost: Callable[[int], Sequence[int]],
    lora: Callable[[int], int],
    budget: int,
    r: int | None = None,
    s: int | None = None,
) -> tuple[int, list[int]]:
    """The separation rank and every module's rank for LSR.

    Both free: the (r, s) nearest to s = r / 2 (see TERMS_PER_RANK), those that use the budget to 99% preferred. Where
    more is left, the last modules are raised to the next rank while it fits. A pair that has more parameters than the
    LoRA of rank r is taken only where there is no other.

    Args:
        cost: r -> parameters of each module at separation rank 1.
        lora: r -> parameters of all modules in a LoRA.
        budget: parameters in all.
        r: the rank, if it is given.
        s: the separation rank, if it is given.

    Raises:
        ConfigError: the budget is below the least that is possible.
    """
    totals = {rank: sum(cost(rank)) for rank in ([r] if r else _balanced_ranks())}
    choices = [(rank, terms) for rank, total in totals.items() for terms in ([s] if s else _terms(total, budget))]
    choices = [(rank, terms) for rank, terms in choices if totals[rank] * terms <= budget]
    if not choices:
        least = min(totals.values()) * (s or 1)
        raise ConfigError(too_small(budget, least, len(cost(min(totals)))))

    def preference(choice: tuple[int, int]) -> tuple[bool, float, int]:
        rank, terms = choice
        wasteful, unused = totals[rank] * terms > lora(rank), 1 - totals[rank] * terms / budget
        if s is not None:  # nothing but the rank is left to choose, so the fullest is right
            return wasteful, unused, -rank
        distance = abs(math.log(terms / (rank * TERMS_PER_RANK)))
        return wasteful, distance + (UNEVEN if unused > SLACK else 0), -rank

    rank, terms = min(choices, key=preference)
    costs = [c * terms for c in cost(rank)]
    return terms, [rank] * len(costs) if r else _raise_last(costs, cost, rank, terms, budget)


def _terms(total: int, budget: int) -> list[int]:
    return [budget // total] if budget >= total else []


def _raise_last(
    costs: list[int], cost: Callable[[int], Sequence[int]], rank: int, terms: int, budget: int
) -> list[int]:
    """Spend what is left on the next rank for the last modules, where more than SLACK of the budget is left."""
    ranks = [rank] * len(costs)
    left = budget - sum(costs)
    higher = [h for h in _balanced_ranks() if h > rank]
    if left <= SLACK * budget or not higher:
        return ranks
    raised = cost(higher[0])
    for i in reversed(range(len(ranks))):
        extra = raised[i] * terms - costs[i]
        if 0 < extra <= left:
            ranks[i] = higher[0]
            left -= extra
    return ranks


def _balanced_ranks() -> Iterator[int]:
    """Ranks whose two factors are alike: 1, 2, 4, 6, 9, 12, 16, ... 7 = 7 x 1 would waste parameters."""
    for rank in range(1, MAX_LSR_RANK + 1):
        large, small = split_dim(rank)
        if large <= small + 1:
            yield rank


def too_small(budget: int, least: int, n_modules: int) -> str:
    """What to say of a budget that nothing fits into."""
    return (
        f"the budget of {budget:,} parameters is below the least that {n_modules} modules can have, {least:,}. "
        "Raise it, or adapt fewer modules: --target-modules, or some of the layers."
    )
