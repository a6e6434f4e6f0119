"""A tiny random language model with a byte tokenizer, and a small data file, for runs that take a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from krontune.recipes import RunConfig

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte, and one for each special mark."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = chat_template
    return fast


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama of 32 channels and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256 + len(SPECIAL),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,  # large enough for an adapter to change the answers
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of prompts and completions."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(32)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def run_config(tiny_model: Path, sums: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Makes the config of a four-step run; keyword arguments replace or extend its sections."""

    def make(**changes: Any) -> RunConfig:
        raw: dict[str, Any] = {
            "model": {"path": str(tiny_model), "dtype": "float32"},  # on every CPU, whatever it multiplies natively
            "data": str(sums),
            "method": {"name": "lora", "r": 2, "target_modules": "all-linear"},
            "training": {
                "max_steps": 4,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "use_cpu": True,
            },
            "output": str(tmp_path / "run"),
        }
        for key, value in changes.items():
            merges = isinstance(value, dict) and isinstance(raw.get(key), dict) and key == "training"
            raw[key] = {**raw[key], **value} if merges else value
        return RunConfig.from_mapping(raw)

    return make
