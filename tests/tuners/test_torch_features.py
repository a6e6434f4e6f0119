"""What PyTorch does to any module: copying, pickling, compiling, autocasting, checkpointing, other dtypes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.tuners.helpers import (
    TARGETS,
    adapted,
    adapter_tensors,
    assert_same_tensors,
    base_weights,
    dense_delta,
    kron_layers,
    logits,
    one_layer,
    stored_tensors,
    train_steps,
)


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
@pytest.mark.parametrize("way", [copy.deepcopy, _pickled, _through_torch_save])
def test_copies(tiny, batch, method, way, merged):
    """A copy computes the same, trains on its own, and unmerges to the original bits."""
    base = tiny()
    before = base_weights(base)
    model = adapted(base, method(target_modules=[*TARGETS, "embed_tokens"], train_norms=True))
    if merged:
        model.merge_adapter()
    other = way(model)
    assert torch.equal(logits(other, batch), logits(model, batch))
    if merged:
        other.unmerge_adapter()
        assert_same_tensors(base_weights(other), before)
        assert all(layer.merged for layer in kron_layers(model).values())
        return
    train_steps(other, batch, steps=1)
    assert not torch.equal(logits(other, batch), logits(model, batch))


def test_a_copy_of_a_tied_merged_model(tiny, method):
    base = tiny("tied")
    before = base_weights(base)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = adapted(base, method(target_modules=["embed_tokens"]))
        model.merge_adapter()
    other = copy.deepcopy(model)
    other.unmerge_adapter()
    assert_same_tensors(base_weights(other), before)
    head = other.get_base_model().get_output_embeddings()
    assert head.weight is other.get_base_model().get_input_embeddings().weight


COMPILED = {
    "linear": (lambda: nn.Linear(24, 36), (5, 24)),
    "embedding": (lambda: nn.Embedding(40, 24), None),
    "conv": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("kind", COMPILED)
def test_compile_fullgraph(net, method, kind):
    """One graph, forward and backward, with the values and gradients of eager mode."""
    build, shape = COMPILED[kind]
    x = torch.randint(0, 40, (3, 5)) if shape is None else torch.randn(shape)
    model = adapted(net(build()), method(target_modules=["layer"]))
    factors = [f for f in one_layer(model).factors("default") if f.requires_grad]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs, gradients = [], []
    for function in (model, compiled):
        y = function(x)
        outputs.append(y.detach())
        gradients.append(torch.autograd.grad(y.square().sum(), factors))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for eager, graph in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, graph, rtol=1e-3, atol=1e-4)


def _as_dense(model: nn.Module) -> nn.Module:
    """The same model with W + dW formed by torch.kron in every forward."""

    def forward(x, *, layer):
        base = layer.get_base_layer()
        return F.linear(x, base.weight + dense_delta(layer, dict(stored_tensors(layer, "default"))), base.bias)

    for layer in kron_layers(model).values():
        layer.forward = partial(forward, layer=layer)
    return model


def test_a_loss_curve_dense_factorised_and_compiled(tiny, batch, method):
    """20 steps of AdamW in float64, where only the order of summation may differ; the compiled model is one graph."""
    batch = {**batch, "use_cache": False}
    start = adapted(tiny("llama", torch.float64), method(target_modules=TARGETS), trained=False).double()
    dense = train_steps(_as_dense(copy.deepcopy(start)), batch, steps=20)
    factorised = train_steps(copy.deepcopy(start), batch, steps=20)
    compiled = train_steps(torch.compile(copy.deepcopy(start), fullgraph=True, backend="aot_eager"), batch, steps=20)
    assert dense[-1] < 0.9 * dense[0]
    assert factorised == pytest.approx(dense, rel=1e-9)
    assert compiled == pytest.approx(dense, rel=1e-9)


class Largest(TorchDispatchMode):
    """Sees every tensor that an operation allocates: the largest, in entries. Views of `known` ones take no memory."""

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_allocates_no_matrix(net, variant, dtype):
    """Nothing of (out, in), forward or backward: a layer's memory is that of its factors and activations."""
    n, tokens = 512, 16
    model = adapted(net(nn.Linear(n, n).to(dtype)), variant(target_modules=["layer"])).train()
    x = torch.randn(tokens, n, dtype=dtype, requires_grad=True)
    with Largest(model.parameters()) as largest:
        y = model(x)
    assert tokens * n <= largest.entries < n * n
    with Largest(model.parameters()) as largest:
        y.sum().backward()
    assert largest.entries < n * n
    with Largest(model.parameters()) as largest:  # it would be seen
        one_layer(model).get_delta_weight("default")
    assert largest.entries >= n * n


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(tiny, batch, method, base_dtype):
    model = adapted(tiny("llama", base_dtype), method(target_modules=TARGETS))
    plain = logits(model, batch).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = logits(model, batch)
        with model.disable_adapter():
            base = logits(model, batch)
        losses = train_steps(model, batch, steps=2)
    assert got.dtype == base.dtype
    scale = float(plain.abs().max())
    torch.testing.assert_close(got.float() / scale, plain / scale, rtol=0.1, atol=0.05)
    assert losses[1] < losses[0]
    factors = [f for layer in kron_layers(model).values() for f in layer.factors("default")]
    assert all(f.dtype == torch.float32 for f in factors if f.requires_grad)


@pytest.mark.parametrize("kind", COMPILED)
def test_autocast_of_a_layer(net, method, kind):
    """The output has the dtype that the base layer's has under autocast."""
    build, shape = COMPILED[kind]
    x = torch.randint(0, 40, (3, 5)) if shape is None else torch.randn(shape)
    base = build()
    model = adapted(net(base), method(target_modules=["layer"]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = model(x), base(x).dtype
    assert got.dtype == expected
    torch.testing.assert_close(got.float(), model(x), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(tiny, batch, method, use_reentrant):
    start = adapted(tiny(), method(target_modules=TARGETS)).train()
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(start)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(**batch, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_to_another_dtype(tiny, batch, method):
    """model.to(dtype) takes everything along, as for any module."""
    model = adapted(tiny(), method(target_modules=TARGETS)).to(torch.bfloat16)
    assert all(t.dtype == torch.bfloat16 for t in adapter_tensors(model).values())
    assert logits(model, batch).dtype == torch.bfloat16
    double = adapted(tiny(), method(target_modules=TARGETS)).double()
    assert logits(double, batch).dtype == torch.float64


def test_meta_device_and_back(tiny, batch, method):
    """An adapter can be planned without values, and the state of a real one loaded into it."""
    real = adapted(tiny(), method(target_modules=TARGETS, init_weights="zero"))
    empty = adapted(tiny().to("meta"), method(target_modules=TARGETS, init_weights="zero"), trained=False)
    assert empty.get_nb_trainable_parameters() == real.get_nb_trainable_parameters()
    empty.load_state_dict(real.state_dict(), assign=True)
    ids = {"input_ids": batch["input_ids"]}
    empty.get_base_model().model.rotary_emb = real.get_base_model().model.rotary_emb  # a buffer that is not saved
    assert torch.equal(logits(empty, ids), logits(real, ids))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("grad_enabled", [False, True], ids=["no_grad", ""])
@pytest.mark.parametrize("kind", COMPILED)
def test_functional_transforms(net, method, kind, training, grad_enabled):
    """torch.func.grad, jvp and vmap over functional_call, and forward-mode AD, give what .backward() gives."""
    build, shape = COMPILED[kind]
    x = torch.randint(0, 40, (3, 5)) if shape is None else torch.randn(shape)
    model = adapted(net(build()), method(target_modules=["layer"])).train(training)
    factors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(factors, x):
        return functional_call(model, factors, (x,)).square().sum()

    loss(dict(model.named_parameters()), x).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    tangents = {name: torch.randn_like(factor) for name, factor in factors.items()}
    slope = sum((tangents[name] * gradient).sum() for name, gradient in expected.items())
    with torch.set_grad_enabled(grad_enabled):
        torch.testing.assert_close(torch.func.grad(loss)(factors, x), expected, rtol=1e-3, atol=1e-4)
        _, got = torch.func.jvp(lambda factors: loss(factors, x), (factors,), (tangents,))
        torch.testing.assert_close(got, slope, rtol=1e-3, atol=1e-4)
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(factors, torch.stack([x, x]))
        torch.testing.assert_close({name: g[1] for name, g in each.items()}, expected, rtol=1e-3, atol=1e-4)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(factor, tangents[name]) for name, factor in factors.items()}
        got = forward_ad.unpack_dual(loss(dual, x)).tangent
    torch.testing.assert_close(got, slope, rtol=1e-3, atol=1e-4)
