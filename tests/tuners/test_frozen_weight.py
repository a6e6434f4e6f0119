"""The forward's short cuts: the frozen weight inside the adapter's product, and what is kept between forwards."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from krontune.tuners.base_layer import KronLayer
from krontune.tuners.remembered import Remembered
from tests.tuners.helpers import METHODS, adapted, one_layer, train_a_little, true_delta


class Holder(nn.Module):
    """A model of one linear layer."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 36, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.fixture(params=METHODS)
def layer(request) -> KronLayer:
    torch.manual_seed(0)
    model = get_peft_model(Holder(), METHODS[request.param](target_modules=["linear"]))
    train_a_little(model)
    return one_layer(model)


def dense(layer: KronLayer, x: Tensor) -> Tensor:
    """The layer's output by its dense update, in float64."""
    base = layer.base_layer
    weight = base.weight.double() + layer.get_delta_weight("default").double()
    return nn.functional.linear(x.double(), weight, base.bias.double())


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("rows", [(), (1,), (2, 7), (300,)], ids=str)
def test_with_the_frozen_weight(layer, training, rows):
    layer.train(training)
    x = torch.randn(*rows, 24)
    assert layer._takes_base(x, "default")
    assert_close(layer(x), dense(layer, x))
    with torch.no_grad():
        assert_close(layer(x), dense(layer, x))


def test_gradients_with_the_frozen_weight(layer):
    """Those of the factors, of x, and of a bias that is trained, against the dense update's."""
    layer.base_layer.bias.requires_grad_(True)
    x, g = torch.randn(5, 24, requires_grad=True), torch.randn(5, 36)
    leaves = [x, layer.base_layer.bias, *(f for f in layer.factors("default") if f.requires_grad)]
    actual = torch.autograd.grad(layer(x), leaves, g)
    expected = torch.autograd.grad(dense(layer, x), leaves, g.double())
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e)


def test_hooks_of_the_base_layer_run(layer):
    x, seen = torch.randn(3, 24), []
    handles = [
        layer.base_layer.register_forward_hook(lambda module, args, output: seen.append("after")),
        layer.base_layer.register_forward_pre_hook(lambda module, args: seen.append("before")),
    ]
    assert_close(layer(x), dense(layer, x))
    assert seen == ["before", "after"]
    for handle in handles:
        handle.remove()
    layer(x)
    assert len(seen) == 2


def test_a_replaced_forward_of_the_base_layer_runs(layer):
    """Offloading and quantising libraries replace `forward` on the instance."""
    x, plain = torch.randn(3, 24), layer.base_layer.forward
    layer.base_layer.forward = lambda x: plain(x) + 1
    assert_close(layer(x), dense(layer, x) + 1)


def test_a_subclass_of_linear_is_called(layer):
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x, base = torch.randn(3, 24), layer.base_layer
    expected = dense(layer, x) + base(x).double()
    base.__class__ = Doubled
    assert_close(layer(x), expected)


def test_dropout_leaves_the_frozen_weight_alone(layer):
    layer.kron_dropout["default"] = nn.Dropout(1 - 1e-9)  # drops everything
    x = torch.randn(3, 24)
    assert_close(layer.train()(x), layer.base_layer(x))
    assert_close(layer.eval()(x), dense(layer, x))


CHANGES = {
    "optimizer": lambda layer: torch.optim.SGD(layer.factors("default")[:1], lr=1.0).step(),
    "in place": lambda layer: layer.factors("default")[0].mul_(2),
    "through .data": lambda layer: layer.factors("default")[0].data.mul_(2),
    "through numpy": lambda layer: layer.factors("default")[0].numpy().__imul__(2),
    "new .data": lambda layer: setattr(layer.factors("default")[0], "data", layer.factors("default")[0].data * 2),
    "load_state_dict": lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}),
    "scale": lambda layer: layer.scaling.update(default=2.0),
    "to float64 and back": lambda layer: layer.double().float().factors("default")[0].mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_kept_is_never_stale(layer, change):
    layer.eval()
    x = torch.randn(3, 24)
    for factor in layer.factors("default"):
        factor.grad = torch.ones_like(factor) if factor.requires_grad else None
    with torch.no_grad():
        before = layer(x)
        assert torch.equal(layer(x), before)
        CHANGES[change](layer)
        assert_close(layer(x), dense(layer, x))
        assert not torch.allclose(layer(x), before)


def test_what_is_kept_belongs_to_one_adapter(layer):
    layer.eval()
    x = torch.randn(3, 24)
    with torch.no_grad():
        first = layer(x)
        other = copy.deepcopy(layer)
        other.factors("default")[0].mul_(2)
        assert not torch.allclose(other(x), first)
        assert torch.equal(layer(x), first)
        layer.merge()
        assert_close(layer(x), first)
        layer.unmerge()
        layer.enable_adapters(False)
        assert torch.equal(layer(x), layer.base_layer(x))
        layer.enable_adapters(True)
        assert torch.equal(layer(x), first)


def test_what_is_kept_follows_the_device():
    """Here without a second device that computes: "meta" tells which device the value was made on."""
    kept, tensor = Remembered(), torch.ones(2)
    devices = [kept.get([t], None, lambda t=t: t * 2).device.type for t in (tensor, tensor.to("meta"), tensor)]
    assert devices == ["cpu", "meta", "cpu"]


def test_what_is_kept_follows_the_active_adapter(method):
    """Adapters are switched, changed while another is active, and switched back."""
    model = adapted(Holder(), method(target_modules=["linear"]))
    model.add_adapter("other", method(target_modules=["linear"]))
    train_a_little(model, "other", seed=5)
    layer, x = one_layer(model.eval()), torch.randn(3, 24)

    def expected(name: str) -> Tensor:
        return layer.base_layer(x).double() + x.double() @ true_delta(layer, name).T

    with torch.no_grad():
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            for _ in range(2):  # made, then kept
                assert_close(model(x), expected(name))
            other = {"default": "other", "other": "default"}[name]
            layer.factors(other)[0].mul_(1.5)
        model.set_adapter("other")
        assert_close(model(x), expected("other"))


def test_a_gradient_flows_after_inference(layer):
    layer.eval()
    x = torch.randn(3, 24)
    with torch.inference_mode():
        inferred = layer(x)
    layer(x).sum().backward()
    assert all(f.grad is not None for f in layer.factors("default") if f.requires_grad)
    with torch.no_grad():
        assert_close(layer(x), inferred)
