"""The official metrics of GLUE and SuperGLUE, each a function of predictions and labels in [-1, 1] or [0, 1]."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray


def accuracy(predicted: Array, labels: Array) -> float:
    """Share of equal entries."""
    return float(np.mean(predicted == labels))


def f1(predicted: Array, labels: Array, positive: int = 1) -> float:
    """Harmonic mean of precision and recall of one class; 0 where neither is defined.

    >>> f1(np.array([1, 1, 0, 0]), np.array([1, 0, 1, 0]))
    0.5
    """
    hits = int(np.sum((predicted == positive) & (labels == positive)))
    named = int(np.sum(predicted == positive)) + int(np.sum(labels == positive))
    return 2 * hits / named if named else 0.0


def macro_f1(predicted: Array, labels: Array) -> float:
    """Mean of the F1 of every class that occurs among labels or predictions (SuperGLUE's for CB)."""
    return float(np.mean([f1(predicted, labels, c) for c in np.union1d(predicted, labels)]))


def matthews(predicted: Array, labels: Array) -> float:
    """Matthews correlation of two classes: Pearson's of the 0/1 vectors; 0 where one is constant."""
    return pearson(predicted, labels)


def pearson(predicted: Array, labels: Array) -> float:
    """Pearson correlation; 0 where one side is constant."""
    x, y = (v - v.mean() for v in (predicted.astype(np.float64), labels.astype(np.float64)))
    norms = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norms if norms > 0 else 0.0


def spearman(predicted: Array, labels: Array) -> float:
    """Spearman correlation: Pearson's of the ranks, ties sharing their mean rank."""
    return pearson(_ranks(predicted), _ranks(labels))


def _ranks(values: Array) -> Array:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank: Array = (last - (counts - 1) / 2)[group]
    return mean_rank


METRICS: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def score(metrics: tuple[str, ...], predicted: Array, labels: Array) -> dict[str, float]:
    """Every metric by name, and their mean as "score", as GLUE averages a task with two metrics."""
    values = {name: METRICS[name](predicted, labels) for name in metrics}
    return {"score": sum(values.values()) / len(values), **values}
