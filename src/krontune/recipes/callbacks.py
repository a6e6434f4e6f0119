"""What happens beside the steps of a training run: stopping cleanly, the metrics file, timing, the progress bar."""

from __future__ import annotations

import json
import signal
import statistics
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from krontune.report.files import write_text

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal; `step` is the checkpoint to go on from, None when training had not begun."""

    def __init__(self, signum: int, step: int | None = None) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
        self.step = step


class StopOnSignal(TrainerCallback):
    """Turn the first SIGINT or SIGTERM during training into a checkpoint at the end of the current step, then a stop.

    A context manager around the whole run. Outside the training loop, and on the second signal, it raises
    `Interrupted` at once. Under several processes the ranks agree on the step, since a checkpoint needs them all.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._training = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals there alone
            self._previous = {signum: signal.signal(signum, self._on_signal) for signum in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if not self._training or self.received is not None:
            raise Interrupted(signum)
        self.received = signum

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._training = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.received = _agree(self.received, args)
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.received is not None:
            control.should_evaluate = False  # it would come after the checkpoint, and once more on going on

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._training = False


class MetricsFile(TrainerCallback):
    """Append every log entry to a JSON-lines file as it happens; on resume, drop what lies past the checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.rewrite(state)

    def rewrite(self, state: TrainerState) -> None:
        """Make the file hold what the state remembers, and nothing else."""
        if state.is_world_process_zero:
            write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in state.log_history))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and state.log_history:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


class StepTimer(TrainerCallback):
    """Wall time of every optimizer step, without logging, evaluation and checkpoints."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begin = 0.0

    @property
    def median_ms(self) -> float:
        """Median in milliseconds, without the first step (which allocates and warms up); NaN before any."""
        steady = self.seconds[1:] or self.seconds
        return 1000 * statistics.median(steady) if steady else float("nan")

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.seconds.append(time.perf_counter() - self._begin)


class StepBar(TrainerCallback):
    """A progress bar with the last logged loss on a terminal; one line a log entry elsewhere."""

    def __init__(self, console: Console, label: str) -> None:
        self.console = console
        self.label = label
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(label, total=None, note="")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._progress.start()
            self._progress.update(self._task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        note = "  ".join(f"{name} {float(logs[name]):.4g}" for name in ("loss", "eval_loss") if name in logs)
        if not state.is_world_process_zero or not note:
            return
        self._progress.update(self._task, note=note)
        if not self.console.is_terminal:
            self.console.print(f"{self.label}: step {state.global_step}/{state.max_steps}  {note}", highlight=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._progress.stop()


def _agree(received: int | None, args: TrainingArguments) -> int | None:
    """The signal that any of the processes received."""
    if args.world_size == 1 or not torch.distributed.is_initialized():
        return received
    signum = torch.tensor(received or 0, device=args.device)
    torch.distributed.all_reduce(signum, torch.distributed.ReduceOp.MAX)
    return int(signum.item()) or None
