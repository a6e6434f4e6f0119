"""Methods that ask for more than a config: gradients before the start, on every rank; ranks after every step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from krontune.errors import ConfigError
from krontune.recipes import RunConfig, train
from tests.tuners.test_distributed import outputs_of_two, two_processes

WORKER = """
import os, sys, torch
os.environ["LOCAL_RANK"] = os.environ["RANK"]  # as torchrun would
from transformers import set_seed
from pathlib import Path
from krontune.recipes.config import load_config
from krontune.recipes.fit import _with_adapter
from krontune.recipes.methods import peft_config
from krontune.recipes.runs import RunFolder
from krontune.recipes.training import make_learner
from tests.tuners.helpers import adapter_tensors

config = load_config(Path(sys.argv[1]) / "run.yaml")
learner = make_learner(config)
args = learner.arguments(RunFolder(config.output))
assert args.world_size == 2
set_seed(config.seed)
learner.load(args, None)
model = _with_adapter(peft_config(config.method, learner.task_type), learner, args)
torch.save(adapter_tensors(model), f"{sys.argv[1]}/rank{os.environ['RANK']}.pt")
"""


@two_processes
def test_the_ranks_start_alike(run_config: Callable[..., RunConfig], tmp_path: Path, request) -> None:
    """DDP would not make A0 and B0 equal: they are buffers. And dropout draws other numbers for other rows."""
    method = {"name": "soka", "r": 2, "target_modules": ["q_proj", "v_proj"], "init_weights": "gradient"}
    path = _with_dropout(Path(run_config().model.path), tmp_path / "model")
    config = run_config(method=method, model={"path": str(path), "dtype": "float32"})
    (tmp_path / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
    one, two = outputs_of_two(WORKER, tmp_path, request.config.rootpath)
    assert one.keys() == two.keys() and any(name.endswith("soka_A0") for name in one)
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def _with_dropout(model: Path, copy: Path) -> Path:
    """A copy of the model with dropout in its attention."""
    shutil.copytree(model, copy)
    settings = json.loads((model / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**settings, "attention_dropout": 0.3}))
    return copy


@pytest.mark.parametrize("name", ["adaption_prompt", "cartridge", "multitask_prompt_tuning", "prefix_tuning"])
def test_a_method_without_its_sizes(run_config: Callable[..., RunConfig], name: str) -> None:
    """PEFT lets them through its config, and calculates with None."""
    with pytest.raises(ConfigError, match=rf"method {name}: PEFT cannot use its settings \(.*need a value"):
        train(run_config(method={"name": name}))


def test_adalora_shares_its_ranks_out(run_config: Callable[..., RunConfig]) -> None:
    """Half of the directions are dropped by the last step, and the adapter file holds what is left."""
    sizes = {"init_r": 4, "target_r": 2, "tinit": 0, "tfinal": 1, "deltaT": 1, "target_modules": ["q_proj", "v_proj"]}
    config = run_config(method={"name": "adalora", "total_step": 4, **sizes})
    train(config)
    saved = json.loads((config.output / "adapter" / "adapter_config.json").read_text())
    kept = [keep for layer in saved["rank_pattern"].values() for keep in layer]
    assert sum(kept) == len(kept) // 2


def test_adalora_of_another_length(run_config: Callable[..., RunConfig]) -> None:
    method = {"name": "adalora", "total_step": 9, "target_modules": ["q_proj"]}
    with pytest.raises(ConfigError, match=r"total_step is 9, and the run has 4 steps.*Set method\.total_step: 4"):
        train(run_config(method=method))
