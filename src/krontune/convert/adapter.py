"""An adapter as it lies on disk, of any method that krontune converts: its config, and its updates one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoKrConfig, LoraConfig, PeftConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor

from krontune.convert.lokr_factors import lokr_update
from krontune.convert.stored import Stored, lokr_matrix, lora_matrix
from krontune.convert.updates import LoraUpdate, LsrUpdate, Update, soka_update
from krontune.errors import CheckpointError, ConfigError
from krontune.kron import ChannelOrder
from krontune.tuners import LsrConfig, SokaConfig
from krontune.tuners._peft import SAFETENSORS_WEIGHTS_NAME
from krontune.tuners.base_model import pattern_value
from krontune.tuners.checkpoint import check_adapter_file, check_config

PREFIX = "base_model.model."
METHODS = {LsrConfig: "lsr", SokaConfig: "soka", LoraConfig: "lora", LoKrConfig: "lokr"}
#: How each method's tensors are called: everything before it is the module's name.
_MARKS = {"lsr": ".lsr_", "soka": ".soka_", "lora": ".lora_", "lokr": ".lokr_"}

#: Settings of PEFT's LoRA with which the layer is not W + B A, or the model is another one.
_MORE_THAN_A_PRODUCT = (
    "use_dora",
    "lora_bias",
    "target_parameters",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)


@dataclass(frozen=True)
class Adapter:
    """A local adapter folder, opened. Tensors are read when they are asked for."""

    folder: Path
    config: Any
    method: str  # "lsr", "soka", "lora" or "lokr"
    modules: dict[str, list[str]]  # {module: its tensors' names in the file, after the module's own}
    others: list[str] = field(default_factory=list)  # keys of modules_to_save and biases
    matrices: dict[str, tuple[int, int]] = field(default_factory=dict)  # {module: (m, n)}, of a LoRA or LoKr

    @property
    def file(self) -> Path:
        return self.folder / SAFETENSORS_WEIGHTS_NAME

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights file."""
        return self.file.stat().st_size

    def read(self, key: str) -> Tensor:
        """One tensor by its key in the file without PEFT's prefix, as stored.

        Raises:
            CheckpointError: it cannot be read, or holds NaN or Inf.
        """
        try:
            with safe_open(self.file, framework="pt") as tensors:
                tensor = tensors.get_tensor(PREFIX + key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.file}: cannot read {key!r}: {error}.") from None
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{self.file}: {key!r} holds NaN or Inf. The training diverged, or the file is damaged; go back to an "
                "earlier checkpoint."
            )
        return tensor

    def update(self, name: str) -> Update:
        """The update of a module, in float32.

        Raises:
            CheckpointError: a tensor is damaged.
            ConfigError: the adapter uses something that is no plain update of the weight, such as DoRA.
        """
        path = self.path(name)
        tensors = {tail: _as_float(self.read(path + tail)) for tail in self.modules[name]}
        reader = {"lsr": self._lsr, "soka": self._soka, "lora": self._lora, "lokr": self._lokr}[self.method]
        return reader(name, tensors)

    def updates(self) -> Iterator[tuple[str, Update]]:
        """Every module's update, one at a time."""
        for name in self.modules:
            yield name, self.update(name)

    def path(self, name: str) -> str:
        """How the module's layer is called in the file: differs from its name for wrapped parameters."""
        entry = (getattr(self.config, "resolved", None) or {}).get(name) or {}
        return str(entry.get("path", name))

    def layer(self, name: str) -> dict[str, Any]:
        """What is known of the adapted layer: "layer" ("linear", "conv", ...), "shape", a convolution's "kernel"."""
        if self.method in ("lsr", "soka"):
            return dict(self.config.resolved[name])
        fan_in_fan_out = bool(getattr(self.config, "fan_in_fan_out", False))
        kind = {"layer": "conv1d" if fan_in_fan_out else "linear", **self._stored_layer(name)}
        return {**kind, "shape": list(self.matrices[name])}

    # ---------------------------------------------------------------------------------------------------- each method

    def _scale(self, name: str) -> float:
        """alpha / r as PEFT's LoRA and LoKr have it, patterns included."""
        r = pattern_value(self.config.rank_pattern, name, self.config.r)
        alpha = self.config.lora_alpha if self.method == "lora" else self.config.alpha
        alpha = pattern_value(self.config.alpha_pattern, name, alpha)
        root = getattr(self.config, "use_rslora", False)
        return float(alpha / r**0.5 if root else alpha / r)

    def _alpha(self, name: str) -> float:
        return float(pattern_value(self.config.alpha_pattern, name, self.config.alpha))

    def _lsr(self, name: str, tensors: dict[str, Tensor]) -> Update:
        d = len(tensors) // 2
        a, b = ([tensors[f".lsr_{side}.{i}"] for i in range(d)] for side in "AB")
        return LsrUpdate(a, b, self._alpha(name))

    def _soka(self, name: str, tensors: dict[str, Tensor]) -> Update:
        dA, dB, A0, B0 = (tensors[f".soka_{part}"] for part in ("dA", "dB", "A0", "B0"))
        order = [tensors[tail] for tail in (".soka_rows", ".soka_cols") if tail in tensors]
        for index in order:
            if not torch.equal(index.sort(-1).values, torch.arange(index.shape[-1]).int().expand_as(index)):
                raise CheckpointError(
                    f"{self.file}: the order of {name!r}'s channels is damaged: it is no permutation."
                )
        return soka_update(dA, dB, A0, B0, self._alpha(name), ChannelOrder(*order) if order else None)

    def _lora(self, name: str, tensors: dict[str, Tensor]) -> Update:
        scale = self._scale(name)
        if ".lora_embedding_A" in tensors:
            return LoraUpdate(tensors[".lora_embedding_B"].mT, tensors[".lora_embedding_A"].mT, scale)
        A, B = tensors[".lora_A.weight"], tensors[".lora_B.weight"]
        return LoraUpdate(A.flatten(1), B.flatten(1), scale)

    def _lokr(self, name: str, tensors: dict[str, Tensor]) -> Update:
        return lokr_update({tail.removeprefix(".lokr_"): t for tail, t in tensors.items()}, self._scale(name))

    def _stored_layer(self, name: str) -> dict[str, Any]:
        if ".lora_embedding_A" in self.modules[name]:
            return {"layer": "embedding"}
        if ".lora_A.weight" in self.modules[name]:
            kernel = self.read(f"{name}.lora_A.weight").shape[1:]
            return {"layer": "conv", "kernel": list(kernel)} if len(kernel) > 1 else {}
        if ".lokr_w2" in self.modules[name] and ".lokr_w1" in self.modules[name]:
            left, right = (self.read(f"{name}.lokr_{w}").shape for w in ("w1", "w2"))
            return {"layer": "conv", "kernel": [left[1] * right[1], *right[2:]]} if len(right) > 2 else {}
        return {}


def open_adapter(path: str | Path) -> Adapter:
    """Open an adapter folder, checking its config and that its file holds what the config promises.

    Raises:
        ConfigError: not an adapter, of a method that krontune does not read, or with parts that are no plain update.
        CheckpointError: a file is damaged or missing.
    """
    folder = Path(path)
    if not (folder / "adapter_config.json").is_file():
        what = "does not exist" if not folder.exists() else "is not an adapter: it has no adapter_config.json"
        raise ConfigError(f"{folder} {what}. Give the folder that save_pretrained or krontune train wrote.")
    config = _load_config(folder)
    method = METHODS.get(type(config))
    if method is None:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ConfigError(f"{folder} holds {kind}, and krontune reads adapters of {', '.join(_MARKS)}.")
    if method == "lora":
        _check_plain(config, folder)
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}: the adapter's weights are missing.")
    if method in ("lsr", "soka"):
        check_config(config, str(folder / "adapter_config.json"))
        check_adapter_file(config, str(folder))
    shapes = {key.removeprefix(PREFIX): shape for key, shape in stored_shapes(file).items()}
    modules: dict[str, list[str]] = {}
    others = []
    names = {} if method not in ("lsr", "soka") else {e.get("path", n): n for n, e in (config.resolved or {}).items()}
    for key in shapes:
        path_, mark, tail = key.rpartition(_MARKS[method])
        if mark:
            modules.setdefault(names.get(path_, path_), []).append(mark + tail)
        else:
            others.append(key)
    if not modules:
        raise CheckpointError(f"{file} holds no tensor of a {method} adapter.")
    matrices = {}
    for name, tails in modules.items() if method in ("lora", "lokr") else ():
        stored = Stored(f"{file}: {name}", {tail: shapes[name + tail] for tail in tails})
        r = pattern_value(config.rank_pattern, name, config.r)
        matrices[name] = lora_matrix(stored, r) if method == "lora" else lokr_matrix(stored, r, config.decompose_factor)
    return Adapter(folder, config, method, modules, others, matrices)


def _load_config(folder: Path) -> Any:
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (CheckpointError, ConfigError):
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/adapter_config.json cannot be read: {error}.") from None


def _check_plain(config: LoraConfig, folder: Path) -> None:
    """Refuse what a LoRA can have beside B @ A."""
    extras = [name for name in _MORE_THAN_A_PRODUCT if getattr(config, name, None)]
    if extras:
        raise ConfigError(
            f"{folder} uses {', '.join(extras)}, which is more than a product B A. It cannot be converted."
        )


def _as_float(tensor: Tensor) -> Tensor:
    """Float32, but for what is no number to compute with."""
    return tensor.float() if tensor.is_floating_point() else tensor


def stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """{key: shape} of a weights file, in its order.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}. It is truncated or damaged.") from None
