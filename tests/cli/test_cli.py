from __future__ import annotations

import inspect
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from krontune_cli.app import app

SRC = Path(__file__).resolve().parents[2] / "src"
HEAVY = ("torch", "peft", "transformers", "trl", "datasets", "accelerate", "matplotlib", "krontune")
COMMANDS = [
    [],
    *(
        [name]
        for name in ("train", "eval", "demo", "compare", "plan", "spectrum", "export", "merge", "compress", "info")
    ),
]

runner = CliRunner()


def invoke(*args: str) -> tuple[int, str, str]:
    result = runner.invoke(app, list(args))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command) or "krontune")
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    """Which is what makes it answer at once."""
    code = (
        "import sys\nfrom krontune_cli.app import app\n"
        f"try:\n    app({[*command, '--help']!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_path())
    assert "Usage:" in done.stdout
    assert done.stdout.rstrip().endswith("HEAVY []")


def test_version() -> None:
    assert invoke("--version") == (0, f"krontune {version('krontune')}\n", "")


def test_no_command_shows_the_help() -> None:
    code, stdout, stderr = invoke()
    assert code == 2
    assert "Usage:" in stdout + stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("train", "missing.yaml"), "error: no such file: missing.yaml"),
        (("train",), "Missing argument"),
        (("trian",), "No such command"),
        (("demo", "--steps", "0"), "--steps"),
    ],
)
def test_wrong_use_is_exit_code_2_and_one_line(args: tuple[str, ...], message: str) -> None:
    code, stdout, stderr = invoke(*args)
    assert code == 2
    assert message in stderr
    assert stdout == ""
    if stderr.startswith("error:"):
        assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: x", "unknown setting 'modle'. Did you mean 'model'?"),
        ("model: x\ndata: missing.jsonl\nmethod: lora\noutput: o\n", "no such data file: missing.jsonl"),
        ("model: x\ndata: d.jsonl\nmethod: {name: lsr, rr: 3}\noutput: o\n", "unknown setting 'method.rr'"),
    ],
)
def test_a_mistake_in_the_config(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text)
    code, stdout, stderr = invoke("train", "run.yaml")
    assert (code, stdout) == (2, "")
    last = stderr.splitlines()[-1]
    assert last.startswith("error: ") and message in last and "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_bug_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import krontune.recipes

    def broken(path: Path, overrides: list[str]) -> None:
        raise ValueError("not the user's mistake")

    monkeypatch.setattr(krontune.recipes, "load_config", broken)
    with pytest.raises(ValueError, match="not the user's mistake"):
        invoke("train", "run.yaml")


def test_a_missing_extra_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "krontune.recipes", None)
    monkeypatch.setitem(sys.modules, "trl", None)
    from krontune_cli.terminal import one_line_errors

    with pytest.raises(BaseException) as stop, one_line_errors():
        raise ModuleNotFoundError("No module named 'trl'", name="trl.trainer")
    assert getattr(stop.value, "exit_code", None) == 1


def test_the_configs_of_the_documentation_are_valid() -> None:
    from krontune.recipes import RunConfig
    from krontune.recipes.yaml_files import parse_yaml

    page = (SRC.parent / "docs" / "train.md").read_text(encoding="utf-8")
    blocks = [block.partition("```")[0] for block in page.split("```yaml\n")[1:]]
    assert blocks
    for block in blocks:
        RunConfig.from_mapping(parse_yaml(block, "docs/train.md"))


def test_demo_output_folders(tmp_path: Path) -> None:
    from krontune_cli.demo import _drop_demo, _free_folder

    assert _free_folder(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    assert _free_folder(tmp_path / "demo") == tmp_path / "demo-2"
    (tmp_path / "demo" / "thesis.txt").touch()
    _drop_demo(tmp_path / "demo")
    assert (tmp_path / "demo" / "thesis.txt").exists()


def test_the_demo_has_one_default_for_its_steps() -> None:
    from krontune.recipes.demo import DemoSettings
    from krontune_cli import demo

    assert inspect.signature(demo.command).parameters["steps"].default == DemoSettings(output=Path("x")).steps


def test_json_is_all_that_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for training: the real one is tested in tests/recipes."""
    import krontune.recipes
    from krontune.report import RunRecord

    fixed = RunRecord("run", "lora", {}, "m", 0, 1e-3, 10, 100, 40, 2, 5.0, 1.0, 0.5)
    monkeypatch.setattr(krontune.recipes, "train", lambda config, **_: fixed)
    path = tmp_path / "run.yaml"
    path.write_text(f"model: m\ndata: d\nmethod: lora\noutput: {tmp_path / 'o'}\n")
    code, stdout, _ = invoke("train", str(path), "--json")
    printed = json.loads(stdout)
    assert (code, printed["n_trainable"], printed["output"]) == (0, 10, str(tmp_path / "o"))
    code, stdout, _ = invoke("train", str(path))
    assert code == 0 and "adapter" in stdout and "0.500" in stdout


def _path() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(SRC), os.environ.get("PYTHONPATH", "")])}
