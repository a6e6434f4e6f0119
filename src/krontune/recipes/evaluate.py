"""A task's score of a model, with an adapter or without: `krontune eval`.

OUTPUT/
  settings.json   what was evaluated on what, written first; the same settings go on where a kill stopped them
  items.jsonl     one line a row of the task, written batch by batch
  result.json     the scores, written at the end
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig

from krontune.errors import CheckpointError, ConfigError
from krontune.report.files import write_json
from krontune.report.json_lines import JsonLines

from .config import ModelSettings
from .generate import complete, render
from .judging import check_math_verify, judge
from .metrics import score
from .models import Base, check_chat_template, load_base, model_source, resolve_dtype
from .problems import load_classification
from .runs import environment, locked
from .sandbox.api import SandboxError, missing_protection
from .tasks import Row, Task, fill, find_task, load_rows, subset

RESULT_VERSION = 1

Record = dict[str, Any]


@dataclass(frozen=True)
class EvalSettings:
    """What to evaluate.

    Args:
        task: the task's name.
        adapter: the adapter's folder or Hub id; None for the base alone.
        base: the base model; None for the one that the adapter names.
        data_dir: local files, DATA_DIR/TASK/SPLIT.jsonl; None for the data set on the Hub.
        split: the split; None for the task's own.
        limit: at most so many rows, drawn with a fixed seed.
        prompt: a template over a row's fields; None for the task's own.
        chat: give the prompt as a user's turn, through the tokenizer's chat template.
        max_new_tokens: where an answer is cut off; None for the task's own.
        max_length: tokens of a row, for classification.
        dtype: of the base model; "auto" is float32 for classification, else what this hardware multiplies natively.
        batch_size: rows at a time; it does not count as a setting when an evaluation goes on.
        allow_weaker_sandbox: run programs where this system cannot confine them fully.
    """

    task: str
    adapter: str | None = None
    base: str | None = None
    data_dir: Path | None = None
    split: str | None = None
    limit: int | None = None
    prompt: str | None = None
    chat: bool = False
    max_new_tokens: int | None = None
    max_length: int = 256
    dtype: str = "auto"
    batch_size: int = 8
    allow_weaker_sandbox: bool = False

    def complete(self) -> EvalSettings:
        """With every default in its place.

        Raises:
            ConfigError: an unknown task, no model, an adapter that cannot be read, or settings without effect.
        """
        task = find_task(self.task)
        if not task.generates and (self.chat or self.prompt is not None):
            raise ConfigError(f"{task.name} is a classification task: --chat and --prompt are for generated answers.")
        if self.adapter is None and self.base is None:
            raise ConfigError("name an adapter, or a model with --base.")
        return replace(
            self,
            base=self.base or _base_of(str(self.adapter)),
            split=self.split or task.splits[1],
            prompt=self.prompt or task.prompt,
            max_new_tokens=self.max_new_tokens or task.max_new_tokens,
            dtype=_chosen_dtype(task) if self.dtype == "auto" else self.dtype,
        )


@dataclass(frozen=True)
class EvalResult:
    """Scores over all rows. `stderr` is the standard error of a share of right answers, None for other metrics."""

    task: str
    base: str
    adapter: str | None
    dtype: str  # as resolved: "auto" differs from machine to machine
    n_items: int
    scores: dict[str, float]
    stderr: float | None
    seconds: float  # of this process; less than the whole where it went on from an earlier one
    environment: dict[str, Any]
    version: int = RESULT_VERSION


def evaluate(
    settings: EvalSettings, output: Path, *, force: bool = False, done: Callable[[int, int], None] = lambda n, of: None
) -> EvalResult:
    """Answer every row of the task once, judge the answers, and write the files above.

    Args:
        settings: what to evaluate.
        output: the folder; one that holds a part of the same evaluation is gone on with.
        force: drop what another evaluation left there.
        done: called with the number of rows that are done, and of all.

    Raises:
        ConfigError: settings that do not fit, or a folder that holds another evaluation.
        SandboxError: programs cannot be confined here.
    """
    begin = time.perf_counter()
    settings = settings.complete()
    task = find_task(settings.task)
    _check_tools(task, settings)
    rows = subset(load_rows(task, str(settings.split), settings.data_dir), settings.limit)
    if not rows:
        raise ConfigError(f"{task.name}/{settings.split} has no rows.")
    _check_folder(output, force)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output, "evaluation"):
        _take_up(settings, rows, output)
        journal = JsonLines(output / "items.jsonl")
        journal.repair()
        records = _by_index(journal, len(rows))
        done(len(records), len(rows))
        if len(records) < len(rows):
            for new in _answers(task, settings, rows, set(records)):
                journal.append(new)
                records |= {record["index"]: record for record in new}
                done(len(records), len(rows))
        result = _result(task, settings, rows, records, time.perf_counter() - begin)
        write_json(output / "result.json", vars(result))
    return result


def _check_tools(task: Task, settings: EvalSettings) -> None:
    """What the judge needs, before hours are spent on answers."""
    if task.kind == "math":
        check_math_verify()
    if task.kind == "code" and not settings.allow_weaker_sandbox and (missing := missing_protection()):
        raise SandboxError(missing[0])


def _check_folder(output: Path, force: bool) -> None:
    ours = {"settings.json", "items.jsonl", "result.json", ".lock"}
    if not output.exists():
        return
    if not output.is_dir() or {path.name for path in output.iterdir()} - ours:
        raise ConfigError(f"output {output} holds files that are not an evaluation's; choose another.")
    if force:
        shutil.rmtree(output)


def _take_up(settings: EvalSettings, rows: Sequence[Row], output: Path) -> None:
    """Write down what is evaluated, or check that it is what was begun."""
    path = output / "settings.json"
    now = _fingerprint(settings, rows)
    if not path.exists():
        write_json(path, now)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); start again with --force.") from None
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise ConfigError(
            f"{output} holds an evaluation with another {', '.join(changed)}; replace it with --force, or choose "
            "another --output."
        )


def _fingerprint(settings: EvalSettings, rows: Sequence[Row]) -> dict[str, Any]:
    """All that decides an item's line."""
    decisive = {name: value for name, value in vars(settings).items() if name not in ("batch_size", "data_dir")}
    text = json.dumps(list(rows), sort_keys=True, default=str)
    decisive["rows"] = hashlib.sha256(text.encode("utf-8", errors="replace")).hexdigest()[:16]
    if settings.adapter and Path(settings.adapter).is_dir():
        digest = hashlib.sha256()
        for path in sorted(Path(settings.adapter).glob("adapter_*")):
            digest.update(path.read_bytes())
        decisive["adapter_digest"] = digest.hexdigest()[:16]
    return decisive


def _by_index(journal: JsonLines, n_rows: int) -> dict[int, Record]:
    records: dict[int, Record] = {}
    for record in journal.read():
        index = record.get("index")
        if not isinstance(index, int) or not 0 <= index < n_rows or index in records:
            raise CheckpointError(
                f"{journal.path}: item {index!r} is unknown or there twice; start again with --force."
            )
        records[index] = record
    return records


def _answers(task: Task, settings: EvalSettings, rows: Sequence[Row], known: set[int]) -> Iterator[list[Record]]:
    """Judged answers, batch by batch; rows of like length go together, and a batch that is known is passed over."""
    lengths, answer = (_generated if task.generates else _classified)(task, settings, rows)
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    for start in range(0, len(order), settings.batch_size):
        chosen = [index for index in order[start : start + settings.batch_size] if index not in known]
        if chosen:
            yield [{"index": index, **record} for index, record in zip(chosen, answer(chosen), strict=True)]


# The rows' lengths, and what answers the rows with the given indices.
Answering = tuple[list[int], Callable[[list[int]], list[Record]]]


def _generated(task: Task, settings: EvalSettings, rows: Sequence[Row]) -> Answering:
    model, tokenizer = load_for_generation(settings)
    prompts = [fill(str(settings.prompt), row) for row in rows]
    if settings.chat:
        check_chat_template(tokenizer, masked=False)
        prompts = [render(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]

    def answer(chosen: list[int]) -> list[Record]:
        outputs = complete(
            model,
            tokenizer,
            [prompts[i] for i in chosen],
            max_new_tokens=int(settings.max_new_tokens or task.max_new_tokens),
            stop=() if settings.chat else task.stop,
            special_tokens=not settings.chat,
        )
        verdicts = judge(task, [rows[i] for i in chosen], outputs, allow_weaker=settings.allow_weaker_sandbox)
        return [{**verdict, "output": text} for verdict, text in zip(verdicts, outputs, strict=True)]

    return [len(prompt) for prompt in prompts], answer


def _classified(task: Task, settings: EvalSettings, rows: Sequence[Row]) -> Answering:
    if settings.adapter is None:
        _check_has_head(str(settings.base))
    problem = load_classification(task, _model_settings(settings), own_head=settings.adapter is None)
    model = _adapted(problem.base, settings)
    items = [problem.encode(row, settings.max_length) for row in rows]

    def answer(chosen: list[int]) -> list[Record]:
        predicted = problem.predict(model, [items[i] for i in chosen])
        return [{"predicted": float(value), "label": items[i].label} for i, value in zip(chosen, predicted)]

    return [item.length for item in items], answer


def load_for_generation(settings: EvalSettings) -> Base:
    """The language model with its adapter, and its tokenizer.

    Raises:
        ConfigError: one of them cannot be found, or they do not fit.
    """
    settings = settings.complete()
    base = load_base(_model_settings(settings))
    return Base(_adapted(base.model, settings), base.tokenizer)


def _model_settings(settings: EvalSettings) -> ModelSettings:
    return ModelSettings.model_validate({"path": settings.base, "dtype": settings.dtype})


def _adapted(model: torch.nn.Module, settings: EvalSettings) -> torch.nn.Module:
    """The model with the adapter, on the accelerator where there is one."""
    if settings.adapter is not None:
        try:
            model = PeftModel.from_pretrained(model, settings.adapter)
        except (OSError, ValueError, RuntimeError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise ConfigError(f"cannot put {settings.adapter} on {settings.base}: {first_line}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _chosen_dtype(task: Task) -> str:
    """What "auto" is here: a head is trained in float32, and other hardware may take another type for the rest."""
    return str(resolve_dtype("auto")).removeprefix("torch.") if task.generates else "float32"


def _base_of(adapter: str) -> str:
    try:
        base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except (OSError, ValueError, KeyError, TypeError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{adapter} is not an adapter: {first_line}") from None
    if not base:
        raise ConfigError(f"{adapter} does not name its base model; say it with --base.")
    return str(base)


def _check_has_head(base: str) -> None:
    source = model_source(base)
    architectures = AutoConfig.from_pretrained(source.name_or_path).architectures or []
    if not any("ForSequenceClassification" in name for name in architectures):
        raise ConfigError(f"{base} has no trained classification head; name an adapter that was trained with one.")


def _result(
    task: Task, settings: EvalSettings, rows: Sequence[Row], records: dict[int, Record], seconds: float
) -> EvalResult:
    ordered = [records[i] for i in range(len(rows))]
    stderr = None
    if task.generates:
        share = sum(record["correct"] for record in ordered) / len(ordered)
        scores = {task.metrics[0]: share}
        stderr = math.sqrt(share * (1 - share) / len(ordered))
    else:
        predicted, labels = (np.array([record[name] for record in ordered]) for name in ("predicted", "label"))
        scores = score(task.metrics, predicted, labels)
    return EvalResult(
        task=task.name,
        base=str(settings.base),
        adapter=settings.adapter,
        dtype=settings.dtype,
        n_items=len(rows),
        scores=scores,
        stderr=stderr,
        seconds=seconds,
        environment=environment(),
    )
