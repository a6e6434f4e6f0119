"""`krontune train` as people start it: a process of its own, killed, or several under `accelerate launch`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from krontune.recipes import RunConfig
from krontune.recipes.runs import RunFolder, checkpoint_step

pytestmark = pytest.mark.slow
SRC = Path(__file__).resolve().parents[2] / "src"
MakeConfig = Callable[..., RunConfig]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(SRC), os.environ.get("PYTHONPATH", "")]), **changes}


def write_config(config: RunConfig, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    return path


def wait_for_steps(metrics: Path, n: int, process: subprocess.Popen[str]) -> None:
    for _ in range(3000):
        if metrics.exists() and len(metrics.read_text().splitlines()) >= n:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    raise AssertionError("the run did not get going")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_killed_process_leaves_a_checkpoint(signum: int, code: int, run_config: MakeConfig, tmp_path: Path) -> None:
    config = run_config(training={"max_steps": 100_000, "save_strategy": "no"})
    path = write_config(config, tmp_path)
    command = [sys.executable, "-m", "krontune_cli", "train", str(path)]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for_steps(config.output / "metrics.jsonl", 3, process)
    process.send_signal(signum)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    checkpoint = RunFolder(config.output).latest_checkpoint()
    assert checkpoint is not None
    step = checkpoint_step(checkpoint)
    assert f"Checkpoint of step {step}" in stderr

    resume = [*command, "--resume", "--json", "--set", f"training.max_steps={step + 2}"]
    done = subprocess.run(resume, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == step + 2
    steps = [json.loads(line)["step"] for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert steps[: step + 2] == list(range(1, step + 3))


def test_accelerate_launch(run_config: MakeConfig, tmp_path: Path) -> None:
    config = run_config(training={"max_steps": 2})
    path = write_config(config, tmp_path)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [*launch, "-m", "krontune_cli", "train", str(path), "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2


def test_two_processes_stop_together_and_go_on(run_config: MakeConfig, tmp_path: Path) -> None:
    """A signal to one of two processes stops both after the same step; started again, they finish the run.

    Through torchrun, which is what `accelerate launch` runs for several devices; on CPUs alone it wants MPI.
    """
    method = {"name": "soka", "r": 2, "target_modules": "all-linear"}
    config = run_config(training={"max_steps": 100_000, "save_strategy": "no"}, method=method)
    path = write_config(config, tmp_path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "krontune_cli", "train", str(path)]
    metrics = config.output / "metrics.jsonl"

    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        wait_for_steps(metrics, 2, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        next(worker for worker in workers if worker.environ().get("RANK") == "1").terminate()
        stderr = process.communicate(timeout=200)[1]
    finally:
        process.kill()
    assert process.returncode != 0
    checkpoint = RunFolder(config.output).latest_checkpoint()
    assert checkpoint is not None, stderr
    step = checkpoint_step(checkpoint)
    assert {file.name for file in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}

    resume = [*command, "--resume", "--json", "--set", f"training.max_steps={step + 2}"]
    done = subprocess.run(resume, env=environment(), capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == step + 2  # one JSON value: the second process printed nothing
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, step + 3))
    assert (config.output / "adapter" / "adapter_model.safetensors").exists()
    assert not list(config.output.glob(".*"))
