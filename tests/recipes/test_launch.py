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

import pytest

from krontune.recipes import RunConfig
from krontune.recipes.runs import RunFolder

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
    for _ in range(1200):
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
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert f"Checkpoint of step {step}" in stderr

    resume = [*command, "--resume", "--json", "--set", f"training.max_steps={step + 2}"]
    done = subprocess.run(resume, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == step + 2
    steps = [json.loads(line)["step"] for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert steps[: step + 2] == list(range(1, step + 3))


def test_two_processes_under_accelerate_launch(run_config: MakeConfig, tmp_path: Path) -> None:
    config = run_config(training={"max_steps": 3}, method={"name": "soka", "r": 2, "target_modules": "all-linear"})
    path = write_config(config, tmp_path)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launch, "-m", "krontune_cli", "train", str(path), "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)  # one JSON value: the second process printed nothing
    assert record["steps"] == 3
    lines = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert lines[0]["num_tokens"] > 0
    assert (config.output / "adapter" / "adapter_model.safetensors").exists()
    assert not list(config.output.glob(".*"))
