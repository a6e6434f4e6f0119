"""The papers' tasks: where their rows come from, how a row becomes text, and how an answer is judged."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from krontune.errors import ConfigError, suggest

SUBSET_SEED = 20_250  # of the rows that a limit on evaluation leaves

Row = dict[str, Any]
Kind = Literal["classify", "regress", "choose", "answer", "math", "code"]


@dataclass(frozen=True)
class Task:
    """One benchmark task.

    Args:
        name: what the user calls it, and the folder of its local files.
        kind: "classify" and "regress" put a head on the text; "choose" scores every candidate text and takes the best;
            "answer" is a final number, "math" a final expression, "code" a program that must pass its tests.
        hub: data set and configuration on the Hub.
        texts: one or two templates over the row's fields, and `marked`: see `mark_spans`. For "choose", one pair a
            candidate.
        labels: the classes' names in the order of their numbers; of "choose", the candidates.
        metrics: names in krontune.recipes.metrics; for generated answers, see judging.py.
        splits: the names of the splits for training and for evaluation.
        prompt, completion: templates for generation and for training towards it.
        stop: the generated text is cut before the first of these.
        max_new_tokens: where a generated answer is cut off.
    """

    name: str
    kind: Kind
    hub: tuple[str, str | None]
    texts: tuple[tuple[str, ...], ...] = ()
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    splits: tuple[str, str] = ("train", "validation")
    prompt: str = ""
    completion: str = ""
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256

    @property
    def generates(self) -> bool:
        """Whether the answer is text that a language model writes."""
        return self.kind in ("answer", "math", "code")

    @property
    def n_outputs(self) -> int:
        """Outputs of the head for one text."""
        return 1 if self.kind in ("regress", "choose") else len(self.labels)

    def candidates(self, row: Row) -> list[tuple[str, ...]]:
        """The texts to encode for a row: one, or one a choice."""
        fields = {**row, "marked": mark_spans(row)} if "span1_index" in row else row
        return [tuple(template.format_map(fields) for template in templates) for templates in self.texts]


def mark_spans(row: Row) -> str:
    """The text with * around its first span and # around its second: a pronoun may stand in it several times.

    >>> mark_spans({"text": "Ann saw him, him too.", "span1_text": "Ann", "span1_index": 0,
    ...     "span2_text": "him", "span2_index": 2})
    '*Ann* saw #him#, him too.'
    """
    text = str(row["text"])
    words = list(re.finditer(r"\S+", text))
    marks = []  # where, in which order there, and what: of two spans that begin or end together, one holds the other
    for number, mark in (("1", "*"), ("2", "#")):
        span, first = str(row[f"span{number}_text"]), int(row[f"span{number}_index"])
        start, end = words[first].start(), words[first + len(span.split()) - 1].end()
        if text[start:end].lower().startswith(span.lower()):
            end = start + len(span)  # without the comma
        marks += [(start, start - end, mark), (end, end - start, mark)]
    for where, _, mark in sorted(marks, reverse=True):
        text = text[:where] + mark + text[where:]
    return text


def _glue(name: str, texts: tuple[str, ...], labels: Sequence[str], metrics: Sequence[str], **more: Any) -> Task:
    kind: Kind = "classify" if labels else "regress"
    return Task(name, kind, ("nyu-mll/glue", name), (texts,), tuple(labels), tuple(metrics), **more)


def _super_glue(
    name: str, *texts: tuple[str, ...], labels: Sequence[str], metrics: Sequence[str] = ("accuracy",)
) -> Task:
    kind: Kind = "choose" if len(texts) > 1 else "classify"
    return Task(name, kind, ("aps/super_glue", name), texts, tuple(labels), tuple(metrics))


_ENTAILMENT = ("entailment", "not_entailment")
_PROBLEM = "Question: {question}\nAnswer:"
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _glue("cola", ("{sentence}",), ("unacceptable", "acceptable"), ("matthews",)),
        _glue("sst2", ("{sentence}",), ("negative", "positive"), ("accuracy",)),
        _glue("mrpc", ("{sentence1}", "{sentence2}"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
        _glue("stsb", ("{sentence1}", "{sentence2}"), (), ("pearson", "spearman")),
        _glue("qqp", ("{question1}", "{question2}"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
        _glue(
            "mnli",
            ("{premise}", "{hypothesis}"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            splits=("train", "validation_matched"),
        ),
        _glue("qnli", ("{question}", "{sentence}"), _ENTAILMENT, ("accuracy",)),
        _glue("rte", ("{sentence1}", "{sentence2}"), _ENTAILMENT, ("accuracy",)),
        _super_glue("boolq", ("{question}", "{passage}"), labels=("no", "yes")),
        _super_glue(
            "cb",
            ("{premise}", "{hypothesis}"),
            labels=("entailment", "contradiction", "neutral"),
            metrics=("accuracy", "macro_f1"),
        ),
        _super_glue(
            "copa",
            ("{premise} What was the {question}?", "{choice1}"),
            ("{premise} What was the {question}?", "{choice2}"),
            labels=("choice1", "choice2"),
        ),
        _super_glue("wic", ("{word}: {sentence1}", "{sentence2}"), labels=("different", "same")),
        _super_glue("wsc", ("{marked}", "{span2_text} is {span1_text}"), labels=("no", "yes")),
        Task(
            "gsm8k",
            "answer",
            ("openai/gsm8k", "main"),
            metrics=("exact_match",),
            splits=("train", "test"),
            prompt=_PROBLEM,
            completion=" {answer}",
            stop=("\nQuestion:",),
        ),
        Task(
            "math",
            "math",
            ("DigitalLearningGmbH/MATH-lighteval", "default"),
            metrics=("exact_match",),
            splits=("train", "test"),
            prompt="Question: {problem}\nPut the final answer in \\boxed{{}}.\nAnswer:",
            completion=" {solution}",
            stop=("\nQuestion:",),
            max_new_tokens=512,
        ),
        Task(
            "mbpp",
            "code",
            ("google-research-datasets/mbpp", "full"),
            metrics=("pass@1",),
            splits=("train", "test"),
            prompt='"""\n{text}\nYour code should pass these tests:\n{tests}\n"""\n',
            completion="{code}\n",
            stop=('\n"""', "\nassert", "\nprint(", "\nif __name__", "\n```"),
        ),
        Task(
            "humaneval",
            "code",
            ("openai/openai_humaneval", None),
            metrics=("pass@1",),
            splits=("test", "test"),
            prompt="{prompt}",
            completion="{canonical_solution}",
            stop=("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\nassert", "\n```"),
        ),
    )
}


def find_task(name: str) -> Task:
    """A task by its name.

    Raises:
        ConfigError: there is none; the nearest name is suggested.
    """
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}. {suggest(name, TASKS)}")
    return TASKS[name]


def load_rows(task: Task, split: str, data_dir: Path | None = None) -> list[Row]:
    """The rows of a split: of DATA_DIR/TASK/SPLIT.jsonl, or of the data set on the Hub.

    Raises:
        ConfigError: no such file or data set, or a line that is not JSON.
    """
    if data_dir is None:
        return _from_hub(task, split)
    path = data_dir / task.name / f"{split}.jsonl"
    if not path.is_file():
        raise ConfigError(f"no such file: {path}. --data-dir holds TASK/SPLIT.jsonl, with the keys of {task.hub[0]}.")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: not JSON ({error}).") from None
    return rows


def _from_hub(task: Task, split: str) -> list[Row]:
    import datasets

    try:
        return list(datasets.load_dataset(task.hub[0], task.hub[1], split=split))
    except Exception as error:  # the Hub client raises a dozen unrelated kinds
        first_line = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ConfigError(
            f"cannot load {task.hub[0]} for the task {task.name!r}: {first_line} Or give local files with --data-dir."
        ) from None


def fill(template: str, row: Row) -> str:
    """A prompt or completion: the template over the row's fields, with `tests` for a list of assertions.

    Raises:
        ConfigError: the row has no such field, or what is written is no template.
    """
    tests = {"tests": "\n".join(row["test_list"])} if "test_list" in row else {}
    try:
        return template.format_map({**row, **tests})
    except KeyError as error:
        raise ConfigError(f"the task's rows have no {error}; they have {', '.join(row)}.") from None
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise bad_template(template, error) from None


def bad_template(template: str, error: Exception) -> ConfigError:
    """What to say of a template that Python cannot fill."""
    return ConfigError(
        f"the template {template!r} cannot be filled: {error}. Write {{NAME}} for a field of the rows; double a brace "
        "that is meant."
    )


def subset(rows: Sequence[Row], limit: int | None, seed: int = SUBSET_SEED) -> list[Row]:
    """At most `limit` rows, drawn with the seed and kept in their order; the same rows every time."""
    if limit is None or limit >= len(rows):
        return list(rows)
    chosen = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return [rows[i] for i in chosen]
