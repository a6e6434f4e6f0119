"""The preprocessing that `init_weights: gradient` asks for, on the first batches of a run's own training data."""

from __future__ import annotations

from peft import PeftConfig
from trl import SFTConfig, SFTTrainer

from krontune import preprocess_gradient

from .data import Examples
from .models import Base

EXAMPLES = 128


def prepare_gradient_start(method: PeftConfig, base: Base, args: SFTConfig, examples: Examples) -> None:
    """Leave the mean gradient of the first `EXAMPLES` rows on the model for get_peft_model to take.

    Does nothing for a method without that start. The loss is the trainer's own: same rendering, same mask.
    """
    if getattr(method, "init_weights", None) != "gradient":
        return
    rows = examples.train.select(range(min(EXAMPLES, len(examples.train))))
    model = base.model
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=base.tokenizer)

    def train_step() -> None:
        for batch in trainer.get_train_dataloader():
            trainer.compute_loss(model, {name: tensor.to(model.device) for name, tensor in batch.items()}).backward()

    preprocess_gradient(model, method, train_step)
