"""The configuration of a training run: what `krontune train RUN.yaml` reads, checked before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from krontune.errors import ConfigError, suggest

from .yaml_files import dump_yaml, parse_yaml, read_yaml

# `model: X` stands for `model: {path: X}`, and so on.
SHORT_FORMS = {"model": "path", "data": "train", "method": "name"}
# Fields of every PeftConfig that say what the file is; the run decides them, not its author.
NOT_SETTINGS = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "inference_mode"}
NOT_SETTINGS |= {"format_version", "resolved", "revision", "runtime_config", "saved_tensors"}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(_Section):
    """The base model: a Hub id, a local folder, a GGUF file, or `packaged:smollm2` / `packaged:minilm`."""

    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    gguf_file: str | None = None  # the file inside a Hub repository or folder
    revision: str | None = None
    quantization: Literal["8bit", "4bit"] | None = None  # bitsandbytes, on a GPU
    trust_remote_code: bool = False


class DataSettings(_Section):
    """The training data: a benchmark task, or a Hub id, or a local JSONL, JSON, CSV or Parquet file, and how its rows
    become examples."""

    train: str | None = None
    task: str | None = None  # in place of `train`: gsm8k, cola, ...; its rows, prompt and metrics
    data_dir: Path | None = None  # of a task: TASK/SPLIT.jsonl; without it the data set on the Hub
    eval: str | None = None
    name: str | None = None  # the configuration of a Hub dataset
    split: str = "train"
    eval_split: str | None = None  # with no `eval`: a split of `train`
    columns: dict[Literal["prompt", "completion", "messages", "text"], str] = Field(default_factory=dict)
    chat: bool = False  # prompt and completion become a user's and an assistant's turn
    system: str | None = None  # the system turn before them
    limit: int | None = Field(default=None, gt=0)  # the first so many rows
    eval_limit: int | None = Field(default=None, gt=0)  # of a task: the rows that `krontune eval --limit` takes

    @model_validator(mode="after")
    def _one_source(self) -> DataSettings:
        if (self.train is None) == (self.task is None):
            raise ValueError("give either train (a file or a Hub id) or task (such as gsm8k or cola)")
        without_effect = ("data_dir", "eval_limit") if self.task is None else ("eval", "name", "system")
        why = "is for a task" if self.task is None else "does not go with task, which is asked as krontune eval asks it"
        for name in without_effect:
            if getattr(self, name) is not None:
                raise ValueError(f"{name} {why}; drop it")
        return self

    @property
    def source(self) -> str:
        """What people call the data."""
        return str(self.task or self.train)


class MethodSettings(BaseModel):
    """The PEFT method by its name, and the settings of that method's own config class.

    A name that ends in .json is an adapter_config.json, such as `krontune plan --out` writes; other settings go before.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, raw: Any) -> Any:
        file = raw.get("name") if isinstance(raw, dict) else None
        if not isinstance(file, str) or not file.endswith(".json"):
            return raw
        stored = _read_method(Path(file))
        return {**stored, **raw, "name": stored["name"]}

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class RunConfig(_Section):
    """One training run.

    Example:
        >>> config = RunConfig.from_mapping({
        ...     "model": "packaged:smollm2", "data": "orders.jsonl", "output": "runs/orders",
        ...     "method": {"name": "lsr", "r": 16, "separation_rank": 8},
        ... })
        >>> config.model.path, config.method.settings
        ('packaged:smollm2', {'r': 16, 'separation_rank': 8})
    """

    model: ModelSettings
    data: DataSettings
    method: MethodSettings
    training: dict[str, Any] = Field(default_factory=dict)  # fields of trl.SFTConfig
    output: Path
    seed: int = Field(default=0, ge=0, lt=2**32)
    report_to: list[str] = Field(default_factory=lambda: ["none"])  # wandb, tensorboard, trackio, ...
    resume: bool = False

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        short = {key: value for key, value in raw.items() if key in SHORT_FORMS and isinstance(value, str)}
        return raw | {key: {SHORT_FORMS[key]: value} for key, value in short.items()}

    @field_validator("report_to", mode="before")
    @classmethod
    def _as_list(cls, report_to: Any) -> Any:
        return [report_to] if isinstance(report_to, str) else report_to

    @field_validator("output")
    @classmethod
    def _not_empty(cls, path: Path) -> Path:
        if path == Path("."):
            raise ValueError("name a folder for the run, such as runs/orders-lsr")
        return path

    @classmethod
    def from_mapping(cls, raw: dict[str, Any], source: str = "config") -> RunConfig:
        """Check a mapping.

        Raises:
            ConfigError: an unknown key (the nearest known one is suggested), a missing one, or a bad value.
        """
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise ConfigError(f"{source}: {_describe(error)}") from None

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for YAML or JSON; `from_mapping` gives an equal config back."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The config as YAML, defaults included."""
        return dump_yaml(self.to_mapping())


def _read_method(file: Path) -> dict[str, Any]:
    """The method and its settings from an adapter_config.json."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        name = str(stored["peft_type"]).lower()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no adapter config: {error!r}") from None
    settings = {key: value for key, value in stored.items() if key not in NOT_SETTINGS and value is not None}
    return {"name": name, **settings}


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML run config and apply `key=value` overrides with dotted keys, values in YAML.

    Raises:
        ConfigError: an unreadable file, a malformed override, or a setting that is wrong.
    """
    raw = read_yaml(path)
    for override in overrides:
        apply_override(raw, override)
    return RunConfig.from_mapping(raw, source=str(path))


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted key of a raw mapping in place.

    >>> raw = {"training": {"max_steps": 10}, "method": "lora"}
    >>> apply_override(raw, "training.learning_rate=1e-3"); apply_override(raw, "method.r=4"); raw
    {'training': {'max_steps': 10, 'learning_rate': 0.001}, 'method': {'name': 'lora', 'r': 4}}
    """
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override!r} is not KEY=VALUE; write for example --set training.learning_rate=1e-3.")
    section = raw
    for key in keys[:-1]:
        inner = section.get(key)
        if isinstance(inner, str) and section is raw and key in SHORT_FORMS:
            inner = {SHORT_FORMS[key]: inner}
        elif inner is None:
            inner = {}
        elif not isinstance(inner, dict):
            raise ConfigError(f"--set {override!r}: {key!r} holds {inner!r}, so it has no {keys[-1]!r} to set.")
        section[key] = inner
        section = inner
    section[keys[-1]] = parse_yaml(text, f"--set {override!r}")


def _describe(error: ValidationError) -> str:
    """One line for pydantic's findings, in the words of the file's author."""
    sections: dict[str, type[BaseModel]] = {"model": ModelSettings, "data": DataSettings, "method": MethodSettings}
    known: dict[str, Iterable[str]] = {name: section.model_fields for name, section in sections.items()}
    known |= {"": RunConfig.model_fields, "data.columns": ["prompt", "completion", "messages", "text"]}
    parts = []
    for item in error.errors():
        is_key = item["loc"][-1] == "[key]"
        where = ".".join(str(part) for part in item["loc"][: -1 if is_key else None])
        section, _, key = where.rpartition(".")
        if is_key or item["type"] == "extra_forbidden":
            parts.append(f"unknown setting '{where}'. {suggest(key, known.get(section, ()))}")
        elif item["type"] == "missing":
            parts.append(f"'{where}' is missing.")
        else:
            parts.append(f"'{where}' is {item['input']!r}: {reason(item['msg'])}.")
    return " ".join(dict.fromkeys(parts))


def reason(message: str) -> str:
    """Pydantic's message as a clause: no prefix, no capital."""
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
