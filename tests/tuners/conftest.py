"""Tiny models, built from configs in memory, and the two methods to run them with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.tuners.helpers import METHODS, VARIANTS

VOCAB = 96


_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **_TOKENS,
}
_MIXTRAL = {**_LLAMA, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}
_T5 = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0, **_TOKENS}
_BERT = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: AutoModelForCausalLM.from_config(LlamaConfig(**_LLAMA, tie_word_embeddings=False)),
    # Sizes that 4-bit kernels take: bitsandbytes wants in a multiple of 64 and out of 32 on CPUs with AVX512-BF16.
    "wide": lambda: AutoModelForCausalLM.from_config(
        LlamaConfig(**{**_LLAMA, "hidden_size": 64, "intermediate_size": 128}, tie_word_embeddings=False)
    ),
    "tied": lambda: AutoModelForCausalLM.from_config(LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
    "mixtral": lambda: AutoModelForCausalLM.from_config(MixtralConfig(**_MIXTRAL)),
    "gpt2": lambda: AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=2, n_positions=64, **_TOKENS)
    ),
    "t5": lambda: T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **_T5)),
    "bert": lambda: AutoModelForSequenceClassification.from_config(
        BertConfig(vocab_size=VOCAB, max_position_embeddings=64, **_BERT)
    ),
}


def build(name: str) -> PreTrainedModel:
    """One of MODELS, always with the same weights."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():  # the usual std of 0.02 makes every output nearly the same
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


@pytest.fixture(scope="session")
def _models() -> dict[str, PreTrainedModel]:
    return {}


@pytest.fixture
def tiny(_models: dict[str, PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """tiny("llama", dtype): a fresh copy of a tiny model."""

    def copy_of(name: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        if name not in _models:
            _models[name] = build(name)
        return copy.deepcopy(_models[name]).to(dtype)

    return copy_of


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Three rows of tokens, with labels for a causal LM."""
    ids = torch.randint(3, VOCAB, (3, 10), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """The config class of each method, with small sizes as defaults."""
    return METHODS[request.param]


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Config classes with every setting that changes the update."""
    return VARIANTS[request.param]


class TinyNet(nn.Module):
    """One layer, named "layer", between an input and a mean: anything that PEFT can wrap."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.fixture
def net() -> Callable[[nn.Module], TinyNet]:
    """net(layer): a model that is this layer alone."""
    return TinyNet
