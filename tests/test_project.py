"""The project's files agree with each other: versions, pins, commands, layering."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PIN = re.compile(r'^[a-z0-9-]+==[\w.]+(; python_version (<|>=) "3\.\d+")?$')


def lines(name: str) -> list[str]:
    """The lines of a requirements file without comments."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return [line for line in (raw.split(" #")[0].strip() for raw in text.splitlines()) if line and line[0] != "#"]


def run(code: str) -> str:
    """What `code` prints in a new interpreter."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_version_is_the_same_everywhere() -> None:
    import krontune

    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert stated is not None
    assert krontune.__version__ == stated[1]
    assert f"[{stated[1]}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_are_exact_pins_of_public_versions() -> None:
    assert [line for line in lines("constraints.txt") if not PIN.match(line)] == []
    assert "torch==2.13.0" in lines("constraints.txt")


def test_every_dependency_is_pinned() -> None:
    pinned = {canonicalize_name(Requirement(line).name) for line in lines("constraints.txt")}
    wanted = {canonicalize_name(Requirement(text).name) for text in distribution("krontune").requires or []}
    assert wanted - pinned - {"krontune"} == set()


def test_oldest_peft_is_the_one_that_ci_repeats_on() -> None:
    tested = re.search(r"^OLDEST_PEFT := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    requires = [Requirement(text) for text in distribution("krontune").requires or []]
    (peft,) = [r for r in requires if r.name == "peft"]
    assert tested is not None
    assert tested[1] in peft.specifier
    assert any(s.operator == ">=" and tested[1].startswith(s.version) for s in peft.specifier)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_named_in_the_documentation_exist(page: str) -> None:
    named = set(re.findall(r"\bmake ([a-z][a-z-]+)", (ROOT / page).read_text(encoding="utf-8")))
    targets = set(re.findall(r"^([a-z][a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert named
    assert named <= targets


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    heavy = ["torch", "transformers", "peft", "trl", "datasets", "matplotlib"]
    assert run(f"import sys, krontune_cli.app; print([m for m in {heavy} if m in sys.modules])") == "[]"


def imports(source: Path) -> list[str]:
    """The absolute modules that `source` imports, at its top or inside functions."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return plain + [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]


def test_every_package_has_its_place_in_the_layers() -> None:
    contracts = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[tool.importlinter]")[1]
    packages = [f"krontune.{init.parent.name}" for init in (ROOT / "src" / "krontune").glob("*/__init__.py")]
    assert len(packages) > 2
    assert [name for name in packages if name not in contracts] == []


def test_only_one_file_reaches_inside_peft() -> None:
    """import-linter sees a library as a whole, so it cannot tell `peft` from its inner modules."""
    allowed = ROOT / "src" / "krontune" / "tuners" / "_peft.py"
    inside = {
        source.relative_to(ROOT).as_posix(): found
        for source in (ROOT / "src").rglob("*.py")
        if source != allowed and (found := [name for name in imports(source) if name.startswith("peft.")])
    }
    assert inside == {}
