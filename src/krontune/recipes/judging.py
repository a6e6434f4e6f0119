"""Whether a generated answer is right: a final number, a final expression, or a program that passes its tests."""

from __future__ import annotations

import importlib.util
import re
import textwrap
from collections.abc import Collection, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from krontune.errors import ConfigError

from .sandbox.api import Limits, run_programs
from .tasks import Row, Task

# A minus sign between two numbers is none of theirs: 20-18 ends in 18.
NUMBER = re.compile(r"(?:(?<![\w).])-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
MARKED = re.compile(r"####([^\w\n]{0,8}?" + NUMBER.pattern + ".*)")  # GSM8K's own mark, with a number right after it
ANNOUNCED = re.compile(r"####|the answer is:?", re.IGNORECASE)  # MetaMathQA's words
# Numbers and signs up to an equals sign, and one number after it: what it is equal to is the answer.
CALCULATION = re.compile(r"[-+*/x%()=$\d.,\s]*=\s*(" + NUMBER.pattern + r")(?!\d|[.,]\d|\s*[-+*/x]\s*[$\d(])")
PLAIN_SIGNS = str.maketrans({"\N{MINUS SIGN}": "-", "\N{MULTIPLICATION SIGN}": "*", "\N{DIVISION SIGN}": "/"})
# A line that opens or closes a fenced block; a pair of fences within a line is none.
FENCE = re.compile(r"^[ \t]*`{3,}[^`\n]*\n?", re.MULTILINE)
DEFINED = re.compile(r"^(?:(?:async[ \t]+)?def|class)[ \t]+(\w+)|^(\w+)[ \t]*=", re.MULTILINE)
CALLED = re.compile(r"(\w+)[ \t]*\(")
MATH_TIMEOUT_S = 5


def final_number(text: str) -> str | None:
    """The number that a solution ends in, without signs of thousands and currency.

    It is the one after the first `####` that a number follows, as in the gold answers of GSM8K: what comes later is
    rambling. Without that mark it is the last one that is announced, and without an announcement the last one of all.
    Where a calculation is announced, it is the result.

    >>> final_number("So 3 * 4 = 12.\\n#### 1,012"), final_number("The answer is 20-5=15")
    ('1012', '15')
    >>> final_number("It costs $5.50."), final_number("no idea")
    ('5.50', None)
    """
    text = text.translate(PLAIN_SIGNS)
    announced = [part.partition("\n")[0] for part in ANNOUNCED.split(text)[1:]]
    lines = MARKED.findall(text)[:1] or [line for line in announced if NUMBER.search(line)][-1:]
    number = _announced(lines[0]) if lines else ([None, *NUMBER.findall(text)])[-1]
    return re.sub(r"[$,]", "", number) if number else None


def _announced(line: str) -> str:
    """The number of a line that has one: the result if the line begins with a calculation, else the first."""
    calculated = CALCULATION.match(line)
    return calculated[1] if calculated else NUMBER.findall(line)[0]


def same_number(one: str | None, other: str | None) -> bool:
    """Whether two numbers are equal as decimals: 5.50 is 5.5; an answer that is missing equals nothing."""
    try:
        return one is not None and other is not None and Decimal(one) == Decimal(other)
    except InvalidOperation:
        return False


def same_expression(text: str, solution: str) -> bool:
    """Whether the final expression of `text` equals that of `solution`, by math-verify.

    Raises:
        ConfigError: math-verify is not installed.
    """
    check_math_verify()
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    boxed_first = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    wanted = parse(solution, extraction_config=boxed_first, parsing_timeout=MATH_TIMEOUT_S)
    given = parse(text, extraction_config=boxed_first, parsing_timeout=MATH_TIMEOUT_S)
    return bool(verify(wanted, given, timeout_seconds=MATH_TIMEOUT_S))


def check_math_verify() -> None:
    """Make sure that expressions can be compared.

    Raises:
        ConfigError: math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError("the task math is judged by math-verify; install it with: pip install 'krontune[eval]'")


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    ends = [position for mark in stop if (position := text.find(mark)) >= 0]
    return text[: min(ends)] if ends else text


def program(task: Task, row: Row, text: str) -> str:
    """The program that passes if the answer is right: the code of the answer, then the row's tests."""
    tested = {row["entry_point"]} if task.name == "humaneval" else set(CALLED.findall("\n".join(row["test_list"])))
    code, fenced = answer_code(text.replace("\r\n", "\n"), tested, task.stop)
    if task.name == "humaneval":
        between = "\n" if fenced else ""
        return f"{row['prompt']}{between}{code}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"
    return "\n\n".join([code, row.get("test_setup_code") or "", *row["test_list"]]) + "\n"


def answer_code(text: str, tested: Collection[str], stop: Sequence[str]) -> tuple[str, bool]:
    """The code in an answer, and whether it stood in a fenced block, as chat models write it.

    Of the parts between fences, the first that defines a name in `tested`; whether a fence opens or closes is not
    asked, since a continuation of the prompt may end in a fence that it did not open. Where no part does, an answer
    that begins indented goes on with a function of the prompt, and otherwise the first block counts. What is not in a
    block ends at the first of the `stop` strings.
    """
    before, *blocks = FENCE.split(text)
    plain = cut(before, stop)
    if _defines(plain, tested):
        return plain, False
    for block in map(textwrap.dedent, blocks):  # a block in a list is indented
        if _defines(block, tested):
            return block, True
    written = [block for block in blocks if block.strip()]
    if written and not before.lstrip("\n").startswith((" ", "\t")):
        return written[0], True
    return plain, False


def _defines(code: str, names: Collection[str]) -> bool:
    return any(function in names or variable in names for function, variable in DEFINED.findall(code))


def judge(
    task: Task, rows: Sequence[Row], texts: Sequence[str], limits: Limits | None = None, *, allow_weaker: bool = False
) -> list[dict[str, Any]]:
    """For every generated text, whether it is `correct`, and what that was decided on.

    Raises:
        ConfigError: math-verify is missing.
        SandboxError: the system cannot confine programs, and `allow_weaker` is not set.
    """
    if task.kind == "code":
        sources = [program(task, row, text) for row, text in zip(rows, texts, strict=True)]
        outcomes = run_programs(sources, limits, allow_weaker=allow_weaker)
        return [
            {"correct": outcome.passed, "ended": outcome.status, "message": outcome.output[-200:]}
            for outcome in outcomes
        ]
    if task.kind == "math":
        return [
            {"correct": same_expression(cut(text, task.stop), row["solution"])}
            for row, text in zip(rows, texts, strict=True)
        ]
    found = [(final_number(cut(text, task.stop)), final_number(row["answer"])) for row, text in zip(rows, texts)]
    return [{"correct": same_number(given, wanted), "given": given, "wanted": wanted} for given, wanted in found]
