"""`init_weights: gradient` in several processes: each sees a part of the rows, and all start alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from krontune.recipes import RunConfig
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
