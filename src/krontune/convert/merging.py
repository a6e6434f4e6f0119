"""An adapter merged into its base: a plain transformers folder, written shard by shard."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from krontune.convert.adapter import Adapter, open_adapter
from krontune.convert.base import Base, Place, open_base
from krontune.convert.checking import LogitsCheck, check_logits
from krontune.convert.gguf_file import check_gguf, write_gguf
from krontune.convert.output import check_output, output_folder, save_tensors
from krontune.errors import CheckpointError, ConfigError
from krontune.tuners.checkpoint import check_base, fingerprint
from krontune.weights import Source, local_folder

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_TOKENIZER_FILES = (
    "tokenizer*",
    "*.model",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
)
#: What a merge writes beside the shards, which have the base's names.
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "model.gguf",
    *_TOKENIZER_FILES,
)


@dataclass(frozen=True)
class Merge:
    """What a merge wrote."""

    out: Path
    base: str
    n_merged: int  # weights that got an update
    n_replaced: int  # tensors taken whole from the adapter
    n_bytes: int
    dtype: str
    check: LogitsCheck | None
    notes: list[str] = field(default_factory=list)
    gguf: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON-ready values."""
        plain = {"out": str(self.out), "gguf": self.gguf and str(self.gguf)}
        return {**vars(self), **plain, "check": self.check and self.check._asdict()}


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    gguf: bool = False,
    check: bool = True,
    another_base: bool = False,
    force: bool = False,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> Merge:
    """Add an adapter's updates to its base model and write a folder that plain transformers loads.

    Each weight becomes W + dW, summed in float32 and rounded once to its own dtype. One shard is in memory at a time.

    Args:
        adapter: the adapter's folder.
        out: the folder to write.
        base: the base model; None takes the one that the adapter's config names.
        dtype: "float32", "bfloat16" or "float16" for the whole model; None keeps each tensor's (float32 for GGUF).
        gguf: also write model.gguf into the folder, for llama.cpp; for a base that is a GGUF file.
        check: load both and compare their logits; takes the memory of the whole model.
        another_base: merge even though the base's weights are not those that the adapter was trained on.
        force: replace `out`.
        progress: wraps the shards' names, for a progress bar.

    Raises:
        ConfigError: not an adapter, no base, a quantised base, an unknown dtype, or `out` is not free.
        CheckpointError: another base, a damaged file, or logits that differ by more than rounding.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; allowed: {', '.join(DTYPES)}.")
    opened = open_adapter(adapter)
    found = open_base(opened, base)
    inputs = [opened.folder, *([Path(found.source.name_or_path)] if found.source.is_local else [])]
    written = (*_MODEL_FILES, *found.weights.shards())
    check_output(out, force, inputs, written)
    if gguf:
        check_gguf(found)
    places = find_places(opened, found)
    notes = _check_base(opened, found, places, another_base)
    target = DTYPES[dtype] if dtype else None
    with output_folder(out, force, inputs, written) as folder:
        n_replaced = _write_weights(folder, opened, found, places, target, progress)
        dtypes = _dtypes(folder)
        _write_config(folder, found, max(dtypes, key=lambda d: dtypes[d]))
        _copy_tokenizer(folder, opened, found.source)
        coarsest = max(dtypes, key=lambda d: torch.finfo(d).eps)
        checked = check_logits(opened, found, folder, coarsest) if check else None
        if gguf:
            changed = {place.weight for place in places.values()} | {*opened.others}
            write_gguf(folder, found, changed, folder / "model.gguf")
        n_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    names = "+".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
    file = Path(out) / "model.gguf" if gguf else None
    return Merge(Path(out), found.source.name, len(places), n_replaced, n_bytes, names, checked, notes, file)


def find_places(adapter: Adapter, base: Base) -> dict[str, Place]:
    """{module: where its weight is in the base}.

    Raises:
        CheckpointError: the model has no such module, or one of another shape.
    """
    places = {}
    for name in adapter.modules:
        places[name] = place = base.place(name)
        expected = adapter.layer(name).get("shape")
        if expected is not None and tuple(expected) != place.shape:
            raise CheckpointError(
                f"{name} is {place.shape} in the base model and was {tuple(expected)} where the adapter was made: it "
                "is for another architecture. Give the right model with --base."
            )
    return places


def _check_base(adapter: Adapter, base: Base, places: dict[str, Place], another_base: bool) -> list[str]:
    """Compare the base with the fingerprints that the adapter carries; returns what to tell the user."""
    resolved: dict[str, Any] = getattr(adapter.config, "resolved", None) or {}
    known = set(base.weights.names())
    now = {}
    for name, place in places.items() if resolved else ():
        if place.weight in known:
            W = base.weights.read(place.weight)
            now[name] = {"shape": resolved[name]["shape"], "base": fingerprint(W, str(W.dtype).removeprefix("torch."))}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_base({name: resolved[name] for name in now}, now)
    said = [str(warning.message) for warning in caught]
    for message in said:
        if "not those that this adapter was trained on" in message and not another_base:
            raise CheckpointError(f"{message} To merge into it all the same: --another-base.")
    return said


def _write_weights(
    folder: Path,
    adapter: Adapter,
    base: Base,
    places: dict[str, Place],
    dtype: torch.dtype | None,
    progress: Callable[[Iterable[str]], Iterable[str]],
) -> int:
    """Write the merged shards and their index; returns how many tensors came whole from the adapter."""
    updated = {place.weight: name for name, place in places.items()}
    whole = {key.replace(".base_layer.", "."): key for key in adapter.others}
    shards = _shards(base, set(updated), set(whole))
    missing = set(updated) - {name for names in shards.values() for name in names}
    if missing:
        raise CheckpointError(
            f"{base.source.name} keeps {min(missing)} under another name in its files, so that it cannot be merged "
            "shard by shard. Merge in Python: PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(...)."
        )
    for file in progress(list(shards)):
        tensors = {}
        for name, stored in shards[file].items():
            tensor = adapter.read(whole[name]) if name in whole else base.weights.read(stored)
            if name in updated:
                tensor = _merged(tensor, adapter, updated[name], places[updated[name]])
            tensors[name] = (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).contiguous()
        save_tensors(tensors, folder / file)
    if len(shards) > 1:
        size = sum((folder / file).stat().st_size for file in shards)
        index = {name: file for file, names in shards.items() for name in names}
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return len(whole)


def _shards(base: Base, updated: set[str], whole: set[str]) -> dict[str, dict[str, str]]:
    """{file to write: {tensor: the stored tensor that it starts from}}, new tensors in the last file.

    Args:
        base: the base model.
        updated: the tensors that get an update.
        whole: the tensors that the adapter brings itself.
    """
    shards = {file: {name: name for name in names} for file, names in base.weights.shards().items()}
    known = {name for names in shards.values() for name in names}
    last = shards[list(shards)[-1]]
    ends = _tied_ends(base)
    if ends and (updated | whole) & set(ends):  # one of two tied embeddings is changed, so they part ways
        base.config.tie_word_embeddings = False
        last |= {end: ends[0] for end in ends if end not in known}
    last |= {name: name for name in sorted(whole - known - set(last))}
    return shards


def _tied_ends(base: Base) -> tuple[str, str] | None:
    """The weights of the input and output embeddings where they are one tensor."""
    if not getattr(base.config, "tie_word_embeddings", False):
        return None
    model: Any = base.model
    names = {id(module): name for name, module in model.named_modules()}
    first, second = model.get_input_embeddings(), model.get_output_embeddings()
    return None if second is None else (f"{names[id(first)]}.weight", f"{names[id(second)]}.weight")


@torch.no_grad()
def _merged(weight: Tensor, adapter: Adapter, name: str, place: Place) -> Tensor:
    """W + dW in the weight's own layout, summed in float32 and rounded once to its dtype."""
    module: Any = place.module
    return (weight.float() + place.host.from_matrix(adapter.update(name).dense(), module)).to(weight.dtype)


def _write_config(folder: Path, base: Base, dtype: torch.dtype) -> None:
    config = base.config
    config.architectures = [type(base.model).__name__]
    config.dtype = dtype
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # a GGUF file's: the merged weights are plain
    config.save_pretrained(folder)
    generation = local_folder(base.source) / "generation_config.json"
    if not base.source.gguf_file and generation.is_file():  # beside a GGUF file it may be another model's
        shutil.copy(generation, folder)


def _copy_tokenizer(folder: Path, adapter: Adapter, source: Source) -> None:
    """The adapter's tokenizer where it has one (tokens may have been added), else the base's."""
    own = adapter.folder if (adapter.folder / "tokenizer_config.json").is_file() else None
    if own is None and source.gguf_file:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(source.name_or_path, **source.loading_options).save_pretrained(folder)
        return
    for pattern in _TOKENIZER_FILES:
        for file in (own or local_folder(source)).glob(pattern):
            if file.is_file():
                shutil.copy(file, folder)


def _dtypes(folder: Path) -> dict[torch.dtype, int]:
    """{float dtype of the weights in a folder: number of tensors}."""
    found: dict[torch.dtype, int] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                dtype = _STORED.get(tensors.get_slice(key).get_dtype())
                if dtype is not None:
                    found[dtype] = found.get(dtype, 0) + 1
    return found
