"""What a comparison trains on: encoded rows, a loss, and a score, for classification and for language modelling."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from krontune.errors import ConfigError

from .config import ModelSettings
from .metrics import score
from .models import load_base, load_pretrained, load_tokenizer, model_source, resolve_dtype
from .tasks import Row, Task, fill, load_rows, subset

IGNORED = -100  # a label that has no loss
SPLIT_SEED = 20_250  # of the rows that are set aside for tuning, and of the subsets that are evaluated on
POOL = 16  # batches that are sorted by length together


@dataclass(frozen=True)
class Item:
    """One row as token ids: `texts` holds one sequence a candidate, `segments` the part of the pair of every token."""

    texts: tuple[list[int], ...]
    segments: tuple[list[int], ...]
    label: float | int | list[int]

    @property
    def length(self) -> int:
        return max(map(len, self.texts))


class Problem(ABC):
    """A task encoded for a model. Rates are chosen on `tune`, and `dev` is reported; no row is in two of the three.

    Args:
        task: the task.
        base: the model, loaded, without adapter; copied for every run.
        tokenizer: its tokenizer.
    """

    task_type: str  # PEFT's
    metric: str  # the key of the score that counts
    higher_is_better: bool

    def __init__(self, task: Task, base: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.task = task
        self.base = base
        self.tokenizer = tokenizer
        self.train: list[Item] = []
        self.tune: list[Item] = []
        self.dev: list[Item] = []

    @abstractmethod
    def encode(self, row: Row, max_length: int) -> Item:
        """A row as token ids, cut to `max_length`."""

    @abstractmethod
    def batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Items as padded tensors with `labels`."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Mean training loss of a batch."""

    @abstractmethod
    def evaluate(self, model: nn.Module, items: Sequence[Item], batch_size: int) -> dict[str, float]:
        """The metrics of items; the model is put in eval mode."""

    def floor(self, items: Sequence[Item]) -> dict[str, float]:
        """{"constant": the best score of an answer that is the same for all items}, where there is such a score."""
        return {}

    @abstractmethod
    def prepare_head(self, model: nn.Module, seed: int) -> None:
        """Give a fresh head, where there is one, its random start: the same for every method with the seed."""

    def load(self, data_dir: Path | None, max_length: int, train: int | None, tune: int, dev: int | None) -> None:
        """Read and encode the rows, with at most so many of each; `tune` rows are set aside from the training split."""
        rows = load_rows(self.task, self.task.splits[0], data_dir)
        if len(rows) <= tune:
            raise ConfigError(
                f"{self.task.name} has {len(rows)} training rows; tuning.rows: {tune} leaves none of them."
            )
        random.Random(SPLIT_SEED).shuffle(rows)
        held_out = subset(load_rows(self.task, self.task.splits[1], data_dir), dev, SPLIT_SEED)
        self.tune = [self.encode(row, max_length) for row in rows[:tune]]
        self.train = [self.encode(row, max_length) for row in rows[tune : None if train is None else tune + train]]
        self.dev = [self.encode(row, max_length) for row in held_out]

    def batches(self, batch_size: int, seed: int) -> Iterator[list[Item]]:
        """Training batches without end, in an order that the seed alone decides; items of like length go together."""
        order = random.Random(seed)
        while True:
            shuffled = order.sample(self.train, len(self.train))
            for start in range(0, len(shuffled), POOL * batch_size):
                pool = sorted(shuffled[start : start + POOL * batch_size], key=lambda item: item.length)
                cut = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
                order.shuffle(cut)
                yield from cut


class Classification(Problem):
    """A class or a number from one text, or the best of several, by the model's classification head."""

    task_type = "SEQ_CLS"
    metric = "score"
    higher_is_better = True
    fresh_modules: tuple[str, ...] = ()  # beside the head's last part: modules that the checkpoint had no weights for
    _scale: tuple[float, float] | None = None

    def encode(self, row: Row, max_length: int) -> Item:
        encoded = [
            self.tokenizer(*texts, truncation=True, max_length=max_length, return_token_type_ids=True)
            for texts in self.task.candidates(row)
        ]
        label = float(row["label"]) if self.task.kind == "regress" else int(row["label"])
        return Item(tuple(e["input_ids"] for e in encoded), tuple(e["token_type_ids"] for e in encoded), label)

    def batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        texts = [text for item in items for text in item.texts]
        segments = [segment for item in items for segment in item.segments]
        ids = _padded(texts, int(self.tokenizer.pad_token_id or 0))
        made = {"input_ids": ids, "attention_mask": _padded([[1] * len(t) for t in texts], 0)}
        if "token_type_ids" in self.tokenizer.model_input_names:
            made["token_type_ids"] = _padded(segments, 0)
        return {**made, "labels": torch.tensor([item.label for item in items])}

    def outputs(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """(rows, classes) logits; (rows,) values for regression."""
        logits: Tensor = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()
        return logits.view(len(batch["labels"]), -1) if self.task.kind != "regress" else logits.view(-1)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return self.loss_of(self.outputs(model, batch), batch["labels"])

    def loss_of(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of the outputs of a batch."""
        if self.task.kind != "regress":
            return F.cross_entropy(outputs, labels)
        mean, sd = self._target_scale()  # the head starts at zero; a correlation does not see the scale
        return F.mse_loss(outputs, (labels - mean) / sd)

    def _target_scale(self) -> tuple[float, float]:
        if self._scale is None:
            labels = np.array([item.label for item in self.train], dtype=np.float64)
            self._scale = float(labels.mean()), float(labels.std()) or 1.0
        return self._scale

    def evaluate(self, model: nn.Module, items: Sequence[Item], batch_size: int) -> dict[str, float]:
        by_length = sorted(range(len(items)), key=lambda i: items[i].length)
        predicted = np.zeros(len(items))
        for start in range(0, len(items), batch_size):
            chosen = by_length[start : start + batch_size]
            predicted[chosen] = self.predict(model, [items[i] for i in chosen])
        return score(self.task.metrics, predicted, np.array([item.label for item in items]))

    def floor(self, items: Sequence[Item]) -> dict[str, float]:
        labels = np.array([item.label for item in items])
        answers = [0.0] if self.task.kind == "regress" else np.unique(labels)
        scores = [score(self.task.metrics, np.full(len(labels), answer), labels)["score"] for answer in answers]
        return {"constant": max(scores)}

    @torch.no_grad()
    def predict(self, model: nn.Module, items: Sequence[Item]) -> np.ndarray:
        """The class of every item, or its number, from one batch; the model is put in eval mode."""
        model.eval()
        outputs = self.outputs(model, _to(self.batch(items), next(model.parameters()).device))
        return self.decide(outputs)

    def decide(self, outputs: Tensor) -> np.ndarray:
        """Classes or numbers from `outputs`."""
        decided: np.ndarray = (outputs if self.task.kind == "regress" else outputs.argmax(1)).cpu().numpy()
        return decided

    def prepare_head(self, model: nn.Module, seed: int) -> None:
        torch.manual_seed(seed)
        std = getattr(getattr(model, "config", None), "initializer_range", 0.02)
        for name, module in model.named_modules():
            if (is_head(name) or name in self.fresh_modules) and isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class AnswerLoss(Problem):
    """Language modelling of a task's answers: the loss on their tokens, given the question."""

    task_type = "CAUSAL_LM"
    metric = "loss"
    higher_is_better = False

    def encode(self, row: Row, max_length: int) -> Item:
        prompt = self.tokenizer(fill(self.task.prompt, row))["input_ids"]
        answer = self.tokenizer(fill(self.task.completion, row), add_special_tokens=False)["input_ids"]
        ids = (prompt + answer + [self.tokenizer.eos_token_id])[:max_length]
        labels = ([IGNORED] * len(prompt) + ids[len(prompt) :])[:max_length]
        return Item((ids,), ((),), labels)  # type: ignore[arg-type]

    def batch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        texts = [item.texts[0] for item in items]
        return {
            "input_ids": _padded(texts, int(self.tokenizer.pad_token_id or 0)),
            "attention_mask": _padded([[1] * len(text) for text in texts], 0),
            "labels": _padded([item.label for item in items], IGNORED),  # type: ignore[misc]
        }

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        total, count = self._sum(model, batch)
        return total / count.clamp(min=1)  # none where every prompt fills max_length

    @torch.no_grad()
    def evaluate(self, model: nn.Module, items: Sequence[Item], batch_size: int) -> dict[str, float]:
        model.eval()
        device = next(model.parameters()).device
        by_length = sorted(items, key=lambda item: item.length)
        total = count = 0.0
        for start in range(0, len(items), batch_size):
            part = self._sum(model, _to(self.batch(by_length[start : start + batch_size]), device))
            total, count = total + float(part[0]), count + float(part[1])
        return {"loss": total / count}

    def prepare_head(self, model: nn.Module, seed: int) -> None:
        """Nothing: a language model's head is its own."""

    def _sum(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss summed over the answers' tokens, and their number."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        kept = labels != IGNORED
        return F.cross_entropy(logits[kept].float(), labels[kept], reduction="sum"), kept.sum()


def is_head(name: str) -> bool:
    """Whether a module or parameter belongs to a classification head, by the names that transformers gives them."""
    return any(part in ("classifier", "score") for part in name.split("."))


def make_problem(task: Task, model: ModelSettings) -> Problem:
    """The task for a model, which is loaded here; rows are read by `Problem.load`.

    Raises:
        ConfigError: the model cannot be loaded.
    """
    if task.generates:
        base = load_base(model)
        return AnswerLoss(task, base.model, base.tokenizer)
    return load_classification(task, model)


def load_classification(task: Task, model: ModelSettings, own_head: bool = False) -> Classification:
    """A classification task for a model, which is loaded here.

    Args:
        task: the task.
        model: the model; its head is fresh where it has none, or one of another size.
        own_head: insist on the size of the head that the model has.

    Raises:
        ConfigError: the model cannot be loaded, is a GGUF file, or its own head is of another size.
    """
    source = model_source(model.path, model.gguf_file)
    if source.gguf_file:
        raise ConfigError(f"{model.path!r} is a GGUF file; {task.name} needs a model folder, or packaged:minilm.")
    tokenizer = load_tokenizer(model)
    try:
        encoder, report = load_pretrained(
            AutoModelForSequenceClassification,
            model,
            source,
            num_labels=task.n_outputs,
            dtype=torch.float32 if model.dtype == "auto" else resolve_dtype(model.dtype),  # the head is trained in it
            ignore_mismatched_sizes=not own_head,
            output_loading_info=True,
        )
    except RuntimeError:
        raise ConfigError(
            f"the head of {model.path!r} does not have the {task.n_outputs} outputs of {task.name}."
        ) from None
    encoder.name_or_path = encoder.config._name_or_path = model.path
    if getattr(encoder.config, "pad_token_id", None) is None:  # a decoder finds a text's last token by it
        encoder.config.pad_token_id = tokenizer.pad_token_id
    problem = Classification(task, encoder, tokenizer)
    modules = {key.rpartition(".")[0] for key in report["missing_keys"]}
    problem.fresh_modules = tuple(sorted(name for name in modules if not is_head(name)))
    return problem


def _padded(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(map(len, sequences))
    return torch.tensor([list(sequence) + [value] * (longest - len(sequence)) for sequence in sequences])


def _to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: tensor.to(device) for name, tensor in batch.items()}
