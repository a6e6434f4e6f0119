"""An adapter on a base model that it was not made for: an error or a warning that names what differs."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig

from krontune import CheckpointError
from krontune.tuners.checkpoint import fingerprint
from tests.tuners.conftest import VOCAB
from tests.tuners.helpers import (
    TARGETS,
    adapted,
    kron_layers,
    logits,
)


@pytest.fixture
def folder(tiny, method, tmp_path) -> str:
    adapted(tiny(), method(target_modules=TARGETS)).save_pretrained(tmp_path)
    return str(tmp_path)


def _llama(**changes):
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**sizes, **changes}))


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (lambda: _llama(num_hidden_layers=3), r"unknown to the adapter.*model\.layers\.2\."),
        (lambda: _llama(num_hidden_layers=1), r"missing in this model.*model\.layers\.1\."),
        (lambda: _llama(intermediate_size=96), r"down_proj is \(32, 96\) here and was \(32, 48\)"),
        (lambda: _llama(num_key_value_heads=4), r"v_proj is \(32, 32\) here and was \(16, 32\)"),
    ],
    ids=["deeper", "shallower", "wider", "more heads"],
)
def test_another_architecture(folder, other, names):
    base = other()
    with pytest.raises(CheckpointError, match=f"(?s)another architecture.*{names}"):
        PeftModel.from_pretrained(base, folder)
    assert not kron_layers(base) and not hasattr(base, "peft_config")


def test_onto_a_model_that_has_an_adapter(tiny, method, folder):
    """load_adapter gives the same error, and the model keeps the adapter it had."""
    model = adapted(_llama(intermediate_size=96), method(target_modules=TARGETS))
    with pytest.raises(CheckpointError, match="another architecture"):
        model.load_adapter(folder, "other")
    assert list(model.peft_config) == ["default"]
    assert all(list(layer.specs) == ["default"] for layer in kron_layers(model).values())


def test_other_values(folder):
    with pytest.warns(
        UserWarning, match=r"6 of 6 adapted modules differ, for instance model\.layers\.0\..*another model"
    ):
        PeftModel.from_pretrained(_llama(), folder)


def test_one_changed_weight(tiny, folder):
    base = tiny()
    base.model.layers[1].self_attn.v_proj.weight.data *= 1.5
    with pytest.warns(
        UserWarning, match=r"1 of 6 adapted modules differ, for instance model\.layers\.1\.self_attn\.v_proj"
    ):
        PeftModel.from_pretrained(base, folder)


def test_merged_base(tiny, method, folder):
    """The usual mistake: the adapter is put on a base that it has been merged into."""
    merged = PeftModel.from_pretrained(tiny(), folder).merge_and_unload()
    with pytest.warns(UserWarning, match="6 of 6 adapted modules differ.*adapter merged into it"):
        PeftModel.from_pretrained(merged, folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_base_in_any_float_dtype_is_no_difference(tiny, batch, folder, dtype):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*base model")
        model = PeftModel.from_pretrained(tiny("llama", dtype), folder)
    assert torch.isfinite(logits(model, batch)).all()


def test_other_values_in_another_dtype(folder):
    with pytest.warns(UserWarning, match="6 of 6 adapted modules differ"):
        PeftModel.from_pretrained(_llama().bfloat16(), folder)


def test_another_storage(tiny, folder, monkeypatch):
    """Quantised differently: named with both storages, without any quantisation library here."""
    monkeypatch.setattr("krontune.tuners.base_layer.storage_of", lambda weight, backend: "some 3-bit format")
    with pytest.warns(UserWarning, match=r"stored differently.*6 of 6.*down_proj is some 3-bit format and was float32"):
        PeftModel.from_pretrained(tiny(), folder)


def test_setting_resolved_to_none_starts_afresh(method, folder):
    """What the error advises works."""
    config = type(method()).from_pretrained(folder)
    config.resolved = None
    model = adapted(_llama(num_hidden_layers=3), config)
    assert len(kron_layers(model)) == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_fingerprint(dtype):
    """Sees a change of any sampled entry; does not see the layout in memory."""
    weight = torch.randint(-100, 100, (20, 30)).to(dtype)
    print_ = fingerprint(weight, "x")
    assert print_ == fingerprint(weight.T.contiguous().T, "x")
    assert re.fullmatch("[0-9a-f]{16}", print_["digest"]) and len(print_["sample"]) == 8
    changed = weight.clone()
    changed[-1, -1] += 1
    assert fingerprint(changed, "x")["digest"] != print_["digest"]
    assert fingerprint(weight.to("meta"), "x") == {"storage": "x", "digest": None, "sample": None}
    assert fingerprint(weight[:0], "x")["digest"] is None
    assert len(fingerprint(weight[:1, :3], "x")["sample"]) == 8  # fewer entries than samples
