"""The demo: a small language model learns to write orders as JSON, once with each of three methods.

Every number of its report is measured in the run itself: exact match of the untrained model, then of each saved adapter
loaded onto a fresh copy of the base, on orders that are in no training item.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback

from krontune.errors import ConfigError
from krontune.report import RunRecord
from krontune.report.files import write_text

from .config import ModelSettings, RunConfig
from .generate import Message, answer
from .models import Base, load_base
from .orders import SYSTEM, Item, is_exact, make_items
from .runs import RunFolder
from .training import train

METRIC = "exact_match"


@dataclass(frozen=True)
class Contender:
    """A method with its settings and the learning rate that suits it."""

    name: str
    method: dict[str, Any]
    learning_rate: float


# LoRA r=8 sets the size: LSR takes about a quarter of its parameters, SoKA no more than it has. Each learning rate is
# the best of three tries, the same number for every method (docs/demo.md).
CONTENDERS = (
    Contender("LoRA", {"name": "lora", "r": 8, "lora_alpha": 16}, 2e-3),
    Contender("LSR", {"name": "lsr", "r": 16, "separation_rank": 8}, 8e-3),
    Contender("SoKA", {"name": "soka", "r": 8, "factor_shape": 4}, 2e-3),
)


@dataclass(frozen=True)
class DemoSettings:
    """What can be changed about the demo."""

    output: Path
    model: str = "packaged:smollm2"
    steps: int = 40
    batch_size: int = 4
    test_items: int = 64
    seed: int = 0
    contenders: tuple[Contender, ...] = CONTENDERS

    def run_config(self, contender: Contender) -> RunConfig:
        """The contender's run, as `krontune train` would read it."""
        return RunConfig.from_mapping(
            {
                "model": self.model,
                "data": {"train": str(self.output / "train.jsonl"), "chat": True, "system": SYSTEM},
                "method": {"target_modules": "all-linear", **contender.method},
                "training": {
                    "max_steps": self.steps,
                    "per_device_train_batch_size": self.batch_size,
                    "learning_rate": contender.learning_rate,
                    "lr_scheduler_type": "cosine",
                    "warmup_steps": max(1, self.steps // 16),
                    "logging_steps": 1,
                    "save_strategy": "no",
                },
                "output": str(self.output / contender.name.lower()),
                "seed": self.seed,
            }
        )


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    `answers` holds, per test item, its prompt, the wanted reply and each model's reply by name (`untrained` first).
    """

    records: list[RunRecord]
    answers: list[dict[str, str]]
    seconds: float


class Watcher:
    """How the demo tells what it is doing; this one keeps silent."""

    def phase(self, text: str) -> None:
        """A new phase begins."""

    def callbacks(self, name: str) -> Sequence[TrainerCallback]:
        """Callbacks for the training run of a contender."""
        return ()


def run_demo(settings: DemoSettings, watcher: Watcher | None = None, base: Base | None = None) -> DemoResult:
    """Measure, train, measure again; leaves one run folder a contender and the items in `settings.output`.

    Args:
        settings: what to run.
        watcher: told about each phase.
        base: the model that `settings.model` names, if it is loaded already; it is not changed.

    Raises:
        ConfigError: the output folder is in use, or the model is not installed.
        Interrupted: stopped by a signal.
    """
    watcher = watcher or Watcher()
    begin = time.perf_counter()
    if settings.output.exists() and any(settings.output.iterdir()):
        raise ConfigError(f"output {settings.output} is in use; choose another folder or replace it with --force.")
    n_train = settings.steps * settings.batch_size
    training, test = make_items(n_train, settings.test_items, settings.seed)
    _write_items(settings.output / "train.jsonl", training)
    _write_items(settings.output / "test.jsonl", test)
    watcher.phase(f"Loading {settings.model}")
    base = base or _load(settings.model)
    watcher.phase(f"Untrained: answering {len(test)} unseen orders")
    replies = {"untrained": _replies(base, test)}
    before = _share_exact(replies["untrained"], test)
    records = []
    for contender in settings.contenders:
        record = _train(settings, contender, base, watcher)
        watcher.phase(f"{contender.name}: answering {len(test)} unseen orders")
        replies[contender.name] = _replies(_reload(base, RunFolder(settings.output / contender.name.lower())), test)
        scores = {f"{METRIC}_before": before, f"{METRIC}_after": _share_exact(replies[contender.name], test)}
        records.append(dataclasses.replace(record, name=contender.name, scores=scores))
    answers = [
        {"prompt": item.prompt, "wanted": item.completion, **{name: given[i] for name, given in replies.items()}}
        for i, item in enumerate(test)
    ]
    return DemoResult(records, answers, time.perf_counter() - begin)


def _load(model: str) -> Base:
    base = load_base(ModelSettings(path=model))
    if torch.cuda.is_available():
        base.model.to("cuda")
    return base


def _train(settings: DemoSettings, contender: Contender, base: Base, watcher: Watcher) -> RunRecord:
    watcher.phase(f"{contender.name}: training for {settings.steps} steps")
    own = Base(copy.deepcopy(base.model), base.tokenizer)
    return train(settings.run_config(contender), callbacks=watcher.callbacks(contender.name), base=own)


def _reload(base: Base, folder: RunFolder) -> Base:
    """The saved adapter on a fresh copy of the base: what a user would get, not what is left in memory."""
    return Base(PeftModel.from_pretrained(copy.deepcopy(base.model), folder.adapter), base.tokenizer)


def _replies(base: Base, items: Sequence[Item]) -> list[str]:
    prompts: list[list[Message]] = [
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": item.prompt}] for item in items
    ]
    # twice the longest wanted reply leaves room for another spacing of the same JSON
    longest = max(len(base.tokenizer(item.completion)["input_ids"]) for item in items)
    return answer(base.model, base.tokenizer, prompts, max_new_tokens=2 * longest, batch_size=len(prompts))


def _share_exact(replies: Sequence[str], items: Sequence[Item]) -> float:
    return statistics.mean(is_exact(reply, item.completion) for reply, item in zip(replies, items, strict=True))


def _write_items(path: Path, items: Sequence[Item]) -> None:
    write_text(path, "".join(json.dumps(item._asdict(), ensure_ascii=False) + "\n" for item in items))
