"""Supervised fine-tuning of a causal language model with any PEFT method, through TRL's SFTTrainer."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, TrainerCallback, TrainerState, set_seed
from trl import SFTConfig, SFTTrainer

from krontune.errors import ConfigError, KrontuneError
from krontune.report import RunRecord, final_loss, write_record
from krontune.report.plots import loss_curve
from krontune.tuners import spread_over_ranks

from .callbacks import Interrupted, MetricsFile, StepTimer, StopOnSignal
from .card import model_card
from .config import RunConfig
from .data import Examples, is_chat, load_data
from .gradient_start import prepare_gradient_start
from .methods import check_settings, peft_config
from .models import Base, check_chat_template, load_base
from .runs import RunFolder, checkpoint_step, environment, folder_bytes

# Set by the run config itself, in one place each.
OWN_SETTINGS = {
    "output_dir": "output",
    "seed": "seed",
    "report_to": "report_to",
    "resume_from_checkpoint": "resume",
    "model_init_kwargs": "model",
    "trust_remote_code": "model.trust_remote_code",
}
# TRL's 2e-5 is for full fine-tuning. Where a method's useful range lies is in docs/train.md.
LEARNING_RATES = {"lsr": 6e-3, "soka": 2e-3}
LEARNING_RATE = 2e-4
# What TRL and torch would only complain about deep inside, or not at all.
LEAST = {
    "learning_rate": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 0,
    "max_length": 1,
}


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
        base: the model that `config.model` names, if it is loaded already; the adapter is put into it, in place.

    Returns:
        The run's record, also in OUTPUT/record.json.

    Raises:
        ConfigError: a wrong setting, before anything is loaded or written where that can be told.
        Interrupted: stopped by a signal; resumable when its `step` is not None.
    """
    with StopOnSignal() as stop:
        folder = RunFolder(config.output)
        method = peft_config(config.method)
        args = sft_arguments(config, folder)
        if args.process_index == 0:
            folder.check(config, force)
        set_seed(config.seed)
        examples = load_data(config.data)
        base = base or load_base(config.model)
        if is_chat(examples.train) and not args.chat_template_path:
            check_chat_template(base.tokenizer, masked="prompt" in examples.train.column_names)
        if args.process_index == 0:
            folder.start(config, force)
        return _fit(config, args, method, base, examples, stop, callbacks)


def sft_arguments(config: RunConfig, folder: RunFolder) -> SFTConfig:
    """TRL's arguments from `config.training`, with defaults that suit adapters and the hardware.

    Raises:
        ConfigError: a setting that SFTConfig does not have (the nearest is suggested), that the run config holds
            elsewhere, or whose value is refused.
    """
    for name, place in OWN_SETTINGS.items():
        if name in config.training:
            raise ConfigError(f"training.{name} belongs elsewhere in the file: set '{place}' instead.")
    known = {f.name for f in dataclasses.fields(SFTConfig) if f.init} - OWN_SETTINGS.keys()
    settings = check_settings(SFTConfig, config.training, "training", known)
    _check_ranges(settings)
    on_gpu = torch.cuda.is_available() and not settings.get("use_cpu", False)
    defaults: dict[str, Any] = {
        "learning_rate": LEARNING_RATES.get(config.method.name.lower(), LEARNING_RATE),
        "bf16": on_gpu and not settings.get("fp16", False) and torch.cuda.is_bf16_supported(),
        "gradient_checkpointing": on_gpu,
        "dataloader_pin_memory": on_gpu,
        "ddp_broadcast_buffers": False,  # buffers are frozen and equal everywhere
        "disable_tqdm": True,  # krontune.recipes.callbacks has a bar of its own
    }
    if (config.data.eval or config.data.eval_split) and "eval_strategy" not in settings:
        defaults["eval_strategy"] = "epoch"
    try:
        return SFTConfig(
            output_dir=str(folder.checkpoints),
            seed=config.seed,
            report_to=config.report_to,
            **{**defaults, **settings},
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training settings: {str(error).strip()}") from None


def _check_ranges(settings: dict[str, Any]) -> None:
    for name, least in LEAST.items():
        value = settings.get(name)
        if value is not None and not value >= least:
            raise ConfigError(f"training.{name} is {value}; it must be at least {least}.")
    if settings.get("max_steps", -1) < 1 and settings.get("max_steps", -1) != -1:
        raise ConfigError(
            f"training.max_steps is {settings['max_steps']}; it must be at least 1, or -1 for whole epochs."
        )


def _fit(
    config: RunConfig,
    args: SFTConfig,
    method: PeftConfig,
    base: Base,
    examples: Examples,
    stop: StopOnSignal,
    callbacks: Sequence[TrainerCallback],
) -> RunRecord:
    folder = RunFolder(config.output)
    checkpoint = folder.latest_checkpoint() if config.resume else None
    set_seed(config.seed)  # the adapter's start depends on nothing that was drawn before
    n_base = base.model.num_parameters()
    _place(base, args)
    adapted = _with_adapter(method, base, args, examples)
    timer = StepTimer()
    trainer = _trainer(adapted, base, args, examples, [stop, MetricsFile(folder.metrics), timer, *callbacks])
    begin = time.perf_counter()
    if checkpoint and 0 < args.max_steps <= checkpoint_step(checkpoint):
        _take_over(trainer, adapted, checkpoint)
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    wall_s = time.perf_counter() - begin
    step = trainer.state.global_step
    if stop.received is not None and step < trainer.state.max_steps:
        raise Interrupted(stop.received, step)
    record = _record(config, trainer, n_base, timer.median_ms, wall_s)
    n_bytes = _save_adapter(trainer, folder.adapter, model_card(record))
    record = dataclasses.replace(record, adapter_bytes=n_bytes)
    if trainer.is_world_process_zero():
        write_record(record, folder.record)
        loss_curve([record], folder.loss_curve)
    return record


def _place(base: Base, args: SFTConfig) -> None:
    """Move the model to its GPU before the adapter is made, so that the SVDs of a start run there."""
    whole = args.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_GPU)
    if args.device.type == "cuda" and whole and not getattr(base.model, "is_quantized", False):
        base.model.to(args.device)


def _with_adapter(method: PeftConfig, base: Base, args: SFTConfig, examples: Examples) -> PeftModel:
    """PEFT's errors about the model (no module matched, shapes) are about the user's settings."""
    try:
        prepare_gradient_start(method, base, args, examples)
        with spread_over_ranks():
            return get_peft_model(base.model, method)
    except KrontuneError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _trainer(
    model: PeftModel, base: Base, args: SFTConfig, examples: Examples, callbacks: list[TrainerCallback]
) -> SFTTrainer:
    """The trainer; what it refuses is a combination of the user's settings."""
    try:
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=examples.train,
            eval_dataset=examples.eval,
            processing_class=base.tokenizer,
            callbacks=callbacks,
        )
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error).strip()) from None
    except RuntimeError as error:  # how transformers says that report_to names a package that is not there
        if "to be installed" not in str(error):
            raise
        raise ConfigError(f"report_to: {error}") from None
    if len(trainer.train_dataset) == 0:
        raise ConfigError(f"no training example has a completion within training.max_length={args.max_length} tokens.")
    trainer.remove_callback(PrinterCallback)
    return trainer


def _take_over(trainer: SFTTrainer, model: PeftModel, checkpoint: Path) -> None:
    """Take a checkpoint of the last step for the result; the trainer itself would do one step more."""
    model.load_adapter(str(checkpoint), model.active_adapter, is_trainable=True)
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def _save_adapter(trainer: SFTTrainer, adapter: Path, card: str) -> int:
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


def _record(config: RunConfig, trainer: SFTTrainer, n_base: int, step_ms: float, wall_s: float) -> RunRecord:
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    # a run shorter than logging_steps logs only its mean
    means = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    logged = any("loss" in entry for entry in history) or not means
    evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
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
        scores={"eval_loss": evaluated[-1]} if evaluated else {},
        history=history,
        environment=environment(),
    )
