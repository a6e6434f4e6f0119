"""A merged model as a GGUF file: the base's own file with the changed tensors in 16 bits, for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from krontune.convert.base import Base
from krontune.errors import ConfigError
from krontune.weights import Source, open_weights
from krontune.weights.reader import gguf_names

#: How the architectures keep attention's rows: "llama" in pairs of rotated halves, the others as transformers does.
_PAIRED_ROWS = ("llama",)
_AS_THEY_ARE = ("qwen2", "qwen3", "phi3", "stablelm", "starcoder2")


def write_gguf(folder: Path, base: Base, changed: set[str], file: Path) -> None:
    """Copy the base's GGUF file with the tensors that the merge changed taken from the merged folder, as float16.

    Unchanged tensors keep their bytes, quantised as they are, and the tokenizer and all other fields go with them. What
    only the merged folder has is added: the head, where it was one tensor with the embedding and no longer is.

    Args:
        folder: the merged transformers folder.
        base: the base, opened from a GGUF file.
        changed: names of the changed tensors in the model.
        file: the file to write.

    Raises:
        ConfigError: the base is no GGUF file, of an architecture whose layout is not known here, or the merged folder
            has a tensor that GGUF has no name for.
    """
    import gguf

    check_gguf(base)
    reader = gguf.GGUFReader(Path(base.source.name_or_path) / str(base.source.gguf_file))
    architecture = reader.fields["general.architecture"].contents()
    merged = open_weights(Source(str(folder), str(folder)), base.model)
    names = base.weights.gguf_names()  # type: ignore[attr-defined]
    writer = gguf.GGUFWriter(file, architecture)
    for field in reader.fields.values():
        _copy_field(writer, field)
    payload = []

    def add(name: str, data: np.ndarray, kind: Any = None) -> None:
        if kind is None:  # one of ours
            kind = gguf.GGMLQuantizationType.F16 if data.dtype == np.float16 else gguf.GGMLQuantizationType.F32
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, kind)
        payload.append(data)

    for tensor in reader.tensors:
        name = names.get(tensor.name)
        if name in changed:
            add(tensor.name, _gguf_layout(merged.read(name).float().numpy(), tensor.name, base))
        else:
            add(tensor.name, tensor.data, tensor.tensor_type)
    for name in merged.names():
        if name in names.values():
            continue
        stored = _gguf_name(architecture, base, name)
        add(stored, _gguf_layout(merged.read(name).float().numpy(), stored, base))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for data in payload:
        writer.write_tensor_data(data)
    writer.close()


def _gguf_name(architecture: str, base: Base, name: str) -> str:
    stored = {ours: theirs for theirs, ours in gguf_names(architecture, base.model).items()}
    if name not in stored:
        raise ConfigError(
            f"--gguf has no name for {name}, which the adapter brings: llama.cpp would do without it. Serve the merged "
            "folder with transformers or vLLM."
        )
    return stored[name]


def check_gguf(base: Base) -> None:
    """Raise ConfigError unless `write_gguf` can work on this base."""
    if not base.source.gguf_file:
        raise ConfigError(
            f"--gguf takes the tokenizer and the layout from the base's own GGUF file, and {base.source.name} is none. "
            "Convert the merged folder with llama.cpp's convert_hf_to_gguf.py."
        )
    kind = str(base.config.model_type)
    if kind not in (*_PAIRED_ROWS, *_AS_THEY_ARE):
        raise ConfigError(
            f"--gguf knows the layout of {', '.join((*_PAIRED_ROWS, *_AS_THEY_ARE))}, not of {kind}. Convert the "
            "merged folder with llama.cpp's convert_hf_to_gguf.py."
        )


def _copy_field(writer: Any, field: Any) -> None:
    from gguf import GGUFValueType

    if field.name.startswith("GGUF.") or field.name == "general.architecture":
        return  # the writer's own
    kind = field.types[0]
    inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
    writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)


def _gguf_layout(weight: np.ndarray, name: str, base: Base) -> np.ndarray:
    """The tensor as GGUF keeps it, in float16."""
    config: Any = base.config
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": getattr(config, "num_key_value_heads", None)}
    if config.model_type in _PAIRED_ROWS:
        for part, n_heads in heads.items():
            if part in name:
                n_heads = n_heads or config.num_attention_heads
                rows = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, *weight.shape[1:])
                weight = rows.swapaxes(1, 2).reshape(weight.shape)
    return np.ascontiguousarray(weight.astype(np.float16) if weight.ndim > 1 else weight)
