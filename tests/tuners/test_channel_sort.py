"""SoKA on sorted channels. What holds for every adapter is tested with the variant "soka-sorted" beside the others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from krontune import SokaConfig
from krontune.errors import ConfigError
from krontune.kron import KronShape, channel_order, kron_sum, rearrange
from krontune.tuners.soka import model as soka_model
from tests.tuners.helpers import TARGETS, adapted, one_layer, train_a_little, true_delta


def hidden_product(m: int = 16, n: int = 24) -> torch.Tensor:
    """A Kronecker product of factors that rise and fall, its channels shuffled."""
    torch.manual_seed(0)
    rows, cols = torch.rand(m // 4, 1).sort(0).values + 0.1, torch.rand(1, 4).sort(1).values + 0.1
    W = torch.kron(rows @ cols, torch.ones(4, n // 4))
    return W[torch.randperm(m)][:, torch.randperm(n)]


def layer_of(weight: torch.Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone())
    return layer


@pytest.mark.parametrize("how", ["norm", "svd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_is_the_dense_product(net: Callable, how: str, dtype: torch.dtype) -> None:
    model = adapted(net(nn.Linear(24, 32)).to(dtype), SokaConfig(r=3, target_modules=["layer"], channel_sort=how))
    layer = one_layer(model)
    base = layer.get_base_layer()
    for shape in ((5, 24), (2, 7, 24), (24,), (0, 24)):
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        wanted = x.double() @ (base.weight.double() + true_delta(layer)).T + base.bias.double()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(layer(x).double(), wanted, rtol=100 * eps, atol=100 * eps)
        (got,) = torch.autograd.grad(layer(x).square().sum(), x)
        (true,) = torch.autograd.grad(wanted.square().sum(), x)
        torch.testing.assert_close(got, true, rtol=1000 * eps, atol=1000 * eps)


def test_the_start_holds_more_of_a_sorted_weight(net: Callable) -> None:
    """One term is enough for the hidden product, and far from it in the order that the channels came in."""
    W = hidden_product()
    left_out = {}
    for how in (None, "norm", "svd"):
        config = SokaConfig(r=1, factor_shape=(4, 4), target_modules=["layer"], channel_sort=how)
        layer = one_layer(get_peft_model(net(layer_of(W)), config))
        _, _, A0, B0 = layer.factors("default")[:4]
        start = kron_sum(A0, B0)
        order = layer.order("default")
        rest = W - (start if order is None else order.unsort(start))
        left_out[how] = float(rest.norm() / W.norm())
        assert torch.equal(layer.delta_matrix("default"), torch.zeros_like(W))
    assert left_out["norm"] < 0.01 > left_out["svd"]  # bfloat16's rounding of the start
    assert left_out[None] > 0.1


def test_the_orders_are_the_weights_own(net: Callable) -> None:
    W = torch.randn(16, 24)
    layer = one_layer(get_peft_model(net(layer_of(W)), SokaConfig(r=2, target_modules=["layer"], channel_sort="norm")))
    order = layer.order("default")
    ordered = order.sort(W)
    assert torch.equal(ordered.norm(dim=1).argsort(descending=True), torch.arange(16))
    assert torch.equal(order.unsort(ordered), W)
    assert torch.equal(ordered[order.rows.long()], W[:, order.cols.long()])  # what the forward gathers
    for got, wanted in zip(order, channel_order(W, "norm"), strict=True):
        assert got.dtype == torch.int32 and torch.equal(got, wanted)


@pytest.mark.parametrize("how", ["norm", "svd"])
def test_every_order_is_a_permutation_and_undone_bit_for_bit(how: str) -> None:
    for W in (torch.randn(6, 10), torch.zeros(4, 4), torch.randn(3, 8, 4)):
        order = channel_order(W, how)
        for index in order:
            assert torch.equal(index.sort(-1).values.long(), torch.arange(index.shape[-1]).expand_as(index))
        assert torch.equal(order.unsort(order.sort(W)), W)
    rows = rearrange(order.sort(W), KronShape(2, 2, 4, 2))
    assert rows.shape == (3, 4, 8)


def test_a_checkpoint_brings_its_orders(tiny: Callable, batch: dict, tmp_path: Path, monkeypatch) -> None:
    """They are not computed on load; another base's weights do not change them."""
    config = SokaConfig(r=2, target_modules=TARGETS, channel_sort="svd")
    model = adapted(tiny(), config)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for key, t in stored.items() if key.endswith(("rows", "cols"))} == {torch.int32}
    monkeypatch.setattr(soka_model, "channel_order", None)
    other = tiny()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1)
    with pytest.warns(UserWarning, match="not those that this adapter was trained on"):
        loaded = PeftModel.from_pretrained(other, str(tmp_path))
    for key, tensor in loaded.state_dict().items():
        if "soka_rows" in key or "soka_cols" in key:
            assert torch.equal(tensor, stored[key.replace(".default", "")])
    with torch.no_grad():
        again = PeftModel.from_pretrained(tiny(), str(tmp_path)).eval()
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_joining(net: Callable) -> None:
    W = torch.randn(16, 24)
    model = get_peft_model(net(layer_of(W)), SokaConfig(r=2, target_modules=["layer"], channel_sort="norm"))
    for name, how in (("same", "norm"), ("other", "svd"), ("plain", None)):
        model.add_adapter(name, SokaConfig(r=1, target_modules=["layer"], channel_sort=how))
    layer = one_layer(model)
    for name in ("default", "same", "other", "plain"):
        layer.set_requires_grad(name, True)
        train_a_little(model, name)
    model.base_model.add_weighted_adapter(["default", "same"], [0.5, -2.0], "joined")
    wanted = 0.5 * true_delta(layer, "default") - 2 * true_delta(layer, "same")
    torch.testing.assert_close(true_delta(layer, "joined"), wanted, rtol=1e-5, atol=1e-6)
    for names in (["default", "other"], ["default", "plain"]):
        with pytest.raises(ConfigError, match="channels in different orders"):
            model.base_model.add_weighted_adapter(names, [1.0, 1.0], "no")


def test_adapters_with_and_without_sorting_side_by_side(net: Callable) -> None:
    model = adapted(net(nn.Linear(24, 16)), SokaConfig(r=2, target_modules=["layer"], channel_sort="norm"))
    model.add_adapter("plain", SokaConfig(r=2, target_modules=["layer"]))
    layer = one_layer(model)
    train_a_little(model, "plain")
    x = torch.randn(3, 24)
    base = layer.get_base_layer()
    for names in (["default"], ["plain"], ["default", "plain"]):
        model.base_model.set_adapter(names)
        wanted = base(x).double() + x.double() @ sum(true_delta(layer, name) for name in names).T
        torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)
    before = copy.deepcopy(base.weight.data)
    layer.merge()
    assert not torch.equal(base.weight, before)
    layer.unmerge()
    assert torch.equal(base.weight, before)


def test_wrong_settings(net: Callable) -> None:
    with pytest.raises(ConfigError, match="channel_sort='size' is unknown"):
        SokaConfig(channel_sort="size")
    with torch.device("meta"):
        model = net(nn.Linear(16, 16))
    with pytest.raises(ConfigError, match="channel_sort='norm' looks at the weights, and layer is on the meta device"):
        get_peft_model(model, SokaConfig(r=1, target_modules=["layer"], channel_sort="norm"))
