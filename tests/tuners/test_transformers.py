"""transformers' own adapter methods, PEFT's Auto classes, Trainer and TRL."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from krontune import CheckpointError, ConfigError, LsrConfig, SokaConfig
from tests.tuners.helpers import (
    TARGETS,
    adapted,
    adapter_tensors,
    assert_same_tensors,
    base_weights,
    kron_layers,
    logits,
    train_a_little,
)

DTYPES = [torch.float32, torch.bfloat16]


# ---------------------------------------------------------------------------------------- transformers' native methods


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_adapter(tiny, batch, method, tmp_path, dtype):
    """add_adapter, save_pretrained and load_adapter of a PreTrainedModel, without a PeftModel: bits and dtypes."""
    model = tiny("llama", dtype)
    base = logits(model, batch)
    config = method(target_modules=TARGETS)
    model.add_adapter(config, "mine")
    assert torch.equal(logits(model, batch), base)
    train_a_little(model, "mine")
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)

    again = tiny("llama", dtype)
    again.load_adapter(tmp_path, "loaded")
    assert_same_tensors(adapter_tensors(again, "loaded"), adapter_tensors(model, "mine"))
    assert torch.equal(logits(again, batch), expected)
    assert not any(p.requires_grad for layer in kron_layers(again).values() for p in layer.factors("loaded"))
    again.disable_adapters()
    assert torch.equal(logits(again, batch), base)
    again.enable_adapters()
    assert torch.equal(logits(again, batch), expected)
    # The two formats are one. PEFT makes 16-bit factors float32, unless told not to.
    wrapped = PeftModel.from_pretrained(tiny("llama", dtype), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(logits(wrapped, batch), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_loading_of_a_peft_checkpoint(tiny, batch, method, tmp_path, dtype):
    model = adapted(tiny("llama", dtype), method(target_modules=TARGETS))
    model.save_pretrained(tmp_path)
    native = tiny("llama", dtype)
    native.load_adapter(tmp_path)
    assert_same_tensors(adapter_tensors(native), adapter_tensors(model))
    assert torch.equal(logits(native, batch), logits(model, batch))


def test_native_several_adapters(tiny, batch, method):
    model = tiny()
    model.add_adapter(method(target_modules=TARGETS), "one")
    model.add_adapter(method(target_modules=["o_proj"]), "two")
    outputs = {}
    for seed, name in enumerate(("one", "two")):
        train_a_little(model, name, seed=seed)
        model.set_adapter(name)
        outputs[name] = logits(model, batch)
    assert not torch.allclose(outputs["one"], outputs["two"])
    model.set_adapter("one")
    assert torch.equal(logits(model, batch), outputs["one"])
    model.delete_adapter("two")
    assert torch.equal(logits(model, batch), outputs["one"])


def test_native_loading_on_another_base(tiny, method, tmp_path):
    """The check of the base is in the config, so that it works here as well."""
    model = adapted(tiny("gpt2"), method(target_modules=["c_attn"]))
    model.save_pretrained(tmp_path)
    with pytest.raises((CheckpointError, ValueError), match=r"not found in the base model|another architecture"):
        tiny().load_adapter(tmp_path)


def test_native_loading_of_a_file_that_lacks_a_tensor(tiny, batch, method, tmp_path):
    """transformers reports missing tensors and goes on; the first forward does not."""
    adapted(tiny(), method(target_modules=TARGETS)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors[next(key for key in tensors if "v_proj" in key)]
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    model = tiny()
    model.load_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="its weights were never loaded"):
        logits(model, batch)


def test_native_failure_leaves_no_adapter(tiny, batch, method):
    model = tiny()
    model.add_adapter(method(target_modules=TARGETS), "good")
    with pytest.raises(ConfigError, match="LlamaRMSNorm, which cannot be adapted"):
        model.add_adapter(method(target_modules=["input_layernorm"]), "bad")
    assert list(model.peft_config) == ["good"]
    assert torch.equal(logits(model, batch), logits(tiny(), batch))


# -------------------------------------------------------------------------------------------------------- AutoPeftModel


@pytest.fixture
def saved(tiny, method, tmp_path):
    """(model, folder) of an adapter that knows the folder of its base model."""
    tiny().save_pretrained(tmp_path / "base")
    model = adapted(tiny(), method(target_modules=TARGETS, task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_auto_peft_model(saved, batch):
    model, folder = saved
    again = AutoPeftModelForCausalLM.from_pretrained(str(folder))
    assert_same_tensors(adapter_tensors(again), adapter_tensors(model))
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_auto_peft_model_of_a_damaged_file(saved):
    _, folder = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.popitem()
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: the tensor .* is missing"):
        AutoPeftModelForCausalLM.from_pretrained(str(folder))


def test_model_card_and_files(saved):
    _, folder = saved
    assert {p.name for p in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] in ("LSR", "SOKA")


# --------------------------------------------------------------------------------------------------------- Trainer, TRL


def _data(rows: int = 8) -> Dataset:
    ids = torch.randint(3, 96, (rows, 6), generator=torch.Generator().manual_seed(2)).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def _arguments(folder, **settings) -> TrainingArguments:
    defaults = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
    }
    return TrainingArguments(str(folder), **{**defaults, **settings})


def _train(model, arguments, **settings) -> list[float]:
    trainer = Trainer(model, arguments, train_dataset=_data())
    trainer.train(**settings)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_resuming_equals_an_uninterrupted_run(tiny, method, tmp_path):
    """Adapter, optimizer and data order come back: the same losses and the same bits at the end."""
    config = method(target_modules=TARGETS, dropout=0.1, train_norms=True)
    torch.manual_seed(3)
    whole = adapted(tiny(), config, trained=False)
    losses = _train(whole, _arguments(tmp_path / "whole"))

    torch.manual_seed(3)
    stopped = adapted(tiny(), config, trained=False)
    arguments = _arguments(tmp_path / "parts", save_strategy="steps", save_steps=2)
    _train(stopped, arguments)
    resumed = adapted(tiny(), config, trained=False)
    again = _train(resumed, arguments, resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert again[-2:] == losses[-2:]
    assert_same_tensors(adapter_tensors(resumed), adapter_tensors(whole))
    norms = {n: t for n, t in whole.state_dict().items() if "modules_to_save" in n}
    assert_same_tensors({n: resumed.state_dict()[n] for n in norms}, norms)


def test_load_best_model_at_end(tiny, method, tmp_path):
    """Trainer loads an earlier checkpoint over the trained adapter."""
    model = adapted(tiny(), method(target_modules=TARGETS), trained=False)
    arguments = _arguments(
        tmp_path,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the first, worse one is loaded
    )
    trainer = Trainer(model, arguments, train_dataset=_data(), eval_dataset=_data())
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    stored = PeftModel.from_pretrained(tiny(), trainer.state.best_model_checkpoint)
    assert_same_tensors(adapter_tensors(model), adapter_tensors(stored))


@pytest.fixture(scope="module")
def tokenizer():
    """Letters, made in memory."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz "])}
    inner = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sft_trainer(tiny, method, tokenizer, tmp_path, dtype):
    """SFTTrainer wraps the model itself, given the config; the base stays as it was; the adapter reloads."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    base = tiny("llama", dtype)
    before = base_weights(base)
    config = method(target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        max_length=16,
        gradient_checkpointing=dtype == torch.bfloat16,
    )
    data = Dataset.from_list([{"prompt": "say hello", "completion": " hello"}] * 4)
    trainer = trl.SFTTrainer(base, arguments, train_dataset=data, peft_config=config, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[1] < losses[0]
    assert config.resolved is None
    assert_same_tensors(base_weights(trainer.model), before)

    trainer.save_model(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny("llama", dtype), tmp_path / "adapter")
    assert_same_tensors(adapter_tensors(again), adapter_tensors(trainer.model))


@pytest.mark.parametrize("config_class", [LsrConfig, SokaConfig])
def test_reference_adapter_of_dpo(tiny, config_class, tokenizer, tmp_path):
    """TRL adds a copy of a trained adapter as reference, from the config that the model has."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    model = adapted(tiny(), config_class(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    arguments = trl.DPOConfig(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    data = Dataset.from_list([{"prompt": "say", "chosen": " hello", "rejected": " goodbye"}] * 4)
    trainer = trl.DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
    assert_same_tensors(adapter_tensors(trainer.model, "ref"), adapter_tensors(trainer.model, "default"))
    trainer.train()
