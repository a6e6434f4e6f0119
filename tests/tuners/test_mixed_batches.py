"""adapter_names=: every row of a batch through an adapter of its own, in forward and in generate."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from krontune import ConfigError
from tests.tuners.helpers import (
    TARGETS,
    adapted,
    kron_layers,
    logits,
    train_a_little,
)

NAMES = ["first", "__base__", "second"]


def _two_adapters(model, config, **other) -> PeftModel:
    from peft import get_peft_model

    model = get_peft_model(model, config, adapter_name="first").eval()
    model.add_adapter("second", type(config)(**{**config_fields(config), **other}))
    for seed, name in enumerate(("first", "second")):
        train_a_little(model, name, seed=seed, std=0.3)
    return model


def config_fields(config) -> dict:
    return {"r": config.r, "target_modules": config.target_modules, "modules_to_save": config.modules_to_save}


def _alone(model: PeftModel, name: str, call):
    """call() with one adapter active, or none."""
    if name == "__base__":
        with model.disable_adapter():
            return call()
    model.set_adapter(name)
    return call()


def _row(batch: dict, i: int) -> dict:
    return {key: value[i : i + 1] for key, value in batch.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_forward(tiny, batch, method, name):
    targets = {"llama": [*TARGETS, "embed_tokens"], "gpt2": ["c_attn", "wte"]}[name]
    model = _two_adapters(tiny(name), method(target_modules=targets), alpha=-0.8)
    mixed = logits(model, batch, adapter_names=NAMES)
    for i, adapter in enumerate(NAMES):
        alone = _alone(model, adapter, lambda i=i: logits(model, _row(batch, i)))
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[0], _alone(model, "second", lambda: model(**_row(batch, 0)).logits)[0], atol=1e-2)
    # The hooks are gone afterwards.
    model.set_adapter("second")
    torch.testing.assert_close(model(**_row(batch, 2)).logits, mixed[2:], rtol=1e-4, atol=1e-5)


def test_convolution(net, method):
    model = _two_adapters(net(torch.nn.Conv2d(4, 6, 3, padding=1)), method(target_modules=["layer"]))
    x = torch.randn(3, 4, 5, 5)
    mixed = model(x, adapter_names=NAMES)
    for i, adapter in enumerate(NAMES):
        alone = _alone(model, adapter, lambda i=i: model(x[i : i + 1]))
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_adapters_on_different_modules(tiny, batch, method):
    """A row passes unchanged through a layer that its adapter does not have."""
    model = adapted(tiny(), method(target_modules=["q_proj"]))
    model.add_adapter("second", method(target_modules=["v_proj", "down_proj"]))
    train_a_little(model, "second")
    names = ["default", "__base__", "second"]
    mixed = logits(model, batch, adapter_names=names)
    for i, adapter in enumerate(names):
        alone = _alone(model, adapter, lambda i=i: logits(model, _row(batch, i)))
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_saved_modules(tiny, batch, method):
    """Heads and norms that are trained whole follow the row, too."""
    config = method(target_modules=["query", "value"], modules_to_save=["classifier"], train_norms=True)
    model = _two_adapters(tiny("bert"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.second" in name:
                parameter.mul_(1.5)
    inputs = {"input_ids": batch["input_ids"]}
    mixed = logits(model, inputs, adapter_names=NAMES)
    for i, adapter in enumerate(NAMES):
        alone = _alone(model, adapter, lambda i=i: logits(model, _row(inputs, i)))
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-4, atol=1e-5)


GENERATION = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "several sequences": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
}


@pytest.mark.parametrize("way", GENERATION)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generate(tiny, batch, method, name, way):
    """Also with beams, which repeat the decoder's rows, and with an encoder, whose rows they do not repeat."""
    targets = {"llama": TARGETS, "t5": ["q", "v", "wi"]}[name]
    model = _two_adapters(tiny(name), method(target_modules=targets))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    settings = {**GENERATION[way], "max_new_tokens": 6, "min_new_tokens": 6}
    mixed = model.generate(**inputs, adapter_names=NAMES, **settings)
    rows = settings.get("num_return_sequences", 1)
    for i, adapter in enumerate(NAMES):
        alone = _alone(model, adapter, lambda i=i: model.generate(**_row(inputs, i), **settings))
        assert torch.equal(mixed[i * rows : (i + 1) * rows], alone), adapter


def test_generation_config_object(tiny, batch, method):
    """Beams may also come from a GenerationConfig."""
    from transformers import GenerationConfig

    model = _two_adapters(tiny(), method(target_modules=TARGETS))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    by_config = GenerationConfig(num_beams=3, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=2)
    got = model.generate(**inputs, adapter_names=NAMES, generation_config=by_config)
    expected = model.generate(
        **inputs, adapter_names=NAMES, num_beams=3, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=2
    )
    assert torch.equal(got, expected)


def test_beams_of_the_model_itself(tiny, batch, method):
    """What the user's GenerationConfig leaves open comes from the model's; a forward is not repeated by either."""
    from transformers import GenerationConfig

    base = tiny()
    base.generation_config.num_beams = 3
    model = _two_adapters(base, method(target_modules=TARGETS))
    inputs = {key: batch[key][:2] for key in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 4, "min_new_tokens": 4}
    names = ["first", "second"]
    got = model.generate(**inputs, adapter_names=names, generation_config=GenerationConfig(**settings))
    for i, adapter in enumerate(names):
        alone = _alone(model, adapter, lambda i=i: model.generate(**_row(inputs, i), num_beams=3, **settings))
        assert torch.equal(got[i : i + 1], alone), adapter
    assert "generate" not in vars(base)
    six = batch["input_ids"].repeat(2, 1)
    with pytest.raises(ConfigError, match="2 entries for a batch of 6"):
        model(input_ids=six, adapter_names=names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["first", "nobody", "second"], r"\['nobody'\].*Known are \['first', 'second'\]"),
        (["first", "second"], "2 entries for a batch of 3"),
        (["first"] * 4, "4 entries for a batch of 3"),
    ],
)
def test_wrong_names(tiny, batch, method, names, message):
    model = _two_adapters(tiny(), method(target_modules=TARGETS))
    with pytest.raises(ConfigError, match=message):
        model(**batch, adapter_names=names)
    assert not any(layer._forward_pre_hooks for layer in kron_layers(model).values())


def test_in_training_or_merged(tiny, batch, method):
    model = _two_adapters(tiny(), method(target_modules=TARGETS))
    model.train()
    with pytest.raises(ConfigError, match=r"eval\(\)"):
        model(**batch, adapter_names=NAMES)
    model.eval().merge_adapter()
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        model(**batch, adapter_names=NAMES)


def test_disabled(tiny, batch, method):
    base = tiny()
    expected = logits(base, batch)
    model = _two_adapters(base, method(target_modules=TARGETS))
    with model.disable_adapter():
        assert torch.equal(logits(model, batch, adapter_names=NAMES), expected)
