"""init_weights="gradient": the preprocessing call, the start that it gives, and its errors."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from krontune import ConfigError, LsrConfig, SokaConfig, preprocess_gradient
from krontune.kron import KronShape, rearrange, separated_sum
from tests.tuners.helpers import (
    TARGETS,
    adapted,
    assert_same_tensors,
    base_weights,
    kron_layers,
    logits,
    one_layer,
    train_steps,
)


@pytest.fixture
def gradient_config(method):
    return lambda **kw: method(init_weights="gradient", **{"target_modules": TARGETS, **kw})


def _train_step(model: nn.Module, batch: dict, batches: int = 2):
    """What a user passes: forward and backward over a few batches."""

    def step() -> None:
        for i in range(batches):
            model(input_ids=batch["input_ids"].roll(i, 1), labels=batch["labels"].roll(i, 1)).loss.backward()

    return step


def _with_gradient(net, gradient: torch.Tensor, config):
    """A one-layer model whose loss has this gradient for the weight, adapted."""
    model = net(nn.Linear(gradient.shape[1], gradient.shape[0]))
    preprocess_gradient(model, config, lambda: (model.layer.weight * gradient).sum().backward())
    return one_layer(adapted(model, config, trained=False))


def _angles(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Cosines of the principal angles between two row spaces, (k,), least last."""
    bases = (torch.linalg.qr(matrix.detach().double().T).Q for matrix in (rows, others))
    one, two = bases
    return torch.linalg.svdvals(one.T @ two)


def test_lsr_spans_the_top_right_singular_vectors_of_the_gradient(net):
    """With enough terms A's row space is theirs; it is as large as the random start's."""
    gradient = torch.randn(24, 3) @ torch.diag(torch.tensor([9.0, 5.0, 3.0])) @ torch.randn(3, 36)
    gradient += 0.01 * torch.randn(24, 36)
    config = LsrConfig(r=2, separation_rank=6, init_weights="gradient", target_modules=["layer"])
    with pytest.warns(UserWarning, match="more parameters"):
        layer = _with_gradient(net, gradient, config)  # min(2*6, 1*6) = 6 terms make any (2, 36) matrix
    A, B = layer.lora_factors("default")
    _, _, Vh = torch.linalg.svd(-gradient)
    assert _angles(A, Vh[:2]).min() > 0.999
    assert B.count_nonzero() == 0
    # The norm of a random start: r rows of n entries with a variance of 1/(3n).
    assert A.norm().item() == pytest.approx((2 / 3) ** 0.5, rel=0.5)


def test_lsr_takes_the_kpsvd_of_those_vectors(net):
    """With fewer terms A is the best sum of s Kronecker products to the singular vectors, up to one factor."""
    gradient = torch.randn(24, 36)
    config = LsrConfig(r=4, separation_rank=2, init_weights="gradient", target_modules=["layer"])
    layer = _with_gradient(net, gradient, config)
    A = layer.lora_factors("default")[0].detach().double()
    _, _, Vh = torch.linalg.svd(-gradient.double())
    spec = layer.specs["default"]
    (r1, r2), (n1, n2) = spec.rank_factors, spec.in_factors
    R = rearrange(Vh[:4], KronShape(r1, n1, r2, n2))
    U, S, V = torch.linalg.svd(R)
    best = U[:, :2] * S[:2] @ V[:2]
    got = rearrange(A, KronShape(r1, n1, r2, n2))
    assert torch.linalg.matrix_rank(got, rtol=1e-4) == 2
    cosine = (got * best).sum() / (got.norm() * best.norm())
    assert abs(cosine) > 0.999  # the signs of singular vectors are free, and are shared by both here


def test_lsr_spare_terms_can_be_trained(net):
    """Terms that the singular vectors do not need are small, random and not zero."""
    gradient = torch.outer(torch.randn(24), torch.kron(torch.randn(6), torch.randn(6)))
    config = LsrConfig(r=1, separation_rank=3, init_weights="gradient", target_modules=["layer"])
    with pytest.warns(UserWarning, match="more parameters"):
        layer = _with_gradient(net, gradient, config)
    norms = torch.stack([f.flatten(1).norm(dim=1) for f in layer.a_factors("default")]).prod(0)
    assert norms.min() > 1e-3 * norms.max()
    assert separated_sum(layer.a_factors("default")).shape == (1, 36)


@pytest.mark.parametrize("factor_shape", [1, 2, "square"])
def test_soka_starts_from_the_kpsvd_of_the_negative_gradient(net, factor_shape):
    """A0 are its left terms, and B0 is zero: the first step of B goes down the gradient."""
    gradient = torch.randn(24, 36)
    config = SokaConfig(r=3, factor_shape=factor_shape, init_weights="gradient", target_modules=["layer"])
    layer = _with_gradient(net, gradient, config)
    _, _, A0, B0 = layer.factors("default")
    assert B0.count_nonzero() == 0
    U, _, _ = torch.linalg.svd(rearrange(-gradient.double(), layer.specs["default"].shape))
    assert _angles(A0.flatten(1), U[:, :3].T).min() > 0.999


@pytest.mark.parametrize("rank", [0, 1])
def test_a_gradient_without_enough_terms(net, method, rank):
    """Such as that of an expert that got no token: the start is finite, and every term can learn."""
    gradient = torch.randn(24, rank) @ torch.randn(rank, 36)
    layer = _with_gradient(net, gradient, method(init_weights="gradient", target_modules=["layer"]))
    assert all(torch.isfinite(f).all() for f in layer.factors("default"))
    assert layer.get_delta_weight("default").count_nonzero() == 0
    layer(torch.randn(7, 36)).square().sum().backward()
    moved = [f.grad for f in layer.factors("default") if f.requires_grad and f.grad.any()]
    assert all((gradient.flatten(1).norm(dim=1) > 0).all() for gradient in moved) and moved


def test_the_model_is_left_as_it_was(tiny, batch, gradient_config):
    base = tiny()
    base.train()
    base.model.embed_tokens.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in base.named_parameters()}
    before = base_weights(base)
    config = gradient_config()
    preprocess_gradient(base, config, _train_step(base, batch))
    assert_same_tensors(base_weights(base), before)
    assert {n: p.requires_grad for n, p in base.named_parameters()} == flags
    assert base.training and all(p.grad is None for p in base.parameters())
    assert config.target_modules == set(TARGETS) and config.resolved is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flow(tiny, batch, gradient_config, dtype, tmp_path):
    """Preprocess, adapt, train, save, reload; nothing is left behind on the base's layers."""
    base = tiny("llama", dtype)
    expected = logits(base, batch)
    config = gradient_config()
    preprocess_gradient(base, config, _train_step(base, batch))
    model = adapted(base, config, trained=False)
    assert torch.equal(logits(model, batch), expected)
    assert not any("_krontune_gradient" in vars(module) for module in model.modules())
    losses = train_steps(model, batch)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("llama", dtype), tmp_path)  # needs no gradient
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_the_gradient_is_the_sum_over_the_batches(tiny, batch):
    """The same starts as from plain autograd on the full model."""
    config = SokaConfig(r=2, init_weights="gradient", factor_shape=1, target_modules=["down_proj"])
    base, reference = tiny(), tiny()
    preprocess_gradient(base, config, _train_step(base, batch))
    reference.train()
    _train_step(reference, batch)()
    for name, layer in kron_layers(adapted(base, config, trained=False).base_model.model).items():
        U, _, _ = torch.linalg.svd(-reference.get_parameter(f"{name}.weight").grad)
        assert _angles(layer.factors("default")[2].flatten(1), U[:, :2].T).min() > 0.99, name


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gpt2", {"target_modules": ["c_attn", "wte"]}),
        ("mixtral", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
        ("mixtral", {"target_modules": None, "target_parameters": ["experts.down_proj"]}),
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": None}),
    ],
    ids=str,
)
def test_other_layers(tiny, batch, gradient_config, name, settings):
    base = tiny(name)
    expected = logits(base, batch)
    config = gradient_config(**settings)
    preprocess_gradient(base, config, _train_step(base, batch))
    model = adapted(base, config, trained=False)
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=0)
    assert not any("_krontune_gradient" in vars(module) for module in model.modules())


def test_errors(tiny, batch, gradient_config, method):
    base = tiny()
    before = base_weights(base)
    with pytest.raises(ConfigError, match="needs init_weights='gradient'; the config says True"):
        preprocess_gradient(base, method(target_modules=TARGETS), lambda: None)
    with pytest.raises(ConfigError, match=r"target_modules=\{'nothing'\}.* matched nothing"):
        preprocess_gradient(base, gradient_config(target_modules=["nothing"]), lambda: None)
    with pytest.raises(ConfigError, match=r"No gradient reached model\.layers\.0.*loss\.backward"):
        preprocess_gradient(base, gradient_config(), lambda: None)
    with pytest.raises(ConfigError, match=r"The gradient of .* holds NaN or Inf"):
        preprocess_gradient(base, gradient_config(), lambda: (base(**batch).loss * torch.nan).backward())
    with pytest.raises(ZeroDivisionError):
        preprocess_gradient(base, gradient_config(), lambda: 1 / 0)
    with pytest.raises(ConfigError, match=r"Call krontune\.preprocess_gradient\(.*before get_peft_model"):
        adapted(base, gradient_config())
    assert all(p.requires_grad and p.grad is None for p in base.parameters())
    assert not base.training and not kron_layers(base)
    assert_same_tensors(base_weights(base), before)


@pytest.mark.parametrize("adapter", ["ours", "lora"])
def test_an_adapted_model_is_refused(tiny, batch, method, gradient_config, adapter):
    other = method(target_modules=TARGETS) if adapter == "ours" else LoraConfig(target_modules=TARGETS)
    model = get_peft_model(tiny(), other)
    with pytest.raises(ConfigError, match=r"matched nothing.*before get_peft_model"):
        preprocess_gradient(model, gradient_config(), _train_step(model, batch))


def test_a_gradient_survives_a_failed_injection(tiny, batch, gradient_config):
    """Correct the config and go on: the batches need not be run again."""
    base = tiny()
    config = gradient_config()
    preprocess_gradient(base, config, _train_step(base, batch))
    with pytest.raises(ConfigError, match="before get_peft_model"):
        adapted(base, gradient_config(target_modules=[*TARGETS, "o_proj"]))
    assert kron_layers(adapted(base, config))
