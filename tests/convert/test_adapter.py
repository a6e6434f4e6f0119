"""Adapters whose file does not hold what their config promises are refused, with the file and the key."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from krontune.convert import compress, export, info, merge, open_adapter
from krontune.errors import CheckpointError

MODULE = "base_model.model.model.layers.1.self_attn.k_proj"


def edited(adapter: Path, out: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of an adapter with its tensors changed."""
    shutil.copytree(adapter, out)
    tensors = load_file(out / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out


def refused(adapter: Path, base: Path, out: Path, key: str) -> None:
    """Every command names the file and the key, and writes nothing."""
    file = adapter / "adapter_model.safetensors"
    calls: list[Callable[[], object]] = [
        lambda: open_adapter(adapter),
        lambda: info(adapter),
        lambda: export(adapter, out),
        lambda: merge(adapter, out, base=str(base), check=False),
        lambda: compress(adapter, out, separation_rank=1),
    ]
    for call in calls:
        with pytest.raises(CheckpointError) as caught:
            call()
        assert str(file) in str(caught.value) and key in str(caught.value)
    assert not out.exists()


TENSORS = [
    ("lsr", "lsr_A.1"),
    ("lsr", "lsr_B.0"),
    ("soka", "soka_dA"),
    ("soka", "soka_B0"),
    ("lora", "lora_A.weight"),
    ("lora", "lora_B.weight"),
    ("lokr", "lokr_w1"),
    ("lokr", "lokr_w2_a"),
    ("lokr", "lokr_w2_b"),
    ("lokr-whole", "lokr_w2"),
]


def stored_name(adapter: Path, tensor: str) -> str:
    """LoKr keeps a factor whole or as a product, as its rank has it."""
    held = load_file(adapter / "adapter_model.safetensors")
    return tensor if f"{MODULE}.{tensor}" in held else f"{tensor}_a" if f"{MODULE}.{tensor}_a" in held else tensor[:-2]


@pytest.mark.parametrize(("name", "tensor"), TENSORS)
def test_a_missing_tensor_is_named(
    name: str, tensor: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    key = f"{MODULE}.{stored_name(adapters[name], tensor)}"
    adapter = edited(adapters[name], tmp_path / "adapter", lambda tensors: tensors.pop(key))
    refused(adapter, base, tmp_path / "out", key.removeprefix("base_model.model."))


@pytest.mark.parametrize(("name", "tensor"), [case for case in TENSORS if not case[1].startswith("lokr")])
@pytest.mark.parametrize("axis", [-1, -2])
def test_a_wrong_shape_is_named(
    name: str, tensor: str, axis: int, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    key = f"{MODULE}.{tensor}"

    def longer(tensors: dict[str, Tensor]) -> None:
        tensors[key] = torch.cat([tensors[key], tensors[key]], axis)

    adapter = edited(adapters[name], tmp_path / "adapter", longer)
    rank_axis = {"lora_A.weight": -2, "lora_B.weight": -1}.get(tensor, axis)
    if axis == rank_axis:
        refused(adapter, base, tmp_path / "out", key.removeprefix("base_model.model."))
    else:  # a LoRA's config does not say how large the weight is; the base does
        with pytest.raises(CheckpointError, match=r"k_proj is .* in the base model"):
            merge(adapter, tmp_path / "out", base=str(base), check=False)


@pytest.mark.parametrize(("name", "tensor"), [case for case in TENSORS if case[1].startswith("lokr")])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_lokr_of_a_wrong_shape_is_never_written_out(
    name: str, tensor: str, axis: int, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    key = f"{MODULE}.{stored_name(adapters[name], tensor)}"

    def longer(tensors: dict[str, Tensor]) -> None:
        tensors[key] = torch.cat([tensors[key], tensors[key], tensors[key]], axis)

    adapter = edited(adapters[name], tmp_path / "adapter", longer)
    with pytest.raises(CheckpointError, match=r"k_proj"):
        merge(adapter, tmp_path / "out", base=str(base), check=False)


@pytest.mark.parametrize("name", ["lsr", "soka"])
def test_a_module_without_any_tensor_is_named(name: str, base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    def without(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(MODULE)]:
            del tensors[key]

    adapter = edited(adapters[name], tmp_path / "adapter", without)
    refused(adapter, base, tmp_path / "out", MODULE.removeprefix("base_model.model."))
