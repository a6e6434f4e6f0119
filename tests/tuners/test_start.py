"""An adapter's start, and what must stay as it was: the base weights and the base model's output."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from krontune import LsrConfig, SokaConfig
from tests.tuners.helpers import (
    TARGETS,
    adapted,
    assert_same_tensors,
    base_weights,
    kron_layers,
    logits,
    one_layer,
    train_steps,
    true_delta,
)

ZERO_STARTS = {
    "lsr-True": lambda **kw: LsrConfig(r=4, separation_rank=3, **kw),
    "lsr-zero": lambda **kw: LsrConfig(r=4, separation_rank=3, init_weights="zero", **kw),
    "lsr-d1": lambda **kw: LsrConfig(r=4, separation_rank=1, n_factors=1, **kw),
    "lsr-d3": lambda **kw: LsrConfig(r=8, separation_rank=2, n_factors=3, **kw),
    "soka-True": lambda **kw: SokaConfig(r=5, **kw),
    "soka-principal": lambda **kw: SokaConfig(r=5, init_weights="principal", factor_shape="square", **kw),
    "soka-zero": lambda **kw: SokaConfig(r=5, init_weights="zero", **kw),
    "soka-energy": lambda **kw: SokaConfig(r=6, rank_selection="energy", energy_threshold=0.3, **kw),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", ZERO_STARTS)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_dw_is_exactly_zero_at_the_start(tiny, batch, start, dtype, autocast_adapter_dtype):
    base = tiny("llama", dtype)
    with torch.no_grad():
        expected = logits(base, batch)
    config = ZERO_STARTS[start](target_modules="all-linear")
    model = get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype).eval()

    for name, layer in kron_layers(model).items():
        assert layer.get_delta_weight("default").count_nonzero() == 0, name
        assert layer.factors("default")[0].dtype == (torch.float32 if autocast_adapter_dtype else dtype), name
    with torch.no_grad():
        got = logits(model, batch)
    assert got.dtype == dtype
    assert torch.equal(got, expected)


@pytest.mark.parametrize("start", ZERO_STARTS)
def test_a_zero_start_can_learn(tiny, batch, start):
    """Zero dW is not a saddle: some factor has a gradient."""
    model = adapted(tiny(), ZERO_STARTS[start](target_modules=TARGETS), trained=False)
    model(**batch).loss.backward()
    for name, layer in kron_layers(model).items():
        gradients = [f.grad for f in layer.factors("default") if f.requires_grad]
        assert any(g.abs().max() > 0 for g in gradients), name
        assert all(torch.isfinite(g).all() for g in gradients), name


@pytest.mark.parametrize("weight", ["zero", "of one term"])
def test_every_term_can_learn(net, method, weight):
    """Also where the weight has fewer terms than the adapter, or none: a term that starts at zero would never move."""
    base = torch.nn.Linear(24, 36)
    row, column = (torch.zeros(24), torch.zeros(36)) if weight == "zero" else (torch.randn(24), torch.randn(36))
    base.weight.data = torch.outer(column, row)
    model = adapted(net(base), method(target_modules=["layer"]), trained=False)
    layer = one_layer(model)
    x = torch.randn(7, 24)
    assert torch.equal(model(x), base(x))
    model(x).square().sum().backward()
    gradients = [f.grad.flatten(1).norm(dim=1) for f in layer.factors("default") if f.requires_grad]
    assert (torch.stack([g for g in gradients if g.any()]).sum(0) > 1e-6).all()


@pytest.mark.parametrize("config_class", [LsrConfig, SokaConfig])
def test_false_is_a_random_start(tiny, batch, config_class):
    model = adapted(tiny(), config_class(r=4, init_weights=False, target_modules=TARGETS), trained=False)
    with torch.no_grad():
        got = logits(model, batch)
        with model.disable_adapter():
            base = logits(model, batch)
    assert not torch.allclose(got, base, atol=1e-3)


def test_paper_start_is_tiny_and_not_zero(net):
    """All factors N(0, 0.01^2), as the authors have them: entries of B A have a variance of r * s^2 * 1e-16."""
    config = LsrConfig(r=16, separation_rank=16, init_weights="paper", target_modules=["layer"])
    layer = one_layer(adapted(net(torch.nn.Linear(256, 256)), config, trained=False))
    assert layer.factors("default")[0].std().item() == pytest.approx(0.01, rel=0.1)
    assert true_delta(layer).std().item() == pytest.approx((16 * 16**2) ** 0.5 * 1e-8, rel=0.2)


@pytest.mark.parametrize(("n_factors", "separation_rank"), [(1, 1), (2, 1), (2, 16), (3, 1), (3, 16)])
def test_lsr_start_has_the_variance_of_a_fresh_lora(net, n_factors, separation_rank):
    """A's entries have variance 1/(3n) whatever s and d are, and B = 0."""
    config = LsrConfig(r=64, separation_rank=separation_rank, n_factors=n_factors, target_modules=["layer"])
    layer = one_layer(adapted(net(torch.nn.Linear(512, 512)), config, trained=False))
    A, B = layer.lora_factors("default")
    assert A.shape == (64, 512)
    assert B.count_nonzero() == 0
    # Entries of one Kronecker term share factors, so that the sample's variance is a rough one.
    assert A.square().mean().item() * 3 * 512 == pytest.approx(1, rel=0.5)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_training_never_writes_the_base(tiny, batch, method, dtype):
    base = tiny("llama", dtype)
    before = base_weights(base)
    with torch.no_grad():
        expected = logits(base, batch)
    model = adapted(base, method(target_modules="all-linear", dropout=0.1), trained=False)
    losses = train_steps(model, batch)

    assert losses[-1] < losses[0]
    assert_same_tensors(base_weights(model), before)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(logits(model, batch), expected)
    with torch.no_grad():
        assert not torch.equal(logits(model, batch), expected)


def test_unload_gives_the_base_back(tiny, batch, method):
    base = tiny()
    before = base_weights(base)
    model = adapted(base, method(target_modules=TARGETS)).unload()
    assert not kron_layers(model)
    assert_same_tensors(base_weights(model), before)


def test_only_factors_are_trainable(tiny, method):
    model = adapted(tiny(), method(target_modules=TARGETS), trained=False)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    prefix = f"{model.peft_config['default'].peft_type.value.lower()}_"
    assert trainable and all(prefix in name for name in trainable)
    expected = sum(layer.specs["default"].n_params for layer in kron_layers(model).values())
    assert model.get_nb_trainable_parameters()[0] == expected
