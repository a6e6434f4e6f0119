"""What the tuner tests share: small configs of both methods, and the dense truth of an adapter in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from krontune import LsrConfig, SokaConfig
from krontune.tuners.base_layer import KronLayer

#: A small config of each method: what a test is run with where it holds for both.
METHODS: dict[str, Callable[..., Any]] = {
    "lsr": lambda **kw: LsrConfig(**{"r": 4, "separation_rank": 3, **kw}),
    "soka": lambda **kw: SokaConfig(**{"r": 3, **kw}),
}

#: Every setting that changes what an adapter computes or where it starts.
VARIANTS: dict[str, Callable[..., Any]] = {
    "lsr": METHODS["lsr"],
    "lsr-alpha": lambda **kw: LsrConfig(**{"r": 4, "separation_rank": 2, "alpha": -0.7, **kw}),
    "lsr-d1": lambda **kw: LsrConfig(**{"r": 2, "separation_rank": 1, "n_factors": 1, **kw}),
    "lsr-d3": lambda **kw: LsrConfig(**{"r": 8, "separation_rank": 2, "n_factors": 3, **kw}),
    "soka": METHODS["soka"],
    "soka-alpha": lambda **kw: SokaConfig(**{"r": 2, "alpha": 2.5, **kw}),
    "soka-p1": lambda **kw: SokaConfig(**{"r": 3, "factor_shape": 1, **kw}),
    "soka-square": lambda **kw: SokaConfig(**{"r": 3, "factor_shape": "square", **kw}),
    "soka-zero": lambda **kw: SokaConfig(**{"r": 3, "init_weights": "zero", **kw}),
    "soka-sorted": lambda **kw: SokaConfig(**{"r": 3, "alpha": 1.5, "channel_sort": "norm", **kw}),
}

#: PEFT 0.20 lacks a few things that the tests of them skip.
OLD_PEFT = Version(peft.__version__) < Version("0.21")

TARGETS = ["q_proj", "v_proj", "down_proj"]  # of the tiny Llama


def adapted(model: nn.Module, config: Any, *, trained: bool = True) -> PeftModel:
    """get_peft_model, in eval mode; `trained` puts every factor where training might have taken it."""
    model = get_peft_model(model, config).eval()
    if trained:
        train_a_little(model)
    return model


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor], **arguments: Any) -> Tensor:
    """The model's logits; without gradients, since with them another order of summation may be the faster one."""
    return model(**batch, **arguments).logits


@torch.no_grad()
def train_a_little(model: nn.Module, adapter: str = "default", seed: int = 0, std: float = 0.1) -> None:
    """Add noise to all trainable factors, so that the update is far from zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in kron_layers(model).values():
        if adapter in layer.specs:
            for parameter in trainable_factors(layer, adapter):
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))


def trainable_factors(layer: KronLayer, adapter: str = "default") -> list[nn.Parameter]:
    return [f for f in layer.factors(adapter) if isinstance(f, nn.Parameter)]


def kron_layers(model: nn.Module) -> dict[str, KronLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, KronLayer)}


def one_layer(model: nn.Module) -> KronLayer:
    (layer,) = kron_layers(model).values()
    return layer


def kron_chain(factors: list[Tensor]) -> Tensor:
    """F_1 (x) F_2 (x) ... by torch.kron."""
    product = factors[0]
    for factor in factors[1:]:
        product = torch.kron(product, factor)
    return product


def true_delta(layer: KronLayer, adapter: str = "default") -> Tensor:
    """alpha * dW of the papers' equations from the stored tensors, in float64 by torch.kron: (m, n) or (e, m, n)."""
    return dense_delta(layer, {name: t.detach().double() for name, t in stored_tensors(layer, adapter)}, adapter)


def dense_delta(layer: KronLayer, stored: dict[str, Tensor], adapter: str = "default") -> Tensor:
    """The same from any tensors in the place of the stored ones, differentiable, in their dtype."""
    formula = _lsr_delta if any(name.startswith("lsr") for name in stored) else _soka_delta
    experts = layer.specs[adapter].experts
    if experts is None:
        return layer.scaling[adapter] * formula(stored)
    each = [formula({name: tensor[e] for name, tensor in stored.items()}) for e in range(experts)]
    return layer.scaling[adapter] * torch.stack(each)


def stored_tensors(layer: KronLayer, adapter: str) -> Iterator[tuple[str, Tensor]]:
    names = layer.specs[adapter].tensor_shapes()
    return zip(names, layer.factors(adapter), strict=True)


def _lsr_delta(stored: dict[str, Tensor]) -> Tensor:
    A, B = (
        sum(kron_chain(list(term)) for term in zip(*(t for name, t in stored.items() if side in name), strict=True))
        for side in ("lsr_A", "lsr_B")
    )
    return B @ A


def _soka_delta(stored: dict[str, Tensor]) -> Tensor:
    """Equation 5 as the paper has it: sum A (x) B - sum A0 (x) B0."""
    dA, dB, A0, B0 = (stored[name] for name in ("soka_dA", "soka_dB", "soka_A0", "soka_B0"))
    now = sum(torch.kron(a, b) for a, b in zip(A0 + dA, B0 + dB, strict=True))
    start = sum(torch.kron(a, b) for a, b in zip(A0, B0, strict=True))
    if "soka_rows" not in stored:
        return now - start
    rows, cols = (stored[name].long() for name in ("soka_rows", "soka_cols"))
    return (now - start)[rows][:, cols.argsort()]


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every base parameter and buffer, under its name in the model without adapters."""
    tensors = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "lsr_" not in name and "soka_" not in name and "modules_to_save" not in name:
            name = name.replace("base_layer.", "").replace("original_module.", "").removeprefix("base_model.model.")
            tensors[name] = tensor.detach().clone()
    return tensors


def assert_same_tensors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal names, dtypes and bits."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def adapter_tensors(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """{layer.tensor: value} of every stored tensor of an adapter."""
    return {
        f"{path.removeprefix('base_model.model.')}.{name}": tensor.detach().clone()
        for path, layer in kron_layers(model).items()
        if adapter in layer.specs
        for name, tensor in stored_tensors(layer, adapter)
    }


def tolerance(dtype: torch.dtype, terms: int = 64) -> dict[str, float]:
    """rtol and atol for a sum of `terms` products of entries of order one."""
    eps = torch.finfo(dtype).eps * terms**0.5
    return {"rtol": 4 * eps, "atol": 4 * eps}


def train_steps(model: nn.Module, batch: dict[str, Tensor], steps: int = 3, lr: float = 1e-2) -> list[float]:
    """A few AdamW steps on one batch; the losses."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses
