"""The cases: what is measured, with one setup function each for the speed and the memory run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from benchmarks.contenders import builder, equal_rank, frozen_linear
from benchmarks.measure import Work

SHAPES = ((576, 576), (768, 768), (1536, 576), (4096, 4096), (11008, 4096))  # (out, in)
TOKENS = (1, 128, 2048)
LSR = "LSR r=4 s=16"


@dataclass(frozen=True)
class Setting:
    """How a run is made; written into its results."""

    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    repetitions: int = 20
    seed: int = 0
    seconds: float = 20.0  # rounds are added to a case for so long
    quick: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True)
class Case:
    """A name, and the setup that returns every contender ready to run.

    Args:
        name: parts separated by slashes, for glob patterns.
        setup: makes the contenders.
        quick: --quick runs it, too.
        full: a full run runs it.
        quick_rounds: fewer rounds in --quick, where one takes seconds.
        once: the case is not about time; it runs a single time.
        memory: peak and saved bytes are taken, too.
        give_up, aside: see `measure.interleaved`.
    """

    name: str
    setup: Callable[[Setting], Mapping[str, Work]]
    quick: bool = False
    full: bool = True
    quick_rounds: int | None = None
    once: bool = False
    memory: bool = True
    give_up: float = float("inf")
    aside: tuple[str, ...] = ()

    def rounds(self, setting: Setting) -> int:
        """How often each contender is timed."""
        if self.once:
            return 1
        return (
            min(setting.repetitions, self.quick_rounds or setting.repetitions) if setting.quick else setting.repetitions
        )


def layer_works(setting: Setting, m: int, n: int, tokens: int, mode: str, labels: Sequence[str]) -> dict[str, Work]:
    """Setup of a layer case: the same frozen weight and the same input for every contender.

    Args:
        setting: of the run.
        m: out features.
        n: in features.
        tokens: rows of the input.
        mode: "eval" (forward in eval mode without gradient) or "train" (forward and backward, the input's gradient and
            the adapter's).
        labels: the contenders.
    """
    torch.manual_seed(setting.seed)
    base = frozen_linear(m, n, setting.device, setting.torch_dtype)
    x = torch.randn(tokens, n, device=setting.device, dtype=setting.torch_dtype)
    gradient = torch.randn(tokens, m, device=setting.device, dtype=setting.torch_dtype)
    works = {}
    for label in labels:
        try:
            works[label] = _layer_work(builder(label)(base), x, gradient, mode)
        except ImportError as error:
            works[label] = Work(partial(_missing, error))
    return works


def _missing(error: ImportError) -> object:
    raise error


def _layer_work(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor, mode: str) -> Work:
    layer.train(mode == "train")
    trainable = [p for p in layer.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trainable:  # as after some training: nothing is exactly zero
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    known = [x, *layer.parameters(), *layer.buffers()]
    facts = {"n_params": sum(p.numel() for p in trainable)}
    if mode == "eval":

        def evaluate() -> object:
            with torch.no_grad():
                return layer(x)

        return Work(evaluate, None, known, facts)
    leaf = x.detach().requires_grad_()

    def train() -> object:
        leaf.grad = None
        for parameter in trainable:
            parameter.grad = None
        layer(leaf).backward(gradient)
        return None

    return Work(train, lambda: layer(leaf), known, facts)


def grid_labels(m: int, n: int) -> list[str]:
    """Who takes part in the grid: both methods, and every rival with as many parameters or of the same kind."""
    ranks = {4, 8, equal_rank(m, n, "square", 16)}
    return [
        "base",
        LSR,
        f"materialised {LSR}",
        "SoKA p=4 K=8",
        "SoKA square K=1",
        "SoKA square K=16",
        *(f"LoRA r={r}" for r in sorted(ranks)),
        "LoKr",
        "LyCORIS LoKr",
        "LyCORIS LoKr, bypass",
        "FastKron K=1",
    ]


def layer_case(m: int, n: int, tokens: int, mode: str, labels: Sequence[str], quick: bool = False) -> Case:
    """The case called layer/{m}x{n}/{tokens}/{mode}."""
    setup = partial(layer_works, m=m, n=n, tokens=tokens, mode=mode, labels=labels)
    return Case(f"layer/{m}x{n}/{tokens}/{mode}", setup, quick)


def layer_cases() -> list[Case]:
    """The grid, and the cases beside it that the figures to reach name."""
    grid = [
        layer_case(m, n, tokens, mode, grid_labels(m, n), quick=(m, n) == (768, 768))
        for m, n in SHAPES
        for tokens in TOKENS
        for mode in ("eval", "train")
    ]
    beside = [
        layer_case(768, 768, 4096, "train", ["base", LSR, f"materialised {LSR}", "LoRA r=4"]),
        layer_case(4096, 4096, 512, "train", ["base", "SoKA p=4 K=16", "LoRA r=16"]),
        layer_case(4096, 4096, 1024, "eval", ["base", "SoKA p=4 K=16", "SoKA square K=16", "LoRA r=16"]),
    ]
    return grid + beside
