"""`krontune train`: from a run config to a run folder, for language models and for classifiers."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftConfig
from transformers import TrainerCallback, set_seed

from krontune.errors import ConfigError
from krontune.report import RunRecord

from .callbacks import StopOnSignal
from .classify import Classifier
from .config import RunConfig
from .fit import Learner, fit
from .methods import peft_config
from .models import Base
from .runs import RunFolder
from .sft import LanguageModel
from .tasks import find_task


def train(
    config: RunConfig, *, force: bool = False, callbacks: Sequence[TrainerCallback] = (), base: Base | None = None
) -> RunRecord:
    """Fine-tune as `config` says and fill its run folder (see krontune.recipes.runs).

    SIGINT and SIGTERM end the run after the current step with a checkpoint. Under `accelerate launch` every process
    calls this; only the first one writes.

    Args:
        config: the run.
        force: replace a run that is already in the output folder.
        callbacks: more callbacks for the trainer, such as a progress bar.
        base: the language model that `config.model` names, if it is loaded already; the adapter is put into it, in
            place.

    Returns:
        The run's record, also in OUTPUT/record.json.

    Raises:
        ConfigError: a wrong setting, before anything is loaded or written where that can be told.
        Interrupted: stopped by a signal; resumable when its `step` is not None.
    """
    with StopOnSignal() as stop:
        folder = RunFolder(config.output)
        learner = make_learner(config)
        method = _method(config, learner)
        args = learner.arguments(folder)
        if args.process_index == 0:
            folder.check(config, force)
        set_seed(config.seed)
        learner.load(args, base)
        if args.process_index == 0:
            folder.start(config, force)
        return fit(config, args, method, learner, stop, callbacks)


def _method(config: RunConfig, learner: Learner) -> PeftConfig:
    method = peft_config(config.method, learner.task_type)
    if learner.task_type == "SEQ_CLS" and not hasattr(method, "modules_to_save"):
        raise ConfigError(
            f"{config.data.task} needs a trained head, and the method {config.method.name} trains nothing beside "
            "itself. Choose another method."
        )
    return method


def make_learner(config: RunConfig) -> Learner:
    """What `config` trains: a classifier for a classification task, otherwise a language model.

    Raises:
        ConfigError: an unknown task.
    """
    task = None if config.data.task is None else find_task(config.data.task)
    return LanguageModel(config, task) if task is None or task.generates else Classifier(config, task)
