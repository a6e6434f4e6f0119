"""Weights read one tensor at a time, under the names that the model's own modules have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safetensors import SafetensorError, safe_open

from krontune.errors import CheckpointError, ConfigError
from krontune.weights.source import Source, local_folder

if TYPE_CHECKING:
    from torch import Tensor, nn


class Weights(Protocol):
    """A model's weights on disk. Names are those of the model's state dict."""

    def names(self) -> list[str]:
        """Every tensor there is, in the file's order."""

    def read(self, name: str) -> Tensor:
        """One tensor, dequantised where it is quantised. Nothing else is loaded."""

    def shards(self) -> dict[str, list[str]]:
        """{file name: names of the tensors in it}."""


class SafetensorsWeights:
    """The safetensors files of a model folder, one or many."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        self._files = _tensor_files(folder)
        self._in_file = _match_names(self._files, model)

    def names(self) -> list[str]:
        return list(self._in_file)

    def read(self, name: str) -> Tensor:
        stored = self._in_file[name]
        try:
            with safe_open(self._files[stored], framework="pt") as tensors:
                return tensors.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._files[stored]}: cannot read {stored!r}: {error}.") from None

    def shards(self) -> dict[str, list[str]]:
        shards: dict[str, list[str]] = {}
        for name, stored in self._in_file.items():
            shards.setdefault(self._files[stored].name, []).append(name)
        return shards


class GgufWeights:
    """A GGUF file. Its tensors are dequantised to float32 and given back transformers' names and layout."""

    #: Bytes of float32 in a shard of `shards`.
    SHARD_BYTES = 4 * 2**30

    def __init__(self, file: Path, model: nn.Module) -> None:
        import gguf
        from transformers import modeling_gguf_pytorch_utils as hf

        reader = gguf.GGUFReader(file)
        architecture = reader.fields["general.architecture"].contents()
        processor = hf.TENSOR_PROCESSORS.get(architecture, hf.TensorProcessor)
        config: Any = model.config
        self._process = processor(config=config.to_dict()).process
        renamed = gguf_names(architecture, model)
        if any(t.name not in renamed for t in reader.tensors if t.name != "rope_freqs.weight"):
            renamed = hf.get_gguf_hf_weights_map(
                model, processor()
            )  # knows every model's peculiarities, in many seconds
        self._tensors: dict[str, Any] = {renamed[t.name]: t for t in reader.tensors if t.name in renamed}
        if not self._tensors:
            raise CheckpointError(f"{file}: none of its tensors belongs to a {type(model).__name__}.")

    def names(self) -> list[str]:
        return list(self._tensors)

    def gguf_names(self) -> dict[str, str]:
        """{name in the file: name in the model}."""
        return {str(tensor.name): name for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        import gguf
        import torch

        tensor = self._tensors[name]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(self._process(weights=values, name=tensor.name).weights.copy())

    def shards(self) -> dict[str, list[str]]:
        groups: list[list[str]] = [[]]
        used = 0
        for name, tensor in self._tensors.items():
            size = 4 * int(tensor.n_elements)
            if used + size > self.SHARD_BYTES and groups[-1]:
                groups.append([])
                used = 0
            groups[-1].append(name)
            used += size
        if len(groups) == 1:
            return {"model.safetensors": groups[0]}
        return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def gguf_names(architecture: str, model: nn.Module) -> dict[str, str]:
    """{name in a GGUF file: name in the model}, by the gguf package's own table."""
    import gguf

    key = next((k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if key is None:
        return {}
    table = gguf.get_tensor_name_map(key, model.config.num_hidden_layers)  # type: ignore[union-attr]
    renamed = {}
    for name in model.state_dict():
        stem, _, suffix = name.rpartition(".")
        found = table.get_name(stem)
        if found is not None:
            renamed[f"{found}.{suffix}"] = name
    return renamed


def open_weights(source: Source, model: nn.Module) -> Weights:
    """Open a model's weights; nothing is read yet.

    Args:
        source: where the model lies.
        model: its modules, on the meta device say: they give the names.

    Raises:
        ConfigError: the folder has no weights, or only pickled ones.
        CheckpointError: a file is missing or damaged.
    """
    folder = local_folder(source)
    if source.gguf_file:
        return GgufWeights(folder / source.gguf_file, model)
    return SafetensorsWeights(folder, model)


def has_weights(source: Source) -> bool:
    """Whether weights are at hand without fetching anything."""
    folder = Path(source.name_or_path)
    return bool(source.gguf_file) or any(folder.glob("*.safetensors"))


def _tensor_files(folder: Path) -> dict[str, Path]:
    """{tensor name in the file: file} of a model folder."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{index} is damaged: {error}.") from None
        missing = sorted({file for file in listed.values() if not (folder / file).is_file()})
        if missing:
            raise CheckpointError(f"{folder} has no {missing[0]}, which its index names. Fetch the model again.")
        return {name: folder / file for name, file in listed.items()}
    if not single.is_file():
        pickled = next(folder.glob("*.bin"), None)
        what = f"only a pickle ({pickled.name})" if pickled else "no weights"
        raise ConfigError(f"{folder} holds {what}; a model.safetensors or a .gguf file is needed.")
    with ExitStack() as stack:
        try:
            tensors = stack.enter_context(safe_open(single, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{single} cannot be read as safetensors: {error}.") from None
        return dict.fromkeys(tensors.keys(), single)


def _match_names(files: dict[str, Path], model: nn.Module) -> dict[str, str]:
    """{name in the model: name in the files}; a name that the model does not know is kept as it is.

    Checkpoints of a bare model lack the prefix that a model with a head has, and the other way round.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    known = set(model.state_dict())
    return {next((c for c in _spellings(name, prefix) if c in known), name): name for name in files}


def _spellings(name: str, prefix: str) -> Iterator[str]:
    yield name
    if prefix != ".":
        yield prefix + name
        yield name.removeprefix(prefix)
