"""Quantised bases: bitsandbytes 4 and 8 bit, torchao int8, all of which run on the CPU."""

from __future__ import annotations

import copy
import importlib
import os
import re
import traceback
import warnings

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import krontune
from krontune import ConfigError, KrontuneError, LsrConfig, SokaConfig, preprocess_gradient
from tests.tuners.helpers import (
    OLD_PEFT,
    TARGETS,
    adapted,
    adapter_tensors,
    assert_same_tensors,
    kron_layers,
    logits,
    train_steps,
    true_delta,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*MatMul8bitLt:UserWarning")


def _torchao() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


# name: (library, its configuration, how the checkpoint calls it)
FORMATS = {
    "bnb nf4": (
        "bitsandbytes",
        lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        "bnb 4bit nf4",
    ),
    "bnb fp4": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True), "bnb 4bit fp4"),
    "bnb 8bit": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True), "bnb 8bit"),
    "torchao int8": ("torchao", _torchao, "torchao Int8Tensor"),
}


def _lacks_a_kernel(error: Exception) -> bool:
    """Whether the library says that it has nothing for this machine: outside of krontune, and in so many words."""
    ours = os.path.dirname(krontune.__file__)
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, KrontuneError) or any(frame.filename.startswith(ours) for frame in frames):
        return False
    words = r"(?i)\b(cpu|cuda|gpu|backend|kernels?)\b|not (implemented|supported)|unsupported"
    return isinstance(error, (ImportError, NotImplementedError)) or bool(re.search(words, str(error)))


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (RuntimeError("No GPU found."), True),
        (NotImplementedError("aten::_weight_int8pack_mm"), True),
        (ImportError("needs bitsandbytes >= 0.50"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConfigError("CPU"), False),
    ],
)
def test_what_is_skipped(error, lacks):
    """A regression of ours cannot pass as a machine without kernels."""
    assert _lacks_a_kernel(error) == lacks


def test_an_error_from_our_code_is_not_skipped():
    with pytest.raises(ConfigError) as error:
        LsrConfig(r=0)
    assert not _lacks_a_kernel(NotImplementedError("cpu").with_traceback(error.value.__traceback__))


@pytest.fixture(scope="module")
def _quantised(tmp_path_factory) -> dict:
    return {"folder": tmp_path_factory.mktemp("base")}


@pytest.fixture
def quantised(tiny, _quantised):
    """quantised(format): a tiny Llama in that format, as from_pretrained makes it."""

    def load(kind: str):
        library, config, _ = FORMATS[kind]
        try:
            importlib.import_module(library)
        except ImportError as error:
            pytest.skip(f"{library} does not work here: {error}")
        if kind.startswith("torchao") and OLD_PEFT:
            pytest.skip("PEFT before 0.21 does not work with this torchao")
        if kind not in _quantised:
            tiny("wide").save_pretrained(_quantised["folder"])
            try:
                model = AutoModelForCausalLM.from_pretrained(
                    _quantised["folder"], quantization_config=config(), device_map="cpu"
                )
                model(input_ids=torch.tensor([[3]]))  # some kernels are missing only when they are called
            except (ImportError, RuntimeError) as error:
                if not _lacks_a_kernel(error):
                    raise
                pytest.skip(f"{kind} does not run on this CPU: {error}")
            _quantised[kind] = model.eval()
        return copy.deepcopy(_quantised[kind])

    return load


def _stored(model) -> dict[str, torch.Tensor]:
    """The quantised weights as they are stored, in the order in which they were quantised."""
    stored = {}
    for name, layer in kron_layers(model).items():
        weight = layer.base_parameter
        while hasattr(weight, "__tensor_flatten__"):
            weight = getattr(weight, weight.__tensor_flatten__()[0][0])
        stored[name] = weight.detach().clone()
    return stored


@pytest.mark.parametrize("kind", FORMATS)
def test_start_training_and_disabling(quantised, batch, method, kind):
    base = quantised(kind)
    expected = logits(base, batch)
    model = adapted(base, method(target_modules=TARGETS), trained=False)
    assert torch.equal(logits(model, batch), expected)
    entry = model.peft_config["default"].resolved["model.layers.0.self_attn.q_proj"]
    assert entry["base"]["storage"] == FORMATS[kind][2] and entry["base"]["digest"]
    assert entry["shape"] == [64, 64]

    before = _stored(model)
    losses = train_steps(model, batch)
    assert losses[-1] < losses[0]
    assert_same_tensors(_stored(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("kind", FORMATS)
def test_layer_output(quantised, method, kind):
    """The adapted layer's output is the quantised layer's own plus the dense update's."""
    model = adapted(quantised(kind), method(target_modules=["v_proj"], layers_to_transform=[0]))
    (layer,) = kron_layers(model).values()
    x = torch.randn(3, 5, 64)
    with torch.no_grad():
        got, base = layer(x), layer.get_base_layer()(x)
    expected = base.double() + x.double() @ true_delta(layer).T
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FORMATS)
def test_gradient_after_a_forward_in_eval(quantised, method, kind):
    """Evaluating in the middle of a training must not cut it: bitsandbytes reorders codes for eval on some CPUs."""
    model = adapted(quantised(kind), method(target_modules=["v_proj"], layers_to_transform=[0]))
    (layer,) = kron_layers(model).values()
    x, weights = torch.randn(2, 5, 64), torch.randn(2, 5, 32)
    with torch.no_grad():
        layer.eval()(x)
    layer.train()(x.requires_grad_()).backward(weights)
    with torch.no_grad():
        dense = layer.get_base_weight().double() + true_delta(layer)
    torch.testing.assert_close(x.grad.double(), weights.double() @ dense, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", FORMATS)
def test_principal_start_is_that_of_the_dequantised_weight(quantised, kind):
    """W' is as near to W as its start: A0 (x) B0 is the KPSVD of what the quantised layer multiplies with."""
    config = SokaConfig(r=2, factor_shape=1, target_modules=["v_proj"], layers_to_transform=[0])
    (layer,) = kron_layers(adapted(quantised(kind), config, trained=False)).values()
    _, _, A0, B0 = layer.factors("default")
    with torch.no_grad():
        W = layer.get_base_layer()(torch.eye(64)).T
    U, S, Vh = torch.linalg.svd(W.float())
    best = U[:, :2] * S[:2] @ Vh[:2]
    start = sum(torch.kron(a, b) for a, b in zip(A0, B0, strict=True))
    assert (start - best).norm() < 0.05 * best.norm()


@pytest.mark.parametrize("kind", FORMATS)
def test_merging(quantised, batch, method, kind):
    """Merging rounds to the format, and says so; unmerging brings the codes back bit for bit."""
    model = adapted(quantised(kind), method(target_modules=TARGETS))
    before, unmerged = _stored(model), logits(model, batch)
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"Merging into a {FORMATS[kind][2]} weight rounds the update"):
            model.merge_adapter(safe_merge=True)
        assert all(not torch.equal(weight, before[name]) for name, weight in _stored(model).items())
        with model.disable_adapter():
            logits(model, batch)
        assert_same_tensors(_stored(model), before)
    assert torch.equal(logits(model, batch), unmerged)


@pytest.mark.parametrize("kind", ["bnb 8bit", "torchao int8"])
def test_merged_output(quantised, batch, method, kind):
    """8 bits hold the sum about as well as the weight."""
    model = adapted(quantised(kind), method(target_modules=TARGETS))
    unmerged = logits(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = model.merge_and_unload()
    assert not kron_layers(plain)
    assert (logits(plain, batch) - unmerged).std() < 0.05 * unmerged.std()


@pytest.mark.parametrize("kind", FORMATS)
def test_reload(quantised, batch, method, tmp_path, kind):
    model = adapted(quantised(kind), method(target_modules=TARGETS))
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="(?s).*base model")
            again = PeftModel.from_pretrained(quantised(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert_same_tensors(adapter_tensors(again), adapter_tensors(model))
        assert torch.equal(logits(again, batch), logits(model, batch))


@pytest.mark.parametrize(
    ("made_on", "put_on"), [("bnb nf4", None), (None, "bnb 8bit"), ("bnb nf4", "bnb fp4"), ("torchao int8", "bnb nf4")]
)
def test_another_quantisation_is_named(quantised, tiny, batch, method, tmp_path, made_on, put_on):
    def load(kind):
        return tiny("wide") if kind is None else quantised(kind)

    adapted(load(made_on), method(target_modules=TARGETS)).save_pretrained(tmp_path)
    was, now = (FORMATS[kind][2] if kind else "float32" for kind in (made_on, put_on))
    with pytest.warns(UserWarning, match=rf"stored differently.* 6 of 6 modules.* is {now} and was {was}"):
        model = PeftModel.from_pretrained(load(put_on), tmp_path)
    assert torch.isfinite(logits(model, batch)).all()


def test_no_gradient_start(quantised, batch, method):
    base = quantised("bnb nf4")
    with pytest.raises(ConfigError, match="is quantised, and has no gradient"):
        preprocess_gradient(base, method(init_weights="gradient", target_modules=TARGETS), lambda: None)


def test_a_format_that_cannot_be_merged_into(tiny, method, monkeypatch):
    """Such as GPTQ: the error comes before anything is written."""
    from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend

    model = adapted(tiny(), method(target_modules=["q_proj"]))
    for layer in kron_layers(model).values():
        layer.quantization_backend = ForwardOnlyQuantizationBackend("gptq")
    with pytest.raises(ConfigError, match=r"A gptq weight cannot be merged into.*load the base model unquantised"):
        model.merge_adapter()


def test_mixed_batches_and_several_adapters(quantised, batch, method):
    model = adapted(quantised("bnb nf4"), method(target_modules=TARGETS))
    model.add_adapter("other", method(target_modules=["v_proj"], init_weights=False))
    mixed = logits(model, batch, adapter_names=["default", "__base__", "other"])
    for i, name in enumerate(("default", None, "other")):
        row = {key: value[i : i + 1] for key, value in batch.items()}
        if name is None:
            with model.disable_adapter():
                alone = logits(model, row)
        else:
            model.set_adapter(name)
            alone = logits(model, row)
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-3, atol=1e-3)
