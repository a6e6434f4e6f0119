"""An LSR adapter is a LoRA of rank r; both methods convert to one."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, convert_to_lora, get_peft_model, set_peft_model_state_dict

from krontune import LsrConfig, SokaConfig
from tests.tuners.helpers import TARGETS, adapted, kron_layers, logits, train_a_little


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("alpha", [1.0, -2.5])
def test_lsr_equals_the_lora_of_its_factors(tiny, batch, name, alpha):
    """PEFT's own LoRA with A and B from lora_factors: equal outputs, and equal gradients of the inputs."""
    targets = {"llama": TARGETS, "gpt2": ["c_attn", "c_fc"]}[name]
    lsr = adapted(tiny(name), LsrConfig(r=6, separation_rank=2, alpha=alpha, target_modules=targets))
    lora = get_peft_model(tiny(name), LoraConfig(r=6, lora_alpha=6 * alpha, target_modules=targets)).eval()
    for path, layer in kron_layers(lsr).items():
        A, B = layer.lora_factors("default")
        target = lora.get_submodule(path)
        target.lora_A["default"].weight.data.copy_(A)
        target.lora_B["default"].weight.data.copy_(B)
    torch.testing.assert_close(logits(lsr, batch), logits(lora, batch), rtol=1e-4, atol=1e-4)

    gradients = []
    for model in (lsr, lora):
        embedding = model.get_input_embeddings()
        inputs = embedding(batch["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=inputs, labels=batch["labels"]).loss.backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_lora_factors_of_experts(tiny):
    config = LsrConfig(r=4, separation_rank=2, target_parameters=["experts.down_proj"], target_modules=[])
    for layer in kron_layers(adapted(tiny("mixtral"), config)).values():
        A, B = layer.lora_factors("default")
        assert A.shape == (4, 4, 24) and B.shape == (4, 32, 4)
        torch.testing.assert_close(layer.scaling["default"] * B @ A, layer.get_delta_weight("default"))


def _convert():
    return pytest.importorskip(
        "peft.tuners.lora.conversion", reason="this PEFT has no conversion to LoRA"
    ).convert_to_lora


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "config",
    [
        LsrConfig(r=4, separation_rank=2),
        SokaConfig(r=2, factor_shape=2, init_weights="zero"),  # matrix rank up to K * p^2 = 8
    ],
    ids=["lsr", "soka"],
)
def test_converts_with_pefts_own_converter(tiny, batch, config, name):
    config = copy.deepcopy(config)
    config.target_modules = {"llama": set(TARGETS), "gpt2": {"c_attn"}}[name]
    model = adapted(tiny(name), config)
    assert model.supports_lora_conversion()
    lora_config, state_dict = convert_to_lora(model, rank=8)
    lora = get_peft_model(tiny(name), lora_config).eval()
    set_peft_model_state_dict(lora, state_dict)
    torch.testing.assert_close(logits(lora, batch), logits(model, batch), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("layer", "supported"),
    [
        (torch.nn.Linear(8, 8), True),
        (torch.nn.Embedding(8, 8), False),
        (torch.nn.Conv2d(4, 4, 3), False),
    ],
    ids=["linear", "embedding", "conv"],
)
def test_what_converts(net, method, layer, supported):
    model = adapted(net(layer), method(target_modules=["layer"]))
    assert model.supports_lora_conversion() is supported


def test_a_second_adapter_converts(tiny, batch, method):
    model = adapted(tiny(), method(target_modules=TARGETS))
    model.add_adapter(
        "other", method(r=1, init_weights="zero", target_modules=TARGETS)
    )  # of matrix rank 1, or p^2 = 16
    train_a_little(model, "other", seed=3)
    model.set_adapter("other")
    lora_config, state_dict = convert_to_lora(model, rank=16, adapter_name="other")
    lora = get_peft_model(tiny(), lora_config).eval()
    set_peft_model_state_dict(lora, state_dict)
    torch.testing.assert_close(logits(lora, batch), logits(model, batch), rtol=1e-3, atol=1e-3)
