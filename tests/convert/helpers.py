"""Small models and adapters with random factors, saved as their own libraries save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoKrConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from krontune import LsrConfig, SokaConfig

LINEAR = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, PeftConfig] = {
    "lsr": LsrConfig(r=4, separation_rank=3, target_modules=LINEAR, alpha=2.5),
    "lsr-patterns": LsrConfig(
        r=4, separation_rank=2, target_modules=LINEAR, rank_pattern={"up_proj": 6}, alpha_pattern={"q_proj": 0.5}
    ),
    "lsr-three-factors": LsrConfig(r=8, separation_rank=2, n_factors=3, target_modules=LINEAR),
    "soka": SokaConfig(r=2, target_modules=LINEAR, alpha=1.5),
    "soka-square": SokaConfig(r=3, target_modules=LINEAR, factor_shape="square"),
    "soka-sorted": SokaConfig(r=2, target_modules=LINEAR, alpha=1.5, channel_sort="svd"),
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR, rank_pattern={"down_proj": 2}),
    "lokr": LoKrConfig(r=4, alpha=6, target_modules=LINEAR),
    "lokr-whole": LoKrConfig(r=64, alpha=32, target_modules=LINEAR),
}


def tiny_llama(**changes: Any) -> LlamaConfig:
    settings = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**settings, **changes})


def save_base(folder: Path, config: Any = None, **options: Any) -> Path:
    """A model with random weights, as transformers saves it."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config or tiny_llama()).save_pretrained(folder, **options)
    return folder


def randomise(model: PeftModel, size: float = 0.2) -> PeftModel:
    """Give every trainable parameter values, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    return model.eval()


def save_adapter(folder: Path, base: Path, config: PeftConfig, model_class: Any = AutoModelForCausalLM) -> Path:
    """An adapter with random factors on `base`, as PEFT saves it."""
    model = model_class.from_pretrained(base)
    randomise(get_peft_model(model, config)).save_pretrained(folder)
    return folder


def ids(vocabulary: int = 64) -> torch.Tensor:
    return torch.randint(0, vocabulary, (2, 9), generator=torch.Generator().manual_seed(3))


def adapter_logits(base: Path, adapter: Path, model_class: Any = AutoModelForCausalLM) -> torch.Tensor:
    """What the adapter says on its base, by PEFT."""
    model = PeftModel.from_pretrained(model_class.from_pretrained(base, dtype=torch.float32), str(adapter)).eval()
    with torch.no_grad():
        return model(input_ids=ids()).logits
