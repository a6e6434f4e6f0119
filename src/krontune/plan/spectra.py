"""KPSVD spectra of a model's weights, read one at a time, with a cache that survives interruption."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from krontune.errors import CheckpointError, ConfigError, ShapeError
from krontune.kron import (
    SORTS,
    FactorShape,
    KronShape,
    budget_ranks,
    channel_order,
    nearest_kron,
    resolve_shape,
    select_rank,
)
from krontune.kron.spectrum import ELBOW_ACCEPTED, RULES
from krontune.plan.budget import too_small
from krontune.plan.targets import Target
from krontune.report.json_lines import JsonLines
from krontune.tuners.checkpoint import fingerprint
from krontune.tuners.hosts import host_of
from krontune.weights import Weights

#: Numbers of terms at which the share of the energy is reported.
ENERGY_AT = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Spectrum:
    """The top of one weight's KPSVD spectrum for one factor shape."""

    name: str
    kind: str
    layer: int | None  # the first index in the name
    label: str  # the factor shape as it was asked for: "auto", "square", "p=4", "(64, 64)"
    shape: KronShape
    channel_sort: str | None
    experts: int | None
    energy: float  # ||W||_F^2
    sigma: list[float]

    @property
    def n_params(self) -> int:
        """Parameters of a term."""
        return self.shape.n_params * (self.experts or 1)

    def share(self, k: int) -> float:
        """The share of the energy that the first k terms hold."""
        return sum(s * s for s in self.sigma[:k]) / self.energy if self.energy else 0.0

    @property
    def noise_edge(self) -> float:
        """The largest singular value that noise would have: sigma above it is structure.

        sqrt(v) * (sqrt(p) + sqrt(q)) for R(W) of (p, q), the edge of the Marchenko-Pastur law, v the mean square of
        what is left once the terms above the edge are taken out; found by repeating that until it stands still.
        """
        p, q = self.shape.m1 * self.shape.n1, self.shape.m2 * self.shape.n2
        above = 0
        while True:
            left = max(self.energy - sum(s * s for s in self.sigma[:above]), 0.0)
            freedom = max(p * q - above * (p + q), 1)
            edge = math.sqrt(left / freedom) * (math.sqrt(p) + math.sqrt(q))
            more = sum(s > edge for s in self.sigma)
            if more <= above:
                return edge
            above = more

    def to_dict(self, rule: str = "spectrum", theta: float = 0.9, k_max: int | None = None) -> dict[str, Any]:
        """Everything about it, with the rank that a rule chooses, as JSON-ready values."""
        sigma, edge = torch.tensor(self.sigma, dtype=torch.float64), self.noise_edge
        choice = select_rank(sigma, self.energy, rule, theta, k_max=k_max)
        return {
            **asdict(self),
            "shape": list(self.shape),
            "p": self.shape.n1 if self.shape.n1 == self.shape.m2 else None,
            "n_params_per_term": self.n_params,
            "share_at": {str(k): self.share(k) for k in ENERGY_AT if k <= len(self.sigma)},
            "noise_edge": edge,
            "above_noise": sum(s > edge for s in self.sigma),
            "energy_rank": choice.energy_rank,
            "elbow_rank": choice.elbow_rank,
            "elbow_strength": choice.elbow_strength,
            "elbow_accepted": ELBOW_ACCEPTED,
            "theta": theta,
            "rank": choice.rank,
            "reason": choice.reason,
        }


def spectrum_report(
    spectra: Sequence[Spectrum],
    rule: str = "spectrum",
    theta: float = 0.9,
    k_max: int | None = None,
    budget: int | None = None,
) -> dict[str, Any]:
    """The spectra with the rank that a rule chooses for each, as JSON-ready values.

    Args:
        spectra: what `spectrum` returned; the first one's factor shape, unsorted, is the one ranks are chosen for.
        rule: "energy", "elbow", "spectrum" (the smaller of both), or "budget".
        theta: the energy threshold.
        k_max: the largest rank of a rule.
        budget: parameters in all, for "budget".

    Raises:
        ConfigError: an unknown rule, or a budget without the rule "budget" or the other way round.
    """
    if rule not in (*RULES, "budget"):
        raise ConfigError(f"rule {rule!r} is unknown; allowed: {', '.join(RULES)}, budget.")
    if (rule == "budget") != (budget is not None):
        raise ConfigError(
            f"rule {rule!r} and budget {budget} do not go together: give rule='budget' and a budget, or none."
        )
    if not 0 < theta <= 1:
        raise ConfigError(f"theta = {theta} is out of range; it must be in (0, 1].")
    layers = [s.to_dict("spectrum" if rule == "budget" else rule, theta, k_max) for s in spectra]
    main = spectra[0].label if spectra else None
    if budget is not None and spectra:
        chosen = [i for i, s in enumerate(spectra) if s.label == main and s.channel_sort is None]
        tops = [torch.tensor(spectra[i].sigma) for i in chosen]
        units, energies = [spectra[i].n_params for i in chosen], [spectra[i].energy for i in chosen]
        for i, rank in zip(chosen, budget_ranks(tops, energies, units, budget)):
            layers[i].update(rank=rank, reason=f"{spectra[i].share(rank):.1%} of the energy, within the budget")
    unsorted = {(s.name, s.label): s for s in spectra if s.channel_sort is None}
    for layer, s in zip(layers, spectra):
        if s.channel_sort is not None:
            plain = unsorted[s.name, s.label]
            layer["gain_at"] = {str(k): s.share(k) - plain.share(k) for k in ENERGY_AT if k <= len(s.sigma)}
    settings = {"rule": rule, "theta": theta, "k_max": k_max, "budget": budget}
    settings["terms"] = max((len(s.sigma) for s in spectra), default=0)
    labels = list(dict.fromkeys(s.label for s in spectra))
    sort = next((s.channel_sort for s in spectra if s.channel_sort), None)
    return {"version": 1, "settings": settings, "shapes": labels, "channel_sort": sort, "layers": layers}


def check_budget(targets: Sequence[Target], shapes: Sequence[FactorShape], budget: int) -> None:
    """Raise ConfigError where a budget is below one term of each weight, before any spectrum is computed.

    Ranks are chosen for the first shape that divides the first weight, as in `spectrum_report`.
    """
    main = next((setting for target in targets for setting in shapes if _fitting(target, setting) is not None), None)
    fitting = [(target, _fitting(target, main)) for target in targets if main is not None]
    units = [shape.n_params * (target.experts or 1) for target, shape in fitting if shape is not None]
    if budget < sum(units):
        raise ConfigError(too_small(budget, sum(units), len(units)))


def shape_label(setting: FactorShape) -> str:
    """How a factor shape setting is shown."""
    if isinstance(setting, int):
        return f"p={setting}"
    return setting if isinstance(setting, str) else f"({setting[0]}, {setting[1]})"


def parse_shapes(text: str) -> list[FactorShape]:
    """Factor shapes from a command line.

    >>> parse_shapes("auto,1,64x32,square")
    ['auto', 1, (64, 32), 'square']

    Raises:
        ConfigError: none of these forms.
    """
    shapes: list[FactorShape] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part in ("auto", "square"):
            shapes.append(part)  # type: ignore[arg-type]
        elif re.fullmatch(r"\d+", part):
            shapes.append(int(part))
        elif re.fullmatch(r"\d+x\d+", part):
            left, right = part.split("x")
            shapes.append((int(left), int(right)))
        else:
            raise ConfigError(
                f"{part!r} is not a factor shape. Allowed: auto, square, a number p, or MxN for A's shape."
            )
    if not shapes:
        raise ConfigError("no factor shape is given. Allowed: auto, square, a number p, or MxN for A's shape.")
    return shapes


def spectrum(
    weights: Weights,
    model: nn.Module,
    targets: Sequence[Target],
    shapes: Sequence[FactorShape] = ("auto",),
    k: int = 32,
    *,
    channel_sort: str | None = None,
    cache: str | Path | None = None,
    progress: Callable[[Iterable[Target]], Iterable[Target]] = iter,
) -> list[Spectrum]:
    """The KPSVD spectra of the targets' weights. One weight is in memory at a time.

    Args:
        weights: where to read them.
        model: the modules, on the meta device say; how a layer keeps its weight is looked up there.
        targets: which weights.
        shapes: factor shapes; one that does not divide a weight is left out for that weight.
        k: terms to compute.
        channel_sort: "svd" or "norm": also the spectra of the weights with sorted channels.
        cache: a file of what is already computed, read first and extended after every weight.
        progress: wraps the targets, for a progress bar.

    Returns:
        One Spectrum for each weight, shape and order that exists, in this order.

    Raises:
        ConfigError: NaN or Inf in a weight, an unknown order, or no shape that fits anything.
        CheckpointError: a weight is missing.
    """
    if k < 1:
        raise ConfigError(f"k is {k}; at least 1 term is needed.")
    if channel_sort not in (None, *SORTS):
        raise ConfigError(f"channel_sort {channel_sort!r} is unknown; allowed: {', '.join(SORTS)}.")
    done = _Cache(None if cache is None else Path(cache))
    orders = [None] if channel_sort is None else [None, channel_sort]
    found = []
    for target in progress(targets):
        wanted = [(s, shape) for s in shapes if (shape := _fitting(target, s)) is not None]
        W = read_matrix(weights, model, target)
        digest = fingerprint(W, "")["digest"]
        for order in orders:
            for setting, shape in wanted:
                key = _key(target, shape, k, order, digest)
                if key not in done:
                    done[key] = _compute(W, shape, k, order, target.name)
                entry = done[key]
                found.append(
                    Spectrum(
                        target.name,
                        target.kind,
                        target.indices[0] if target.indices else None,
                        shape_label(setting),
                        shape,
                        order,
                        target.experts,
                        entry["energy"],
                        entry["sigma"],
                    )
                )
    if not found:
        raise ConfigError(f"none of the factor shapes {[shape_label(s) for s in shapes]} divides any of the weights.")
    return found


def read_matrix(weights: Weights, model: nn.Module, target: Target) -> Tensor:
    """A target's weight as the tuners see it: (m, n) or (experts, m, n), float32.

    Raises:
        CheckpointError: the files have no such weight.
    """
    modules = dict(model.named_modules())
    module_name, parameter, stored = target.name, None, f"{target.name}.weight"
    if module_name not in modules:  # a bare parameter, such as the weights of experts
        module_name, _, parameter = target.name.rpartition(".")
        stored = target.name
    if stored not in weights.names():
        raise CheckpointError(
            f"the model's files have no tensor {stored!r}. They keep this weight under another name; "
            "save the loaded model with save_pretrained first."
        )
    host = host_of(modules[module_name], module_name, False, parameter)
    return host.to_matrix(weights.read(stored)).float()


def _fitting(target: Target, setting: FactorShape) -> KronShape | None:
    try:
        return resolve_shape(target.m, target.n, setting, target.name)
    except ShapeError:
        return None


def _compute(W: Tensor, shape: KronShape, k: int, order: str | None, name: str) -> dict[str, Any]:
    """{"energy", "sigma"} of one matrix, or of all experts' together: their terms are counted as one."""
    energy, squares = 0.0, torch.zeros(0, dtype=torch.float64)
    for matrix in W if W.dim() == 3 else [W]:
        if order is not None:
            matrix = channel_order(matrix, order).sort(matrix)
        try:
            top = nearest_kron(matrix, shape, k)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
        energy += top.energy
        squares = top.sigma.double().square() + (squares if len(squares) else 0.0)
    return {"energy": energy, "sigma": squares.sqrt().tolist()}


def _key(target: Target, shape: KronShape, k: int, order: str | None, digest: str | None) -> str:
    text = json.dumps([target.name, target.experts, list(shape), k, order, digest])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class _Cache:
    """Entries by key, in a file of one JSON line each, written as they come: an interruption loses one at most."""

    def __init__(self, file: Path | None) -> None:
        self._lines = None if file is None else JsonLines(file)
        self._entries: dict[str, dict[str, Any]] = {}
        if self._lines is not None:
            self._lines.repair()
            self._entries = dict(_entry(row, self._lines.path) for row in self._lines.read())

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._entries[key]

    def __setitem__(self, key: str, entry: dict[str, Any]) -> None:
        self._entries[key] = entry
        if self._lines is not None:
            self._lines.append([{"key": key, **entry}])


def _entry(row: dict[str, Any], file: Path) -> tuple[str, dict[str, Any]]:
    try:
        return row["key"], {"energy": float(row["energy"]), "sigma": [float(s) for s in row["sigma"]]}
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{file} is no cache of spectra: {row} is no entry. Delete it, or name another."
        ) from None
