"""What the differentiable layers share: following torch.autocast, second derivatives, flattening."""

from __future__ import annotations

import math
from collections.abc import Callable
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


def plain_grads(
    plain: Callable[..., Tensor], g: Tensor, inputs: tuple, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of plain(*inputs), differentiable in g and the inputs in turn, for create_graph=True."""
    # Aliases: an input that depends on another must not pass its share on to it here.
    inputs = tuple(t.view_as(t) if isinstance(t, Tensor) else t for t in inputs)
    wanted = [t for t, need in zip(inputs, needed) if need]
    grads = iter(torch.autograd.grad(plain(*inputs), wanted, g, create_graph=True, allow_unused=True))
    return tuple(next(grads) if need else None for need in needed)


def flat(x: Tensor) -> Tensor:
    """(..., n) -> (T, n), also where there are no rows."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def cast_to(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """The tensor in another's dtype; None stays None."""
    return None if tensor is None else tensor.to(like.dtype)
