"""What each setting of a config selects or changes, and what PEFT's own settings keep meaning."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from krontune import ConfigError, LsrConfig, SokaConfig
from krontune.tuners import _peft
from tests.tuners.helpers import (
    OLD_PEFT,
    TARGETS,
    adapted,
    assert_same_tensors,
    base_weights,
    kron_layers,
    logits,
    train_steps,
    true_delta,
)

SELECTIONS = {
    "names": {"target_modules": TARGETS},
    "regex": {"target_modules": r".*layers\.1\.self_attn\.[qk]_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "full name": {"target_modules": ["model.layers.0.mlp.up_proj"]},
    "default": {},
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["q_proj", "layers.0.mlp.up_proj"]},
    "exclude regex": {"target_modules": TARGETS, "exclude_modules": r".*layers\.0\..*"},
    "layers": {"target_modules": TARGETS, "layers_to_transform": [1]},
    "one layer": {"target_modules": TARGETS, "layers_to_transform": 1, "layers_pattern": "layers"},
    "saved": {"target_modules": "all-linear", "modules_to_save": ["q_proj"]},
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_same_modules_as_lora(tiny, method, selection):
    """PEFT's own LoRA is the truth about what a selection means."""
    ours = adapted(tiny(), method(**SELECTIONS[selection]), trained=False)
    lora = get_peft_model(tiny(), LoraConfig(**SELECTIONS[selection]))
    expected = {name for name, module in lora.named_modules() if isinstance(module, _peft.BaseTunerLayer)}
    assert set(kron_layers(ours)) == expected and expected
    assert set(ours.peft_config["default"].resolved) == {n.removeprefix("base_model.model.") for n in expected}


def test_rank_pattern(tiny, method):
    pattern = {r"layers\.1\.self_attn\.q_proj": 2, "down_proj": 1}
    model = adapted(tiny(), method(r=4, target_modules=TARGETS, rank_pattern=pattern))
    layers = kron_layers(model.base_model.model.model.layers)
    assert {name: layer.specs["default"].r for name, layer in layers.items()} == {
        "0.self_attn.q_proj": 4,
        "0.self_attn.v_proj": 4,
        "0.mlp.down_proj": 1,
        "1.self_attn.q_proj": 2,
        "1.self_attn.v_proj": 4,
        "1.mlp.down_proj": 1,
    }


def test_alpha_pattern(tiny, method):
    plain = adapted(tiny(), method(target_modules=TARGETS))
    scaled = adapted(tiny(), method(target_modules=TARGETS, alpha=3.0, alpha_pattern={"v_proj": -0.5}))
    scaled.load_state_dict(plain.state_dict())
    for (name, one), two in zip(kron_layers(plain).items(), kron_layers(scaled).values(), strict=True):
        factor = -0.5 if "v_proj" in name else 3.0
        torch.testing.assert_close(true_delta(two), factor * true_delta(one))


def test_a_pattern_that_matches_nothing_warns(tiny, method):
    if OLD_PEFT:
        pytest.skip("PEFT before 0.21 does not look at patterns that match nothing")
    with pytest.warns(RuntimeWarning, match="alpha_pattern.*did not match"):
        adapted(tiny(), method(target_modules=TARGETS, alpha_pattern={"nothing": 2.0}))


def test_modules_to_save(tiny, batch, method, tmp_path):
    base = tiny()
    before, expected = base_weights(base), logits(base, batch)
    model = adapted(base, method(target_modules=["q_proj"], modules_to_save=["lm_head"]), trained=False)
    train_steps(model, batch)
    assert_same_tensors(base_weights(model), before)
    head = model.base_model.model.lm_head
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), expected)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(logits(again, batch), logits(model, batch))


@pytest.mark.parametrize("which", ["all", "only"])
def test_bias(tiny, batch, method, tmp_path, which):
    bias = which if which == "all" else f"{method().peft_type.value.lower()}_only"
    if OLD_PEFT:
        with pytest.raises(ConfigError, match=r"needs peft >= 0\.21"):
            method(bias=bias)
        return
    base = tiny("bert")
    model = adapted(base, method(target_modules=["query"], bias=bias, task_type="SEQ_CLS"), trained=False)
    biases = {n: p.requires_grad for n, p in model.base_model.model.bert.named_parameters() if n.endswith("bias")}
    assert [n for n in biases if biases[n]] == [n for n in biases if which == "all" or "query" in n]
    train_steps(model, {"input_ids": batch["input_ids"], "labels": torch.tensor([0, 1, 2])})
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("bert"), tmp_path)
    inputs = {"input_ids": batch["input_ids"]}
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_bias_names(method):
    with pytest.raises(ConfigError, match="bias='lora_only' is unknown"):
        method(bias="lora_only")


# --------------------------------------------------------------------------------------------------------- train_norms

NORMS = {"llama": 5, "gpt2": 5, "t5": 7, "bert": 3, "mixtral": 5}


def _norms(model) -> dict[str, _peft.ModulesToSaveWrapper]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _peft.ModulesToSaveWrapper) and "norm" in type(module.original_module).__name__.lower()
    }


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_found(tiny, method, name):
    targets = {"bert": ["query"], "gpt2": ["c_attn"], "t5": ["q"]}.get(name, ["q_proj"])
    model = adapted(tiny(name), method(target_modules=targets, train_norms=True), trained=False)
    norms = _norms(model)
    assert len(norms) == NORMS[name]
    for norm in norms.values():
        assert all(p.requires_grad for p in norm.modules_to_save["default"].parameters())
        assert not any(p.requires_grad for p in norm.original_module.parameters())


@pytest.mark.parametrize("layer", ["BatchNorm2d", "GroupNorm", "InstanceNorm2d"])
def test_torch_norms(method, layer):
    norm = {
        "BatchNorm2d": torch.nn.BatchNorm2d(6),
        "GroupNorm": torch.nn.GroupNorm(2, 6),
        "InstanceNorm2d": torch.nn.InstanceNorm2d(6, affine=True),
    }[layer]
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), norm, torch.nn.LayerNorm(2, elementwise_affine=False))
    model = adapted(model, method(target_modules=["0"], train_norms=True), trained=False)
    assert list(_norms(model)) == ["base_model.model.1"]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_norms_are_trained_saved_and_switched_off(tiny, batch, method, tmp_path, low_cpu_mem_usage):
    base = tiny()
    before, expected = base_weights(base), logits(base, batch)
    config = method(target_modules=TARGETS, train_norms=True, modules_to_save=["lm_head"])
    model = adapted(base, config, trained=False)
    assert config.modules_to_save == ["lm_head"]
    train_steps(model, batch)
    assert_same_tensors(base_weights(model), before)
    for norm in _norms(model).values():
        assert not torch.equal(norm.modules_to_save["default"].weight, norm.original_module.weight)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), expected)

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert len(_norms(again)) == NORMS["llama"]
    assert torch.equal(logits(again, batch), logits(model, batch))
    again.save_pretrained(tmp_path / "again")  # names do not pile up
    reread = type(config).from_pretrained(tmp_path / "again").modules_to_save
    assert sorted(reread) == sorted(model.peft_config["default"].modules_to_save) and len(reread) == 6


def test_norms_of_a_second_adapter(tiny, batch, method):
    model = adapted(tiny(), method(target_modules=TARGETS, train_norms=True))
    model.add_adapter("plain", method(target_modules=TARGETS))
    model.add_adapter("other", method(target_modules=TARGETS, train_norms=True))
    with torch.no_grad():
        for norm in _norms(model).values():
            assert set(norm.modules_to_save) == {"default", "other"}
            norm.modules_to_save["other"].weight.mul_(2)
    outputs = {}
    for name in ("default", "plain", "other", "default"):
        model.set_adapter(name)
        got = logits(model, batch)
        assert torch.equal(outputs.setdefault(name, got), got)
    assert torch.equal(outputs["plain"], logits(tiny(), batch))
    assert not torch.allclose(outputs["default"], outputs["other"])
    model.delete_adapter("other")
    assert all(set(norm.modules_to_save) == {"default"} for norm in _norms(model).values())


def test_norms_of_a_classifier(tiny, batch, method, tmp_path):
    """PEFT saves the head of a classifier as well, of its own accord."""
    model = adapted(tiny("bert"), method(target_modules=["query", "value"], train_norms=True, task_type="SEQ_CLS"))
    inputs = {"input_ids": batch["input_ids"]}
    train_steps(model, {**inputs, "labels": torch.tensor([0, 1, 2])})
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("bert"), tmp_path)
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert not torch.equal(logits(tiny("bert"), inputs), logits(model, inputs))


def test_norms_inside_a_saved_module(method):
    """A norm inside a module that is saved whole is saved with it, once."""
    head = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(8, 8), "norm": torch.nn.LayerNorm(8), "head": head})
    model = get_peft_model(model, method(target_modules=["body"], modules_to_save=["head"], train_norms=True))
    wrappers = {n for n, m in model.named_modules() if isinstance(m, _peft.ModulesToSaveWrapper)}
    assert wrappers == {"base_model.model.norm", "base_model.model.head"}
    model.add_adapter("other", method(target_modules=["body"], modules_to_save=["head"], train_norms=True))
    assert wrappers == {n for n, m in model.named_modules() if isinstance(m, _peft.ModulesToSaveWrapper)}


def test_no_norms(net, method):
    with pytest.raises(ConfigError, match="no normalisation layer"):
        adapted(net(torch.nn.Linear(8, 8)), method(target_modules=["layer"], train_norms=True))


@pytest.mark.parametrize(
    ("config", "m", "n", "expected"),
    [
        (LsrConfig(r=4, factor_shapes={768: (48, 16)}), 768, 512, ((2, 2), (32, 16), (48, 16))),
        (LsrConfig(r=6, factor_shapes={6: (1, 6)}), 7, 12, ((1, 6), (4, 3), (7, 1))),
        (LsrConfig(r=8, n_factors=3), 64, 30, ((2, 2, 2), (5, 3, 2), (4, 4, 4))),
        (SokaConfig(), 768, 512, ((192, 4), (4, 128))),
        (SokaConfig(factor_shape="square"), 768, 512, ((32, 32), (24, 16))),
        (SokaConfig(factor_shape=2), 768, 512, ((384, 2), (2, 256))),
        (SokaConfig(factor_shape=(6, 8)), 768, 512, ((6, 8), (128, 64))),
        (SokaConfig(), 7, 9, ((7, 1), (1, 9))),
    ],
    ids=str,
)
def test_factor_shapes(config, m, n, expected):
    spec = config.spec_for(m, n)
    names = ("rank_factors", "in_factors", "out_factors") if isinstance(config, LsrConfig) else ("left", "right")
    assert tuple(getattr(spec, name) for name in names) == expected
    assert spec.matrix_shape == (m, n)
