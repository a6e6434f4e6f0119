"""The metrics against scikit-learn and SciPy, which GLUE and SuperGLUE are scored with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as truth

from krontune.recipes.metrics import METRICS, score
from krontune.recipes.tasks import TASKS, load_rows

CLASSES = st.integers(2, 40).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 2), min_size=n, max_size=n)] * 2))
OFFICIAL = {
    "accuracy": lambda predicted, labels: truth.accuracy_score(labels, predicted),
    "f1": lambda predicted, labels: truth.f1_score(labels, predicted, zero_division=0),
    "macro_f1": lambda predicted, labels: truth.f1_score(labels, predicted, average="macro", zero_division=0),
    "matthews": lambda predicted, labels: truth.matthews_corrcoef(labels, predicted),
    "pearson": lambda predicted, labels: stats.pearsonr(predicted, labels).statistic,
    "spearman": lambda predicted, labels: stats.spearmanr(predicted, labels).statistic,
}
# Those that GLUE (Wang et al. 2018, table 1) and SuperGLUE (Wang et al. 2019, table 1) name for their tasks.
NAMED = {
    "cola": {"matthews"},
    "sst2": {"accuracy"},
    "mrpc": {"accuracy", "f1"},
    "stsb": {"pearson", "spearman"},
    "qqp": {"accuracy", "f1"},
    "mnli": {"accuracy"},
    "qnli": {"accuracy"},
    "rte": {"accuracy"},
    "boolq": {"accuracy"},
    "cb": {"accuracy", "macro_f1"},
    "copa": {"accuracy"},
    "wic": {"accuracy"},
    "wsc": {"accuracy"},
}


def test_every_metric_is_checked() -> None:
    assert set(OFFICIAL) == set(METRICS)
    assert {name: set(task.metrics) for name, task in TASKS.items() if not task.generates} == NAMED


@given(CLASSES)
@pytest.mark.parametrize("name", ["accuracy", "f1", "macro_f1", "matthews"])
def test_classes(name: str, drawn: tuple[list[int], list[int]]) -> None:
    predicted, labels = map(np.array, drawn)
    if name in ("f1", "matthews"):
        predicted, labels = np.minimum(predicted, 1), np.minimum(labels, 1)
    assert METRICS[name](predicted, labels) == pytest.approx(OFFICIAL[name](predicted, labels), abs=1e-12)


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=3, max_size=40))
@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_correlations_with_ties(name: str, pairs: list[tuple[int, int]]) -> None:
    predicted, labels = np.array(pairs, dtype=float).T
    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        assert METRICS[name](predicted, labels) == 0
    else:
        assert METRICS[name](predicted, labels) == pytest.approx(OFFICIAL[name](predicted, labels), abs=1e-12)


@pytest.mark.parametrize("name", NAMED)
def test_on_the_labels_of_the_benchmark(name: str, shared_data: Path) -> None:
    """Predictions that are right three times out of four; and the mean of a task's metrics is its score."""
    task = TASKS[name]
    labels = np.array([row["label"] for row in load_rows(task, task.splits[1], shared_data)], dtype=float)
    draw = np.random.default_rng(0)
    predicted = np.where(draw.random(len(labels)) < 0.75, labels, draw.permutation(labels))
    values = score(task.metrics, predicted, labels)
    for metric in task.metrics:
        assert values[metric] == pytest.approx(OFFICIAL[metric](predicted, labels), abs=1e-12)
    assert values["score"] == pytest.approx(np.mean([values[metric] for metric in task.metrics]))
