"""A frozen linear layer plus LSR-Adapt's update, as one differentiable operation that keeps only its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from krontune.errors import ShapeError
from krontune.kron.autograd import cast_to, flat, plain_grads, to_compute, without_autocast
from krontune.kron.separation import check_factors, separated_grads, separated_shape, separated_sum


def separated_linear(
    x: Tensor,
    a_factors: Sequence[Tensor],
    b_factors: Sequence[Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """x @ (weight + scale * B A)^T + bias with A, B as separated representations: LSR-Adapt's layer.

    The layer of arXiv:2502.13568. Each of A and B is built from its factors by one small GEMM; then come two
    skinny products, as in LoRA. The backward keeps x and the factors alone and builds the rest again. Differentiable
    twice.

    Args:
        x: (..., n).
        a_factors: d tensors (s, r_i, n_i), any float dtype; A = separated_sum(a_factors) is (r, n).
        b_factors: d tensors (s, m_i, r_i); B = separated_sum(b_factors) is (m, r).
        weight: (m, n), or None for the update alone.
        bias: (m,), or None.
        scale: multiplies the update; dimensionless.

    Returns:
        (..., m), dtype of x (under autocast, autocast's).

    Raises:
        ShapeError: sizes that do not fit together.

    Cost: s*(r*n + m*r) multiply-adds, and r*(m + n) per row; three times that with the backward.
    """
    check_factors(a_factors)
    check_factors(b_factors)
    (r, n), (m, columns) = separated_shape(a_factors), separated_shape(b_factors)
    if x.shape[-1] != n or r != columns or (weight is not None and weight.shape != (m, n)):
        raise ShapeError(
            f"x is {tuple(x.shape)}, A ({r}, {n}), B ({m}, {columns}), weight "
            f"{None if weight is None else tuple(weight.shape)}; they must be (..., n), (r, n), (m, r) and (m, n)."
        )
    x = to_compute(x)
    inputs: tuple[Any, ...] = (x, weight, bias, scale, len(a_factors), *a_factors, *b_factors)
    if torch.compiler.is_compiling():
        return _plain(*inputs)
    backward = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)
    with without_autocast(x):
        return (_SeparatedLinear.apply if backward else _fast)(*inputs)


def low_rank_linear(
    x: Tensor, A: Tensor, Bt: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """x @ (weight + Bt^T A)^T + bias: what `separated_linear` computes once A and B are built.

    Args:
        x: (..., n).
        A: (r, n), dtype of x; as Bt, weight and bias.
        Bt: (r, m), B transposed and scaled.
        weight: (m, n), or None.
        bias: (m,), or None.

    Returns:
        (..., m). The update is added into the weight's product, in place: no pass over memory of its own.
    """
    rows = flat(x)
    h = F.linear(rows, A)
    y = F.linear(h, Bt.mT, bias) if weight is None else F.linear(rows, weight, bias).addmm_(h, Bt)
    return y.view(*x.shape[:-1], y.shape[-1])


def low_rank_pair(
    a_factors: Sequence[Tensor], b_factors: Sequence[Tensor], scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A (r, n) and scale * B^T (r, m), for `low_rank_linear`. Products with rows of length r would be slow."""
    A, Bt = separated_sum(a_factors), separated_sum(b_factors, transposed=True)
    return A.to(dtype), (Bt if scale == 1 else scale * Bt).to(dtype)


def _plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, d: int, *factors: Tensor) -> Tensor:
    """In differentiable torch operations alone: what torch.compile and a second derivative see."""
    A, Bt = low_rank_pair(factors[:d], factors[d:], scale, x.dtype)
    W, b = cast_to(weight, x), cast_to(bias, x)
    y = F.linear(x, A) @ Bt
    if W is not None:
        return y + F.linear(x, W, b)
    return y if b is None else y + b


def _fast(x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, d: int, *factors: Tensor) -> Tensor:
    """The same in fewer passes over memory: the update is added into the weight's product."""
    pair = low_rank_pair(factors[:d], factors[d:], scale, x.dtype)
    return low_rank_linear(x, *pair, cast_to(weight, x), cast_to(bias, x))


class _SeparatedLinear(torch.autograd.Function):
    """`_fast`, with a backward that keeps the inputs and nothing else."""

    @staticmethod
    def forward(  # one function with its context: the form with a setup_context costs 60 us a call more
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, d: int, *factors: Tensor
    ) -> Tensor:
        ctx.scale, ctx.d = scale, d
        ctx.save_for_backward(x, weight, bias, *factors)
        return _fast(x, weight, bias, scale, d, *factors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *factors = ctx.saved_tensors
        with without_autocast(x):
            if torch.is_grad_enabled():  # create_graph=True: the gradients are differentiated in turn
                return plain_grads(_plain, g, (x, weight, bias, ctx.scale, ctx.d, *factors), ctx.needs_input_grad)
            need_x, need_weight, need_bias, _, _, *need_factors = ctx.needs_input_grad
            A, Bt = low_rank_pair(factors[: ctx.d], factors[ctx.d :], ctx.scale, x.dtype)
            W, rows, g = cast_to(weight, x), flat(x), flat(g)
            gh = F.linear(g, Bt)
            gx = None
            if need_x:
                gx = (gh @ A if W is None else (g @ W).addmm_(gh, A)).view(x.shape)
            g_factors: list[Tensor | None] = [None] * len(factors)
            if any(need_factors):
                gA, gBt = gh.t() @ rows, F.linear(rows, A).t() @ g
                g_up = separated_grads(factors[ctx.d :], gBt if ctx.scale == 1 else ctx.scale * gBt, transposed=True)
                g_factors = [*separated_grads(factors[: ctx.d], gA), *g_up]
            g_weight = g.mT @ rows if need_weight else None
            g_bias = g.sum(0) if need_bias else None
        return (gx, g_weight, g_bias, None, None, *g_factors)
