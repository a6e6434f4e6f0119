"""Every task's rows become the texts and answers that its authors mean, on the benchmarks' own rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from krontune.errors import ConfigError
from krontune.recipes.tasks import TASKS, fill, find_task, load_rows, mark_spans, subset

WITH_A_HEAD = [name for name, task in TASKS.items() if not task.generates]


@pytest.mark.parametrize("name", WITH_A_HEAD)
def test_texts_and_labels(name: str, shared_data: Path) -> None:
    task = TASKS[name]
    for split in task.splits:
        rows = load_rows(task, split, shared_data)
        for row in rows[:200]:
            candidates = task.candidates(row)
            assert all(text.strip() for texts in candidates for text in texts)
            if task.kind == "choose":
                assert len(candidates) == len(task.labels) and candidates[0] != candidates[1]
        labels = {row["label"] for row in rows}
        if task.kind == "regress":
            assert min(labels) == 0 and max(labels) == 5
        else:
            assert labels == set(range(len(task.labels)))
        assert task.n_outputs == (1 if task.kind in ("choose", "regress") else len(labels))


def test_the_spans_of_wsc_are_marked_where_they_stand(shared_data: Path) -> None:
    """No input carries two labels; without marks, 13 did, since a pronoun stands in them twice."""
    task = TASKS["wsc"]
    for split in task.splits:
        labels: dict[object, set[int]] = {}
        n_misplaced = 0
        for row in load_rows(task, split, shared_data):
            (texts,) = task.candidates(row)
            labels.setdefault(texts, set()).add(row["label"])
            assert texts[1] == f"{row['span2_text']} is {row['span1_text']}"
            assert texts[0].replace("*", "").replace("#", "") == row["text"].replace("*", "").replace("#", "")
            for span, mark, other in ((row["span1_text"], "*", "#"), (row["span2_text"], "#", "*")):
                wanted = f"{mark}{span}{mark}".replace("\n", " ").lower()
                n_misplaced += wanted not in texts[0].replace("\n", " ").replace(other, "").lower()
        assert not [texts for texts, found in labels.items() if len(found) > 1]
        assert n_misplaced == (1 if split == "validation" else 0)  # the data set's own: its index is one too small


def test_spans_that_touch_or_hold_each_other_are_marked_both() -> None:
    row = {
        "text": "Ann's dog bit her, her arm.",
        "span1_text": "her",
        "span1_index": 4,
        "span2_text": "her",
        "span2_index": 3,
    }
    assert TASKS["wsc"].candidates({**row, "label": 0}) == [("Ann's dog bit #her#, *her* arm.", "her is her")]
    inside = {
        "text": "Ann hit his dog.",
        "span1_text": "his dog",
        "span1_index": 2,
        "span2_text": "his",
        "span2_index": 2,
    }
    assert TASKS["wsc"].candidates(inside)[0][0] == "Ann hit *#his# dog*."
    assert mark_spans({**inside, "span2_text": "dog", "span2_index": 3}) == "Ann hit *his #dog#*."


def test_prompts_of_generated_answers(shared_data: Path) -> None:
    row = load_rows(TASKS["gsm8k"], "test", shared_data)[0]
    assert fill(TASKS["gsm8k"].prompt, row) == f"Question: {row['question']}\nAnswer:"
    row = load_rows(TASKS["mbpp"], "test", shared_data)[0]
    prompt = fill(TASKS["mbpp"].prompt, row)
    assert row["text"] in prompt and all(test in prompt for test in row["test_list"])
    assert fill(TASKS["math"].prompt, {"problem": "1+1?"}).splitlines()[1] == "Put the final answer in \\boxed{}."


def test_a_subset_is_the_same_every_time_and_keeps_the_order() -> None:
    rows = [{"i": i} for i in range(50)]
    chosen = subset(rows, 7, seed=1)
    assert chosen == subset(rows, 7, seed=1) != subset(rows, 7, seed=2)
    assert [row["i"] for row in chosen] == sorted({row["i"] for row in chosen}) and len(chosen) == 7
    assert subset(rows, 50, seed=1) == subset(rows, None, seed=1) == rows


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'gsm8k'"):
        find_task("gsm8")
    with pytest.raises(ConfigError, match=r"no such file: .*rte/validation.jsonl"):
        load_rows(TASKS["rte"], "validation", tmp_path)
    with pytest.raises(ConfigError, match="cannot load nyu-mll/glue for the task 'rte'"):
        load_rows(TASKS["rte"], "validation")
    (tmp_path / "rte").mkdir()
    (tmp_path / "rte" / "validation.jsonl").write_text(json.dumps({"label": 1}) + "\nnot json\n")
    with pytest.raises(ConfigError, match="line 2"):
        load_rows(TASKS["rte"], "validation", tmp_path)
