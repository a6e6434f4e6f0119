"""Supervised fine-tuning of a causal language model, through TRL's SFTTrainer."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from krontune.errors import ConfigError

from .arguments import on_gpu, trainer_arguments
from .config import RunConfig
from .data import is_chat, load_data, template
from .fit import Learner
from .models import Base, check_chat_template, load_base
from .runs import RunFolder


class LanguageModel(Learner):
    """A causal language model on text, prompts with completions, or conversations."""

    task_type = "CAUSAL_LM"
    train_data: Dataset
    eval_data: Dataset | None

    def arguments(self, folder: RunFolder) -> SFTConfig:
        return sft_arguments(self.config, folder)

    def load(self, args: SFTConfig, base: Base | None) -> None:
        examples = load_data(self.config.data)
        self.base = base or load_base(self.config.model)
        self.train_data, self.eval_data = examples.train, examples.eval
        if is_chat(examples.train) and not args.chat_template_path:
            check_chat_template(self.base.tokenizer, masked="prompt" in examples.train.column_names)

    def first_rows(self, n: int) -> Dataset:
        return self.train_data.select(range(min(n, len(self.train_data))))

    def trainer(self, model: Any, args: SFTConfig, **data_and_callbacks: Any) -> SFTTrainer:
        trainer = SFTTrainer(model=model, args=args, processing_class=self.base.tokenizer, **data_and_callbacks)
        if len(trainer.train_dataset) == 0:
            raise ConfigError(
                f"no training example has a completion within training.max_length={args.max_length} tokens."
            )
        return trainer

    def eval_options(self) -> list[str]:
        chat = ["--chat"] if self.task and self.config.data.chat else []
        prompt = self.config.data.columns.get("prompt") if self.task else None
        return [*super().eval_options(), *chat, *(["--prompt", template(prompt)] if prompt else [])]


def sft_arguments(config: RunConfig, folder: RunFolder) -> SFTConfig:
    """TRL's arguments from `config.training`.

    Raises:
        ConfigError: see `trainer_arguments`.
    """
    gpu = on_gpu(config.training)
    bf16 = gpu and not config.training.get("fp16", False) and torch.cuda.is_bf16_supported()
    return trainer_arguments(SFTConfig, config, folder, {"bf16": bf16, "gradient_checkpointing": gpu})
