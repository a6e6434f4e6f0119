"""Fitting the cost model of krontune.kron.cost to the measured times of all paths."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.paths import BASE
from benchmarks.results import Results
from krontune.kron import KronShape
from krontune.kron.cost import DEVICES, Device, choose_path, path_work


def report(results: Results) -> str:
    """The fitted constants as the line that stands in cost.py, and the regret with them and with those in force."""
    device = results.header["setting"]["device"]
    fitted = fit(results)
    line = ", ".join(f"{name}={value:.3g}" for name, value in fitted._asdict().items())
    before, after = mean_regret(results, DEVICES[device]), mean_regret(results, fitted)
    return (
        f'"{device}": Device({line}),\n'
        f"mean regret over {len(list(results.matching('paths/*')))} cases: {before:.3f} with the constants in force, "
        f"{after:.3f} with these. They stand in DEVICES in src/krontune/kron/cost.py."
    )


def fit(results: Results) -> Device:
    """The prices, none negative, that explain best what every path takes beyond the frozen weight's own products.

    Least squares on relative errors: each path's row is divided by its measured time, so that a microsecond and a
    second weigh the same.
    """
    rows, times = [], []
    for case in results.matching("paths/*"):
        base = results.seconds(case, BASE).median
        for path, record in results.cases[case].items():
            if path != BASE:
                whole = results.seconds(case, path).median
                rows.append([count / whole for count in _counts(path, record)])
                times.append((whole - base) / whole)
    if not rows:
        raise ValueError("the results hold no case called paths/*, which the model is fitted to.")
    prices = _least_squares(torch.tensor(rows, dtype=torch.float64), torch.tensor(times, dtype=torch.float64))
    unit = float(prices[0]) or 1.0  # the model counts in multiply-adds of a large product
    return Device(*(float(price) / unit for price in prices))


def mean_regret(results: Results, prices: Device) -> float:
    """Over all path cases: time of the path that the model with these prices would choose, over the fastest one's."""
    regrets = []
    for case in results.matching("paths/*"):
        paths = {path: record for path, record in results.cases[case].items() if path != BASE}
        first = next(iter(paths.values()))
        sizes, fold = (first["tokens"], KronShape(*first["shape"]), first["terms"], first["trained"]), _folds(first)
        times = {path: results.seconds(case, path).median for path in paths}
        regrets.append(times[choose_path(*sizes, fold_weight=fold, prices=prices)] / min(times.values()))
    return sum(regrets) / len(regrets)


def _counts(path: str, record: dict) -> tuple[float, ...]:
    sizes = record["tokens"], KronShape(*record["shape"]), record["terms"], record["trained"]
    return tuple(path_work(path, *sizes, _folds(record)))


def _folds(record: dict) -> bool:
    """Whether the merged path added into the weight. Files from before this was recorded are of float32: it did."""
    return bool(record.get("fold_weight", True))


def _least_squares(rows: Tensor, values: Tensor) -> Tensor:
    """The least squares solution without negative entries, by leaving out the most negative one until none is."""
    kept = list(range(rows.shape[1]))
    while True:
        solution = torch.linalg.lstsq(rows[:, kept] / (scale := rows[:, kept].norm(dim=0)), values).solution / scale
        if len(kept) == 1 or float(solution.min()) >= 0:
            break
        kept.pop(int((solution * scale).argmin()))
    prices = torch.zeros(rows.shape[1], dtype=rows.dtype)
    prices[kept] = solution.clamp_min(0)
    return prices
