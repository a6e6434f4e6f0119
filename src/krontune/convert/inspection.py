"""What an adapter is, read off its files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from krontune.convert.adapter import Adapter
from krontune.convert.exporting import open_any


def info(path: str | Path, base: str | None = None) -> dict[str, Any]:
    """Method, base and its fingerprint, ranks, shapes, parameters, bytes, norms of dW, condition numbers, versions.

    Args:
        path: an adapter's folder, or a LyCORIS file of LoKr modules.
        base: the base model, for a LyCORIS file alone.

    Returns:
        JSON-ready values; "modules" has one entry for each adapted weight.

    Raises:
        ConfigError: not an adapter, or of a method that krontune does not know.
        CheckpointError: a damaged file, or NaN or Inf in a tensor.
    """
    adapter = open_any(path, base)
    modules = [_module(adapter, name) for name in adapter.modules]
    config = adapter.config
    task = config.task_type
    return {
        "path": str(path),
        "method": adapter.method,
        "base": config.base_model_name_or_path,
        "base_fingerprint": _fingerprint(modules),
        "base_storage": sorted({m["base"]["storage"] for m in modules if m["base"]}),
        "task_type": getattr(task, "value", task),
        "n_modules": len(modules),
        "n_params": sum(m["n_params"] for m in modules),
        "n_others": len(adapter.others),
        "others": sorted(adapter.others),
        "n_bytes": adapter.n_bytes,
        "dtypes": sorted(_dtypes(adapter)),
        "norm": sum(m["norm"] ** 2 for m in modules) ** 0.5,
        "worst_condition": max((m["condition"] for m in modules if m["condition"] is not None), default=None),
        "settings": _settings(config),
        "format_version": getattr(config, "format_version", None),
        "peft_version": getattr(config, "peft_version", None),
        "modules": modules,
    }


def _module(adapter: Adapter, name: str) -> dict[str, Any]:
    update = adapter.update(name)
    described = update.describe()
    conditions: Any = described.get("condition")
    entry = (getattr(adapter.config, "resolved", None) or {}).get(name) or {}
    W = update.dense()
    return {
        "name": name,
        "layer": adapter.layer(name)["layer"],
        "shape": list(W.shape),
        "r": described["r"],
        "separation_rank": described.get("separation_rank"),
        "factors": described["factors"],
        "n_params": update.n_params,
        "norm": float(torch.linalg.vector_norm(W.double())),
        "condition": max(conditions.values()) if conditions else None,
        "choice": entry.get("choice"),
        "base": entry.get("base"),
    }


def _fingerprint(modules: list[dict[str, Any]]) -> str | None:
    """One for all adapted base weights: adapters of the same weights of one base have the same."""
    digests = {m["name"]: (m["base"] or {}).get("digest") for m in modules}
    if None in digests.values():
        return None
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


def _settings(config: Any) -> dict[str, Any]:
    """The settings that a person would have written."""
    names = ["r", "separation_rank", "alpha", "lora_alpha", "factor_shape", "factor_shapes", "init_weights"]
    names += ["channel_sort", "rank_selection", "budget", "use_rslora", "decompose_factor", "train_norms", "bias"]
    names += ["modules_to_save"]
    empty: tuple[Any, ...] = (None, False, "none", {}, [])
    return {name: getattr(config, name) for name in names if getattr(config, name, None) not in empty}


def _dtypes(adapter: Adapter) -> set[str]:
    """The dtypes of the stored tensors."""
    keys = (adapter.path(name) + tail for name, tails in adapter.modules.items() for tail in tails)
    return {str(adapter.read(key).dtype).removeprefix("torch.") for key in keys}
