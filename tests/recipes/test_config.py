from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig

from krontune import LsrConfig, SokaConfig
from krontune.errors import ConfigError
from krontune.recipes.config import MethodSettings, RunConfig, apply_override, load_config
from krontune.recipes.methods import method_names, peft_config
from krontune.recipes.runs import RunFolder
from krontune.recipes.sft import sft_arguments
from krontune.recipes.yaml_files import dump_yaml, parse_yaml

GOOD = """
model: packaged:smollm2
data: orders.jsonl
method: {name: lsr, r: 16}
training: {learning_rate: 1e-3}
output: runs/orders
"""


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def test_short_forms_and_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    assert config.model.path == "packaged:smollm2"
    assert config.data.train == "orders.jsonl"
    assert config.method.settings == {"r": 16}
    assert config.training == {"learning_rate": 0.001}
    assert (config.seed, config.resume, config.report_to) == (0, False, ["none"])


def test_resolved_yaml_reads_back_to_the_same_config(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD, "seed=7", "report_to=[tensorboard, wandb]")
    assert RunConfig.from_mapping(parse_yaml(config.to_yaml(), "resolved")) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trainig={}", "unknown setting 'trainig'. Did you mean 'training'?"),
        ("model.pth=x", "unknown setting 'model.pth'. Did you mean 'path'?"),
        ("data.trian=x", "unknown setting 'data.trian'. Did you mean 'train'?"),
        ("data.columns.promt=q", "unknown setting 'data.columns.promt'. Did you mean 'prompt'?"),
        ("seed=-1", "'seed' is -1: input should be greater than or equal to 0."),
        ("model.dtype=float8", "'model.dtype' is 'float8'"),
        ("output=.", "name a folder for the run"),
        ("model=3", "'model' is 3"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, GOOD, change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_sections_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'data' is missing. 'method' is missing. 'output' is missing."):
        load(tmp_path, "model: packaged:smollm2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty file"),
        ("- a\n- b\n", "not a list"),
        ("model: x\nmodel: y\n", "line 2: key 'model' is given twice"),
        ("? [a, b]\n: 1\n", "line 1: a key is a word, not sequence in brackets"),
        ("model:\n  ? {a: b}\n  : 1\n", "line 2: a key is a word, not mapping in brackets"),
        ("a: 1\nb: [x\nc: 2\n", "line 3"),
    ],
)
def test_a_file_that_is_not_a_config(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")


def test_no_is_a_word_and_false_is_not(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD, "training.save_strategy=no", "training.packing=false", "data.chat=yes")
    assert config.training == {"learning_rate": 0.001, "save_strategy": "no", "packing": False}
    assert config.data.chat is True


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=1", "training.=1"])
def test_a_malformed_override(override: str) -> None:
    with pytest.raises(ConfigError, match="is not KEY=VALUE"):
        apply_override({}, override)


def test_an_override_below_a_value() -> None:
    with pytest.raises(ConfigError, match="'seed' holds 3"):
        apply_override({"seed": 3}, "seed.x=1")


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.booleans() | st.text(max_size=20))
def test_overrides_read_what_the_yaml_dump_writes(value: object) -> None:
    raw: dict[str, object] = {}
    text = dump_yaml({"x": value}).partition(":")[2]
    apply_override(raw, f"a.b={text}")
    assert raw == {"a": {"b": value}}


@given(st.integers(1, 999), st.integers(-30, 30))
def test_numbers_without_a_dot_are_numbers(mantissa: int, exponent: int) -> None:
    assert parse_yaml(f"{mantissa}e{exponent}", "x") == float(f"{mantissa}e{exponent}")


@pytest.mark.parametrize(
    ("name", "settings", "kind"),
    [
        ("lsr", {"r": 8, "separation_rank": 4}, LsrConfig),
        ("SoKA", {"r": 2, "factor_shape": [24, 4]}, SokaConfig),
        ("lora", {"r": 4, "init_lora_weights": "pissa"}, LoraConfig),
        ("ia3", {"target_modules": ["q_proj"], "feedforward_modules": []}, IA3Config),
    ],
)
def test_methods_by_name(name: str, settings: dict[str, object], kind: type) -> None:
    config = peft_config(MethodSettings(name=name, **settings))
    assert type(config) is kind
    assert config.task_type == "CAUSAL_LM"
    for field, value in settings.items():
        got = getattr(config, field)
        assert (list(got) if isinstance(got, (set, tuple)) else got) == value


def test_every_peft_method_is_known() -> None:
    assert {"lora", "lsr", "soka", "adalora", "vera", "oft", "prefix_tuning"} <= set(method_names())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "loraa"}, "unknown method 'loraa'. Did you mean 'lora'?"),
        ({"name": "lora", "lora_alhpa": 4}, "unknown setting 'method.lora_alhpa'. Did you mean 'lora_alpha'?"),
        ({"name": "lsr", "resolved": {}}, "unknown setting 'method.resolved'"),
        ({"name": "lora", "r": "many"}, "'method.r' is 'many': input should be a valid integer"),
        ({"name": "lora", "target_modules": 3}, "'method.target_modules' is 3: input should be a valid "),
        ({"name": "lsr", "r": 0}, "r=0"),
        ({"name": "soka", "rank_selection": "best"}, "rank_selection='best'"),
    ],
)
def test_a_wrong_method_setting(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        peft_config(MethodSettings(**settings))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"learning_rte": 1e-3}, "unknown setting 'training.learning_rte'. Did you mean 'learning_rate'?"),
        ({"output_dir": "x"}, "training.output_dir belongs elsewhere in the file: set 'output' instead."),
        ({"seed": 1}, "set 'seed' instead"),
        ({"max_steps": "ten"}, "'training.max_steps' is 'ten'"),
        ({"max_steps": 0}, "training.max_steps is 0; it must be at least 1, or -1"),
        ({"learning_rate": -1}, "training.learning_rate is -1.0; it must be at least 0."),
        ({"learning_rate": ".nan"}, "training.learning_rate"),
        ({"per_device_train_batch_size": 0}, "training.per_device_train_batch_size is 0; it must be at least 1."),
        ({"eval_strategy": "sometimes"}, "training settings: sometimes is not a valid"),
    ],
)
def test_a_wrong_training_setting(training: dict[str, object], message: str) -> None:
    raw = {"model": "m", "data": "d", "method": "lora", "training": training, "output": "o"}
    with pytest.raises(ConfigError) as error:
        sft_arguments(RunConfig.from_mapping(raw), RunFolder(Path("o")))
    assert message in str(error.value)


def test_training_defaults_follow_the_method_and_can_be_replaced() -> None:
    raw = {"model": "m", "data": "d", "output": "o", "training": {"use_cpu": True}}
    rates = {}
    for method in ("lsr", "lora"):
        args = sft_arguments(RunConfig.from_mapping({**raw, "method": method}), RunFolder(Path("o")))
        rates[method] = args.learning_rate
        assert not args.bf16 and not args.gradient_checkpointing
    assert rates["lsr"] > rates["lora"]
    raw["training"] = {"use_cpu": True, "learning_rate": 5e-4}
    config = RunConfig.from_mapping({**raw, "method": "lsr"})
    assert sft_arguments(config, RunFolder(Path("o"))).learning_rate == 5e-4
