"""Every kind of layer: its adapted output is that of the same layer with W + dW in the place of W."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from krontune import ConfigError, LsrConfig, SokaConfig
from tests.tuners.helpers import (
    adapted,
    kron_layers,
    logits,
    one_layer,
    tolerance,
    true_delta,
)


def _conv1d(out_features: int, in_features: int) -> Conv1D:
    layer = Conv1D(out_features, in_features)
    nn.init.normal_(layer.weight)
    return layer


IDS = torch.randint(0, 40, (3, 5), generator=torch.Generator().manual_seed(0))


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# name: (layer, input)
LAYERS = {
    "linear": (lambda: nn.Linear(24, 36), _noise(2, 5, 24)),
    "linear-1d-input": (lambda: nn.Linear(24, 36), _noise(24)),
    "linear-no-bias": (lambda: nn.Linear(36, 24, bias=False), _noise(7, 36)),
    "linear-prime": (lambda: nn.Linear(13, 7), _noise(3, 13)),
    "linear-to-one": (lambda: nn.Linear(24, 1), _noise(3, 24)),
    "gpt2-conv1d": (lambda: _conv1d(36, 24), _noise(2, 5, 24)),
    "embedding": (lambda: nn.Embedding(40, 24), IDS),
    "embedding-padding": (lambda: nn.Embedding(40, 24, padding_idx=0), IDS),
    "embedding-scaled": (lambda: Gemma3TextScaledWordEmbedding(40, 24, 0, embed_scale=3.7), IDS),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, padding=1), _noise(2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), _noise(2, 8, 9, 9)),
    "conv2d-groups": (lambda: nn.Conv2d(8, 12, (3, 2), groups=4, dilation=2), _noise(2, 8, 9, 9)),
    "conv2d-depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False), _noise(2, 8, 9, 9)),
    "conv2d-reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), _noise(2, 4, 7, 7)),
    "conv2d-same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), _noise(2, 4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 1)), _noise(1, 4, 3, 5, 5)),
}


def _with_weight(layer: nn.Module, delta: torch.Tensor) -> nn.Module:
    """The same layer in float64 with its weight plus delta, an (m, n) matrix."""
    dense = copy.deepcopy(layer).double()
    delta = delta.T if isinstance(layer, Conv1D) else delta
    dense.weight.data += delta.reshape(dense.weight.shape)
    return dense


@pytest.mark.parametrize("kind", LAYERS)
def test_output_is_that_of_the_dense_weight(net, variant, kind):
    build, x = LAYERS[kind]
    base = build()
    model = adapted(net(base), variant(target_modules=["layer"]))
    layer = one_layer(model)
    dense = _with_weight(base, true_delta(layer))

    expected = dense(x if x.dtype == torch.long else x.double())
    got = model(x)
    plain = base(x)
    assert got.shape == expected.shape and got.dtype == plain.dtype
    scale = float(expected.abs().max())
    torch.testing.assert_close(got.double() / scale, expected / scale, **tolerance(torch.float32))
    assert not torch.allclose(got, plain, atol=1e-3 * scale)

    delta = layer.get_delta_weight("default")
    assert delta.shape == base.weight.shape
    torch.testing.assert_close(delta.double(), dense.weight - base.weight.double(), **tolerance(torch.float32))


@pytest.mark.parametrize("kind", ["linear", "gpt2-conv1d", "embedding", "conv2d-groups"])
def test_gradients_are_those_of_the_dense_weight(net, method, kind):
    """d loss / d factor through the structured product equals that through the dense update."""
    build, x = LAYERS[kind]
    model = adapted(net(build()), method(target_modules=["layer"]))
    layer = one_layer(model)
    factors = [f for f in layer.factors("default") if f.requires_grad]
    direction = torch.randn_like(model(x))

    got = torch.autograd.grad((model(x) * direction).sum(), factors)
    weight = layer.get_base_layer().weight.detach()
    dense = copy.deepcopy(layer.get_base_layer())
    del dense.weight
    dense.weight = weight + layer.get_delta_weight("default")
    expected = torch.autograd.grad((dense(x) * direction).sum(), factors)
    for ours, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "gpt2-conv1d", "embedding", "conv2d"])
def test_half_precision_base(net, method, kind, dtype):
    """The output has the base's dtype; what is trained stays float32."""
    build, x = LAYERS[kind]
    base = build().to(dtype)
    model = adapted(net(base), method(target_modules=["layer"]))
    layer = one_layer(model)
    x = x if x.dtype == torch.long else x.to(dtype)
    got = model(x)
    assert got.dtype == dtype
    assert all(f.dtype == torch.float32 for f in layer.factors("default") if f.requires_grad)
    expected = _with_weight(base, true_delta(layer))(x if x.dtype == torch.long else x.double())
    scale = float(expected.abs().max())
    torch.testing.assert_close(got.double() / scale, expected / scale, **tolerance(dtype))


def test_dropout_acts_on_the_update_alone(net, method):
    base = nn.Linear(24, 36)
    model = adapted(net(base), method(target_modules=["layer"], dropout=0.5))
    x = _noise(64, 24)
    model.train()
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    mean = torch.stack([model(x) for _ in range(400)]).mean(0)
    model.eval()
    torch.testing.assert_close(mean, model(x), atol=0.5, rtol=0.1)
    assert torch.equal(model(x), model(x))


def test_dropout_on_an_embedding_warns(net, method):
    with pytest.warns(UserWarning, match="no effect on an embedding"):
        adapted(net(nn.Embedding(40, 24)), method(target_modules=["layer"], dropout=0.1))


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(4, 6, 3), nn.LayerNorm(24), nn.GRU(24, 24)])
def test_other_layers_are_refused_by_name(net, method, layer):
    model = net(layer)
    with pytest.raises(ConfigError, match=rf"layer is a {type(layer).__name__}.*Supported are Linear"):
        adapted(model, method(target_modules=["layer"]))
    assert model.layer is layer


def test_gpt2(tiny, batch, method):
    """A whole model of Conv1D layers, merged by hand in float64."""
    base = tiny("gpt2")
    dense = copy.deepcopy(base).double()
    model = adapted(base, method(target_modules=["c_attn", "c_proj", "c_fc"]))
    for name, layer in kron_layers(model.base_model.model).items():
        dense.get_submodule(name).weight.data += true_delta(layer).T
    torch.testing.assert_close(
        logits(model, batch).double(), logits(dense, batch), **tolerance(torch.float32, terms=4096)
    )


def test_default_targets_of_an_architecture(tiny, method):
    """target_modules=None takes what LoRA takes."""
    model = adapted(tiny("gpt2"), method())
    assert {name.rsplit(".", 1)[1] for name in kron_layers(model)} == {"c_attn"}


def test_tied_embedding(tiny, batch, method):
    """The adapter of a tied embedding acts on the embedding alone; the head keeps the base weight."""
    base = tiny("tied")
    dense = copy.deepcopy(base).double()
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = adapted(base, method(target_modules=["embed_tokens", "q_proj"]))
    dense.lm_head.weight = nn.Parameter(dense.lm_head.weight.detach().clone())
    for name, layer in kron_layers(model.base_model.model).items():
        dense.get_submodule(name).weight.data += true_delta(layer)
    torch.testing.assert_close(
        logits(model, batch).double(), logits(dense, batch), **tolerance(torch.float32, terms=4096)
    )
    assert model.get_base_model().lm_head.weight is model.get_base_model().model.embed_tokens.base_layer.weight


def test_layer_twice_in_a_model(method):
    """A module that stands at two places is adapted at the place that was matched, as PEFT does."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x))

    model = adapted(Twice(), method(target_modules=["first"]))
    x = _noise(3, 8)
    W = model.base_model.model.first.get_base_layer().weight.double()
    b = model.base_model.model.first.get_base_layer().bias.double()
    delta = true_delta(one_layer(model))
    expected = (x.double() @ (W + delta).T + b) @ W.T + b
    torch.testing.assert_close(model(x).double(), expected, **tolerance(torch.float32, terms=512))


@pytest.mark.parametrize("config_class", [LsrConfig, SokaConfig])
def test_no_argument_is_required(net, config_class):
    """The defaults work on an ordinary layer, and say what they are."""
    model = adapted(net(nn.Linear(384, 512)), config_class(target_modules=["layer"]))
    assert "spec" in model.peft_config["default"].resolved["layer"]
    assert "scaling=1.0" in repr(model)


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["out_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["out_proj"], "target_parameters": ["layer.in_proj_weight"]},
        {"target_parameters": ["out_proj.weight"]},
    ],
    ids=str,
)
def test_a_projection_that_is_never_called(net, method, targets):
    """nn.MultiheadAttention reads out_proj.weight: an adapter of it would train nothing, in silence."""
    base = net(nn.MultiheadAttention(16, 2))
    with pytest.raises(ConfigError, match=r"never calls out_proj.*in_proj_weight with target_parameters"):
        adapted(base, method(**targets))
    assert kron_layers(adapted(base, method(target_parameters=["layer.in_proj_weight"])))


@pytest.mark.parametrize(
    "targets",
    [{"target_modules": ["linear1", "linear2"]}, {"target_parameters": ["self_attn.in_proj_weight"]}],
    ids=["linears", "attention"],
)
def test_an_encoder_layer_does_not_pass_over_its_adapters(net, method, targets):
    """nn.TransformerEncoderLayer's fast path in eval mode reads the base weights of all its modules."""
    base = net(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval()
    x, expected = torch.randn(2, 3, 16), copy.deepcopy(base)
    model = copy.deepcopy(adapted(base, method(**targets)))
    for name, layer in kron_layers(model.base_model.model).items():
        getattr(expected.get_submodule(name), layer.weight_name).data += true_delta(layer).float()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(x), rtol=1e-4, atol=1e-5)
