"""SoKA's rank rules on a model: what is chosen, what is recorded, what cannot be reached."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from krontune import ConfigError, SokaConfig
from krontune.kron import KronShape, rearrange
from tests.tuners.helpers import TARGETS, adapted, kron_layers, one_layer

SHAPE = KronShape(6, 5, 4, 8)


def _weight_with_spectrum(sigma: list[float]) -> nn.Linear:
    """A layer whose KPSVD for factors of SHAPE has these singular values, and no others."""
    left = torch.linalg.qr(torch.randn(30, len(sigma))).Q.T.reshape(-1, 6, 5)
    right = torch.linalg.qr(torch.randn(32, len(sigma))).Q.T.reshape(-1, 4, 8)
    layer = nn.Linear(40, 24)
    layer.weight.data = sum(s * torch.kron(a, b) for s, a, b in zip(sigma, left, right, strict=True))
    return layer


def _chosen(net, sigma: list[float], **settings) -> dict:
    config = SokaConfig(factor_shape=(6, 5), target_modules=["layer"], **settings)
    model = adapted(net(_weight_with_spectrum(sigma)), config, trained=False)
    entry = model.peft_config["default"].resolved["layer"]
    assert entry["spec"]["r"] == entry["choice"]["rank"] == one_layer(model).specs["default"].r
    return entry["choice"]


ELBOW = [8.0, 7.5, 0.5, 0.4, 0.3, 0.3, 0.2, 0.2]  # the squares fall from 56 to 0.25 after the second
FLAT = [1.0] * 20


@pytest.mark.parametrize(
    ("settings", "sigma", "rank"),
    [
        ({"rank_selection": "energy", "energy_threshold": 0.5}, [4.0, 3.0, 2.0, 1.0], 1),  # 16 of 30
        ({"rank_selection": "energy", "energy_threshold": 0.8}, [4.0, 3.0, 2.0, 1.0], 2),  # 25 of 30
        ({"rank_selection": "energy"}, [4.0, 3.0, 2.0, 1.0], 3),  # 29 of 30
        ({"rank_selection": "energy", "energy_threshold": 1.0, "r": 6}, [4.0, 3.0, 2.0, 1.0], 4),
        ({"rank_selection": "energy", "min_r": 3, "energy_threshold": 0.5}, [4.0, 3.0, 2.0, 1.0], 3),
        ({"rank_selection": "elbow", "r": 8}, ELBOW, 3),
        ({"rank_selection": "spectrum", "r": 8}, ELBOW, 2),  # the energy is reached before the elbow
        ({"rank_selection": "spectrum", "r": 8, "energy_threshold": 0.999}, ELBOW, 3),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_rules(net, settings, sigma, rank):
    choice = _chosen(net, sigma, **settings)
    assert choice["rule"] == settings["rank_selection"]
    assert choice["rank"] == rank
    json.dumps(choice)


@pytest.mark.parametrize("rule", ["energy", "elbow", "spectrum"])
def test_a_flat_spectrum_reaches_nothing(net, rule):
    """The rule keeps its largest rank, and the record says so, with what it saw."""
    choice = _chosen(net, FLAT, rank_selection=rule, r=5)
    assert choice["rank"] == 5 and "kept k_max = 5" in choice["reason"]
    if rule != "elbow":
        assert choice["energy_rank"] is None and "25.0% of the energy, below the threshold 90.0%" in choice["reason"]
    if rule != "energy":
        assert choice["elbow_strength"] < 0.4 and "no elbow" in choice["reason"]


def test_the_largest_rank(net):
    """32 with a rule, unless r says otherwise; never more than the shapes hold."""
    assert SokaConfig().max_r == 8
    assert SokaConfig(rank_selection="energy").max_r == 32
    assert SokaConfig(rank_selection="energy", r=5).max_r == 5
    assert _chosen(net, [1.0] * 30, rank_selection="energy")["rank"] == 27  # 0.9 of min(6*5, 4*8) equal terms
    with pytest.warns(UserWarning, match=r"r=50 Kronecker terms were asked for, and 30 of shape .* It gets 30"):
        assert _chosen(net, FLAT, r=50)["rank"] == 30


def test_rank_pattern_caps_a_rule(tiny):
    config = SokaConfig(rank_selection="energy", r=6, rank_pattern={"v_proj": 2}, target_modules=TARGETS)
    model = adapted(tiny(), config, trained=False)
    ranks = {name: layer.specs["default"].r for name, layer in kron_layers(model).items()}
    assert all(rank == (2 if "v_proj" in name else 6) for name, rank in ranks.items())  # random weights are flat


BUDGETS = [1_000, 3_000, 10_000, 100_000]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("factor_shape", ["auto", "square", 1])
def test_budget_is_never_exceeded(tiny, budget, factor_shape):
    config = SokaConfig(rank_selection="budget", budget=budget, factor_shape=factor_shape, target_modules=TARGETS, r=12)
    model = adapted(tiny(), config, trained=False)
    used = model.get_nb_trainable_parameters()[0]
    layers = kron_layers(model).values()
    assert used <= budget
    assert all(1 <= layer.specs["default"].r <= 12 for layer in layers)
    smallest = min(layer.specs["default"].shape.n_params for layer in layers)
    all_full = all(layer.specs["default"].r == min(12, layer.specs["default"].shape.max_terms) for layer in layers)
    assert all_full or budget - used < 2 * max(layer.specs["default"].shape.n_params for layer in layers)
    assert smallest
    for entry in model.peft_config["default"].resolved.values():
        assert entry["choice"]["rule"] == "budget" and "% of the energy" in entry["choice"]["reason"]


def test_a_budget_gives_all_layers_the_same_share_of_their_energy():
    """Of two layers of one shape, the one with the flatter spectrum needs more terms for it."""
    model = nn.ModuleDict({"steep": _weight_with_spectrum([9.0, 8.0, 7.0, 0.1]), "flat": _weight_with_spectrum(FLAT)})
    config = SokaConfig(
        rank_selection="budget",
        budget=5 * SHAPE.n_params,
        factor_shape=(6, 5),
        target_modules=["steep", "flat"],
    )
    resolved = adapted(model, config, trained=False).peft_config["default"].resolved
    assert (resolved["steep"]["choice"]["rank"], resolved["flat"]["choice"]["rank"]) == (1, 4)


def test_budget_below_one_term_a_layer(tiny):
    base = tiny()
    config = SokaConfig(rank_selection="budget", budget=100, target_modules=TARGETS)
    with pytest.raises(ConfigError, match=r"budget of 100 parameters is below 1 term.*6 layers, which take \d+"):
        adapted(base, config)
    assert not kron_layers(base)


def test_experts_share_a_rank(tiny):
    config = SokaConfig(
        rank_selection="budget", budget=4_000, target_parameters=["experts.down_proj"], target_modules=[]
    )
    model = adapted(tiny("mixtral"), config, trained=False)
    assert model.get_nb_trainable_parameters()[0] <= 4_000
    for layer in kron_layers(model).values():
        assert all(len(factor) == 4 for factor in layer.factors("default"))  # experts


def test_a_rule_needs_weights(tiny):
    with pytest.raises(ConfigError, match="looks at the weights, and the model is on the meta device"):
        adapted(tiny().to("meta"), SokaConfig(rank_selection="energy", target_modules=TARGETS), trained=False)


def test_the_rule_sees_the_weight_and_not_the_start(net):
    """A rule works with any start; energy is that of the whole weight."""
    sigma = [4.0, 3.0, 2.0, 1.0]
    layer = _weight_with_spectrum(sigma)
    energy = float(rearrange(layer.weight.detach(), SHAPE).square().sum())
    assert energy == pytest.approx(30, rel=1e-4)
    choice = _chosen(net, sigma, rank_selection="energy", energy_threshold=0.8, init_weights="zero")
    assert choice["rank"] == 2
