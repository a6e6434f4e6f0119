"""What the autograd functions need to follow torch.autocast: the dtype to compute in, and a way to keep it out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def to_compute(x: Tensor) -> Tensor:
    """x in the dtype that a linear layer would compute in: autocast's, where it is on and x is not float64."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A region where autocast changes nothing for x's device. Free where it is off."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
