"""Several adapters on one model: switching, several at once, trainability, deletion, and joining them into one."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn

from krontune import ConfigError, LsrConfig, SokaConfig
from tests.tuners.helpers import (
    TARGETS,
    adapted,
    adapter_tensors,
    assert_same_tensors,
    kron_layers,
    logits,
    tolerance,
    train_a_little,
    train_steps,
    true_delta,
)

SUM = tolerance(torch.float32, terms=4096)


@pytest.fixture
def two(tiny, method):
    """A model with the trained adapters "default" and "other", which differ in every setting; "default" is active."""
    model = adapted(tiny(), method(target_modules=TARGETS))
    model.add_adapter("other", method(r=2, alpha=-0.5, target_modules=["v_proj", "o_proj"]))
    train_a_little(model, "other", seed=1)
    return model


def _dense_logits(model: PeftModel, base: torch.nn.Module, batch: dict, weights: dict[str, float]) -> torch.Tensor:
    """Of the base in float64 with sum_a weights[a] * dW_a added by hand."""
    dense = copy.deepcopy(base).double()
    for name, layer in kron_layers(model.base_model.model).items():
        for adapter, weight in weights.items():
            if adapter in layer.specs:
                dense.get_submodule(name).weight.data += weight * true_delta(layer, adapter)
    return logits(dense, batch)


def test_switching(tiny, batch, two):
    for active in ("default", "other", "default"):
        two.set_adapter(active)
        expected = _dense_logits(two, tiny(), batch, {active: 1})
        torch.testing.assert_close(logits(two, batch).double(), expected, **SUM)


def test_several_active_at_once(tiny, batch, two):
    two.base_model.set_adapter(["default", "other"])
    expected = _dense_logits(two, tiny(), batch, {"default": 1, "other": 1})
    torch.testing.assert_close(logits(two, batch).double(), expected, **SUM)
    with two.disable_adapter():
        assert torch.equal(logits(two, batch), logits(tiny(), batch))
    torch.testing.assert_close(logits(two, batch).double(), expected, **SUM)


def test_only_the_active_adapter_trains(batch, two):
    two.set_adapter("other")
    before = adapter_tensors(two, "default")
    moved = adapter_tensors(two, "other")
    train_steps(two, batch)
    assert_same_tensors(adapter_tensors(two, "default"), before)
    assert any(not torch.equal(t, moved[n]) for n, t in adapter_tensors(two, "other").items())
    trainable = [n for n, p in two.named_parameters() if p.requires_grad]
    assert trainable and all(".other" in name for name in trainable)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_added_adapter_does_not_train(tiny, method, dtype):
    """Until it is activated; on a half-precision base, too, where PEFT casts it after it is made."""
    model = adapted(tiny("llama", dtype), method(target_modules=TARGETS))
    model.add_adapter("other", method(target_modules=TARGETS))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable and all(".default" in name for name in trainable)
    model.add_weighted_adapter(["default", "other"], [1, 1], "sum")
    assert trainable == [n for n, p in model.named_parameters() if p.requires_grad]


def test_delete(tiny, batch, two):
    two.delete_adapter("default")
    assert list(two.peft_config) == ["other"]
    two.set_adapter("other")
    expected = _dense_logits(two, tiny(), batch, {"other": 1})
    torch.testing.assert_close(logits(two, batch).double(), expected, **SUM)
    for layer in kron_layers(two).values():
        assert "default" not in layer.specs and "default" not in layer.scaling
    assert not any("default" in name for name in two.state_dict())


def test_delete_and_add_under_the_same_name(tiny, batch, two, method):
    two.delete_adapter("other")
    two.add_adapter("other", method(target_modules=TARGETS))
    two.set_adapter("other")
    assert torch.equal(logits(two, batch), logits(tiny(), batch))


def test_adapters_do_not_share_a_config(tiny, batch, method):
    """One config object serves two adapters and two models, and is itself never written to."""
    config = method(target_modules=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 1})
    before = copy.deepcopy(config)
    first = adapted(tiny(), config)
    first.add_adapter("other", config)
    wider = adapted(tiny("gpt2"), method(), trained=False)  # another architecture
    second = adapted(tiny(), config)
    before.base_model_name_or_path = config.base_model_name_or_path  # PEFT's own get_peft_model writes this one
    assert config == before and config.resolved is None
    assert first.peft_config["default"] is not first.peft_config["other"]
    for model in (first, second, wider):
        for c in model.peft_config.values():
            assert c is not config and c.resolved
    assert first.peft_config["default"].resolved == second.peft_config["default"].resolved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_config_of_an_adapter_makes_a_copy_of_it(tiny, batch, method, dtype):
    """As TRL makes its reference adapters: the copy has the same bits, also the frozen ones, and does not train."""
    model = adapted(tiny("llama", dtype), method(target_modules=TARGETS, train_norms=True))
    with torch.no_grad():
        model.base_model.model.model.norm.modules_to_save["default"].weight.mul_(1.5)
    model.add_adapter("ref", model.peft_config["default"])
    expected = logits(model, batch)
    copied = adapter_tensors(model, "ref")
    assert_same_tensors(copied, adapter_tensors(model))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable and not any(".ref" in name for name in trainable)
    train_steps(model, batch)
    assert_same_tensors(adapter_tensors(model, "ref"), copied)
    assert not torch.equal(logits(model, batch), expected)
    model.set_adapter("ref")
    assert torch.equal(logits(model, batch), expected)


def test_status_and_printing(two, capsys):
    two.print_trainable_parameters()
    assert "trainable params" in capsys.readouterr().out
    status = two.get_model_status()
    assert status.active_adapters == ["default"] and sorted(status.available_adapters) == ["default", "other"]
    assert status.peft_types == {"default": two.peft_type.value, "other": two.peft_type.value}
    assert status.num_adapter_layers == 8
    assert "separation_rank" in str(two) or "SokaSpec" in str(two)


# ------------------------------------------------------------------------------------------------- add_weighted_adapter


def _delta(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    return {name: true_delta(layer, adapter) for name, layer in kron_layers(model).items() if adapter in layer.specs}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", [(0.7, -1.3), (1.0, 1.0), (0.1, 0.0)], ids=str)
def test_weighted_adapter_is_the_exact_sum(tiny, batch, method, weights, dtype):
    """Different ranks, alphas and targets; in float32 whatever the base, as the adapters themselves."""
    model = adapted(tiny("llama", dtype), method(target_modules=TARGETS))
    other = method(r=method().r * 2, alpha=-0.37, target_modules=["v_proj", "o_proj"])
    model.add_adapter("other", other)
    train_a_little(model, "other", seed=1)
    model.add_weighted_adapter(["default", "other"], list(weights), "sum")

    deltas = [_delta(model, adapter) for adapter in ("default", "other")]
    joined = _delta(model, "sum")
    assert joined.keys() == deltas[0].keys() | deltas[1].keys()
    for name, got in joined.items():
        expected = sum(w * d[name] for w, d in zip(weights, deltas, strict=True) if name in d)
        scale = max(float(d[name].abs().max()) for d in deltas if name in d)
        torch.testing.assert_close(got / scale, expected / scale, **tolerance(torch.float32))
    model.set_adapter("sum")
    assert torch.isfinite(logits(model, batch)).all()


@pytest.mark.parametrize("combination_type", ["linear", "cat"])
def test_weighted_adapter_saves_and_reloads(tiny, batch, method, tmp_path, combination_type):
    """Also where the adapters have different modules, so that neither's target_modules are those of the sum."""
    model = adapted(tiny(), method(target_modules=TARGETS, layers_to_transform=[0]))
    model.add_adapter("other", method(r=method().r * 2, target_modules=["o_proj", "v_proj"]))
    train_a_little(model, "other", seed=2)
    model.add_weighted_adapter(["default", "other"], [0.3, 1.7], "sum", combination_type=combination_type)
    model.set_adapter("sum")
    expected = logits(model, batch)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(tiny(), tmp_path / "sum")
    assert torch.equal(logits(again, batch), expected)


def test_weighted_adapter_of_modules_that_are_called_alike(method, tmp_path):
    """`lin` alone was adapted; a module whose name ends alike is not, on the way back either."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(12, 12)
            self.block = nn.ModuleDict({"lin": nn.Linear(12, 12)})

        def forward(self, x):
            return self.block["lin"](self.lin(x))

    base, x = Net(), torch.randn(3, 12)
    model = adapted(copy.deepcopy(base), method(target_modules=r"lin"))
    model.base_model.add_weighted_adapter(["default"], [2.0], "sum")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(base, tmp_path / "sum")
    with torch.no_grad():  # with gradients the order of summation may be another
        assert torch.equal(again(x), model(x))


def test_weighted_adapter_of_experts(tiny, batch, method, tmp_path):
    config = method(target_parameters=["experts.gate_up_proj", "experts.down_proj"], target_modules=[])
    model = adapted(tiny("mixtral"), config)
    model.add_adapter("other", config)
    train_a_little(model, "other", seed=1)
    model.add_weighted_adapter(["default", "other"], [2.0, -1.0], "sum")
    first, second, joined = (_delta(model, adapter) for adapter in ("default", "other", "sum"))
    assert len(joined) == 4
    for name, got in joined.items():
        torch.testing.assert_close(got, 2 * first[name] - second[name], **SUM)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(tiny("mixtral"), tmp_path / "sum")
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_weighted_adapter_of_norms(tiny, batch, method):
    """Modules that are trained whole are averaged as the updates are: N0 + sum_i w_i (N_i - N0)."""
    base = tiny()
    config = method(target_modules=["q_proj"], train_norms=True)
    model = adapted(base, config)
    model.add_adapter("other", config)
    norm = model.base_model.model.model.norm
    with torch.no_grad():
        norm.modules_to_save["default"].weight += 0.5
        norm.modules_to_save["other"].weight *= 3
    start = norm.original_module.weight
    model.add_weighted_adapter(["default", "other"], [0.7, -1.3], "sum")
    expected = start + 0.7 * 0.5 - 1.3 * 2 * start
    torch.testing.assert_close(norm.modules_to_save["sum"].weight, expected)
    model.set_adapter("sum")
    assert norm.active_adapters == ["sum"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["default", "nobody"], [1, 1], "sum"), r"\['nobody'\] do not exist"),
        ((["default"], [1], "other"), "'other' exists already"),
        ((["default"], [1, 2], "sum"), "1 adapters and 2 weights"),
        (([], [], "sum"), "0 adapters and 0 weights"),
        ((["default"], [1], "sum", "svd"), "combination_type='svd' is unknown"),
        ((["default"], [float("nan")], "sum"), "finite"),
    ],
)
def test_weighted_adapter_errors(two, arguments, message):
    with pytest.raises(ConfigError, match=message):
        two.add_weighted_adapter(*arguments)
    assert list(two.peft_config) == ["default", "other"]


@pytest.mark.parametrize(
    "configs",
    [
        [LsrConfig(r=4, separation_rank=2, target_modules=["q_proj"], n_factors=d) for d in (2, 3)],
        [SokaConfig(target_modules=["q_proj"], factor_shape=p) for p in (1, 4)],
    ],
    ids=["lsr", "soka"],
)
def test_adapters_that_cannot_be_joined(tiny, configs):
    model = adapted(tiny(), configs[0])
    model.add_adapter("other", configs[1])
    with pytest.raises(ConfigError, match="can be joined where"):
        model.add_weighted_adapter(["default", "other"], [1, 1], "sum")
    assert list(model.peft_config) == ["default", "other"]
    assert all("sum" not in layer.specs for layer in kron_layers(model).values())
