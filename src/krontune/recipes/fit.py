"""A training run from the loaded model to the saved adapter: what language models and classifiers have in common."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import DistributedType
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed

from krontune.errors import ConfigError, KrontuneError
from krontune.report import RunRecord, final_loss, write_record
from krontune.report.plots import loss_curve
from krontune.tuners import spread_over_ranks
from krontune.tuners.base_config import KronConfig

from .callbacks import Interrupted, MetricsFile, StepTimer, StopOnSignal
from .card import model_card
from .config import RunConfig
from .gradient_start import prepare_gradient_start
from .models import Base
from .runs import RunFolder, checkpoint_step, environment, folder_bytes
from .tasks import Task


class Learner(ABC):
    """What is trained on what: made from a config alone, then loaded.

    Args:
        config: the run.
        task: the benchmark task that `config.data` names, if it names one.

    Raises:
        ConfigError: settings that do not go together.
    """

    task_type: str  # PEFT's
    base: Base
    train_data: Sequence[Any]
    eval_data: Sequence[Any] | None
    fresh_modules: Sequence[str] = ()  # the checkpoint had no weights for them, so they are trained and saved

    def __init__(self, config: RunConfig, task: Task | None) -> None:
        self.config = config
        self.task = task

    @abstractmethod
    def arguments(self, folder: RunFolder) -> TrainingArguments:
        """The trainer's arguments; nothing is loaded for them."""

    @abstractmethod
    def load(self, args: Any, base: Base | None) -> None:
        """Read the rows and the model: sets `base`, `train_data` and `eval_data`."""

    @abstractmethod
    def trainer(self, model: Any, args: Any, **data_and_callbacks: Any) -> Trainer:
        """The trainer of a model, adapted or not."""

    def first_rows(self, n: int) -> Sequence[Any]:
        """The first training rows, as the trainer takes them."""
        return self.train_data[:n]

    def scores(self, evaluated: dict[str, float]) -> dict[str, float]:
        """What counts of a trainer's log entry of an evaluation."""
        return {"eval_loss": evaluated["eval_loss"]}

    def eval_options(self) -> list[str]:
        """What `krontune eval` has to be told to ask as was trained."""
        return ["--task", self.task.name] if self.task else []


def fit(
    config: RunConfig,
    args: TrainingArguments,
    method: PeftConfig,
    learner: Learner,
    stop: StopOnSignal,
    callbacks: Sequence[TrainerCallback],
) -> RunRecord:
    """Train an adapter of the learner's model and fill the run folder.

    Raises:
        ConfigError: settings that do not fit the model or the data.
        Interrupted: stopped by a signal, after a checkpoint.
    """
    folder = RunFolder(config.output)
    checkpoint = folder.latest_checkpoint() if config.resume else None
    set_seed(config.seed)  # the adapter's start depends on nothing that was drawn before
    n_base = learner.base.model.num_parameters()
    _place(learner.base, args)
    adapted = _with_adapter(method, learner, args)
    timer, metrics = StepTimer(), MetricsFile(folder.metrics)
    own = [AllocateRanks()] if method.peft_type == "ADALORA" else []
    trainer = _trainer(learner, adapted, args, [stop, metrics, timer, *own, *callbacks])
    begin = time.perf_counter()
    if checkpoint and 0 < args.max_steps <= checkpoint_step(checkpoint):
        _take_over(trainer, adapted, checkpoint, metrics)
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    wall_s = time.perf_counter() - begin
    step = trainer.state.global_step
    if stop.received is not None and step < trainer.state.max_steps:
        raise Interrupted(stop.received, step)
    _evaluate_at_the_end(trainer)
    record = _record(config, learner, trainer, n_base, timer.median_ms, wall_s)
    n_bytes = _save_adapter(
        trainer, folder.adapter, model_card(record, learner.task, shlex.join(learner.eval_options()))
    )
    record = dataclasses.replace(record, adapter_bytes=n_bytes)
    if trainer.is_world_process_zero():
        write_record(record, folder.record)
        loss_curve([record], folder.loss_curve)
    return record


def _place(base: Base, args: TrainingArguments) -> None:
    """Move the model to its GPU before the adapter is made, so that the SVDs of a start run there."""
    whole = args.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_GPU)
    if args.device.type == "cuda" and whole and not getattr(base.model, "is_quantized", False):
        base.model.to(args.device)


def _with_adapter(method: PeftConfig, learner: Learner, args: TrainingArguments) -> PeftModel:
    """PEFT's errors about the model (no module matched, shapes) are about the user's settings.

    So are the TypeErrors of its own methods: some of them calculate with a setting that has no default.
    """
    try:
        _train_fresh_modules(method, learner)
        prepare_gradient_start(method, learner, args)
        with spread_over_ranks():
            return get_peft_model(learner.base.model, method)
    except KrontuneError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except TypeError as error:
        if isinstance(method, KronConfig):
            raise
        raise ConfigError(
            f"method {learner.config.method.name}: PEFT cannot use its settings ({error}). Does one of them need a "
            "value? PEFT's documentation of the method says which have no default."
        ) from None


class AllocateRanks(TrainerCallback):
    """AdaLoRA shares its ranks out anew after every step, from its gradients; the training loop has to ask for it."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, *, model: Any, **_: Any) -> None:
        planned = model.peft_config[model.active_adapter].total_step
        if planned != state.max_steps:
            raise ConfigError(
                f"method.total_step is {planned}, and the run has {state.max_steps} steps, by whose end the ranks must "
                f"have been shared out. Set method.total_step: {state.max_steps}."
            )

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, *, model: Any, **_: Any) -> None:
        model.base_model.update_and_allocate(state.global_step)


def _train_fresh_modules(method: PeftConfig, learner: Learner) -> None:
    """PEFT trains and saves the last part of a head; a pooler or another part that is as fresh would be lost."""
    if learner.fresh_modules:
        method.modules_to_save = [*(method.modules_to_save or ()), *learner.fresh_modules]


def _trainer(learner: Learner, model: PeftModel, args: TrainingArguments, callbacks: list[TrainerCallback]) -> Trainer:
    """The trainer; what it refuses is a combination of the user's settings."""
    try:
        trainer = learner.trainer(
            model, args, train_dataset=learner.train_data, eval_dataset=learner.eval_data, callbacks=callbacks
        )
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error).strip()) from None
    except RuntimeError as error:  # how transformers says that report_to names a package that is not there
        if "to be installed" not in str(error):
            raise
        raise ConfigError(f"report_to: {error}") from None
    trainer.remove_callback(PrinterCallback)
    return trainer


def _take_over(trainer: Trainer, model: PeftModel, checkpoint: Path, metrics: MetricsFile) -> None:
    """Take a checkpoint of the last step for the result; the trainer itself would do one step more."""
    model.load_adapter(str(checkpoint), model.active_adapter, is_trainable=True)
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    metrics.rewrite(trainer.state)


def _evaluate_at_the_end(trainer: Trainer) -> None:
    """Make the last evaluation that of the model which is saved."""
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    stale = evaluated[-1:] != [trainer.state.global_step] or trainer.args.load_best_model_at_end
    if trainer.args.eval_strategy != "no" and stale:
        trainer.evaluate()


def _save_adapter(trainer: Trainer, adapter: Path, card: str) -> int:
    """Save the adapter and its tokenizer, whole or not at all. All processes take part, the first one writes.

    Returns:
        The bytes of its tensor file.
    """
    partial = adapter.with_name(".adapter.partial")
    trainer.save_model(str(partial))
    if trainer.is_world_process_zero():
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle, and config.yaml says the same
        (partial / "README.md").write_text(card, encoding="utf-8")
        if adapter.exists():
            shutil.rmtree(adapter)
        partial.replace(adapter)
    trainer.accelerator.wait_for_everyone()
    return folder_bytes(adapter, "*.safetensors")


def _record(
    config: RunConfig, learner: Learner, trainer: Trainer, n_base: int, step_ms: float, wall_s: float
) -> RunRecord:
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    # a run shorter than logging_steps logs only its mean
    means = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    logged = any("loss" in entry for entry in history) or not means
    evaluated = [entry for entry in history if "eval_loss" in entry]
    return RunRecord(
        name=config.output.name,
        method=config.method.name.lower(),
        settings=config.method.settings,
        model=config.model.path,
        seed=config.seed,
        learning_rate=trainer.args.learning_rate,
        n_trainable=trainer.get_num_trainable_parameters(),
        n_base=n_base,
        adapter_bytes=0,  # known once it is saved
        steps=trainer.state.global_step,
        step_ms=step_ms,
        wall_s=wall_s,
        loss=final_loss(history) if logged else means[-1],
        scores=learner.scores(evaluated[-1]) if evaluated else {},
        history=history,
        environment=environment(),
    )
