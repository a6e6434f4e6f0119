"""Whether a merged model still says what the adapter said on its base."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from krontune.convert.adapter import Adapter
from krontune.convert.base import Base
from krontune.errors import CheckpointError
from krontune.weights import Source

#: How far logits may be apart, relative to their norm, where the weights were rounded to that dtype.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_ROWS, _TOKENS = 2, 24


class LogitsCheck(NamedTuple):
    """The logits of a merged model against those of the adapter on its base, on random tokens."""

    difference: float  # ||merged - adapter|| / ||adapter||
    effect: float  # ||adapter - base|| / ||adapter||: what the adapter changes
    tolerance: float


def check_logits(adapter: Adapter, base: Base, merged: Path, dtype: torch.dtype) -> LogitsCheck:
    """Compare them; everything is computed in float32.

    Raises:
        CheckpointError: they differ by more than rounding to `dtype` explains.
    """
    model = base.load()
    sample = _sample(model.config)
    adapted = PeftModel.from_pretrained(model, str(adapter.folder))
    with adapted.disable_adapter():
        before = logits(adapted, sample)
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


def _sample(config: Any) -> Tensor:
    """Random token ids, the same every time, within the positions that the model has."""
    positions = getattr(config, "max_position_embeddings", None) or _TOKENS + 4
    shape = (_ROWS, max(1, min(_TOKENS, positions - 4)))  # RoBERTa's first positions are reserved
    return torch.randint(0, int(config.vocab_size), shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any, sample: Tensor) -> Tensor:
    """The model's first output for token ids."""
    output = model(input_ids=sample)
    first = output.logits if hasattr(output, "logits") else output[0]
    return first.detach().float()
