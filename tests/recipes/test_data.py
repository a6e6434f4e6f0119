from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from krontune.errors import ConfigError
from krontune.recipes import RunConfig
from krontune.recipes.config import DataSettings
from krontune.recipes.data import is_chat, load_data
from krontune.recipes.evaluate import EvalSettings, evaluate
from krontune.recipes.runs import RunFolder
from krontune.recipes.tasks import TASKS
from krontune.recipes.training import make_learner

ROWS = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(5)]
TASK_ROWS: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "1 + 1?", "answer": "2 #### 2"},
    "math": {"problem": "What is $1 + 1$?", "solution": "It is $\\boxed{2}$."},
    "mbpp": {"text": "Add.", "code": "def add(a, b):\r\n    return a + b", "test_list": ["assert add(1, 1) == 2"]},
}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_the_same_rows_from_every_format(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(path, ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        Dataset.from_list(ROWS).to_parquet(path)
    examples = load_data(DataSettings(train=str(path)))
    assert examples.train.to_list() == ROWS
    assert examples.eval is None


def test_columns_by_name_and_by_template(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "1+1?", "hint": "add", "answer": "2"}])
    columns = {"prompt": "Q: {question} ({hint})\nA:", "completion": "answer"}
    rows = load_data(DataSettings(train=str(path), columns=columns)).train.to_list()
    assert rows == [{"prompt": "Q: 1+1? (add)\nA:", "completion": "2"}]


def test_chat_wraps_prompt_and_completion(jsonl: Path) -> None:
    rows = load_data(DataSettings(train=str(jsonl), chat=True, system="Be brief.")).train
    assert is_chat(rows)
    assert rows[0] == {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q0"}],
        "completion": [{"role": "assistant", "content": "a0"}],
    }


def test_messages_are_kept(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path = write_jsonl(tmp_path / "m.jsonl", [{"messages": messages, "id": 1}])
    rows = load_data(DataSettings(train=str(path))).train
    assert rows.to_list() == [{"messages": messages}]
    assert is_chat(rows)


def test_eval_file_and_limit(jsonl: Path, tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "eval.jsonl", ROWS[:3])
    examples = load_data(DataSettings(train=str(jsonl), eval=str(held_out), limit=2))
    assert examples.train.to_list() == ROWS[:2]
    assert examples.eval is not None and examples.eval.to_list() == ROWS[:2]
    assert not is_chat(examples.train)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": oops}\n', r"rows.jsonl, line 2: not JSON"),
        ('{"prompt": "a", "completion": "b"}\n[1]\n', r"line 2: a JSON object is needed"),
        ("", "is empty"),
        ('{"prompt": "a", "completion": null}\n', "1 of 1 rows have no completion"),
        ('{"prompt": "a", "completion": 3}\n', "completion must be text; the first row has 3"),
        ('{"messages": [1]}\n', "messages must be a list of {role, content}"),
        ('{"messages": "hello"}\n', "messages must be a list of {role, content}"),
        ('{"question": "a", "answer": "b"}\n', "has the columns question, answer; needed are prompt and completion"),
    ],
)
def test_bad_rows(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_data(DataSettings(train=str(path)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "missing.jsonl"}, "no such data file: missing.jsonl"),
        ({"train": "/etc/hostname"}, "data files are .csv, .json, .jsonl, .parquet"),
        ({"train": "nobody/nothing"}, "cannot load the data set 'nobody/nothing', split 'train'"),
    ],
)
def test_bad_sources(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_data(DataSettings(**settings))


def test_settings_without_effect_are_refused(jsonl: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.system has no effect"):
        load_data(DataSettings(train=str(jsonl), system="Be brief."))
    chats = write_jsonl(tmp_path / "m.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(ConfigError, match=r"data\.chat wraps"):
        load_data(DataSettings(train=str(chats), chat=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_split": "test"}, r"data\.eval_split: 'test' is for a data set on the Hub; .* data\.eval"),
        ({"split": "nonsense"}, r"data\.split: 'nonsense' is for"),
        ({"name": "x"}, r"data\.name: 'x' is for"),
        ({"name": "x", "eval": True}, r"data\.name: 'x' is for"),
        ({"eval_split": "test", "eval": True}, r"data\.eval_split: 'test' is for"),
    ],
)
def test_a_file_has_neither_splits_nor_configurations(jsonl: Path, changes: dict[str, Any], message: str) -> None:
    changes = {**changes, "eval": str(jsonl)} if "eval" in changes else changes
    with pytest.raises(ConfigError, match=message):
        load_data(DataSettings(train=str(jsonl), **changes))
    assert load_data(DataSettings(train=str(jsonl), split="train")).train.to_list() == ROWS


def test_a_named_column_decides_what_a_row_is(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "p", "completion": "c", "question": "q"}])
    rows = load_data(DataSettings(train=str(path), columns={"text": "question"})).train
    assert rows.to_list() == [{"text": "q"}]
    rows = load_data(DataSettings(train=str(path), columns={"prompt": "question"})).train
    assert rows.to_list() == [{"prompt": "q", "completion": "c"}]
    with pytest.raises(ConfigError, match=r"data\.columns names prompt, text, but a row is prompt and completion, or"):
        load_data(DataSettings(train=str(path), columns={"prompt": "question", "text": "question"}))


@pytest.mark.parametrize("maker", ["Q {prompt", "{}", "{prompt:d}", "{prompt.size}", "{prompt!x}"])
def test_a_template_that_is_none(jsonl: Path, tmp_path: Path, maker: str) -> None:
    with pytest.raises(ConfigError, match=r"template|no column"):
        load_data(DataSettings(train=str(jsonl), columns={"prompt": maker}))
    for split in ("train", "test"):
        (tmp_path / "gsm8k").mkdir(exist_ok=True)
        write_jsonl(tmp_path / "gsm8k" / f"{split}.jsonl", [{**TASK_ROWS["gsm8k"], "prompt": "p"}])
    with pytest.raises(ConfigError, match=r"cannot be filled: .* Write {NAME} for a field"):
        load_data(DataSettings(task="gsm8k", data_dir=tmp_path, columns={"prompt": maker}))


def test_a_column_that_is_not_there(jsonl: Path) -> None:
    with pytest.raises(ConfigError, match=r"no column 'promt'. Did you mean 'prompt'\?"):
        load_data(DataSettings(train=str(jsonl), columns={"prompt": "{promt}!"}))


def test_broken_parquet(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(ConfigError, match=r"cannot read .*x\.parquet"):
        load_data(DataSettings(train=str(path)))


@pytest.mark.parametrize(("name", "chat"), [("gsm8k", False), ("gsm8k", True), ("mbpp", False), ("math", True)])
def test_a_task_is_trained_on_the_very_tokens_that_eval_asks(
    name: str, chat: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer's own tokens before the completion, against what `krontune eval` hands to the tokenizer."""
    rows = [{**TASK_ROWS[name], "n": i} for i in range(3)]
    for split in TASKS[name].splits:
        (tmp_path / name).mkdir(exist_ok=True)
        write_jsonl(tmp_path / name / f"{split}.jsonl", rows)
    config = RunConfig.from_mapping(
        {
            "model": str(tiny_model),
            "data": {"task": name, "data_dir": str(tmp_path), "chat": chat, "eval_limit": 2},
            "method": "lora",
            "training": {"use_cpu": True},
            "output": str(tmp_path / "run"),
        }
    )
    learner = make_learner(config)
    args = learner.arguments(RunFolder(config.output))
    learner.load(args, None)
    assert (len(learner.train_data), len(learner.eval_data or ())) == (3, 2)
    trainer = learner.trainer(
        learner.base.model, args, train_dataset=learner.train_data, eval_dataset=learner.eval_data
    )
    batch = {name: tensor[0].tolist() for name, tensor in next(iter(trainer.get_eval_dataloader())).items()}
    places = zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    trained = [token for token, label, seen in places if seen and label == -100]
    asked: list[tuple[str, bool]] = []

    def listen(model: Any, tokenizer: Any, texts: list[str], *, special_tokens: bool, **_: Any) -> list[str]:
        asked.extend((text, special_tokens) for text in texts)
        return [""] * len(texts)

    monkeypatch.setattr("krontune.recipes.evaluate.complete", listen)
    monkeypatch.setattr("krontune.recipes.evaluate.judge", lambda task, rows, *_, **__: [{"correct": True}] * len(rows))
    monkeypatch.setattr("krontune.recipes.evaluate._check_tools", lambda *_: None)
    evaluate(EvalSettings(name, base=str(tiny_model), data_dir=tmp_path, chat=chat), tmp_path / "eval")
    text, special = asked[0]
    assert learner.base.tokenizer(text, add_special_tokens=special)["input_ids"] == trained
    assert learner.eval_options() == ["--task", name, *(["--chat"] if chat else [])]


def test_columns_replace_the_templates_of_a_task(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "gsm8k").mkdir(exist_ok=True)
        write_jsonl(tmp_path / "gsm8k" / f"{split}.jsonl", [TASK_ROWS["gsm8k"]])
    columns: dict[Any, str] = {"prompt": "question", "completion": "So: {answer}"}
    settings = DataSettings(task="gsm8k", data_dir=tmp_path, columns=columns)
    assert load_data(settings).train.to_list() == [{"prompt": "1 + 1?", "completion": "So: 2 #### 2"}]
    with pytest.raises(ConfigError, match="the task's rows have no 'hint'; they have question, answer"):
        load_data(DataSettings(task="gsm8k", data_dir=tmp_path, columns={"prompt": "hint"}))


def test_a_task_without_rows(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").touch()
    with pytest.raises(ConfigError, match="gsm8k/train has no rows"):
        load_data(DataSettings(task="gsm8k", data_dir=tmp_path))
