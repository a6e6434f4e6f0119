"""Bad settings: one clear error that says what was got, what is allowed and what to do, and a model left as it was."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from krontune import ConfigError, KrontuneError, LsrConfig, ShapeError, SokaConfig
from tests.tuners.helpers import TARGETS, adapted, assert_same_tensors, base_weights, kron_layers, logits

COMMON = {
    "alpha zero": ({"alpha": 0}, r"alpha=0 switches the adapter off"),
    "alpha nan": ({"alpha": math.nan}, r"alpha=nan is not allowed.*finite number"),
    "alpha text": ({"alpha": "1"}, r"alpha='1' is not allowed"),
    "dropout": ({"dropout": 1.0}, r"dropout=1\.0 is not allowed.*\[0, 1\)"),
    "negative dropout": ({"dropout": -0.1}, r"dropout=-0\.1 is not allowed"),
    "r zero": ({"r": 0}, r"r=0 is not allowed.*integer of at least 1"),
    "r negative": ({"r": -3}, r"r=-3 is not allowed"),
    "r float": ({"r": 2.5}, r"r=2\.5 is not allowed"),
    "r bool": ({"r": True}, r"r=True is not allowed"),
    "start": ({"init_weights": "pissa"}, r"init_weights='pissa' is unknown\. Allowed: True, False, .*'gradient'"),
    "start one": ({"init_weights": 1}, r"init_weights=1 is unknown"),
    "rank pattern": ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0 is not allowed"),
    "alpha pattern": ({"alpha_pattern": {"q_proj": math.inf}}, r"alpha_pattern\['q_proj'\]=inf is not allowed"),
    "alpha pattern zero": ({"alpha_pattern": {"q_proj": 0}}, r"alpha_pattern\['q_proj'\]=0 switches"),
    "rank pattern none": ({"rank_pattern": None}, r"rank_pattern=None is not allowed.*dict"),
    "rank pattern list": ({"rank_pattern": [4]}, r"rank_pattern=\[4\] is not allowed.*dict"),
    "alpha pattern none": ({"alpha_pattern": None}, r"alpha_pattern=None is not allowed.*dict"),
    "alpha pattern list": ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern=\['q_proj'\] is not allowed.*dict"),
    "rank pattern no regex": ({"rank_pattern": {"q_(": 2}}, r"rank_pattern: 'q_\(' is no regex"),
    "alpha pattern no regex": ({"alpha_pattern": {"*q": 2}}, r"alpha_pattern: '\*q' is no regex"),
    "train norms text": ({"train_norms": "yes"}, r"train_norms='yes' is unknown\. Allowed: True, False"),
    "targets": ({"target_modules": 5}, r"target_modules=5 is not allowed.*list of names"),
    "saved modules": ({"modules_to_save": "lm_head"}, r"modules_to_save='lm_head' is not allowed.*list of names"),
    "bias": ({"bias": "some"}, r"bias='some' is unknown\. Allowed: 'none', 'all', '(lsr|soka)_only'"),
    "layers pattern": ({"layers_pattern": "layers"}, r"layers_pattern has no effect without layers_to_transform"),
    "layers of a regex": ({"layers_to_transform": [0], "target_modules": ".*q"}, r"layers_to_transform has no effect"),
}


@pytest.mark.parametrize("case", COMMON)
def test_common_settings(method, case):
    settings, message = COMMON[case]
    with pytest.raises(ConfigError, match=message):
        method(**settings)


OF_ONE_METHOD = [
    (LsrConfig, {"separation_rank": 0}, ConfigError, r"separation_rank=0 is not allowed"),
    (LsrConfig, {"n_factors": 0}, ConfigError, r"n_factors=0 is not allowed"),
    (LsrConfig, {"factor_shapes": "square"}, ConfigError, r"factor_shapes='square' is not allowed.*'auto', or a dict"),
    (LsrConfig, {"factor_shapes": {768: (48, 15)}}, ShapeError, r"768: \(48, 15\), which is not 2 .*\(32, 24\)"),
    (LsrConfig, {"factor_shapes": {768: (768,)}}, ShapeError, r"768: \(768,\), which is not 2 factors"),
    (LsrConfig, {"factor_shapes": {6: (-2, -3)}}, ShapeError, r"6: \(-2, -3\), which is not 2 factors"),
    (LsrConfig, {"factor_shapes": {768.5: (32, 24)}}, ConfigError, r"factor_shapes=.* is not allowed"),
    (LsrConfig, {"factor_shapes": {768: (32.9, 24)}}, ConfigError, r"factor_shapes=.* is not allowed"),
    (LsrConfig, {"factor_shapes": {"x": (2, 3)}}, ConfigError, r"factor_shapes=.* is not allowed"),
    (LsrConfig, {"factor_shapes": {6: 3}}, ConfigError, r"factor_shapes=.* is not allowed"),
    (SokaConfig, {"rank_selection": "auto"}, ConfigError, r"rank_selection='auto' is unknown\. Allowed: 'fixed', .*"),
    (SokaConfig, {"energy_threshold": 0.5}, ConfigError, r"energy_threshold has no effect with rank_selection='fixed'"),
    (SokaConfig, {"rank_selection": "energy", "energy_threshold": 0}, ConfigError, r"energy_threshold=0 .*\(0, 1\]"),
    (SokaConfig, {"rank_selection": "energy", "energy_threshold": 2}, ConfigError, r"energy_threshold=2 .*\(0, 1\]"),
    (SokaConfig, {"budget": 100}, ConfigError, r"budget=100 and rank_selection='fixed' do not go together"),
    (SokaConfig, {"rank_selection": "budget"}, ConfigError, r"budget=None and rank_selection='budget' do not go"),
    (SokaConfig, {"rank_selection": "budget", "budget": -1}, ConfigError, r"budget=-1 is not allowed"),
    (SokaConfig, {"min_r": 2}, ConfigError, r"min_r=2 has no effect with rank_selection='fixed'"),
    (SokaConfig, {"rank_selection": "energy", "min_r": 9, "r": 8}, ConfigError, r"min_r=9 is above.*r=8"),
    (SokaConfig, {"factor_shape": "cube"}, ConfigError, r"factor_shape='cube' is not allowed. It is 'auto', 'square'"),
    (SokaConfig, {"factor_shape": 0}, ConfigError, r"factor_shape=0 is not allowed"),
    (SokaConfig, {"factor_shape": True}, ConfigError, r"factor_shape=True is not allowed"),
    (SokaConfig, {"factor_shape": (2, -3)}, ConfigError, r"factor_shape=\(2, -3\) is not allowed"),
    (SokaConfig, {"factor_shape": (2, 3, 4)}, ConfigError, r"factor_shape=\(2, 3, 4\) is not allowed"),
]


@pytest.mark.parametrize(("config_class", "settings", "error", "message"), OF_ONE_METHOD, ids=lambda v: str(v)[:60])
def test_settings_of_one_method(config_class, settings, error, message):
    """Before any model is seen."""
    with pytest.raises(error, match=message):
        config_class(**settings)


def test_integers_of_numpy(tmp_path):
    """They are integers, and become Python's: JSON knows no others."""
    two, six = np.int64(2), np.int32(6)
    lsr = LsrConfig(r=two, separation_rank=two, factor_shapes={six: (np.int64(3), two)}, rank_pattern={"q": two})
    soka = SokaConfig(r=two, factor_shape=(two, six))
    for config in (lsr, soka):
        config.save_pretrained(tmp_path)
        assert PeftConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert lsr.factor_shapes == {6: (3, 2)} and soka.factor_shape == (2, 6)
    assert SokaConfig(factor_shape=two).factor_shape == 2


# ------------------------------------------------------------------------------------------- errors that need the model

WITH_MODEL = {
    "shape": (
        SokaConfig(factor_shape=(5, 4), target_modules=TARGETS),
        r"q_proj is \(32, 32\); factor_shape \(5, 4\) does not divide out=32\. Nearest that do: \(4, 4\), \(8, 4\)",
    ),
    "p": (SokaConfig(factor_shape=3, target_modules=TARGETS), r"q_proj.* p = 3 does not divide both 32 and 32"),
    "budget": (
        SokaConfig(rank_selection="budget", budget=10, target_modules=TARGETS, modules_to_save=["lm_head"]),
        r"budget of 10 parameters is below",
    ),
    "layer": (LsrConfig(target_modules=["input_layernorm"], train_norms=False), r"input_layernorm is a LlamaRMSNorm"),
    "a layer among others": (
        LsrConfig(target_modules=["q_proj", "post_attention_layernorm", "v_proj"], modules_to_save=["lm_head"]),
        r"post_attention_layernorm is a LlamaRMSNorm",
    ),
    "gradient": (
        LsrConfig(init_weights="gradient", target_modules=TARGETS, train_norms=True),
        r"preprocess_gradient\(.*before get_peft_model",
    ),
}


def _requires_grad(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", WITH_MODEL)
def test_the_model_is_left_as_it_was(tiny, batch, case):
    """Its modules, which parameters train, its values; and the next, correct config works."""
    config, message = WITH_MODEL[case]
    base = tiny()
    base.model.embed_tokens.requires_grad_(False)
    modules, values, trainable = dict(base.named_modules()), base_weights(base), _requires_grad(base)
    expected = logits(base, batch)

    with pytest.raises(KrontuneError, match=message):
        get_peft_model(base, config)
    assert dict(base.named_modules()) == modules
    assert_same_tensors(base_weights(base), values)
    assert _requires_grad(base) == trainable
    assert not hasattr(base, "peft_config")
    assert torch.equal(logits(base, batch), expected)
    assert kron_layers(adapted(base, type(config)(target_modules=TARGETS)))


@pytest.mark.parametrize("case", ["shape", "budget", "layer", "a layer among others"])
def test_the_other_adapter_is_left_as_it_was(tiny, batch, method, case):
    """A second adapter that cannot be added leaves no trace, in layers and saved modules that the first one has."""
    bad, message = WITH_MODEL[case]
    good = type(bad)(target_modules=[*TARGETS, "o_proj"], modules_to_save=["lm_head"])
    model = adapted(tiny(), good)
    modules, trainable = dict(model.named_modules()), _requires_grad(model)
    state, targeted = model.state_dict(), list(model.base_model.targeted_module_names)
    expected = logits(model, batch)

    with pytest.raises(KrontuneError, match=message):
        model.add_adapter("bad", bad)
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    assert dict(model.named_modules()) == modules
    assert _requires_grad(model) == trainable
    assert_same_tensors(model.state_dict(), state)
    assert model.base_model.targeted_module_names == targeted
    assert torch.equal(logits(model, batch), expected)
    model.add_adapter("bad", type(bad)(target_modules=TARGETS, modules_to_save=["lm_head"]))
    model.set_adapter("bad")


def test_no_module_matched(tiny, method):
    base = tiny()
    with pytest.raises(ValueError, match=r"nothing.*not found in the base model"):
        adapted(base, method(target_modules=["nothing"]))
    with pytest.raises(ConfigError, match=r"target_modules=None .*'custom' has none\. Name the modules, or say"):
        adapted(nn.Sequential(nn.Linear(4, 4)), method())
    assert not kron_layers(base) and all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_or_inf_in_a_weight(tiny, method, value, dtype):
    base = tiny("llama", dtype)
    base.model.layers[1].self_attn.v_proj.weight.data[3, 5] = value
    with pytest.raises(ConfigError, match=r"weight of model\.layers\.1\.self_attn\.v_proj holds NaN or Inf.*exclude"):
        adapted(base, method(target_modules=TARGETS))
    assert not kron_layers(base)
    config = method(target_modules=TARGETS, exclude_modules=["layers.1.self_attn.v_proj"])
    assert len(kron_layers(adapted(base, config))) == 5  # what the message advises


def test_what_is_wasteful_or_cut_is_said(net):
    with pytest.warns(
        UserWarning, match=r"1 of 1 modules have more parameters than the LoRA.*layer has 256 against 128"
    ):
        adapted(net(nn.Linear(16, 16)), LsrConfig(r=4, separation_rank=8, target_modules=["layer"]))
    with pytest.warns(UserWarning, match=r"factor_shapes has no effect for \[768\].* There are \[4, 16, 24\]"):
        config = LsrConfig(separation_rank=2, factor_shapes={768: (48, 16), 24: (8, 3)}, target_modules=["layer"])
        adapted(net(nn.Linear(24, 16)), config)
    with pytest.warns(UserWarning, match=r"layer: r=9 Kronecker terms were asked for, and 4 of shape"):
        adapted(net(nn.Linear(4, 4)), SokaConfig(r=9, factor_shape="square", target_modules=["layer"]))


def test_errors_are_value_errors():
    """So that handlers for PEFT's own errors keep working."""
    assert issubclass(KrontuneError, ValueError)
    with pytest.raises(ValueError, match=re.escape("r=0 is not allowed")):
        LsrConfig(r=0)
