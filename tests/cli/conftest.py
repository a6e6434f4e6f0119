"""A folder with a tiny base model and adapters of it, to run the commands in."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from krontune_cli.app import app
from tests.convert.helpers import CONFIGS, save_adapter, save_base


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, and the adapters lsr/, soka/, soka-sorted/ and lora/, which name it as "base"."""
    folder = tmp_path_factory.mktemp("workshop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_base(Path("base"))
        for name in ("lsr", "soka", "soka-sorted", "lora"):
            save_adapter(Path(name), Path("base"), CONFIGS[name])
    return folder


@pytest.fixture
def at_work(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, where links lead to everything in the workshop."""
    for item in workshop.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def run(*args: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a krontune command; a bug comes up as its own exception."""
    result = CliRunner().invoke(app, list(args))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr
