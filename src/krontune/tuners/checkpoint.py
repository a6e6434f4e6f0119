"""What makes an adapter safe to load: its format version, the shapes it must hold, the base it was made for."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from krontune.errors import CheckpointError
from krontune.tuners import _peft

FORMAT_VERSION = 1
_PREFIX = "base_model.model."  # PeftModel's own part of every key in the file
_SAMPLES, _SHOWN = 64, 8  # entries of a weight in its fingerprint: hashed, and kept as numbers
_ORDERS = (".soka_rows", ".soka_cols")
FLOATS = ("float32", "bfloat16", "float16", "float64")


# ---------------------------------------------------------------------------------------------- the adapter's own files


def spec_to_dict(spec: Any) -> dict:
    """A module's spec as JSON-ready values."""
    return json.loads(json.dumps(asdict(spec)))


def check_config(config: Any, file: str) -> None:
    """Check format_version and every entry of `resolved` of a loaded config.

    Raises:
        CheckpointError: names the file and what in it is wrong.
    """
    version = config.format_version
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: format_version is {version!r}, and this krontune reads 1 to {FORMAT_VERSION}. "
            "Install a newer krontune."
        )
    if not isinstance(config.resolved, (dict, NoneType)):
        raise CheckpointError(f"{file}: resolved is damaged: it is no table of modules.")
    for name in config.resolved or {}:
        try:
            _check_entry(config, name)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{file}: resolved[{name!r}] is damaged: {error!r}") from None


def _check_entry(config: Any, name: str) -> None:
    entry, spec = config.resolved[name], config.spec(name)
    if tuple(entry["shape"]) != spec.matrix_shape:
        raise ValueError(f"shape is {entry['shape']}, and the factors of spec make {spec.matrix_shape}")
    base = entry["base"]
    digest, sample = base["digest"], base["sample"]
    is_list = isinstance(sample, list) and len(sample) == _SHOWN
    numbers = is_list and all(isinstance(v, (int, float)) for v in sample)
    if not isinstance(base["storage"], str) or not (
        (digest is sample is None) or (isinstance(digest, str) and numbers)
    ):
        raise ValueError(f"base is {base}, which is no fingerprint of a weight")
    if not isinstance(entry.get("path", name), str):
        raise ValueError(f"path is {entry['path']!r}")
    stored_dtype(entry)


def stored_dtype(entry: dict) -> torch.dtype:
    """The dtype of a module's factors in the file, from its entry in `resolved`."""
    name = entry.get("dtype", "float32")
    if name not in FLOATS:
        raise ValueError(f"dtype is {name!r}")
    return getattr(torch, name)


def check_adapter_file(config: Any, folder: str) -> None:
    """Check a local adapter's weights: safetensors, readable to its last byte, every tensor there and of its shape.

    The factors' values are looked at, too: they are finite, and orders of channels are permutations.

    Does nothing for a Hub id (the file is not here yet) and for a folder that holds a config alone.

    Raises:
        CheckpointError: names the file and the first key that is wrong.
    """
    pickled = os.path.join(folder, _peft.WEIGHTS_NAME)
    file = os.path.join(folder, _peft.SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(file):
        if os.path.isfile(pickled):
            raise CheckpointError(
                f"{pickled} is a pickle, which krontune does not load. Save the adapter again with "
                "save_pretrained(..., safe_serialization=True)."
            )
        return
    if config.resolved is None:
        raise CheckpointError(
            f"{file} belongs to a config without `resolved`: adapter_config.json was edited, or comes from elsewhere."
        )
    with _opened(file) as tensors:
        keys = list(tensors.keys())
        check_tensors(config, {key: tuple(tensors.get_slice(key).get_shape()) for key in keys}, file)
        for key in _factor_keys(config, keys):
            check_values(key, tensors.get_tensor(key), file)


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}. It is truncated or damaged.") from None


def check_state(config: Any, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """`check_adapter_file` for tensors that have been read already."""
    check_tensors(config, {key: tuple(tensor.shape) for key, tensor in tensors.items()}, where)
    for key in _factor_keys(config, tensors):
        check_values(key, tensors[key], where)


def check_tensors(config: Any, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Check that the tensors of an adapter, {key: shape}, are those that its config promises.

    Raises:
        CheckpointError: names `where` and the first key that is missing or of another shape.
    """
    shapes = {key.removeprefix(_PREFIX): shape for key, shape in shapes.items()}
    for key, shape in _expected_shapes(config).items():
        if key not in shapes:
            raise CheckpointError(f"{where}: the tensor {key!r} is missing. The file is incomplete or was edited.")
        if shape is not None and shapes[key] != shape:
            raise CheckpointError(
                f"{where}: the tensor {key!r} has the shape {shapes[key]}, and adapter_config.json says {shape}. "
                "One of the two files was edited or belongs to another adapter."
            )


def check_values(key: str, tensor: torch.Tensor, where: str) -> None:
    """Check that a tensor of an adapter holds what its name says: an order of channels, or finite floats.

    Raises:
        CheckpointError: names `where` and the key.
    """
    key = key.removeprefix(_PREFIX)
    if tensor.is_meta or type(tensor).__name__ == "DTensor":
        return
    if key.endswith(_ORDERS):
        in_turn = torch.arange(tensor.shape[-1], device=tensor.device).expand_as(tensor)
        if tensor.is_floating_point() or not torch.equal(tensor.long().sort(-1).values, in_turn):
            raise CheckpointError(
                f"{where}: the order of channels {key!r} is no permutation of 0 to {tensor.shape[-1] - 1}. The file is "
                "damaged or was edited."
            )
    elif str(tensor.dtype).removeprefix("torch.") not in FLOATS:
        raise CheckpointError(
            f"{where}: the tensor {key!r} is {tensor.dtype}; a factor is one of {', '.join(FLOATS)}. The file was "
            "edited."
        )
    elif not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"{where}: the tensor {key!r} holds NaN or Inf. The training diverged, or the file is damaged; go back to "
            "an earlier checkpoint."
        )


def _factor_keys(config: Any, keys: Iterable[str]) -> list[str]:
    """Those of the keys that name an adapter's own tensors, not those of a module that is saved whole."""
    known = {key for key, shape in _expected_shapes(config).items() if shape is not None}
    return [key for key in keys if key.removeprefix(_PREFIX) in known]


def _expected_shapes(config: Any) -> dict[str, tuple[int, ...] | None]:
    """{key without PEFT's prefix: shape} of every tensor; None for modules that are saved whole and may be resized."""
    shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(config.saved_tensors or ())
    for name, entry in (config.resolved or {}).items():
        for tensor, shape in config.spec(name).tensor_shapes().items():
            shapes[f"{entry.get('path', name)}.{tensor}"] = shape
    return shapes


# ------------------------------------------------------------------------------------------------ the base it fits onto


def fingerprint(weight: torch.Tensor, storage: str) -> dict:
    """A small description of a base weight: enough to notice another, a merged or a differently quantised one.

    Args:
        weight: as stored (packed, where quantised), any shape.
        storage: how it is stored: a dtype's name, or a quantisation backend's.

    Returns:
        {"storage", "digest" of 64 evenly spaced entries' bytes, "sample" of 8 of them}; no digest on the meta device or
        for a sharded weight, which cannot be read here.
    """
    if weight.is_meta or type(weight).__name__ == "DTensor" or weight.numel() == 0:
        return {"storage": storage, "digest": None, "sample": None}
    plain = _stored_numbers(weight).detach().as_subclass(torch.Tensor).reshape(-1)
    index = torch.linspace(0, plain.numel() - 1, _SAMPLES, dtype=torch.float64).long().to(plain.device)
    entries = plain[index].cpu().contiguous()
    digest = hashlib.sha256(entries.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    sample = [float(f"{v:.4g}") for v in entries[:: _SAMPLES // _SHOWN].double().tolist()]
    return {"storage": storage, "digest": digest, "sample": sample}


def _stored_numbers(weight: torch.Tensor) -> torch.Tensor:
    """The weight itself, or the codes of a quantised tensor subclass: its first inner tensor."""
    while hasattr(weight, "__tensor_flatten__"):
        weight = getattr(weight, weight.__tensor_flatten__()[0][0])
    return weight


def _differs(saved: dict, now: dict) -> bool:
    """Whether two fingerprints of float weights are of different values, dtype apart."""
    if not saved.get("digest") or not now.get("digest"):
        return False
    if saved["storage"] == now["storage"]:
        return saved["digest"] != now["digest"]
    scale = max(map(abs, saved["sample"])) or 1.0
    return any(abs(a - b) > 0.01 * abs(a) + 1e-3 * scale for a, b in zip(saved["sample"], now["sample"], strict=True))


def check_base(resolved: dict[str, dict], base: dict[str, dict]) -> None:
    """Compare the base that an adapter was made for with the one that it is being put on.

    Args:
        resolved: the checkpoint's, {module: {"shape", "base": fingerprint, ...}}.
        base: the same two of the modules that were matched now.

    Raises:
        CheckpointError: modules are missing or too many, or a weight has another shape: another architecture.

    Warns where the values or the quantisation differ, naming what differs.
    """
    hint = "Load it on the base model that adapter_config.json names, or set config.resolved = None to start afresh."
    missing, extra = (sorted(resolved.keys() - base.keys()), sorted(base.keys() - resolved.keys()))
    if missing or extra:
        raise CheckpointError(
            "The adapter was made for another architecture: "
            + "; ".join(
                f"{len(names)} modules {what}, such as {names[0]!r}"
                for names, what in ((missing, "are missing in this model"), (extra, "are unknown to the adapter"))
                if names
            )
            + f". {hint}"
        )
    for name, saved in resolved.items():
        if list(saved["shape"]) != list(base[name]["shape"]):
            raise CheckpointError(
                f"The adapter was made for another architecture: {name} is {tuple(base[name]['shape'])} here and was "
                f"{tuple(saved['shape'])}. {hint}"
            )
    _warn_of_differences(resolved, base)


def _warn_of_differences(resolved: dict[str, dict], base: dict[str, dict]) -> None:
    def is_float(storage: str) -> bool:
        return storage in FLOATS

    quantised, changed = [], []
    for name, saved in resolved.items():
        was, now = saved.get("base") or {}, base[name]["base"]
        if not was:
            continue
        if was["storage"] != now["storage"] and not (is_float(was["storage"]) and is_float(now["storage"])):
            quantised.append((name, was["storage"], now["storage"]))
        elif _differs(was, now):
            changed.append(name)
    if quantised:
        name, was, now = quantised[0]
        warnings.warn(
            f"The base model is stored differently from the one that this adapter was trained on: {len(quantised)} of "
            f"{len(resolved)} modules, for instance {name} is {now} and was {was}. Expect small differences.",
            stacklevel=2,
        )
    if changed:
        warnings.warn(
            f"The base model's weights are not those that this adapter was trained on: {len(changed)} of "
            f"{len(resolved)} adapted modules differ, for instance {changed[0]}. Is it another model, or one with an "
            "adapter merged into it?",
            stacklevel=2,
        )
