"""The number of terms: energy, elbow, budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from krontune.errors import ConfigError
from krontune.kron import budget_ranks, elbow_rank, energy_rank, select_rank

spectra = st.lists(st.floats(0.01, 100), min_size=1, max_size=20).map(lambda v: torch.tensor(sorted(v, reverse=True)))


@given(spectra, st.floats(0, 1000), st.floats(0.01, 1))
def test_energy_rank_is_the_least_that_reaches_the_threshold(sigma, unseen, theta):
    energy = float(sigma.double().square().sum()) + unseen
    held = [float(sigma[:k].double().square().sum()) for k in range(len(sigma) + 1)]
    slack = 1e-5 * energy
    rank = energy_rank(sigma, energy, theta)
    if rank is None:
        assert held[-1] < theta * energy + slack
    else:
        assert held[rank] >= theta * energy - slack and held[rank - 1] < theta * energy + slack


def test_a_full_spectrum_reaches_all_of_its_energy():
    sigma = torch.linalg.svdvals(torch.randn(50, 40, generator=torch.Generator().manual_seed(0)))
    assert energy_rank(sigma, float(sigma.double().square().sum()) * (1 + 1e-8), theta=1.0) == 40


@pytest.mark.parametrize("theta", [0, -1, 1.5])
def test_thresholds_out_of_range(theta):
    with pytest.raises(ConfigError, match=r"must be in \(0, 1\]"):
        energy_rank(torch.ones(3), 3.0, theta)


def test_elbow_of_known_spectra():
    steep = torch.tensor([10.0, 9.5, 9.0, 1.0, 0.9, 0.8, 0.7, 0.6])
    elbow = elbow_rank(steep)
    assert elbow.rank == 4 and elbow.strength == pytest.approx(1 - 3 / 7 - (1 - 0.36) / (100 - 0.36), abs=1e-5)
    assert elbow_rank(torch.linspace(10, 1, 20).sqrt()).strength == pytest.approx(0, abs=1e-6)  # a straight line
    assert elbow_rank(torch.ones(5)) == (5, 0.0)
    assert elbow_rank(torch.tensor([3.0])) == (1, 0.0)
    assert elbow_rank(torch.tensor([3.0, 1.0])).strength == 0


@given(spectra)
def test_an_elbow_lies_within_the_spectrum(sigma):
    rank, strength = elbow_rank(sigma)
    assert 1 <= rank <= len(sigma) and 0 <= strength <= 1


def test_rules_and_their_reasons():
    sharp = torch.tensor([10.0, 0.5, 0.4, 0.3, 0.2])
    energy = float(sharp.square().sum())
    assert select_rank(sharp, energy, "energy", theta=0.9).rank == 1
    elbow = select_rank(sharp, energy, "elbow")
    assert elbow.rank == 2 and "elbow at 2" in elbow.reason
    both = select_rank(sharp, energy, "spectrum", theta=0.999)
    assert (both.rank, both.energy_rank, both.elbow_rank) == (2, 4, 2)


def test_a_flat_spectrum_keeps_k_max_and_says_why():
    flat = torch.linspace(1.0, 0.8, 10)
    for rule in ("energy", "elbow", "spectrum"):
        choice = select_rank(flat, energy=100.0, rule=rule, k_max=6)
        assert choice.rank == 6 and choice.energy_rank is None and "k_max = 6" in choice.reason
        assert ("below the threshold 90.0%" in choice.reason) == (rule != "elbow")
        assert ("no elbow" in choice.reason) == (rule != "energy")


@given(spectra, st.sampled_from(["energy", "elbow", "spectrum"]), st.integers(1, 5), st.integers(5, 30))
def test_the_rank_is_within_its_bounds(sigma, rule, k_min, k_max):
    k_min = min(k_min, len(sigma))
    choice = select_rank(sigma, float(sigma.square().sum()), rule, k_min=k_min, k_max=k_max)
    assert k_min <= choice.rank <= min(k_max, len(sigma))


def test_a_rank_below_k_min_is_raised():
    choice = select_rank(torch.tensor([10.0, 0.1, 0.1]), 101.0, "energy", theta=0.5, k_min=2)
    assert choice.rank == 2 and "raised to k_min = 2" in choice.reason


def test_bad_rules():
    with pytest.raises(ConfigError, match="'best' is unknown; allowed: energy, elbow, spectrum"):
        select_rank(torch.ones(3), 3.0, "best")
    with pytest.raises(ConfigError, match="k_min = 0"):
        select_rank(torch.ones(3), 3.0, k_min=0)
    with pytest.raises(ConfigError, match="k_max = 3"):
        select_rank(torch.ones(3), 3.0, k_min=4)


layers = st.lists(st.tuples(spectra, st.integers(1, 500)), min_size=1, max_size=8)


@given(layers, st.integers(0, 20_000), st.integers(1, 3))
def test_a_budget_is_never_exceeded_and_leaves_nothing_affordable(layers, extra, k_min):
    sigmas, sizes = zip(*layers)
    energies = [float(s.double().square().sum()) * 1.5 for s in sigmas]
    least = sum(min(k_min, len(s)) * p for s, p in layers)
    budget = least + extra
    ranks = budget_ranks(sigmas, energies, sizes, budget, k_min)
    spent = sum(k * p for k, p in zip(ranks, sizes))
    assert spent <= budget
    assert all(min(k_min, len(s)) <= k <= len(s) for k, s in zip(ranks, sigmas))
    assert all(p > budget - spent for k, s, p in zip(ranks, sigmas, sizes) if k < len(s))


def test_a_budget_raises_the_least_share_first():
    """Shares after one term and two: 0.517 and 0.9994, 0.994 and 0.9989, 0.41 and 0.74."""
    sigmas = [torch.tensor([3.0, 2.9, 0.1]), torch.tensor([3.0, 0.2, 0.1]), torch.tensor([1.0, 0.9, 0.8])]
    energies = [float(s.square().sum()) for s in sigmas]
    assert budget_ranks(sigmas, energies, [10, 10, 10], 40) == [1, 1, 2]
    assert budget_ranks(sigmas, energies, [10, 10, 10], 60) == [2, 1, 3]
    assert budget_ranks(sigmas, energies, [10, 10, 100], 150) == [2, 3, 1]  # the third cannot have a second one
    assert budget_ranks([torch.zeros(2), sigmas[0]], [0.0, energies[0]], [10, 10], 30) == [1, 2]


@given(st.lists(st.tuples(spectra, st.integers(1, 50)), min_size=1, max_size=6), st.floats(0.05, 0.95))
def test_the_budget_of_a_threshold_gives_the_threshold_s_ranks(layers, theta):
    sigmas, sizes = [s for s, _ in layers], [p for _, p in layers]
    energies = [float(s.double().square().sum()) for s in sigmas]
    wanted = [energy_rank(s, e, theta) for s, e in zip(sigmas, energies)]
    budget = sum(k * p for k, p in zip(wanted, sizes))
    assert budget_ranks(sigmas, energies, sizes, budget) == wanted


def test_a_budget_below_one_term_a_layer():
    with pytest.raises(ConfigError, match=r"budget of 19 .* which take 20"):
        budget_ranks([torch.ones(2)] * 2, [2.0] * 2, [10, 10], 19)
