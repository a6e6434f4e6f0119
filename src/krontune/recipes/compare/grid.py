"""The grid file of a comparison, and the runs that it stands for."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import nn
from transformers import PretrainedConfig

from krontune.errors import ConfigError, suggest
from krontune.plan import parse_amount
from krontune.recipes.config import MethodSettings, ModelSettings, apply_override, reason
from krontune.recipes.problems import AnswerLoss, Classification
from krontune.recipes.tasks import find_task
from krontune.recipes.yaml_files import read_yaml
from krontune.weights import find_model, load_config, meta_model

from .methods import NO_TARGETS, Method, adapt, count_trainable, sizing, solve


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Training(_Section):
    """How every run trains: the same for all methods."""

    steps: int = Field(default=150, gt=0)
    batch_size: int = Field(default=16, gt=0)
    max_length: int = Field(default=128, gt=0)  # tokens of a row
    warmup: float = Field(default=0.1, ge=0, lt=1)  # share of the steps; the rate then falls to zero on a line
    head_rate: float = Field(default=1e-3, gt=0)  # of the classification head
    norm_rate: float | None = Field(default=None, gt=0)  # of norm layers beside an adapter; None: as the adapter
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    train_rows: int | None = Field(default=None, gt=0)
    dev_rows: int | None = Field(default=None, gt=0)  # of the evaluation split, the same ones for all
    eval_every: int | None = Field(default=None, gt=0)  # steps between scores on the way, for learning curves
    log_every: int = Field(default=10, gt=0)


class Tuning(_Section):
    """How learning rates are chosen: on rows of the training split that no run trains on, with seeds of their own."""

    trials: int = Field(default=5, gt=0)
    factor: float = Field(default=3.0, gt=1)
    rows: int = Field(default=200, gt=0)
    seeds: list[int] = [1000]
    tasks: list[str] | None = None  # one rate a method from these tasks together; None: one a method and task


class Row(_Section):
    """A method of the grid; lists of budgets and norms stand for one method each."""

    label: str
    method: MethodSettings
    rate: float = Field(gt=0)  # the first one to try
    tuned: bool = True  # False: `rate` is used as it is
    budget: list[str | int | None] = [None]  # parameters, or a share of the reference such as 0.29x
    norms: list[bool] = [False]
    multipliers: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        raw = dict(raw)
        if isinstance(raw.get("method"), str):
            raw["method"] = {"name": raw["method"]}
        for name in ("budget", "norms"):
            if name in raw and not isinstance(raw[name], list):
                raw[name] = [raw[name]]
        return raw


class Grid(_Section):
    """A comparison, as its file says it."""

    name: str
    model: ModelSettings
    tasks: list[str] = Field(min_length=1)
    data_dir: Path | None = None
    target_modules: str | list[str] | None = None  # for every method that does not say otherwise
    training: Training = Training()
    per_task: dict[str, dict[str, Any]] = Field(default_factory=dict)  # training settings of single tasks
    tuning: Tuning = Tuning()
    seeds: list[int] = Field(min_length=1)
    reference: str  # the label that budgets and differences refer to
    methods: list[Row] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("model"), str):
            return {**raw, "model": {"path": raw["model"]}}
        return raw

    @field_validator("tasks")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            task = find_task(name)
            if task.splits[0] == task.splits[1]:
                raise ValueError(f"{name} has no rows for training, only those that it is evaluated on")
        return names

    @model_validator(mode="after")
    def _consistent(self) -> Grid:
        labels = [row.label for row in self.methods]
        if len(set(labels)) < len(labels):
            raise ValueError(f"two methods have the label {next(x for x in labels if labels.count(x) > 1)!r}")
        if self.reference not in labels:
            raise ValueError(f"reference {self.reference!r} is no method's label. {suggest(self.reference, labels)}")
        reference = self.methods[labels.index(self.reference)]
        if len(reference.budget) > 1 or str(reference.budget[0]).endswith("x"):
            raise ValueError("the reference has one size: give it no list of budgets, and no share of itself")
        if len(reference.norms) > 1 and reference.norms[0]:
            raise ValueError("the reference's norms: put false first; that is the one that others are compared with")
        if len({find_task(name).generates for name in self.tasks}) > 1:
            raise ValueError("tasks with a head and tasks with generated answers need a grid each")
        for name in (self.tuning.tasks or []) + list(self.per_task):
            if name not in self.tasks:
                raise ValueError(f"{name!r} is not among the tasks. {suggest(name, self.tasks)}")
        if set(self.tuning.seeds) & set(self.seeds):
            raise ValueError("a seed that rates were tuned on is among those of the final runs; use fresh ones")
        return self

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Grid:
        """Read a grid file, and apply `key=value` overrides with dotted keys, values in YAML.

        Raises:
            ConfigError: unreadable, a malformed override, or a setting that is wrong.
        """
        raw = read_yaml(path)
        for override in overrides:
            apply_override(raw, override)
        return cls.from_mapping(raw, str(path))

    @classmethod
    def from_mapping(cls, raw: dict[str, Any], source: str = "grid") -> Grid:
        """Check a mapping.

        Raises:
            ConfigError: a setting that is unknown, missing or wrong.
        """
        try:
            grid = cls.model_validate(raw)
            for name in grid.tasks:
                grid.training_for(name)
            return grid
        except ValidationError as error:
            found = (f"'{'.'.join(map(str, item['loc']))}': {reason(item['msg'])}." for item in error.errors())
            raise ConfigError(f"{source}: {' '.join(dict.fromkeys(found))}") from None

    def training_for(self, task: str) -> Training:
        """The training settings of a task."""
        return Training.model_validate({**self.training.model_dump(), **self.per_task.get(task, {})})

    def tuning_rows(self, task: str) -> int:
        """How many training rows of a task are set aside: none where no trial needs them."""
        tunes = any(row.tuned for row in self.methods) and task in (self.tuning.tasks or self.tasks)
        return self.tuning.rows if tunes else 0


@dataclass(frozen=True)
class RunSpec:
    """One run: all that decides its result."""

    phase: str
    task: str
    method: Method
    rate: float
    seed: int
    training: dict[str, Any]
    tuning_rows: int
    model: dict[str, Any]
    data: str  # a digest of the task's rows

    @property
    def key(self) -> str:
        """A digest of everything but the label and the search: equal keys mean the same run."""
        decisive = asdict(self)
        for name in ("label", "rate", "tuned"):
            decisive["method"].pop(name)
        if self.training["norm_rate"] is None or not self.method.norms_beside:
            decisive["training"].pop("norm_rate")  # it changes nothing
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def resolve_methods(grid: Grid) -> list[Method]:
    """The grid's methods, one a budget and choice of norms, each at its size.

    Raises:
        ConfigError: a budget that a method cannot meet, or settings that do not fit the model.
    """
    make_model, task_type = _skeleton(grid)

    def sized(row: Row, budget: str | int | None, norms: bool, whole: int) -> Method:
        method = _method(row, grid, budget, norms)
        return method if budget is None else solve(method, parse_amount(budget, whole, unit="x"), make_model, task_type)

    (row,) = (row for row in grid.methods if row.label == grid.reference)
    reference = sized(row, row.budget[0], row.norms[0], 0)
    if reference.sized_by_weights:
        raise ConfigError(
            f"reference {reference.label!r}: its size comes from the weights, so that it is not known what a share of "
            "it is. Choose another reference."
        )
    whole = _size(reference, make_model, task_type)
    methods = [sized(row, budget, norms, whole) for row in grid.methods for budget in row.budget for norms in row.norms]
    _check_distinct(methods)
    return methods


def _check_distinct(methods: Sequence[Method]) -> None:
    """No two methods share a label, or are the same in all but their labels and would do the same runs."""
    seen: dict[str, str] = {}
    for method in methods:
        what = asdict(replace(method, label="", rate=0.0 if method.tuned else method.rate))
        for key in (method.label, json.dumps(what, sort_keys=True)):
            if key in seen:
                raise ConfigError(f"{seen[key]!r} and {method.label!r} are the same method; leave one of them out.")
            seen[key] = method.label


def sizes(grid: Grid, methods: Sequence[Method]) -> dict[str, int]:
    """Trainable parameters of every method by its label, the head apart; without those that the weights decide.

    Raises:
        ConfigError: settings that do not fit the model.
    """
    make_model, task_type = _skeleton(grid)
    known = (method for method in methods if not method.sized_by_weights)
    return {method.label: _size(method, make_model, task_type) for method in known}


def _size(method: Method, make_model: Callable[[], nn.Module], task_type: str) -> int:
    if method.shares_budget:  # its ranks come from the weights, which are not here; it stays within the budget
        return int(method.settings["budget"])
    return count_trainable(adapt(sizing(method), make_model(), task_type))


@lru_cache(maxsize=1)
def _model_config(path: str) -> PretrainedConfig:
    return load_config(find_model(path))  # seconds, for a GGUF file


def _skeleton(grid: Grid) -> tuple[Callable[[], nn.Module], str]:
    """What makes the model without its weights, and PEFT's name of its task."""
    task = find_task(grid.tasks[0])
    task_type = (AnswerLoss if task.generates else Classification).task_type
    config = copy.deepcopy(_model_config(grid.model.path))
    config.num_labels = max(task.n_outputs, 1)
    return lambda: meta_model(config, task_type), task_type


def run_spec(grid: Grid, method: Method, phase: str, task: str, rate: float, seed: int) -> RunSpec:
    """A run of the grid."""
    training = grid.training_for(task).model_dump()
    if phase == "tune":
        training["eval_every"] = None  # a trial has no scores on the way
    data = _digest_of_rows(task, grid.data_dir)
    return RunSpec(phase, task, method, rate, seed, training, grid.tuning_rows(task), grid.model.model_dump(), data)


@lru_cache(maxsize=64)
def _digest_of_rows(name: str, data_dir: Path | None) -> str:
    """Of the local files of a task's splits; the Hub's data sets go by name."""
    if data_dir is None:
        return "hub"
    task = find_task(name)
    digest = hashlib.sha256()
    for split in task.splits:
        path = data_dir / name / f"{split}.jsonl"
        if not path.is_file():
            raise ConfigError(f"no such file: {path}. data_dir holds TASK/SPLIT.jsonl, with the keys of {task.hub[0]}.")
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _method(row: Row, grid: Grid, budget: str | int | None, norms: bool) -> Method:
    settings = row.method.settings
    if row.method.name not in NO_TARGETS and grid.target_modules is not None:
        settings = {"target_modules": grid.target_modules, **settings}
    label = row.label
    if len(row.budget) > 1:
        label += f" @{budget}"
    if norms and len(row.norms) > 1:
        label += " + norms"
    method = Method(label, row.method.name, settings, norms, row.rate, row.tuned, row.multipliers)
    if row.method.name == "ln_tuning" and "target_modules" not in settings:
        return replace(method, name="head", norms=True)  # the same parameters, found on any model
    return method


def tuning_tasks(grid: Grid, task: str) -> Sequence[str]:
    """The tasks whose trials decide the rate for `task`."""
    return grid.tuning.tasks or [task]
