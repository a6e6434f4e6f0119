"""EleutherAI's lm-evaluation-harness on a model with an adapter, on any base that krontune loads."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from krontune.errors import ConfigError

from .evaluate import EvalSettings, load_for_generation


def run_harness(
    tasks: Sequence[str],
    adapter: str | None = None,
    base: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    include_path: Path | None = None,
) -> dict[str, Any]:
    """The harness's scores of the tasks, by task.

    Args:
        tasks: names of the harness's tasks.
        adapter: the adapter's folder or Hub id; None for the base alone.
        base: the base model; None for the one that the adapter names.
        limit: the first so many rows of each.
        batch_size: rows at a time.
        dtype: of the base model.
        include_path: a folder with task files of one's own.

    Raises:
        ConfigError: lm-eval is not installed, does not know a task, or the model cannot be loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("the harness is the package lm-eval; install it with: pip install 'krontune[lm-eval]'")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include_path) if include_path else None)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(f"lm-eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists what it has.")
    settings = EvalSettings("gsm8k", adapter, base, dtype=dtype).complete()  # the task is not asked
    model, tokenizer = load_for_generation(settings)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit, task_manager=manager)
    return {
        "base": settings.base,
        "adapter": adapter,
        "dtype": settings.dtype,
        "limit": limit,
        "results": found["results"],
        "versions": found["versions"],
    }
