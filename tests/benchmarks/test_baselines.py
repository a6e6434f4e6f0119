"""Every contender computes what its name says, so that only like is compared with like."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import paths
from benchmarks.cases import Setting, grid_labels
from benchmarks.contenders import builder, equal_rank, frozen_linear
from benchmarks.paths import path_works
from krontune.kron import kron_delta_linear, linear

OUT, IN = 24, 16


@pytest.fixture
def base() -> nn.Linear:
    torch.manual_seed(0)
    return frozen_linear(OUT, IN, "cpu", torch.float32)


def moved(layer: nn.Module) -> nn.Module:
    """As after some training: no factor is zero."""
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return layer.eval()


def update(layer: nn.Module, base: nn.Linear) -> torch.Tensor:
    """The dense matrix that a layer adds to its base, read off its outputs."""
    with torch.no_grad():
        return (layer(torch.eye(IN)) - base(torch.eye(IN))).T


def kron(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return torch.kron(A.detach().double().contiguous(), B.detach().double().contiguous())


@pytest.mark.parametrize("label", [label for label in grid_labels(OUT, IN) if label not in ("base", "FastKron K=1")])
def test_each_contender_trains_all_that_it_counts(base: nn.Linear, label: str) -> None:
    if label.startswith("LyCORIS"):
        pytest.importorskip("lycoris", reason="lycoris-lora is not installed")
    layer = moved(builder(label)(base)).train()
    layer(torch.randn(5, IN)).square().sum().backward()
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert base.weight.grad is None


def test_materialised_lsr_is_the_sum_of_its_terms(base: nn.Linear) -> None:
    layer = moved(builder("materialised LSR r=4 s=3")(base))
    A = sum(kron(p, q) for p, q in zip(*layer.A, strict=True))
    B = sum(kron(p, q) for p, q in zip(*layer.B, strict=True))
    torch.testing.assert_close(update(layer, base).double(), B @ A, rtol=1e-4, atol=1e-5)
    ours = builder("LSR r=4 s=3")(base)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == sum(
        p.numel() for p in ours.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("label", [label for label in grid_labels(OUT, IN) if not label.startswith(("LyC", "Fast"))])
def test_contenders_take_16_bits(label: str) -> None:
    layer = builder(label)(frozen_linear(OUT, IN, "cpu", torch.bfloat16))
    x = torch.randn(5, IN, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad is not None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("train", [False, True])
def test_the_chosen_path_is_the_one_that_is_taken(dtype: str, train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits the merged path makes a product of its own, so that another may be cheaper."""
    taken: list[str] = []
    choose = linear._choose
    monkeypatch.setattr(linear, "_choose", lambda *args: taken.append(choose(*args)) or taken[-1])
    works = path_works(Setting(dtype=dtype), 576, 576, 512, 4, 16, train)
    monkeypatch.setattr(paths, "kron_delta_linear", lambda *args, path: kron_delta_linear(*args))
    next(work for label, work in works.items() if label != "base").step()
    assert [label for label, work in works.items() if work.facts.get("chosen")] == taken
    assert all(work.facts["fold_weight"] == (dtype == "float32") for work in works.values())


@pytest.mark.parametrize("label", ["LyCORIS LoKr", "LyCORIS LoKr, bypass"])
def test_lycoris_is_one_kronecker_term(base: nn.Linear, label: str) -> None:
    pytest.importorskip("lycoris", reason="lycoris-lora is not installed")
    layer = moved(builder(label)(base))
    expected = kron(layer.adapter.lokr_w1, layer.adapter.lokr_w2) * layer.adapter.scale
    torch.testing.assert_close(update(layer, base).double(), expected, rtol=1e-4, atol=1e-5)


def test_fastkron_is_one_kronecker_term() -> None:
    pytest.importorskip("pyfastkron", reason="pyfastkron is not installed")
    base = frozen_linear(64, 64, "cpu", torch.float32)
    layer = builder("FastKron K=1")(base)
    x = torch.randn(8, 64)
    try:
        y = layer(x)
    except RuntimeError as error:
        pytest.skip(f"pyfastkron does not know this machine: {error}")
    expected = base(x).double() + x.double() @ kron(layer.At, layer.Bt)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


def test_equal_rank_has_equal_parameters() -> None:
    base = frozen_linear(768, 768, "cpu", torch.float32)
    counts = [
        sum(p.numel() for p in builder(label)(base).parameters() if p.requires_grad)
        for label in ("SoKA p=4 K=8", "LoRA r=8")
    ]
    assert counts[0] == counts[1] == 12_288
    assert equal_rank(768, 768, 4, 16) == 16


def test_an_unknown_contender_is_an_error() -> None:
    with pytest.raises(ValueError, match="no contender is called 'DoRA r=8'"):
        builder("DoRA r=8")
