"""Training of an encoder with a classification head on a GLUE or SuperGLUE task, through transformers' Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainingArguments

from krontune.errors import ConfigError

from .arguments import trainer_arguments
from .config import RunConfig
from .data import task_rows
from .fit import Learner
from .metrics import score
from .models import Base
from .problems import Classification, Item, load_classification
from .runs import RunFolder
from .tasks import Row, Task


@dataclass
class ClassifierArguments(TrainingArguments):
    """The trainer's, and where a row is cut off."""

    max_length: int = field(default=256, metadata={"help": "Tokens of a row, as of krontune eval."})


class ClassifierTrainer(Trainer):
    """The trainer, with the batches, the loss and the metrics of a Classification."""

    def __init__(self, problem: Classification, **settings: Any) -> None:
        super().__init__(data_collator=problem.batch, compute_metrics=self._metrics, **settings)
        self.problem = problem
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The problem's own; its outputs are one row of logits, or one value, for every row of the task."""
        outputs = self.problem.outputs(model, inputs)
        loss = self.problem.loss_of(outputs, inputs["labels"])
        return (loss, {"logits": outputs}) if return_outputs else loss

    def _metrics(self, evaluated: EvalPrediction) -> dict[str, float]:
        predicted = self.problem.decide(torch.as_tensor(evaluated.predictions))
        return score(self.problem.task.metrics, predicted, evaluated.label_ids)


class Classifier(Learner):
    """A model with a sequence-classification head on a task; the head is trained and saved with the adapter."""

    task_type = "SEQ_CLS"
    task: Task
    problem: Classification

    def __init__(self, config: RunConfig, task: Task) -> None:
        super().__init__(config, task)
        self._check_settings()

    def arguments(self, folder: RunFolder) -> ClassifierArguments:
        defaults = {"label_names": ["labels"], "remove_unused_columns": False}
        return trainer_arguments(ClassifierArguments, self.config, folder, defaults)

    def load(self, args: ClassifierArguments, base: Base | None) -> None:
        train, held_out = task_rows(self.task, self.config.data)
        self.problem = load_classification(self.task, self.config.model)
        self.base = base or Base(self.problem.base, self.problem.tokenizer)
        self.fresh_modules = self.problem.fresh_modules
        self.problem.train = self.train_data = self._encode(train, args.max_length)
        self.problem.dev = self.eval_data = self._encode(held_out, args.max_length)

    def trainer(self, model: Any, args: ClassifierArguments, **data_and_callbacks: Any) -> Trainer:
        return ClassifierTrainer(
            self.problem, model=model, args=args, processing_class=self.base.tokenizer, **data_and_callbacks
        )

    def scores(self, evaluated: dict[str, float]) -> dict[str, float]:
        names = ["score", *self.task.metrics]
        return {**super().scores(evaluated), **{name: evaluated[f"eval_{name}"] for name in names}}

    def eval_options(self) -> list[str]:
        length = self.config.training.get("max_length")
        return [*super().eval_options(), *(["--max-length", str(length)] if length else [])]

    def _check_settings(self) -> None:
        data, name = self.config.data, self.task.name
        for setting, given in (("data.chat", data.chat), ("data.columns", data.columns)):
            if given:
                raise ConfigError(f"{name} is a classification task: {setting} is for generated answers. Drop it.")
        if self.config.model.quantization:
            raise ConfigError(f"{name} trains a head, which model.quantization would quantise. Drop it.")

    def _encode(self, rows: Sequence[Row], max_length: int) -> list[Item]:
        n_labels = len(self.task.labels)
        try:
            items = [self.problem.encode(row, max_length) for row in rows]
        except KeyError as error:
            raise ConfigError(f"{self.task.name}: a row has no {error}.") from None
        wrong = {item.label for item in items if n_labels and not 0 <= int(item.label) < n_labels}  # type: ignore[arg-type]
        if wrong:
            raise ConfigError(
                f"{self.task.name}: the label {min(wrong, key=str)} is none of 0 to {n_labels - 1}; a split "
                "without labels, such as GLUE's test, cannot be used."
            )
        return items
