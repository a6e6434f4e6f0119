"""Training data: rows from the Hub or from local files, as the examples that SFTTrainer takes."""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from krontune.errors import ConfigError, suggest

from .config import DataSettings
from .tasks import Row, Task, bad_template, fill, find_task, load_rows, subset

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# What a row can be; of several, the first that has a place for every named column.
KINDS = (("prompt", "completion"), ("messages",), ("text",))


@dataclass(frozen=True)
class Examples:
    """What a model is trained on, and optionally evaluated on."""

    train: Dataset
    eval: Dataset | None = None


def load_data(settings: DataSettings) -> Examples:
    """Training rows and, if asked for, evaluation rows, with the columns of one of the `KINDS`.

    Raises:
        ConfigError: a file or data set that cannot be read, columns that are not there, or empty rows.
    """
    if settings.task is not None:
        return _load_task(find_task(settings.task), settings)
    _check_files(settings)
    train = _examples(settings, settings.source, settings.split)
    if settings.eval:
        return Examples(train, _examples(settings, settings.eval, settings.eval_split or settings.split))
    if settings.eval_split:
        return Examples(train, _examples(settings, settings.source, settings.eval_split))
    return Examples(train)


def _check_files(settings: DataSettings) -> None:
    """Refuse what a local file does not have: splits, and configurations."""
    train_is_file, eval_is_file = (_is_file(source) for source in (settings.source, settings.eval or settings.source))
    without_effect = {
        "split": settings.split if train_is_file and settings.split != "train" else None,
        "eval_split": settings.eval_split if eval_is_file else None,
        "name": settings.name if train_is_file and eval_is_file else None,
    }
    for name, value in without_effect.items():
        if value is not None:
            raise ConfigError(
                f"data.{name}: {value!r} is for a data set on the Hub; a file is taken whole. Drop it, and name "
                "the file to evaluate on, if there is one, with data.eval."
            )


def task_rows(task: Task, settings: DataSettings) -> tuple[list[Row], list[Row]]:
    """A task's rows for training, and for evaluation: those that `krontune eval` asks, with the same limit.

    Raises:
        ConfigError: rows that cannot be read, none at all, or a task that has nothing to train on.
    """
    if task.splits[0] == task.splits[1]:
        raise ConfigError(f"{task.name} has no rows for training; train on another data set with data.train.")
    parts = []
    for split in (settings.split, settings.eval_split or task.splits[1]):
        parts.append(load_rows(task, split, settings.data_dir))
        if not parts[-1]:
            raise ConfigError(f"{task.name}/{split} has no rows.")
    return parts[0][: settings.limit], subset(parts[1], settings.eval_limit)


def _load_task(task: Task, settings: DataSettings) -> Examples:
    """The task's own prompts, which `krontune eval` asks, or those of `settings.columns`; and the answers."""
    unknown = settings.columns.keys() - {"prompt", "completion"}
    if unknown:
        raise ConfigError(f"data.columns.{min(unknown)}: a task's examples are made of prompt and completion.")
    makers = {"prompt": task.prompt, "completion": task.completion, **settings.columns}
    templates = {str(name): template(maker) for name, maker in makers.items()}
    train, held_out = (
        Dataset.from_list([_task_example(templates, row, settings.chat) for row in rows])
        for rows in task_rows(task, settings)
    )
    return Examples(train, held_out)


def _task_example(templates: dict[str, str], row: Row, chat: bool) -> dict[str, Any]:
    example = {name: fill(text, row) for name, text in templates.items()}
    if not chat:
        return example
    return _as_chat({**example, "completion": example["completion"].strip()}, None)


def template(maker: str) -> str:
    """A template as it is, or that of a column.

    >>> template("question"), template("Q: {question}")
    ('{question}', 'Q: {question}')
    """
    return maker if _is_template(maker) else f"{{{maker}}}"


def is_chat(dataset: Dataset) -> bool:
    """Whether the rows are messages, to be rendered by the tokenizer's chat template."""
    return not isinstance(dataset[0].get("prompt", dataset[0].get("text")), str)


def _examples(settings: DataSettings, source: str, split: str) -> Dataset:
    rows = _read(settings, source, split)
    if settings.limit:
        rows = rows.select(range(min(settings.limit, len(rows))))
    if len(rows) == 0:
        raise ConfigError(f"{source} has no rows.")
    if settings.system is not None and not settings.chat:
        raise ConfigError("data.system has no effect without data.chat: true.")
    rows = _choose_columns(rows, settings, source)
    if settings.chat and not all(isinstance(rows[0].get(name), str) for name in ("prompt", "completion")):
        raise ConfigError(f"data.chat wraps a prompt and a completion of plain text; {source} has other rows. Drop it.")
    _check_values(rows, source)
    if settings.chat:
        return rows.map(lambda row: _as_chat(row, settings.system), desc="Wrapping as chat")
    return rows


def _read(settings: DataSettings, source: str, split: str) -> Dataset:
    if _is_file(source):
        return _read_file(Path(source).expanduser())
    try:
        return datasets.load_dataset(source, settings.name, split=split)
    except Exception as error:  # the Hub client raises a dozen unrelated kinds
        raise ConfigError(f"cannot load the data set {source!r}, split {split!r}: {_first_line(error)}") from None


def _is_file(source: str) -> bool:
    path = Path(source).expanduser()
    return path.exists() or path.suffix in FORMATS


def _read_file(path: Path) -> Dataset:
    if not path.is_file():
        raise ConfigError(f"no such data file: {path}")
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path} ends in {path.suffix!r}; data files are {', '.join(sorted(FORMATS))}.")
    if path.stat().st_size == 0:
        raise ConfigError(f"{path} is empty.")
    if path.suffix == ".jsonl":
        _check_jsonl(path)
    try:
        return datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
    except Exception as error:  # pyarrow, pandas and datasets each raise their own
        cause = error.__cause__ or error
        raise ConfigError(f"cannot read {path}: {_first_line(cause)}") from None


def _check_jsonl(path: Path) -> None:
    """Name the first line that is not a JSON object; Arrow's own message gives a byte offset at best."""
    with path.open(encoding="utf-8", errors="strict") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip() and not isinstance(json.loads(line), dict):
                    raise ConfigError(f"{path}, line {number}: a JSON object is needed, such as {{'prompt': ...}}.")
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number}: not JSON ({error.msg}, column {error.colno}).") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8: {error}.") from None


def _choose_columns(rows: Dataset, settings: DataSettings, source: str) -> Dataset:
    """Keep the columns of one kind, taking each from where `settings.columns` says: a column, or a template."""
    available = rows.column_names
    chosen: dict[str, str] = {str(name): maker for name, maker in settings.columns.items()}
    kinds = [kind for kind in KINDS if all(name in chosen or name in available for name in kind)]
    if not kinds:
        raise ConfigError(
            f"{source} has the columns {', '.join(available)}; needed are prompt and completion, or messages, or "
            "text. Say which to use, for example data.columns: {prompt: question, completion: answer}."
        )
    kind = next((kind for kind in kinds if chosen.keys() <= set(kind)), None)
    if kind is None:
        raise ConfigError(
            f"data.columns names {', '.join(chosen)}, but a row is prompt and completion, or messages, or text, and "
            f"{source} has the columns {', '.join(available)}. Name the parts of one of these, and no other."
        )
    makers = {name: chosen.get(name, name) for name in kind}
    for name, maker in makers.items():
        for column in _fields(maker):
            if column not in available:
                known = suggest(column, available)
                raise ConfigError(f"data.columns.{name}: {source} has no column {column!r}. {known}")
    if all(name == maker for name, maker in makers.items()):
        return rows.select_columns(list(kind))

    def build(row: dict[str, Any]) -> dict[str, Any]:
        return {n: fill(m, row) if _is_template(m) else row[m] for n, m in makers.items()}

    return rows.map(build, remove_columns=available, desc="Choosing columns")


def _fields(maker: str) -> list[str]:
    if not _is_template(maker):
        return [maker]
    try:
        return [field for _, field, _, _ in string.Formatter().parse(maker) if field]
    except ValueError as error:
        raise bad_template(maker, error) from None


def _is_template(maker: str) -> bool:
    return "{" in maker


def _check_values(rows: Dataset, source: str) -> None:
    for name in rows.column_names:
        missing = rows.data.column(name).null_count
        if missing:
            raise ConfigError(f"{source}: {missing} of {len(rows)} rows have no {name}.")
        value = rows[0][name]
        plain_text = isinstance(value, str) and name != "messages"
        messages = name != "text" and isinstance(value, list) and all(map(_is_message, value))
        if not plain_text and not messages:
            kind = "a list of {role, content}" if name == "messages" else "text"
            raise ConfigError(f"{source}: {name} must be {kind}; the first row has {value!r}.")


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and {"role", "content"} <= value.keys()


def _as_chat(row: dict[str, str], system: str | None) -> dict[str, list[dict[str, str]]]:
    before = [{"role": "system", "content": system}] if system is not None else []
    return {
        "prompt": [*before, {"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
