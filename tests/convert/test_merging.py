from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, BertModel, GPT2Config

from krontune import LsrConfig, SokaConfig
from krontune.convert import merge, merging
from krontune.errors import CheckpointError, ConfigError
from krontune.weights import Source
from tests.convert.helpers import CONFIGS, adapter_logits, ids, save_adapter, save_base, tiny_llama


def merged_logits(folder: Path) -> torch.Tensor:
    """What plain transformers says."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids()).logits


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_merged_model_says_what_the_adapter_says(
    name: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    report = merge(adapters[name], tmp_path / "merged")
    assert report.check is not None
    assert report.check.difference < 1e-5 < report.check.effect
    torch.testing.assert_close(
        merged_logits(tmp_path / "merged"), adapter_logits(base, adapters[name]), rtol=1e-4, atol=1e-4
    )


def test_weights_are_those_of_merge_and_unload(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    merge(adapters["lsr"], tmp_path, check=False)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapters["lsr"]))
    expected = loaded.merge_and_unload().state_dict()
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(expected)
    for name, tensor in stored.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_shards_stay_shards(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", max_shard_size="8KB")
    adapter = save_adapter(tmp_path / "adapter", base, CONFIGS["soka"])
    seen: list[str] = []
    merge(adapter, tmp_path / "merged", progress=lambda files: (seen.append(f) or f for f in files))
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    assert len(seen) > 2
    assert (
        set(seen) == set(index["weight_map"].values()) == {f.name for f in (tmp_path / "merged").glob("*.safetensors")}
    )
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), adapter_logits(base, adapter), rtol=1e-4, atol=1e-4)


def test_dtype_is_rounded_to_once(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    report = merge(adapters["lsr"], tmp_path / "bf16", dtype="bf16")
    merge(adapters["lsr"], tmp_path / "f32", check=False)
    half, full = (load_file(tmp_path / d / "model.safetensors") for d in ("bf16", "f32"))
    assert report.dtype == "bfloat16"
    assert json.loads((tmp_path / "bf16/config.json").read_text())["dtype"] == "bfloat16"
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in full)


def test_a_bf16_base_stays_bf16(tmp_path: Path) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(tiny_llama(dtype="bfloat16"), dtype=torch.bfloat16).save_pretrained(base)
    adapter = save_adapter(tmp_path / "adapter", base, CONFIGS["lsr"])
    report = merge(adapter, tmp_path / "merged")
    assert report.dtype == "bfloat16"
    assert not report.notes


@pytest.mark.parametrize("method", [LsrConfig, SokaConfig])
@pytest.mark.parametrize("targets", [["wte", "c_attn"], ["lm_head", "c_attn"]])
def test_conv1d_and_tied_embeddings(method: type, targets: list[str], tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    base = save_base(tmp_path / "base", config)
    adapter = save_adapter(tmp_path / "adapter", base, method(r=2, target_modules=targets))
    merge(adapter, tmp_path / "merged")
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), adapter_logits(base, adapter), rtol=1e-4, atol=1e-4)


def test_norms_heads_and_biases_come_from_the_adapter(base: Path, tmp_path: Path) -> None:
    config = LsrConfig(r=2, separation_rank=2, target_modules=["q_proj"], train_norms=True, modules_to_save=["lm_head"])
    adapter = save_adapter(tmp_path / "adapter", base, config)
    report = merge(adapter, tmp_path / "merged")
    assert report.n_replaced == 2 * 2 + 1 + 1
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), adapter_logits(base, adapter), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", ["all", "lsr_only"])
def test_trained_biases(bias: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tiny_llama(attention_bias=True))
    config = LsrConfig(r=2, separation_rank=2, target_modules=["q_proj", "o_proj"], bias=bias)
    adapter = save_adapter(tmp_path / "adapter", base, config)
    assert merge(adapter, tmp_path / "merged").n_replaced >= 4
    torch.testing.assert_close(merged_logits(tmp_path / "merged"), adapter_logits(base, adapter), rtol=1e-4, atol=1e-4)


def test_a_classifier_on_a_bare_model(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(tmp_path / "base")

    class Three(AutoModelForSequenceClassification):
        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            return AutoModelForSequenceClassification.from_pretrained(*args, num_labels=3, **kwargs)

    settings = LsrConfig(r=2, separation_rank=2, target_modules=["query", "dense"], task_type="SEQ_CLS")
    adapter = save_adapter(tmp_path / "adapter", tmp_path / "base", settings, Three)
    merge(adapter, tmp_path / "merged")
    wanted = adapter_logits(tmp_path / "base", adapter, Three)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids()).logits, wanted, rtol=1e-4, atol=1e-4)


def test_another_base_is_refused(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    wider = save_base(tmp_path / "wider", tiny_llama(intermediate_size=32))
    with pytest.raises(CheckpointError, match=r"down_proj is \(16, 32\) in the base model and was \(16, 24\)"):
        merge(adapters["lsr"], tmp_path / "out", base=str(wider))
    other = save_base(tmp_path / "other", GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    with pytest.raises(CheckpointError, match="no module 'model"):
        merge(adapters["lsr"], tmp_path / "out", base=str(other))
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    for file in base.iterdir():
        (tuned / file.name).write_bytes(file.read_bytes())
    save_file(
        {k: t * 1.5 for k, t in load_file(base / "model.safetensors").items()},
        tuned / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(CheckpointError, match=r"not those that this adapter was trained on.*--another-base"):
        merge(adapters["lsr"], tmp_path / "out", base=str(tuned))
    assert not (tmp_path / "out").exists()
    assert merge(adapters["lsr"], tmp_path / "out", base=str(tuned), another_base=True).notes


def test_another_base_is_said_once(adapters: dict[str, Path], tmp_path: Path) -> None:
    other = save_base(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({key: 1.5 * t for key, t in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = merge(adapters["lsr"], tmp_path / "out", base=str(other), another_base=True)
    assert result.check is not None
    said = [*result.notes, *(str(warning.message) for warning in caught)]
    assert sum("not those that this adapter was trained on" in text for text in said) == 1


def test_everything_beside_the_weights_comes_from_the_hub_too(
    base: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's cache stands in for the Hub: a folder that the id leads to."""
    shutil.copytree(base, tmp_path / "cache")
    names = {"generation_config.json", "added_tokens.json", "tokenizer_config.json"}
    for name in names:
        (tmp_path / "cache" / name).write_text("{}")
    monkeypatch.setattr(merging, "local_folder", lambda source: tmp_path / "cache")
    found = merging.open_base(merging.open_adapter(adapters["lsr"]), str(base))
    found.source = Source("somebody/model", "somebody/model")
    (tmp_path / "out").mkdir()
    merging._write_config(tmp_path / "out", found, torch.float32)
    merging._copy_tokenizer(tmp_path / "out", merging.open_adapter(adapters["lsr"]), found.source)
    assert names <= {file.name for file in (tmp_path / "out").iterdir()}


def test_a_quantised_base_is_refused_with_the_reason(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"stored as nf4: merging would round.*--base.*export"):
        merge(adapters["lsr"], tmp_path.parent / "out", base=str(tmp_path))


def test_a_wrong_merge_is_caught_and_leaves_nothing(
    adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = merging._merged
    monkeypatch.setattr(merging, "_merged", lambda weight, *args: 2 * right(weight, *args) - weight)
    with pytest.raises(CheckpointError, match="Nothing was written"):
        merge(adapters["lsr"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_between_shards_leaves_nothing(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", max_shard_size="8KB")
    adapter = save_adapter(tmp_path / "adapter", base, CONFIGS["lsr"])

    def interrupted(files):
        for i, file in enumerate(files):
            if i == 2:
                raise KeyboardInterrupt
            yield file

    with pytest.raises(KeyboardInterrupt):
        merge(adapter, tmp_path / "out", progress=interrupted)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_unknown_dtypes_and_missing_bases(adapters: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype 'int3' is unknown"):
        merge(adapters["lsr"], tmp_path / "out", dtype="int3")
    with pytest.raises(ConfigError, match="does not exist"):
        merge(adapters["lsr"], tmp_path / "out", base="./nowhere")
