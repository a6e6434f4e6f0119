"""The documentation is true: every python block in README.md and docs/ runs, and so does every doctest.

The blocks of one page share a namespace and an empty working folder. A block that cannot run here is preceded by the
comment <!-- not run: REASON -->.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?P<skip><!-- not run: [^\n]+ -->\n+)?^```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)#\s]+)")


def blocks(page: Path) -> Iterator[tuple[int, str]]:
    """The line number and the code of each python block of `page` that is to run."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        if not match["skip"]:
            yield text.count("\n", 0, match.start("code")) + 1, match["code"]


def has_doctest(source: Path) -> bool:
    """Whether any docstring in `source` has an example, without importing it."""
    return ">>> " in source.read_text(encoding="utf-8")


def module_name(source: Path) -> str:
    """src/krontune/kron/__init__.py -> krontune.kron."""
    parts = source.relative_to(ROOT / "src").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.integration
@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p))], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, code in blocks(page):
        tree = ast.parse(code, filename=str(page))
        ast.increment_lineno(tree, line - 1)  # a traceback then points into the page
        exec(compile(tree, str(page), "exec"), namespace)


@pytest.mark.parametrize("name", [module_name(s) for s in SOURCES if has_doctest(s)])
def test_doctests(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples in {name} failed; see the output above"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert not missing


def test_index_names_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    named = {(index.parent / link).resolve() for link in LINK.findall(index.read_text(encoding="utf-8"))}
    assert [p.name for p in PAGES if p.is_relative_to(index.parent) and p != index and p not in named] == []
