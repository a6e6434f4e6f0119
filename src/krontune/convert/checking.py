"""Whether a merged model still says what the adapter said on its base."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from krontune.convert.adapter import Adapter
from krontune.convert.base import Base
from krontune.errors import CheckpointError, ConfigError
from krontune.weights import Source

#: How far logits may be apart, relative to their norm, where the weights were rounded to that dtype.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_ROWS, _TOKENS = 2, 24
#: {name of an input: its values}.
Sample = dict[str, Tensor]


class LogitsCheck(NamedTuple):
    """The logits of a merged model against those of the adapter on its base, on random inputs."""

    difference: float  # ||merged - adapter|| / ||adapter||
    effect: float  # ||adapter - base|| / ||adapter||: what the adapter changes
    tolerance: float


def check_logits(adapter: Adapter, base: Base, merged: Path, dtype: torch.dtype) -> LogitsCheck:
    """Compare them; everything is computed in float32.

    Raises:
        CheckpointError: they differ by more than rounding to `dtype` explains.
        ConfigError: the model takes inputs that are not made up here.
    """
    model = base.load()
    sample, before = _first_output(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The base model")  # the merge itself says this, once
        adapted = PeftModel.from_pretrained(model, str(adapter.folder))
    wanted = logits(adapted, sample)
    del model, adapted
    gc.collect()  # two models at once are not needed
    got = logits(base.load(Source(str(merged), str(merged))), sample)
    norm = float(wanted.norm()) or 1.0
    result = LogitsCheck(float((got - wanted).norm()) / norm, float((wanted - before).norm()) / norm, TOLERANCE[dtype])
    if not result.difference <= result.tolerance:
        raise CheckpointError(
            f"the merged model's logits are {result.difference:.1e} off the adapter's, and rounding explains "
            f"{result.tolerance:.0e}. Nothing was written. Please report this with the adapter's config."
        )
    return result


def _first_output(model: Any) -> tuple[Sample, Tensor]:
    """Random inputs that the model takes, and what it says to them."""
    try:
        sample = _sample(model)
        return sample, logits(model, sample)
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"the logits could not be compared: {type(model).__name__} does not take random tokens or pixels "
            f"({reason}). Nothing was written. Merge without the comparison: --no-check (check=False)."
        ) from None


def _sample(model: Any) -> Sample:
    """Random pixels or token ids, the same every time, within the positions that the model has."""
    config, random = model.config, torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(_ROWS, config.num_channels, height, width, generator=random)}
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or _TOKENS + 4
    shape = (_ROWS, max(1, min(_TOKENS, positions - 4)))  # RoBERTa's first positions are reserved
    names = ("input_ids", "decoder_input_ids") if config.is_encoder_decoder else ("input_ids",)
    return {name: torch.randint(0, int(text.vocab_size), shape, generator=random) for name in names}


@torch.no_grad()
def logits(model: Any, sample: Sample) -> Tensor:
    """The model's first output."""
    output = model(**sample)
    first = output.logits if hasattr(output, "logits") else output[0]
    return first.detach().float()
