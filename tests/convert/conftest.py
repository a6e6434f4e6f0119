from __future__ import annotations

from pathlib import Path

import pytest

from tests.convert.helpers import CONFIGS, save_adapter, save_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{name in CONFIGS: folder}."""
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(folder / name, base, config) for name, config in CONFIGS.items()}
