"""One run of a comparison: a fresh copy of the model, a method, the steps, the score."""

from __future__ import annotations

import copy
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from krontune.errors import ConfigError
from krontune.recipes.problems import Item, Problem, make_problem
from krontune.recipes.tasks import find_task
from krontune.report.compared import ComparedRun

from .grid import Grid, RunSpec, Training
from .methods import adapt, adapter_bytes, count_trainable, parameter_groups

GRADIENT_EXAMPLES = 128  # for starts that are computed from a gradient


def load_problem(grid: Grid, task: str) -> Problem:
    """A task of the grid with its model and its rows.

    Raises:
        ConfigError: one of them cannot be read.
    """
    training = grid.training_for(task)
    problem = make_problem(find_task(task), grid.model)
    rows = grid.tuning_rows(task)
    problem.load(grid.data_dir, training.max_length, training.train_rows, rows, training.dev_rows)
    return problem


def run(spec: RunSpec, problem: Problem) -> ComparedRun:
    """Train as `spec` says and score; a run that fails or diverges is recorded as such.

    Equal seeds mean the same head, the same order of data and the same noise of dropout for every method.
    """
    begin = time.perf_counter()
    record = _record(spec, problem)
    reset_peak_memory()
    try:
        changes = _train_and_score(spec, problem)
    except (ConfigError, RuntimeError, ArithmeticError, NotImplementedError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        changes = {"error": f"{type(error).__name__}: {first_line}"}
    spent = time.perf_counter() - begin
    return ComparedRun(**{**record, **changes, "wall_s": round(spent, 2), "peak_mem_bytes": peak_memory()})


def _record(spec: RunSpec, problem: Problem) -> dict[str, Any]:
    return {
        "key": spec.key,
        "phase": spec.phase,
        "task": spec.task,
        "label": spec.method.label,
        "method": spec.method.name,
        "settings": spec.method.settings,
        "norms": spec.method.norms,
        "seed": spec.seed,
        "learning_rate": spec.rate,
        "metric": problem.metric,
        "higher_is_better": problem.higher_is_better,
    }


def _train_and_score(spec: RunSpec, problem: Problem) -> dict[str, Any]:
    training = Training.model_validate(spec.training)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = copy.deepcopy(problem.base).to(device)
    problem.prepare_head(model, spec.seed)
    torch.manual_seed(spec.seed)  # the adapter's start
    model = adapt(spec.method, model, problem.task_type, lambda: _gradient(model, problem, training, spec.seed))
    torch.manual_seed(spec.seed)  # dropout, whatever the start has drawn
    items = problem.tune if spec.phase == "tune" else problem.dev
    curve: list[dict[str, float]] = []

    def on_the_way(step: int) -> None:
        value = problem.evaluate(model, items, 4 * training.batch_size)[problem.metric]
        curve.append({"step": step, "held_out": round(value, 5)})

    trace = _fit(model, spec, problem, training, on_the_way)
    result: dict[str, Any] = {
        "n_trainable": count_trainable(model),
        "adapter_bytes": adapter_bytes(model),
        "steps": len(trace.step_ms),
        "step_ms": round(statistics.median(trace.step_ms[1:] or trace.step_ms), 2),
        "history": sorted(trace.rows + curve, key=lambda row: row["step"]),
    }
    if trace.diverged:
        return result
    scores = {**problem.evaluate(model, items, 4 * training.batch_size), **problem.floor(items)}
    value = scores[problem.metric]
    return {**result, "scores": scores, "score": value if math.isfinite(value) else None}


class Trace:
    """What a training loop leaves: times, means of the loss and the gradient's norm, and whether it diverged."""

    def __init__(self, log_every: int) -> None:
        self.log_every = log_every
        self.step_ms: list[float] = []
        self.rows: list[dict[str, float]] = []
        self.diverged = False
        self._window: list[tuple[float, float]] = []

    def add(self, step: int, loss: float, grad_norm: float, last: bool) -> None:
        """Note a step's values; a row is made of every `log_every` of them."""
        self.diverged = not (math.isfinite(loss) and math.isfinite(grad_norm))
        self._window.append((loss, grad_norm))
        if step % self.log_every == 0 or last or self.diverged:
            losses, norms = zip(*self._window, strict=True)
            row = {"step": step, "loss": statistics.fmean(losses), "grad_norm": statistics.fmean(norms)}
            if not self.diverged:
                row["grad_norm_sd"] = statistics.pstdev(norms)
                self.rows.append({name: float(f"{value:.5g}") for name, value in row.items()})
            self._window.clear()


def _fit(
    model: nn.Module, spec: RunSpec, problem: Problem, training: Training, on_the_way: Callable[[int], None]
) -> Trace:
    groups = parameter_groups(model, spec.method, spec.rate, training.head_rate, training.norm_rate)
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_factor(step, training))
    device = parameters[0].device
    trace = Trace(training.log_every)
    batches = problem.batches(training.batch_size, spec.seed)
    model.train()
    for step in range(1, training.steps + 1):
        begin = time.perf_counter()
        loss = problem.loss(model, on_device(problem.batch(next(batches)), device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        schedule.step()
        values = float(loss.detach()), float(grad_norm)
        trace.step_ms.append(1000 * (time.perf_counter() - begin))
        trace.add(step, *values, last=step == training.steps)
        if trace.diverged:
            break
        if training.eval_every and step % training.eval_every == 0 and step < training.steps:
            on_the_way(step)
            model.train()
    return trace


def _rate_factor(step: int, training: Training) -> float:
    """Linear warm-up, then linear to zero."""
    warm = max(1, round(training.warmup * training.steps))
    return (step + 1) / warm if step < warm else max(0.0, (training.steps - step) / max(1, training.steps - warm))


def _gradient(model: nn.Module, problem: Problem, training: Training, seed: int) -> None:
    """Backward over the first examples of the run's own training data."""
    batches: Iterator[list[Item]] = problem.batches(training.batch_size, seed)
    device = next(model.parameters()).device
    for _ in range(max(1, GRADIENT_EXAMPLES // training.batch_size)):
        problem.loss(model, on_device(problem.batch(next(batches)), device)).backward()


def on_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on the model's device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def reset_peak_memory() -> None:
    """Start to measure `peak_memory` anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """Bytes at the highest: of the accelerator, or else resident in this process (0 where that is not known)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0
