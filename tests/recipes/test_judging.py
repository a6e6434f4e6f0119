"""What counts as a right answer: numbers, expressions, programs; on the benchmarks' own rows where they are here."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from krontune.recipes.judging import cut, final_number, judge, program, same_expression, same_number
from krontune.recipes.tasks import TASKS, load_rows

linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 * 7 = 42\n#### 42", "42"),
        ("The answer is: 1,234.50", "1234.50"),
        ("She pays $18 then $7. So it is $25.", "25"),
        ("#### -3\nThe rest of 9", "-3"),
        ("the answer is 5 apples, of 12", "5"),
        ("#### none, but 12 was near", "12"),
        ("I do not know", None),
        ("#### .5", ".5"),
        ("#### 12 + 3 = 15", "15"),
        ("#### 15 = 12 + 3", "15"),
        ("#### (12 + 3) * 2 = 15 * 2 = 30 apples", "30"),
        ("#### 18 (since 16 - 3 = 13, and so on)", "18"),
        ("####18", "18"),
        ("#### $1,018.", "1018"),
        ("#### 18\nThe answer is 20", "18"),
        ("#### 18\nLet me try again.\n#### 20", "18"),
        ("#### Step\nSo 9 * 2 = 18\n#### 18", "18"),
        ("The answer is 20-5=15", "15"),
        ("The answer is $20 - $5 = $15.", "15"),
        ("The answer is 7. No, the answer is 8.", "8"),
        ("She pays 20-18", "18"),
        ("She has (2+3)-5", "5"),
        ("from 10-20", "20"),
        ("It is \N{MINUS SIGN}5", "-5"),
        ("It is -$5", "-5"),
        ("20\N{MINUS SIGN}18", "18"),
        ("", None),
    ],
)
def test_the_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("5", "5.0", True), ("5", "6", False), (None, None, False), (".5", "0.50", True), ("007", "7", True)],
)
def test_numbers_are_compared_as_decimals(one: str | None, other: str | None, same: bool) -> None:
    assert same_number(one, other) is same


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_of_gsm8k_is_read_as_its_authors_say(shared_data: Path, split: str) -> None:
    """By the pattern of the benchmark's own evaluation: the number after ####, without commas."""
    rows = load_rows(TASKS["gsm8k"], split, shared_data)
    official = [re.findall(r"#### (\-?[0-9\.\,]+)", row["answer"])[0].replace(",", "") for row in rows]
    assert [final_number(row["answer"]) for row in rows] == official
    solved = [row["answer"] for row in rows[:50]]
    assert all(verdict["correct"] for verdict in judge(TASKS["gsm8k"], rows[:50], solved))
    shifted = solved[1:] + solved[:1]
    expected = [official[i] == official[(i + 1) % 50] for i in range(50)]
    assert [verdict["correct"] for verdict in judge(TASKS["gsm8k"], rows[:50], shifted)] == expected


def test_what_comes_after_the_answer_does_not_count() -> None:
    text = " 2 + 2 = 4\n#### 4\nQuestion: What is 9 * 9?\nAnswer: #### 81"
    assert judge(TASKS["gsm8k"], [{"question": "", "answer": "#### 4"}], [text])[0]["correct"]


@pytest.mark.parametrize(
    ("text", "solution", "same"),
    [
        (r"so \boxed{\frac{1}{2}}", r"Hence the value is $\boxed{\frac12}$.", True),
        (r"so \boxed{0.5}", r"Hence the value is $\boxed{\frac12}$.", True),
        (r"so \boxed{\frac{1}{3}}", r"Hence the value is $\boxed{\frac12}$.", False),
        (r"\boxed{x^2 + 2x + 1}", r"$\boxed{(x+1)^2}$", True),
        (r"\boxed{(1, 2)}", r"$\boxed{(2, 1)}$", False),
        ("no idea", r"$\boxed{7}$", False),
    ],
)
def test_expressions_are_compared_by_math_verify(text: str, solution: str, same: bool) -> None:
    pytest.importorskip("math_verify")
    assert same_expression(text, solution) is same
    assert judge(TASKS["math"], [{"solution": solution}], [text]) == [{"correct": same}]


MBPP = {"text": "Add.", "test_setup_code": "", "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}
HUMANEVAL = {
    "prompt": 'def add(a, b):\n    """Add."""\n',
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "entry_point": "add",
}


@linux
@pytest.mark.parametrize(
    ("name", "row", "text", "passes"),
    [
        ("mbpp", MBPP, "def add(a, b):\n    return a + b\nassert add(9, 9) == 0", True),
        ("mbpp", MBPP, "def add(a, b):\n    return a - b", False),
        ("mbpp", MBPP, "Sure:\n```python\ndef add(a, b):\n    return a + b\n```\nHope that helps.", True),
        ("mbpp", MBPP, "import sys; sys.exit(0)", False),
        ("mbpp", MBPP, "", False),
        ("humaneval", HUMANEVAL, "    return a + b\n\ndef other(): pass", True),
        ("humaneval", HUMANEVAL, "    return a * b\n", False),
        ("humaneval", HUMANEVAL, "```python\ndef add(a, b):\n    return a + b\n```", True),
    ],
)
def test_programs_are_judged_by_their_tests(name: str, row: dict[str, object], text: str, passes: bool) -> None:
    verdict = judge(TASKS[name], [row], [text])[0]
    assert verdict["correct"] is passes, verdict
    assert verdict["ended"] == "exit"


@linux
def test_reference_solutions_of_mbpp_pass_and_those_of_other_tasks_fail(shared_data: Path) -> None:
    rows = load_rows(TASKS["mbpp"], "test", shared_data)[:12]
    solved = [row["code"] for row in rows]
    assert [verdict["correct"] for verdict in judge(TASKS["mbpp"], rows, solved)] == [True] * 12
    assert not any(verdict["correct"] for verdict in judge(TASKS["mbpp"], rows, solved[1:] + solved[:1]))


ADD = "def add(a, b):\n    return a + b\n"
EXAMPLE = "\n```python\nassert add(1, 2) == 4\n```\n"
ANSWERS_WITH_FENCES = {
    "closed, not opened": ADD + "```\n",
    "closed, then an example": ADD + "```\nFor example:" + EXAMPLE,
    "capital": f"Sure:\n```Python\n{ADD}```",
    "with a version": f"Sure:\n```python3\n{ADD}```",
    "with a space": f"Sure:\n``` python\n{ADD}```",
    "with attributes": f'Sure:\n```python title="add.py"\n{ADD}```',
    "of Windows": f"Sure:\n```python\n{ADD}```\nDone.".replace("\n", "\r\n"),
    "without a language": f"Sure:\n```\n{ADD}```",
    "without an end": f"Sure:\n```python\n{ADD}",
    "without a language or an end": f"Sure:\n```\n{ADD}",
    "in the second block": f"Such that:{EXAMPLE}\nit is\n```python\n{ADD}```\n",
    "after output": f"It prints\n```\n3\n```\nby\n```\n{ADD}```\n",
    "after a shell's": f"```bash\npip install add\n```\n```py\n{ADD}```\n",
    "before an example": f"```python\n{ADD}```\nSo:{EXAMPLE}",
    "in a list": "1. Write\n   ```python\n   def add(a, b):\n       return a + b\n   ```\n",
    "of four ticks": f"````python\n{ADD}````",
    "a name for a function": "```python\nadd = lambda a, b: a + b\n```",
    "fences within a line": ADD + "\n# ```add(1, 2)``` is 3\n",
}


@linux
@pytest.mark.parametrize("name", ["mbpp", "humaneval"])
@pytest.mark.parametrize("text", ANSWERS_WITH_FENCES.values(), ids=ANSWERS_WITH_FENCES)
def test_right_code_is_found_between_fences(name: str, text: str) -> None:
    verdict = judge(TASKS[name], [MBPP if name == "mbpp" else HUMANEVAL], [text])[0]
    assert verdict["correct"], verdict


@linux
@pytest.mark.parametrize(
    "text",
    [
        "    return a + b\n```\n",
        "    return a + b\n```\nFor example:" + EXAMPLE,
        "\n    return a + b\n```\nSo it prints\n```\n3\n```\n",
        "```python\n    return a + b\n```",
        "Its body:\n```\n    return a + b\n```\nSo:" + EXAMPLE,
    ],
)
def test_a_function_s_body_is_found_between_fences(text: str) -> None:
    verdict = judge(TASKS["humaneval"], [HUMANEVAL], [text])[0]
    assert verdict["correct"], verdict


def test_a_program_holds_all_tests_and_nothing_after_the_answer() -> None:
    text = program(TASKS["mbpp"], {**MBPP, "test_setup_code": "import math"}, "x = 1\nassert False")
    assert text == "x = 1\n\nimport math\n\nassert add(1, 2) == 3\n\nassert add(0, 0) == 0\n"
    assert cut("abc", ("c", "b")) == "a"
