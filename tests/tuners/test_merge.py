"""merge, unmerge, safe_merge, merge_and_unload: the same outputs when merged, and the old bits after unmerging."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from krontune import ConfigError
from tests.tuners.helpers import (
    TARGETS,
    adapted,
    assert_same_tensors,
    base_weights,
    kron_layers,
    logits,
    one_layer,
    tolerance,
    train_a_little,
    true_delta,
)

LAYERS = {
    "linear": (lambda: nn.Linear(24, 36), (5, 24)),
    "gpt2-conv1d": (lambda: Conv1D(36, 24), (5, 24)),
    "embedding": (lambda: nn.Embedding(40, 24), None),
    "conv2d-groups": (lambda: nn.Conv2d(8, 12, 3, groups=4), (2, 8, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (1, 4, 3, 3, 3)),
}


def test_merging_keeps_a_float64_weight(net, method):
    """The base's own digits stay: only the update is float32."""
    base = net(nn.Linear(24, 36).double())
    model = adapted(base, method(target_modules=["layer"]))
    layer = one_layer(model)
    before, delta = layer.get_base_weight().clone(), true_delta(layer)
    model.merge_adapter()
    error = (layer.get_base_weight() - before - delta).abs().max()
    assert error <= 8 * torch.finfo(torch.float32).eps * delta.abs().max()
    with torch.no_grad():
        for factor in layer.factors("default"):
            factor.zero_()
    model.unmerge_adapter()
    model.merge_adapter()
    assert torch.equal(layer.get_base_weight(), before)


PARAMETRISED = {
    "parametrised": nn.utils.parametrizations.weight_norm,
    "hooked": pytest.param(torch.nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning")),
}


@pytest.mark.parametrize("norm", PARAMETRISED.values(), ids=PARAMETRISED)
@pytest.mark.parametrize("build", [lambda: nn.Linear(8, 12), lambda: nn.Conv1d(8, 12, 3)], ids=["linear", "conv1d"])
def test_a_weight_that_is_computed_cannot_be_merged_into(net, method, norm, build):
    """The adapter itself works; what is written to such a weight would be lost at once."""
    base = net(norm(build()))
    x = torch.randn(2, 8, 8)
    plain = base(x)
    model = adapted(base, method(target_modules=["layer"]))
    unmerged = model(x)
    assert not torch.allclose(unmerged, plain, atol=1e-3)
    with pytest.raises(ConfigError, match=r"weight of layer is computed from other parameters.*Keep the adapter"):
        model.merge_adapter()
    assert torch.equal(model(x), unmerged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_merged_weight_is_rounded_once(net, variant, kind, dtype):
    """The merged weight is the float64 sum, rounded to the base's dtype; unmerging brings the bits back."""
    build, shape = LAYERS[kind]
    base = build().to(dtype)
    x = torch.randint(0, 40, (3, 5)) if shape is None else torch.randn(shape, dtype=dtype)
    model = adapted(net(base), variant(target_modules=["layer"]))
    layer = one_layer(model)
    before, unmerged = base.weight.detach().clone(), model(x)
    delta = true_delta(layer)
    delta = delta.T if isinstance(base, Conv1D) else delta
    exact = before.double() + delta.reshape(before.shape)

    model.merge_adapter()
    assert layer.merged and base.weight.dtype == dtype
    # One rounding, and that of the float32 sum.
    torch.testing.assert_close(base.weight.double(), exact, rtol=torch.finfo(dtype).eps / 2 + 1e-5, atol=1e-5)
    scale = float(unmerged.abs().max())
    torch.testing.assert_close(model(x) / scale, unmerged / scale, **tolerance(dtype, terms=256))

    model.unmerge_adapter()
    assert not layer.merged
    assert torch.equal(base.weight, before)
    assert torch.equal(model(x), unmerged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_model(tiny, batch, method, dtype):
    base = tiny("llama", dtype)
    before = base_weights(base)
    plain = logits(base, batch)
    model = adapted(base, method(target_modules="all-linear"))
    unmerged = logits(model, batch)
    for _ in range(2):
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(logits(model, batch), unmerged, rtol=0.05, atol=300 * torch.finfo(dtype).eps)
        assert not torch.allclose(logits(model, batch), plain, atol=0.1)
        model.unmerge_adapter()
        assert_same_tensors(base_weights(model), before)
    assert torch.equal(logits(model, batch), unmerged)


def test_disabling_a_merged_adapter_unmerges_it(tiny, batch, method):
    base = tiny()
    expected = logits(base, batch)
    model = adapted(base, method(target_modules=TARGETS))
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), expected)
    assert not any(layer.merged for layer in kron_layers(model).values())


def test_switching_a_merged_adapter_unmerges_it(tiny, batch, method):
    base = tiny()
    before = base_weights(base)
    model = adapted(base, method(target_modules=TARGETS))
    model.add_adapter("other", method(target_modules=TARGETS))
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("other")
    assert_same_tensors(base_weights(model), before)


def test_several_adapters(tiny, batch, method):
    """Merged together, one after the other, or by name, in any order: the same bits, and all of them come off again."""
    base = tiny()
    before = base_weights(base)
    model = adapted(base, method(target_modules=TARGETS))
    model.add_adapter("other", method(alpha=-2.0, target_modules=["v_proj", "o_proj"]))
    train_a_little(model, "other", seed=1)
    model.base_model.set_adapter(["default", "other"])
    unmerged = logits(model, batch)

    model.merge_adapter()
    together = base_weights(model)
    torch.testing.assert_close(logits(model, batch), unmerged, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    model.merge_adapter(adapter_names=["default"])
    model.merge_adapter(adapter_names=["other"])
    assert_same_tensors(base_weights(model), together)
    model.merge_adapter(adapter_names=["other"])  # already merged
    assert_same_tensors(base_weights(model), together)
    model.unmerge_adapter()
    assert_same_tensors(base_weights(model), before)
    assert torch.equal(logits(model, batch), unmerged)


@pytest.mark.parametrize("adapter_names", [None, ["other"], ["default", "other"]], ids=str)
def test_merge_and_unload(tiny, batch, method, adapter_names):
    base = tiny()
    dense = copy.deepcopy(base).double()
    model = adapted(base, method(target_modules=TARGETS))
    model.add_adapter("other", method(target_modules=TARGETS))
    train_a_little(model, "other", seed=1)
    for name, layer in kron_layers(model.base_model.model).items():
        for adapter in adapter_names or ["default"]:
            dense.get_submodule(name).weight.data += true_delta(layer, adapter)

    plain = model.merge_and_unload(safe_merge=True, adapter_names=adapter_names)
    assert plain is base and not kron_layers(plain)
    assert plain.state_dict().keys() == dense.state_dict().keys()
    torch.testing.assert_close(logits(plain, batch).double(), logits(dense, batch), **tolerance(torch.float32, 4096))


def test_merge_and_unload_saves_as_a_plain_model(tiny, batch, method, tmp_path):
    model = adapted(tiny(), method(target_modules=TARGETS)).merge_and_unload()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_safe_merge_refuses_nan(tiny, method):
    base = tiny()
    before = base_weights(base)
    model = adapted(base, method(target_modules=TARGETS))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "v_proj" in n and p.requires_grad).fill_(torch.nan)
    with pytest.raises(ConfigError, match=r"(?s)NaN or Inf.*v_proj.*'default'"):
        model.merge_adapter(safe_merge=True)
    broken = {n: w for n, w in base_weights(model).items() if "v_proj" in n}
    assert broken and all(torch.equal(w, before[n]) for n, w in broken.items())


def test_merging_twice_or_unmerging_too_often_warns(net, method):
    model = adapted(net(nn.Linear(8, 8)), method(target_modules=["layer"]))
    before = base_weights(model)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    model.merge_adapter()
    merged = base_weights(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert_same_tensors(base_weights(model), merged)
    model.unmerge_adapter()
    assert_same_tensors(base_weights(model), before)


TIED = [["embed_tokens"], ["embed_tokens", "lm_head", "q_proj"]]


@pytest.mark.parametrize("targets", TIED, ids=["embedding", "both ends"])
@pytest.mark.filterwarnings("ignore:.*tie")
def test_tied_weights(tiny, batch, method, targets):
    """Merging unties: each end gets its own update alone. Unmerging ties again, one weight with the old bits."""
    base = tiny("tied")
    before, plain = base_weights(base), logits(base, batch)
    model = adapted(base, method(target_modules=targets))
    unmerged = logits(model, batch)
    for _ in range(2):
        model.merge_adapter()
        torch.testing.assert_close(logits(model, batch), unmerged, rtol=1e-3, atol=1e-4)
        model.unmerge_adapter()
        assert_same_tensors(base_weights(model), before)
        assert base.get_input_embeddings().weight is base.get_output_embeddings().weight
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), plain)
    assert torch.equal(logits(model, batch), unmerged)


@pytest.mark.filterwarnings("ignore:.*tie")
def test_tied_weights_merged_for_good(tiny, method, batch, tmp_path):
    model = adapted(tiny("tied"), method(target_modules=["embed_tokens"]))
    expected = logits(model, batch)
    plain = model.merge_and_unload()
    assert plain.config.tie_word_embeddings is False
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, batch), expected, rtol=1e-3, atol=1e-4)


def test_merging_modules_to_save(tiny, batch, method):
    model = adapted(tiny(), method(target_modules=["q_proj"], modules_to_save=["lm_head"], train_norms=True))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    expected = logits(model, batch)
    plain = model.merge_and_unload()
    assert not any("modules_to_save" in name for name in plain.state_dict())
    torch.testing.assert_close(logits(plain, batch), expected, rtol=1e-3, atol=1e-4)
