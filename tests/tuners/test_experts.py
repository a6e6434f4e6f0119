"""target_parameters: bare parameters, above all the 3-D weights of experts, several of them in one module."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn

from krontune import ConfigError
from tests.tuners.helpers import (
    adapted,
    adapter_tensors,
    assert_same_tensors,
    base_weights,
    kron_layers,
    logits,
    tolerance,
    train_a_little,
    train_steps,
    true_delta,
)

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]
#: target_modules=None would add the architecture's default ones.
EXPERTS = {"target_parameters": PARAMETERS, "target_modules": []}


def _dense(base: nn.Module, model: PeftModel, *adapters: str) -> nn.Module:
    """The base in float64 with every update added by hand."""
    dense = copy.deepcopy(base).double()
    dense.set_experts_implementation("eager")  # the default, a grouped GEMM, has no float64
    for name, layer in kron_layers(model.base_model.model).items():
        owner = dense.get_submodule(name.replace(".base_layer", ""))
        for adapter in adapters or ("default",):
            getattr(owner, layer.weight_name).data += true_delta(layer, adapter)
    return dense


@pytest.mark.parametrize("targets", [[], ["q_proj"]], ids=["experts", "experts and q_proj"])
@pytest.mark.parametrize("parameters", [PARAMETERS[:1], PARAMETERS], ids=["one", "three, two of them nested"])
def test_output_is_that_of_the_dense_weights(tiny, batch, variant, parameters, targets):
    base = tiny("mixtral")
    before = base_weights(base)
    model = adapted(copy.deepcopy(base), variant(target_parameters=parameters, target_modules=targets))
    assert len(kron_layers(model)) == 2 * (len(parameters) + len(targets))
    assert_same_tensors(base_weights(model), before)

    got = logits(model, batch)
    expected = logits(_dense(base, model), batch)
    torch.testing.assert_close(got.double(), expected, **tolerance(torch.float32, terms=4096))
    assert not torch.allclose(got, logits(base, batch), atol=1e-2)
    assert_same_tensors(base_weights(model), before)  # the forward parametrises and takes it back
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(base, batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_start_and_training(tiny, batch, method, dtype):
    base = tiny("mixtral", dtype)
    before = base_weights(base)
    expected = logits(base, batch)
    model = adapted(base, method(**EXPERTS), trained=False)
    assert torch.equal(logits(model, batch), expected)
    losses = train_steps(model, batch, lr=3e-2)
    assert losses[-1] < losses[0]
    assert_same_tensors(base_weights(model), before)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_every_expert_starts_from_its_own_weight(tiny, method):
    model = adapted(tiny("mixtral"), method(target_parameters=PARAMETERS[:1], target_modules=[]), trained=False)
    for layer in kron_layers(model).values():
        frozen = layer.factors("default")[-1] if "soka" in type(layer).__module__ else layer.factors("default")[0]
        assert frozen.shape[0] == 4
        assert all(not torch.equal(frozen[0], other) for other in frozen[1:])


def test_a_two_dimensional_parameter(net, method):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(12, 8))

        def forward(self, x):
            return x @ self.table.T

    base = net(Table())
    x, table = torch.randn(3, 8), base.layer.table.detach().clone()
    model = adapted(base, method(target_parameters=["layer.table"]))
    (layer,) = kron_layers(model).values()
    expected = x.double() @ (table.double() + true_delta(layer)).T
    torch.testing.assert_close(model(x).double(), expected, **tolerance(torch.float32))


def test_two_adapters(tiny, batch, method):
    base = tiny("mixtral")
    model = adapted(copy.deepcopy(base), method(**EXPERTS))
    model.add_adapter("other", method(**EXPERTS))
    train_a_little(model, "other", seed=1)
    for active in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(active)
        expected = logits(_dense(base, model, *active), batch)
        torch.testing.assert_close(logits(model, batch).double(), expected, **tolerance(torch.float32, terms=4096))
    model.delete_adapter("other")
    model.set_adapter("default")
    expected = logits(_dense(base, model), batch)
    torch.testing.assert_close(logits(model, batch).double(), expected, **tolerance(torch.float32, terms=4096))


def test_merging(tiny, batch, method):
    base = tiny("mixtral")
    before = base_weights(base)
    model = adapted(base, method(**EXPERTS))
    unmerged = logits(model, batch)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, batch), unmerged, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    assert_same_tensors(base_weights(model), before)
    assert torch.equal(logits(model, batch), unmerged)

    plain = model.merge_and_unload()
    assert not kron_layers(plain) and base_weights(plain).keys() == before.keys()
    torch.testing.assert_close(logits(plain, batch), unmerged, rtol=1e-3, atol=1e-4)


def test_unload(tiny, batch, method):
    base = tiny("mixtral")
    before, expected = base_weights(base), logits(base, batch)
    plain = adapted(base, method(**EXPERTS)).unload()
    assert not kron_layers(plain)
    assert_same_tensors(base_weights(plain), before)
    assert torch.equal(logits(plain, batch), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_reload(tiny, batch, method, tmp_path, low_cpu_mem_usage):
    base = tiny("mixtral")
    model = adapted(copy.deepcopy(base), method(**{**EXPERTS, "target_modules": ["q_proj"]}))
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same_tensors(adapter_tensors(again), adapter_tensors(model))
    assert torch.equal(logits(again, batch), expected)


def test_gradient_checkpointing(tiny, batch, method):
    start = adapted(tiny("mixtral"), method(**EXPERTS)).train()
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(start)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        model(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_errors(tiny, method):
    base = tiny("mixtral")
    before = base_weights(base)
    with pytest.raises(ConfigError, match=r"dropout=0\.1 cannot be applied to target_parameters"):
        method(**EXPERTS, dropout=0.1)
    with pytest.raises(ConfigError, match=r"target_parameters .* differ from"):
        model = adapted(copy.deepcopy(base), method(**EXPERTS))
        model.add_adapter("other", method(target_parameters=PARAMETERS[:1], target_modules=[]))
    with pytest.raises(ConfigError, match=r"(?s)target_parameters: weight has the shape \(32,\).*2-D parameters"):
        adapted(base, method(target_parameters=["input_layernorm.weight"], target_modules=[]))
    model = adapted(base, method(**EXPERTS))
    names = ["default", "__base__", "default"]
    with pytest.raises(ConfigError, match=r"adapter_names .* does not work with target_parameters"):
        model(torch.ones(3, 4, dtype=torch.long), adapter_names=names)
    assert_same_tensors(base_weights(model), before)


class Mixer(nn.Module):
    """As Mamba's: a linear beside a bare parameter."""

    def __init__(self):
        super().__init__()
        self.in_proj = nn.Linear(8, 12)
        self.A_log = nn.Parameter(torch.randn(12, 8))

    def forward(self, x):
        return self.in_proj(x) + x @ self.A_log.T


def test_a_linear_inside_the_owner_of_a_parameter(net, method, tmp_path):
    """Its path has a base_layer that its name has not; further adapters reach it, and files bring it back."""
    config = method(target_modules=["in_proj"], target_parameters=["layer.A_log"], rank_pattern={"layer.in_proj": 2})
    base, x = net(Mixer()), torch.randn(3, 8)
    model = adapted(copy.deepcopy(base), config)
    model.add_adapter("other", copy.deepcopy(config))
    train_a_little(model, "other", seed=1)
    for name in ("default", "other"):
        assert model.peft_config[name].resolved.keys() == {"layer.in_proj", "layer.A_log"}
        model.set_adapter(name)
        inner, outer = (one for _, one in sorted(kron_layers(model).items(), reverse=True))
        weight = base.layer.in_proj.weight.double() + true_delta(inner, name)
        expected = x.double() @ (weight + base.layer.A_log.double() + true_delta(outer, name)).T
        expected = expected + base.layer.in_proj.bias.double()
        torch.testing.assert_close(model(x).double(), expected, **tolerance(torch.float32))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    for name in ("default", "other"):
        model.set_adapter(name)
        again.set_adapter(name)
        assert_same_tensors(adapter_tensors(again, name), adapter_tensors(model, name))
        assert torch.equal(again(x), model(x))
    model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    plain = model.merge_and_unload(adapter_names=["sum"])
    assert not kron_layers(plain)
    again.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(plain(x), again(x), **tolerance(torch.float32))
