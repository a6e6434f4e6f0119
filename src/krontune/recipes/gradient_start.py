"""The preprocessing that `init_weights: gradient` asks for, on the first rows of a run's own training data."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from peft import PeftConfig
from transformers import IntervalStrategy, TrainingArguments, set_seed

from krontune import preprocess_gradient

if TYPE_CHECKING:
    from .fit import Learner

EXAMPLES = 128


def prepare_gradient_start(method: PeftConfig, learner: Learner, args: TrainingArguments) -> None:
    """Leave the mean gradient of the first `EXAMPLES` rows on the model for get_peft_model to take.

    Does nothing for a method without that start. The loss is the trainer's own: same rendering, same mask. Several
    processes share the rows out and all keep the mean; what dropout drew on each is forgotten, as a start that differed
    between them would never be made equal again.
    """
    if getattr(method, "init_weights", None) != "gradient":
        return
    model = learner.base.model
    without_evaluation = copy.copy(args)
    without_evaluation.eval_strategy = IntervalStrategy.NO
    trainer = learner.trainer(model, without_evaluation, train_dataset=learner.first_rows(EXAMPLES))

    def train_step() -> None:
        for batch in trainer.get_train_dataloader():
            trainer.compute_loss(model, {name: tensor.to(model.device) for name, tensor in batch.items()}).backward()

    preprocess_gradient(model, method, train_step)
    set_seed(args.seed)
