"""Settings and fixtures shared by all tests: offline, one thread, the same seeds every time."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

# Read when torch, transformers and datasets are imported, so set before; child processes inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
if "KRONTUNE_TEST_HF_HOME" not in os.environ:  # once a run: pytest-xdist's workers inherit it
    os.environ["KRONTUNE_TEST_HF_HOME"] = tempfile.mkdtemp(prefix="krontune-hf-")
    atexit.register(shutil.rmtree, os.environ["KRONTUNE_TEST_HF_HOME"], ignore_errors=True)
os.environ["HF_HOME"] = os.environ["KRONTUNE_TEST_HF_HOME"]

import numpy as np
import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
INTEGRATION_FOLDERS = [ROOT / "tests" / name for name in ("tuners", "recipes")]
# Recipes that make no adapter, or one that other tests make too: another PEFT changes nothing for them.
WITHOUT_ADAPTERS = {f"test_{name}.py" for name in ("data", "generate", "grids", "harness", "judging", "metrics")}
WITHOUT_ADAPTERS |= {f"test_{name}.py" for name in ("models", "orders", "sandbox", "tasks")}

settings.register_profile("ci", derandomize=True, max_examples=25, deadline=None)
settings.register_profile("thorough", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
torch.set_num_threads(1)


def pytest_report_header() -> str:
    """Name the versions that decide a result."""
    return "versions: " + ", ".join(f"{name} {version(name)}" for name in ("torch", "peft", "transformers", "trl"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in INTEGRATION_FOLDERS is an integration test, marked or not, but for WITHOUT_ADAPTERS."""
    for item in items:
        if item.path.parent in INTEGRATION_FOLDERS and item.path.name not in WITHOUT_ADAPTERS:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Start every test from the same seeds, and undo a changed default dtype."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real task data beside the checkout (or $KRONTUNE_DATA); skips where there is none."""
    folder = Path(os.environ.get("KRONTUNE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no task data at {folder}: set KRONTUNE_DATA to a folder of <task>/*.jsonl")
    return folder
