"""A frozen linear layer plus LSR-Adapt's update, as one differentiable operation that keeps only its inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from krontune.errors import ShapeError
from krontune.kron.autograd import Product, apply_product, cast_to, flat, to_compute
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
    return apply_product(_PRODUCT, to_compute(x), weight, bias, scale, len(a_factors), *a_factors, *b_factors)


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
    """In differentiable torch operations alone: what torch.compile, torch.func and second derivatives see."""
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


def _grads(
    rows: Tensor,
    g: Tensor,
    W: Tensor | None,
    scale: float,
    d: int,
    factors: Sequence[Tensor],
    need_x: bool,
    need_factors: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of the rows and of the factors, as `Product.grads` wants them."""
    A, Bt = low_rank_pair(factors[:d], factors[d:], scale, rows.dtype)
    gh = F.linear(g, Bt)
    gx = None
    if need_x:
        gx = gh @ A if W is None else (g @ W).addmm_(gh, A)
    if not any(need_factors):
        return gx, [None] * len(factors)
    gA, gBt = gh.t() @ rows, F.linear(rows, A).t() @ g
    g_up = separated_grads(factors[d:], gBt if scale == 1 else scale * gBt, transposed=True)
    return gx, [*separated_grads(factors[:d], gA), *g_up]


_PRODUCT = Product(_plain, _fast, _grads)
