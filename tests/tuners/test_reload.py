"""A saved adapter comes back bit for bit: the same tensors, dtypes and outputs, and nothing is computed anew."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors import safe_open
from safetensors.torch import load_file

from krontune import CheckpointError, LsrConfig, SokaConfig
from tests.tuners.helpers import (
    TARGETS,
    adapted,
    adapter_tensors,
    assert_same_tensors,
    logits,
    one_layer,
    train_a_little,
    train_steps,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def no_svd(monkeypatch):
    """Any decomposition is an error from the time the fixture is called."""

    def forbid() -> None:
        def refuse(*args, **kwargs):
            raise AssertionError("a decomposition was computed on loading")

        for name in ("svd", "eigh", "qr", "svdvals"):
            monkeypatch.setattr(torch.linalg, name, refuse)
        for module in ("soka.model", "soka.start"):
            monkeypatch.setattr(f"krontune.tuners.{module}.nearest_kron", refuse)
        monkeypatch.setattr("krontune.tuners.lsr.start.nearest_separated", refuse)

    return forbid


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_for_bit(tiny, batch, variant, tmp_path, no_svd, dtype, low_cpu_mem_usage):
    model = adapted(tiny("llama", dtype), variant(target_modules=[*TARGETS, "lm_head"]))
    train_steps(model, batch, steps=1)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    no_svd()
    again = PeftModel.from_pretrained(tiny("llama", dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same_tensors(adapter_tensors(again), adapter_tensors(model))
    assert torch.equal(logits(again, batch), expected)
    assert not any(p.requires_grad for p in again.parameters())
    with again.disable_adapter():
        assert torch.equal(logits(again, batch), logits(tiny("llama", dtype), batch))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
def test_without_autocast_of_the_adapter(tiny, batch, method, tmp_path, low_cpu_mem_usage):
    """autocast_adapter_dtype=False keeps the factors in the base's bfloat16, in memory and in the file."""
    config = method(target_modules=TARGETS)
    model = get_peft_model(tiny("llama", torch.bfloat16), config, autocast_adapter_dtype=False).eval()
    train_a_little(model)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.bfloat16}
    again = PeftModel.from_pretrained(
        tiny("llama", torch.bfloat16),
        tmp_path,
        autocast_adapter_dtype=False,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    assert_same_tensors(adapter_tensors(again), adapter_tensors(model))
    assert torch.equal(logits(again, batch), expected)


@pytest.mark.parametrize("start", [lambda: LsrConfig(init_weights=False), lambda: LsrConfig(init_weights="paper")])
def test_random_starts_reload(tiny, batch, tmp_path, start):
    config = start()
    config.target_modules = set(TARGETS)
    model = adapted(tiny(), config, trained=False)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path)
    assert torch.equal(logits(again, batch), logits(model, batch))


NEW_PROCESS = """
import sys, torch, krontune
from peft import PeftModel
from tests.tuners.conftest import build
from tests.tuners.helpers import adapter_tensors, logits
out = {}
for method in ("lsr", "soka"):
    for low in (False, True):
        base = build("llama").to(torch.bfloat16)
        model = PeftModel.from_pretrained(base, f"{sys.argv[1]}/{method}", low_cpu_mem_usage=low)
        batch = torch.load(f"{sys.argv[1]}/batch.pt")
        out[method, low] = adapter_tensors(model), logits(model, batch)
torch.save(out, f"{sys.argv[1]}/out.pt")
"""


def test_in_a_new_process(tiny, batch, tmp_path, request):
    expected = {}
    for name, config in (("lsr", LsrConfig(separation_rank=2)), ("soka", SokaConfig(r=3))):
        config.target_modules = set(TARGETS)
        model = adapted(tiny("llama", torch.bfloat16), config)
        model.save_pretrained(tmp_path / name)
        expected[name] = adapter_tensors(model), logits(model, batch)
    torch.save(batch, tmp_path / "batch.pt")
    subprocess.run([sys.executable, "-c", NEW_PROCESS, str(tmp_path)], check=True, cwd=request.config.rootpath)
    for (name, _), (tensors, output) in torch.load(tmp_path / "out.pt", weights_only=True).items():
        assert_same_tensors(tensors, expected[name][0])
        assert torch.equal(output, expected[name][1])


def test_into_another_adapter_name_and_training_on(tiny, batch, method, tmp_path):
    model = adapted(tiny(), method(target_modules=TARGETS))
    model.save_pretrained(tmp_path)
    fresh = adapted(tiny(), method(target_modules=TARGETS), trained=False)
    fresh.load_adapter(tmp_path, "loaded", is_trainable=True)
    fresh.set_adapter("loaded")
    assert torch.equal(logits(fresh, batch), logits(model, batch))
    assert train_steps(fresh, batch) == pytest.approx(train_steps(model, batch), rel=1e-5)


def test_over_an_existing_adapter(tiny, batch, method, tmp_path):
    """load_adapter under a name that exists replaces its weights, as Trainer does on resuming."""
    model = adapted(tiny(), method(target_modules=TARGETS))
    model.save_pretrained(tmp_path)
    other = adapted(tiny(), method(target_modules=TARGETS))
    train_a_little(other, seed=5)
    other.load_adapter(tmp_path, "default", is_trainable=True)
    assert_same_tensors(adapter_tensors(other), adapter_tensors(model))


def test_state_dict_functions(tiny, batch, method):
    model = adapted(tiny(), method(target_modules=TARGETS))
    state = get_peft_model_state_dict(model)
    assert all("default" not in name for name in state)
    other = adapted(tiny(), method(target_modules=TARGETS), trained=False)
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(other, batch), logits(model, batch))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_state_dict_into_empty_factors(tiny, batch, method, dtype):
    """get_peft_model and set_peft_model_state_dict with low_cpu_mem_usage."""
    model = adapted(tiny("llama", dtype), method(target_modules=TARGETS))
    empty = get_peft_model(tiny("llama", dtype), method(target_modules=TARGETS), low_cpu_mem_usage=True).eval()
    assert any(p.is_meta for p in empty.parameters())
    set_peft_model_state_dict(empty, get_peft_model_state_dict(model), low_cpu_mem_usage=True)
    assert_same_tensors(adapter_tensors(empty), adapter_tensors(model))
    assert torch.equal(logits(empty, batch), logits(model, batch))


@pytest.mark.parametrize("start", [True, "zero"])
def test_empty_factors_that_were_never_filled(tiny, batch, method, start):
    """With low_cpu_mem_usage a fresh adapter has no values either, whose products torch takes for some."""
    config = method(target_modules=TARGETS, init_weights=start)
    model = get_peft_model(tiny(), config, low_cpu_mem_usage=True).eval()
    message = r"'default' was built with low_cpu_mem_usage, and its weights were never loaded.*or leave it out"
    for call in (lambda: model(**batch), lambda: logits(model, batch), model.merge_adapter):
        with pytest.raises(CheckpointError, match=message):
            call()


def test_modules_may_be_given_by_a_state_dict(tiny, batch, method):
    """inject_adapter_in_model(state_dict=...) takes its modules from the keys, whatever the config says."""
    model = adapted(tiny(), method(target_modules=TARGETS))
    state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}
    other = tiny()
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        inject_adapter_in_model(method(target_modules=["o_proj", *TARGETS]), other, state_dict=state)
    set_peft_model_state_dict(other, state)
    assert_same_tensors(adapter_tensors(other), adapter_tensors(model))
    assert torch.equal(logits(other, batch), logits(model, batch))


def test_several_adapters_are_saved_apart(tiny, batch, method, tmp_path):
    model = adapted(tiny(), method(target_modules=TARGETS))
    model.add_adapter("other", method(r=2, target_modules=["o_proj"]))
    train_a_little(model, "other", seed=1)
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("other", tmp_path / "other")):
        model.set_adapter(name)
        again = PeftModel.from_pretrained(tiny(), folder)
        assert torch.equal(logits(again, batch), logits(model, batch))


def test_what_is_in_the_files(net, method, tmp_path):
    """The format: tensor names and shapes, and what each module came to."""
    config = method(target_modules=["layer"])
    model = adapted(net(torch.nn.Linear(12, 20)), config)
    spec = one_layer(model).specs["default"]
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    halves = {name.rpartition(".")[2] for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16}
    assert halves == ({"soka_A0", "soka_B0"} if config.peft_type.value == "SOKA" else set())
    assert stored == {f"base_model.model.layer.{name}": shape for name, shape in spec.tensor_shapes().items()}
    expected = {
        "LSR": {"lsr_A.0": (3, 2, 4), "lsr_A.1": (3, 2, 3), "lsr_B.0": (3, 5, 2), "lsr_B.1": (3, 4, 2)},
        "SOKA": {"soka_dA": (3, 5, 4), "soka_dB": (3, 4, 3), "soka_A0": (3, 5, 4), "soka_B0": (3, 4, 3)},
    }[config.peft_type.value]
    assert spec.tensor_shapes() == expected

    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is type(config) and again.format_version == 1
    entry = again.resolved["layer"]
    assert entry["shape"] == [20, 12] and entry["base"]["storage"] == "float32"
    assert again.spec("layer") == spec
    if config.peft_type.value == "SOKA":
        assert entry["choice"] == {"rule": "fixed", "rank": 3, "reason": "fixed"}


def test_config_without_its_weights(tiny, batch, method, tmp_path):
    """A checkpoint's config alone makes no adapter: the first forward says so, and so do merging and joining."""
    adapted(tiny(), method(target_modules=TARGETS)).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    config = PeftConfig.from_pretrained(tmp_path)
    model = get_peft_model(tiny(), config).eval()
    message = r"'default' was built from a checkpoint's config, and its weights were never loaded.*resolved = None"
    with pytest.raises(CheckpointError, match=message):
        model(**batch)
    with pytest.raises(CheckpointError, match=message):
        model.merge_adapter()
    with pytest.raises(CheckpointError, match=message):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(tiny(), batch))

    config.resolved = None
    fresh = get_peft_model(tiny(), config).eval()
    assert torch.equal(logits(fresh, batch), logits(tiny(), batch))


def test_config_survives_the_file(method, tmp_path):
    config = method(
        alpha=0.5,
        dropout=0.1,
        target_modules=["a", "b"],
        exclude_modules=["c"],
        rank_pattern={"a": 2},
        alpha_pattern={"b": 3.0},
        modules_to_save=["d"],
        layers_to_transform=[1],
        layers_pattern="layers",
        train_norms=True,
        init_weights="zero",
        **({"factor_shapes": {8: (4, 2)}} if method().peft_type.value == "LSR" else {"factor_shape": (4, 2)}),
    )
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
