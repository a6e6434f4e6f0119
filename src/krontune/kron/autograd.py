"""What the differentiable layers share: one operation that keeps only its inputs, autocast, second derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Product(NamedTuple):
    """A frozen linear layer plus an update, in the three forms that `apply_product` chooses from.

    All take x, weight, bias, scale, an option of the product's own and the factors.
    """

    plain: Callable[..., Tensor]  # in differentiable torch operations alone
    fast: Callable[..., Tensor]  # the same in fewer passes over memory, not differentiable
    # (rows of x, rows of the output's gradient, weight, scale, option, factors, whether x's gradient is wanted, and
    # whether each factor's is) -> (that of the rows or None, [that of each factor or None])
    grads: Callable[..., tuple[Tensor | None, list[Tensor | None]]]


def apply_product(
    product: Product, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, option: Any, *factors: Tensor
) -> Tensor:
    """The product in the form that the moment allows: plain, fast, or fast with a backward."""
    inputs = (x, weight, bias, scale, option, *factors)
    if must_be_plain():
        return product.plain(*inputs)
    with without_autocast(x):
        return _Fast.apply(product, *inputs) if has_backward(*inputs) else product.fast(*inputs)


def has_backward(*inputs: Any) -> bool:
    """Whether a gradient for any of the inputs may be asked for later."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)


def must_be_plain() -> bool:
    """Whether torch has to see every operation: in torch.compile, torch.func's transforms and forward-mode AD.

    A custom autograd.Function could serve these too, in the form with a setup_context, which costs 60 us a call more.
    """
    if torch.compiler.is_compiling():
        return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _Fast(torch.autograd.Function):
    """`Product.fast`, with a backward that keeps the inputs and nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        product: Product,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: float,
        option: Any,
        *factors: Tensor,
    ) -> Tensor:
        ctx.product, ctx.scale, ctx.option = product, scale, option
        ctx.save_for_backward(x, weight, bias, *factors)
        return product.fast(x, weight, bias, scale, option, *factors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *factors = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        with without_autocast(x):
            if torch.is_grad_enabled():  # create_graph=True: the gradients are differentiated in turn
                inputs = (x, weight, bias, ctx.scale, ctx.option, *factors)
                return (None, *plain_grads(ctx.product.plain, g, inputs, needed))
            need_x, need_weight, need_bias, _, _, *need_factors = needed
            rows, g = flat(x), flat(g)
            W = cast_to(weight, x)
            gx, g_factors = ctx.product.grads(rows, g, W, ctx.scale, ctx.option, factors, need_x, need_factors)
            g_weight = g.mT @ rows if need_weight else None
            g_bias = g.sum(0) if need_bias else None
        return (None, gx if gx is None else gx.view(x.shape), g_weight, g_bias, None, None, *g_factors)


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
