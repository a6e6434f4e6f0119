"""How many Kronecker terms a spectrum asks for: by energy, by its elbow, or under a budget over many layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from krontune.errors import ConfigError

#: An elbow weaker than this is no elbow: ordinary weights give 0.18-0.37, real elbows gave 0.55 and 0.95.
ELBOW_ACCEPTED = 0.4

#: A spectrum whose squares fall by no more than this share is flat: the shape of its rounding errors is no elbow.
FLAT = 1e-4

RULES = ("energy", "elbow", "spectrum")


class Elbow(NamedTuple):
    """The point of a spectrum that is farthest below its chord."""

    rank: int
    strength: float  # 0: a straight line, 1: one term holds all that the last does not


class RankChoice(NamedTuple):
    """A number of terms, with everything that led to it."""

    rank: int
    energy_rank: int | None  # None: the threshold is not reached by the terms computed
    elbow_rank: int
    elbow_strength: float
    reason: str


def energy_rank(sigma: Tensor, energy: float, theta: float = 0.9) -> int | None:
    """The least K with sum_{k<=K} sigma_k^2 >= theta * energy, or None where the given terms do not reach it.

    The energy threshold of arXiv:2506.15251. `energy` is ||W||_F^2 of the whole weight, not of the terms computed.

    >>> energy_rank(torch.tensor([3.0, 1.0]), energy=12.0, theta=0.75), energy_rank(torch.ones(2), 9.0)
    (1, None)

    Args:
        sigma: (k,), descending: the spectrum, or its top.
        energy: ||W||_F^2, of the whole weight.
        theta: the share of it to hold, in (0, 1].

    Raises:
        ConfigError: theta out of range.
    """
    if not 0 < theta <= 1:
        raise ConfigError(f"energy threshold {theta} is out of range; it must be in (0, 1].")
    cumulative = sigma.double().square().cumsum(0)
    # A full spectrum sums to its energy only up to float32 rounding, which must not make theta = 1 unreachable.
    reached = cumulative >= theta * energy * (1 - 1e-6)
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else None


def elbow_rank(sigma: Tensor) -> Elbow:
    """argmax_k (1 - x_k - y_k), x = (k-1)/(K-1), y = (sigma_k^2 - sigma_K^2) / (sigma_1^2 - sigma_K^2).

    A flat spectrum, or one of a single term, has no elbow: rank K, strength 0.

    >>> elbow_rank(torch.tensor([10.0, 1.0, 0.9, 0.8, 0.7])).rank
    2

    Args:
        sigma: (K,), descending, K >= 1: the spectrum, or as much of its top as the elbow is looked for in.

    Returns:
        Elbow(rank k, strength): the maximum's place and its height, in [0, 1).
    """
    squares = sigma.double().square()
    drop = float(squares[0] - squares[-1])
    if len(squares) < 2 or drop <= FLAT * float(squares[0]):
        return Elbow(len(squares), 0.0)
    x = torch.linspace(0, 1, len(squares), dtype=torch.float64, device=squares.device)
    distance = 1 - x - (squares - squares[-1]) / drop
    return Elbow(int(distance.argmax()) + 1, float(distance.max()))


def select_rank(
    sigma: Tensor,
    energy: float,
    rule: str = "energy",
    theta: float = 0.9,
    k_min: int = 1,
    k_max: int | None = None,
) -> RankChoice:
    """The number of terms for one weight.

    Args:
        sigma: (k,), descending: the spectrum, or its top.
        energy: ||W||_F^2.
        rule: "energy", "elbow" (accepted from a strength of 0.4), or "spectrum", the smaller of those accepted.
        theta: the energy threshold, in (0, 1].
        k_min: the least rank returned.
        k_max: the largest; also where the elbow's chord ends. None: len(sigma).

    Returns:
        RankChoice; where no rule is accepted the rank is k_max and `reason` says so.

    Raises:
        ConfigError: an unknown rule, theta out of range, or not 1 <= k_min <= k_max.
    """
    if rule not in RULES:
        raise ConfigError(f"rank rule {rule!r} is unknown; allowed: {', '.join(RULES)}.")
    k_max = len(sigma) if k_max is None else min(k_max, len(sigma))
    if not 1 <= k_min <= k_max:
        raise ConfigError(f"k_min = {k_min} and k_max = {k_max}; they must satisfy 1 <= k_min <= k_max.")
    sigma = sigma[:k_max]
    by_energy, elbow = energy_rank(sigma, energy, theta), elbow_rank(sigma)
    accepted: dict[int, str] = {}
    refused = []
    if rule != "elbow":
        if by_energy is None:
            held = float(sigma.double().square().sum()) / energy if energy > 0 else 0.0
            refused.append(f"{k_max} terms hold {held:.1%} of the energy, below the threshold {theta:.1%}")
        else:
            accepted[by_energy] = f"{by_energy} terms hold {theta:.1%} of the energy"
    if rule != "energy":
        if elbow.strength < ELBOW_ACCEPTED:
            refused.append(f"no elbow (strength {elbow.strength:.2f}, {ELBOW_ACCEPTED} needed)")
        else:
            accepted[elbow.rank] = f"elbow at {elbow.rank} (strength {elbow.strength:.2f})"
    rank = min(accepted) if accepted else k_max
    reason = accepted[rank] if accepted else "; ".join(refused) + f": kept k_max = {k_max}"
    if rank < k_min:
        rank, reason = k_min, reason + f", raised to k_min = {k_min}"
    return RankChoice(rank, by_energy, elbow.rank, elbow.strength, reason)


def budget_ranks(
    sigmas: Sequence[Tensor],
    energies: Sequence[float],
    params_per_term: Sequence[int],
    budget: int,
    k_min: int = 1,
) -> list[int]:
    """The number of terms of every layer under one budget of parameters: those of the largest threshold it pays for.

    Each layer gets k_min terms; then the layer with the least share of its energy, sum_{i<=k} sigma_i^2 / E, gets the
    next one, while one fits. So all reach about the same share, as by `energy_rank` with a theta that is found rather
    than given. The total never exceeds the budget.

    Args:
        sigmas: per layer, (k_l,) descending: the top of its spectrum; k_l caps the layer's rank.
        energies: per layer, E_l = ||W_l||_F^2.
        params_per_term: per layer, p_l.
        budget: parameters in all.
        k_min: the least number of terms of a layer (fewer only where its spectrum has fewer).

    Raises:
        ConfigError: the budget is below k_min terms a layer.
    """
    ranks = [min(k_min, len(sigma)) for sigma in sigmas]
    left = budget - sum(rank * p for rank, p in zip(ranks, params_per_term))
    if left < 0:
        raise ConfigError(
            f"the budget of {budget} parameters is below {k_min} term(s) for each of {len(ranks)} layers, which take "
            f"{budget - left}. Raise the budget, or target fewer modules."
        )
    offers = [
        (share, layer)
        for layer, (sigma, energy) in enumerate(zip(sigmas, energies))
        for share in _shares_before(sigma, energy)[ranks[layer] :]
    ]
    # A layer's shares rise and the sort is stable, so that its terms are bought in order; and once one of them does not
    # fit, no later one of that layer does either.
    for _, layer in sorted(offers, key=lambda offer: offer[0]):
        if params_per_term[layer] <= left:
            ranks[layer] += 1
            left -= params_per_term[layer]
    return ranks


def _shares_before(sigma: Tensor, energy: float) -> list[float]:
    """The share of the energy that a layer has before each of its terms; all of it where there is no energy."""
    held = sigma.double().square().cumsum(0).roll(1)
    held[:1] = 0
    return (held / energy).tolist() if energy > 0 else [1.0] * len(sigma)
