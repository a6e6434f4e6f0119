"""krontune eval --harness lm-eval: the standard harness on a model with an adapter, without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from krontune.errors import ConfigError
from krontune.recipes.harness import run_harness
from tests.cli.conftest import run
from tests.recipes.test_evaluate import adapter as adapter
from tests.recipes.test_evaluate import folder as folder

CHOICES = ["no", "yes"]
ROWS = [{"question": f"Is {i} even?", "label": 1 - i % 2} for i in range(8)]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with a task of the harness's own kind."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    settings = {
        "task": "even",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "label",
        "doc_to_choice": CHOICES,
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "even.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return tmp_path


def test_the_adapter_is_applied(task: Path, tiny_model: Path, adapter: Path) -> None:
    """The harness takes the choice with the higher log-likelihood; here that is computed by hand."""
    pytest.importorskip("lm_eval")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter).eval()

    def likelihood(prompt: str, choice: str) -> float:
        before, whole = (
            tokenizer(text, return_tensors="pt")["input_ids"][0] for text in (prompt, f"{prompt} {choice}")
        )
        with torch.no_grad():
            logits = model(whole[None]).logits[0].log_softmax(-1)
        return sum(float(logits[i - 1, whole[i]]) for i in range(len(before), len(whole)))

    chosen = [max((0, 1), key=lambda i: likelihood(row["question"], CHOICES[i])) for row in ROWS]
    expected = sum(c == row["label"] for c, row in zip(chosen, ROWS, strict=True)) / len(ROWS)
    found = run_harness(["even"], str(adapter), str(tiny_model), dtype="float32", include_path=task)
    assert found["results"]["even"]["acc,none"] == expected
    assert (found["base"], found["dtype"]) == (str(tiny_model), "float32")


def test_an_unknown_task(tiny_model: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(ConfigError, match="lm-eval has no task evens"):
        run_harness(["evens"], base=str(tiny_model))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--harness lm-eval --chat --split test", "--split, --chat has no effect with --harness lm-eval"),
        ("--include-path tasks", "--include-path has no effect with --harness krontune"),
    ],
)
def test_no_option_is_ignored(line: str, message: str) -> None:
    code, stdout, stderr = run("eval", "--base", "model", "--task", "gsm8k", *line.split())
    assert (code, stdout) == (2, "") and message in stderr
