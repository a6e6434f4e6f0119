"""A damaged, edited or foreign adapter: a CheckpointError that names the file and the key, and nothing is built."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from krontune import CheckpointError, LsrConfig, SokaConfig
from krontune.tuners.checkpoint import FORMAT_VERSION
from tests.tuners.helpers import (
    OLD_PEFT,
    TARGETS,
    adapted,
    kron_layers,
)

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tiny, method, tmp_path) -> Path:
    """A saved adapter."""
    config = method(target_modules=TARGETS, train_norms=True)
    adapted(tiny(), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def assert_refused(tiny, folder: Path, *parts: str) -> None:
    """Loading raises a CheckpointError with all of these parts, and leaves the base model alone."""
    base = tiny()
    with pytest.raises(CheckpointError) as error:
        PeftModel.from_pretrained(base, folder)
    for part in parts:
        assert part in str(error.value)
    assert not kron_layers(base)


def edit_config(folder: Path, change) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


# --------------------------------------------------------------------------------------------------------- the weights


def test_pickles_are_refused(tiny, folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    assert_refused(tiny, folder, "adapter_model.bin is a pickle", "safe_serialization=True")


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated(tiny, folder, keep):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(len(content) * keep)])
    assert_refused(tiny, folder, str(folder / WEIGHTS), "truncated or damaged")


def test_truncated_where_another_library_opens_it_first(tiny, folder):
    """transformers' load_adapter, and PEFT's over a name in use, never ask krontune: the error is safetensors' own."""
    model, native = PeftModel.from_pretrained(tiny(), folder), tiny()
    before = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])
    with pytest.raises(SafetensorError, match="incomplete"):
        model.load_adapter(folder, "default")
    after = get_peft_model_state_dict(model)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    with pytest.raises(SafetensorError, match="incomplete"):
        native.load_adapter(str(folder))
    with pytest.raises(CheckpointError, match="never loaded"):  # half an adapter does not run
        native(torch.tensor([[1, 2]]))


def test_overwritten_with_something_else(tiny, folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert_refused(tiny, folder, str(folder / WEIGHTS), "truncated or damaged")


@pytest.mark.parametrize("of", ["factor", "frozen or last factor", "norm"])
def test_removed_key(tiny, folder, of):
    key = {
        "factor": next(k for k in load_file(folder / WEIGHTS) if NAME in k),
        "frozen or last factor": [k for k in load_file(folder / WEIGHTS) if NAME in k][-1],
        "norm": "base_model.model.model.norm.weight",
    }[of]
    edit_tensors(folder, lambda tensors: tensors.pop(key))
    assert_refused(tiny, folder, str(folder / WEIGHTS), key.removeprefix("base_model.model."), "missing")


def test_renamed_key(tiny, folder):
    key = next(k for k in load_file(folder / WEIGHTS) if NAME in k)
    edit_tensors(folder, lambda tensors: tensors.update({key + "x": tensors.pop(key)}))
    assert_refused(tiny, folder, str(folder / WEIGHTS), key.removeprefix("base_model.model."), "missing")


@pytest.mark.parametrize("change", [lambda t: t[..., :-1], lambda t: t.transpose(-1, -2), lambda t: t[None]])
def test_wrong_shape(tiny, folder, change):
    key = next(k for k in load_file(folder / WEIGHTS) if NAME in k)
    before = tuple(load_file(folder / WEIGHTS)[key].shape)
    edit_tensors(folder, lambda tensors: tensors.update({key: change(tensors[key]).contiguous()}))
    after = tuple(load_file(folder / WEIGHTS)[key].shape)
    assert_refused(tiny, folder, str(folder / WEIGHTS), key.removeprefix("base_model.model."), str(before), str(after))


def test_weights_of_another_adapter(tiny, folder, tmp_path):
    other = LsrConfig if "SOKA" in (folder / CONFIG).read_text() else SokaConfig
    adapted(tiny(), other(target_modules=TARGETS)).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, folder / WEIGHTS)
    assert_refused(tiny, folder, str(folder / WEIGHTS), "missing")


def _some_key(folder: Path, end: str = "") -> str:
    return next(k for k in load_file(folder / WEIGHTS) if NAME in k and k.endswith(end))


@pytest.mark.parametrize("key", ["base_model.model.model.norm.weight", "base_model.model.lm_head.weight"])
def test_wrong_shape_of_a_module_that_is_saved_whole(tiny, method, tmp_path, key):
    """Found once it is built: PEFT lets such a module differ with ignore_mismatched_sizes."""
    config = method(target_modules=TARGETS, train_norms=True, modules_to_save=["lm_head"])
    adapted(tiny(), config).save_pretrained(tmp_path)
    before = tuple(load_file(tmp_path / WEIGHTS)[key].shape)
    edit_tensors(tmp_path, lambda tensors: tensors.update({key: tensors[key][:-1].clone()}))
    with pytest.raises(CheckpointError) as error:
        PeftModel.from_pretrained(tiny(), tmp_path)
    for part in (str(tmp_path / WEIGHTS), key.removeprefix("base_model.model."), str(before)):
        assert part in str(error.value)
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        PeftModel.from_pretrained(tiny(), tmp_path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, -1])
def test_nan_or_inf_in_a_factor(tiny, folder, value, place):
    def put(tensors: dict[str, torch.Tensor]) -> None:
        tensors[_some_key(folder)].view(-1)[place] = value

    edit_tensors(folder, put)
    key = _some_key(folder).removeprefix("base_model.model.")
    assert_refused(tiny, folder, str(folder / WEIGHTS), key, "holds NaN or Inf", "diverged")


def test_whole_numbers_for_a_factor(tiny, folder):
    key = _some_key(folder)
    edit_tensors(folder, lambda tensors: tensors.update({key: tensors[key].long()}))
    assert_refused(tiny, folder, str(folder / WEIGHTS), key.removeprefix("base_model.model."), "torch.int64")


ORDER_EDITS = {
    "out of range": lambda order: order + 1,
    "negative": lambda order: order - 1,
    "twice": lambda order: order.clamp_min(1),
    "floats": lambda order: order.float(),
}


@pytest.mark.parametrize("side", ["soka_rows", "soka_cols"])
@pytest.mark.parametrize("edit", ORDER_EDITS)
def test_orders_that_are_no_permutation(tiny, tmp_path, side, edit):
    adapted(tiny(), SokaConfig(r=3, target_modules=TARGETS, channel_sort="norm")).save_pretrained(tmp_path)
    key = _some_key(tmp_path, side)
    edit_tensors(tmp_path, lambda tensors: tensors.update({key: ORDER_EDITS[edit](tensors[key])}))
    assert_refused(tiny, tmp_path, str(tmp_path / WEIGHTS), key.removeprefix("base_model.model."), "no permutation")


def test_a_diverged_run_is_not_taken_for_an_unloaded_one(tiny, method):
    """A NaN in one entry of a factor that came with a state dict: PEFT before 0.21 has no hook to refuse it in."""
    model = adapted(tiny(), method(target_modules=TARGETS))
    state = get_peft_model_state_dict(model)
    again = get_peft_model(tiny(), model.peft_config["default"])
    key = next(k for k in state if NAME in k)
    broken = {k: t.clone() for k, t in state.items()}
    broken[key].view(-1)[0] = float("nan")
    if not OLD_PEFT:
        with pytest.raises(CheckpointError, match="holds NaN or Inf"):
            set_peft_model_state_dict(again, broken)
    set_peft_model_state_dict(again, state)
    kron_layers(again)[f"base_model.model.{NAME}"].factors("default")[0].data.view(-1)[0] = float("nan")
    again(torch.tensor([[1, 2]]))


# ---------------------------------------------------------------------------------------------------------- the config


def _spec(config: dict) -> dict:
    return config["resolved"][NAME]["spec"]


def _base(config: dict) -> dict:
    return config["resolved"][NAME]["base"]


CONFIG_EDITS = {
    "newer format": (lambda c: c.update(format_version=FORMAT_VERSION + 1), "format_version is 2"),
    "no format": (lambda c: c.update(format_version="one"), "format_version is 'one'"),
    "setting out of range": (lambda c: c.update(dropout=3), "dropout=3"),
    "setting of another type": (lambda c: c.update(rank_pattern=[1, 2]), CONFIG),
    "unknown start": (lambda c: c.update(init_weights="pissa"), "init_weights='pissa'"),
    "resolved removed": (lambda c: c.update(resolved=None), "without `resolved`"),
    "resolved a list": (lambda c: c.update(resolved=[1]), "resolved is damaged"),
    "entry removed": (lambda c: c["resolved"].update({NAME: None}), f"resolved['{NAME}'] is damaged"),
    "spec removed": (lambda c: c["resolved"][NAME].pop("spec"), f"resolved['{NAME}'] is damaged"),
    "spec of another size": (lambda c: _spec(c).update({_some_list(c): [2, 2]}), f"resolved['{NAME}'] is damaged"),
    "negative rank": (lambda c: _spec(c).update({_some_rank(c): -1}), f"resolved['{NAME}'] is damaged"),
    "text for a rank": (lambda c: _spec(c).update({_some_rank(c): "3"}), f"resolved['{NAME}'] is damaged"),
    "unknown field": (lambda c: _spec(c).update(colour=1), f"resolved['{NAME}'] is damaged"),
    "shape removed": (lambda c: c["resolved"][NAME].pop("shape"), f"resolved['{NAME}'] is damaged"),
    "another shape": (lambda c: c["resolved"][NAME].update(shape=[16, 32]), f"resolved['{NAME}'] is damaged"),
    "base removed": (lambda c: c["resolved"][NAME].pop("base"), f"resolved['{NAME}'] is damaged"),
    "base nonsense": (lambda c: c["resolved"][NAME]["base"].update(sample=["x"]), f"resolved['{NAME}'] is damaged"),
    "base without numbers": (lambda c: _base(c).update(sample=[]), f"resolved['{NAME}'] is damaged"),
    "saved_tensors a number": (lambda c: c.update(saved_tensors=5), "saved_tensors=5"),
    "modules_to_save a number": (lambda c: c.update(modules_to_save=5), "modules_to_save=5"),
    "modules_to_save a text": (lambda c: c.update(modules_to_save="lm_head"), "modules_to_save='lm_head'"),
    "target_modules a number": (lambda c: c.update(target_modules=5), "target_modules=5"),
    "target_modules of numbers": (lambda c: c.update(target_modules=[["q_proj"]]), "target_modules=[['q_proj']]"),
    "dtype nonsense": (lambda c: c["resolved"][NAME].update(dtype="Tensor"), f"resolved['{NAME}'] is damaged"),
    "path nonsense": (lambda c: c["resolved"][NAME].update(path=3), f"resolved['{NAME}'] is damaged"),
}


def _some_list(config: dict) -> str:
    return next(name for name, value in _spec(config).items() if isinstance(value, list))


def _some_rank(config: dict) -> str:
    return next(name for name in ("separation_rank", "r") if name in _spec(config))


@pytest.mark.parametrize("edit", CONFIG_EDITS)
def test_edited_config(tiny, folder, edit):
    change, message = CONFIG_EDITS[edit]
    edit_config(folder, change)
    assert_refused(tiny, folder, str(folder / CONFIG if edit != "resolved removed" else folder), message)


def test_another_rank_in_the_config(tiny, folder):
    """The two files are checked against each other."""
    edit_config(folder, lambda c: _spec(c).update({_some_rank(c): 2}))
    assert_refused(tiny, folder, str(folder / WEIGHTS), NAME, "adapter_config.json says")


def test_a_module_too_few(tiny, folder):
    edit_config(folder, lambda c: c["resolved"].pop(NAME))
    assert_refused(tiny, folder, "another architecture", NAME)


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_truncated_config(tiny, folder, keep):
    """PEFT reads the method's name from it first, so that this one error is partly PEFT's."""
    content = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(content[: int(len(content) * keep)])
    config_class = LsrConfig if '"lsr' in content.lower() else SokaConfig
    with pytest.raises(CheckpointError, match=re.escape(str(folder / CONFIG))):
        config_class.from_pretrained(folder)


def test_config_in_another_encoding(folder):
    text = (folder / CONFIG).read_text()
    config_class = LsrConfig if '"lsr' in text.lower() else SokaConfig
    (folder / CONFIG).write_bytes(text.replace("q_proj", "q\u00fc").encode("latin-1"))
    with pytest.raises(CheckpointError, match=re.escape(str(folder / CONFIG))):
        config_class.from_pretrained(folder)


def test_no_adapter_there(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftModel.from_pretrained(tiny(), tmp_path)


def test_subfolder(tiny, folder, tmp_path):
    again = PeftModel.from_pretrained(tiny(), tmp_path, subfolder="adapter")
    assert kron_layers(again)
    (folder / WEIGHTS).write_bytes(b"")
    with pytest.raises(CheckpointError, match=re.escape(str(folder / WEIGHTS))):
        PeftModel.from_pretrained(tiny(), tmp_path, subfolder="adapter")


def test_state_dict_of_another_adapter(tiny, method):
    """Where no file is seen (the Hub, a state dict), what is loaded is checked against the config all the same."""
    if OLD_PEFT:
        pytest.skip("PEFT before 0.21 has no hook for what it loads")
    model = adapted(tiny(), method(target_modules=TARGETS, train_norms=True))
    state = get_peft_model_state_dict(model)
    set_peft_model_state_dict(model, state)
    key = next(k for k in state if NAME in k)
    with pytest.raises(CheckpointError, match=f"{re.escape(key.removeprefix('base_model.model.'))}.*shape"):
        set_peft_model_state_dict(model, {**state, key: state[key][:-1]})
    del state[key]
    with pytest.raises(CheckpointError, match=f"{re.escape(key.removeprefix('base_model.model.'))}.*missing"):
        set_peft_model_state_dict(model, state)


def test_loading_without_the_weights_file(tiny, folder):
    (folder / WEIGHTS).unlink()
    assert PeftConfig.from_pretrained(folder).resolved
    with pytest.raises((ValueError, OSError)):
        PeftModel.from_pretrained(tiny(), str(folder))
