from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig

from krontune.errors import CheckpointError, ConfigError
from krontune.weights import PACKAGED, find_model, has_weights, load_config, meta_model, open_weights

TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.fixture
def model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(TINY)


@pytest.mark.parametrize("shard_size", ["5GB", "8KB"])
def test_tensors_are_those_of_the_loaded_model(model: torch.nn.Module, tmp_path: Path, shard_size: str) -> None:
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    source = find_model(str(tmp_path))
    weights = open_weights(source, meta_model(load_config(source)))
    state = model.state_dict()
    assert set(weights.names()) == set(state)
    assert all(torch.equal(weights.read(name), state[name]) for name in state)
    assert sorted(name for shard in weights.shards().values() for name in shard) == sorted(state)
    assert (len(weights.shards()) > 1) == (shard_size == "8KB")


def test_a_bare_models_file_serves_a_model_with_a_head(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path)
    names = set(open_weights(find_model(str(tmp_path)), meta_model(config, "SEQ_CLS")).names())
    assert "bert.encoder.layer.0.attention.self.query.weight" in names


def test_meta_models_take_no_memory() -> None:
    model = meta_model(LlamaConfig())
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    assert all(p.is_meta for p in model.parameters())


def test_damage_is_named(model: torch.nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    source, empty = find_model(str(tmp_path)), meta_model(TINY)
    (shard, *_) = sorted(tmp_path.glob("model-*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=shard.name):
        weights = open_weights(source, empty)
        for name in weights.names():
            weights.read(name)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"no {shard.name}"):
        open_weights(source, empty)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        open_weights(source, empty)


def test_folders_without_weights_are_told_apart(tmp_path: Path) -> None:
    TINY.save_pretrained(tmp_path)
    source, empty = find_model(str(tmp_path / "config.json")), meta_model(TINY)
    assert not has_weights(source)
    with pytest.raises(ConfigError, match="no weights"):
        open_weights(source, empty)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="only a pickle"):
        open_weights(source, empty)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert has_weights(source)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("packaged:gpt5", "unknown packaged model 'gpt5'. Allowed: minilm, smollm2"),
        ("./nowhere", "does not exist"),
        ("model.gguf", "does not exist"),
        ("a/b/c", "does not exist"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_model(name)


def test_files_of_another_kind_and_broken_configs(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match="is no model"):
        find_model(str(tmp_path / "notes.txt"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such type"}))
    with pytest.raises(ConfigError, match="cannot read the config"):
        load_config(find_model(str(tmp_path)))


def test_hub_ids_are_left_to_the_hub() -> None:
    assert find_model("org/some-model") == ("org/some-model", "org/some-model", None)


@pytest.mark.slow
def test_gguf_tensors_are_those_that_transformers_loads() -> None:
    try:
        source = find_model("packaged:smollm2")
    except ConfigError:
        pytest.skip(f"{PACKAGED['smollm2'].package} is not installed")
    weights = open_weights(source, meta_model(load_config(source)))
    loaded = AutoModelForCausalLM.from_pretrained(source.name_or_path, gguf_file=source.gguf_file, dtype=torch.float32)
    state = loaded.state_dict()
    assert set(state) - set(weights.names()) == {"lm_head.weight"}  # tied
    assert all(torch.equal(weights.read(name), state[name]) for name in weights.names())
    assert sum(map(len, weights.shards().values())) == len(weights.names())
