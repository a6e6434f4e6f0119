"""A frozen linear layer plus a Kronecker sum, as one differentiable operation that keeps only its inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from krontune.errors import ConfigError, ShapeError
from krontune.kron.autograd import Product, apply_product, cast_to, flat, has_backward, to_compute
from krontune.kron.cost import choose_path, prices_of
from krontune.kron.paths import PATHS, Terms, apply_terms, terms_grads
from krontune.kron.product import check_start, kron_sum, sum_shape
from krontune.kron.shapes import KronShape

_remembered_choice = lru_cache(maxsize=4096)(choose_path)


def kron_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    *,
    path: str = "auto",
) -> Tensor:
    """x @ (weight + scale * sum_k A_k (x) B_k)^T + bias, dense only on the path "merged".

    Every path computes vec(A X B^T) for X = x viewed as (n1, n2); `krontune.kron.paths` has their formulas. The
    backward keeps x and the factors alone and computes the rest again. Differentiable twice.

    Args:
        x: (..., n1*n2).
        A: (K, m1, n1), any float dtype; the product is computed in x's.
        B: (K, m2, n2).
        weight: (m1*m2, n1*n2), or None for the sum alone.
        bias: (m1*m2,), or None.
        scale: multiplies the sum; dimensionless.
        path: "b-first", "a-first", "b-fold", "a-fold", "merged", or "auto", the cheapest by `choose_path`. "merged"
            adds the sum into a copy of a float32 weight; into 16 bits it would be rounded away, so that there the
            dense sum makes a product of its own.

    Returns:
        (..., m1*m2), dtype of x (under autocast, autocast's).

    Raises:
        ShapeError: sizes that do not fit together.
        ConfigError: an unknown path.

    Cost per row: K*n1*m2*(m1 + n2) multiply-adds on the b side, K*m1*n2*(n1 + m2) on the a side, three times that with
    the backward; merged K*m*n in all, and one more product as large as the weight's in the backward.
    """
    return _linear(x, weight, bias, scale, path, A, B)


def kron_delta_linear(
    x: Tensor,
    dA: Tensor,
    dB: Tensor,
    A0: Tensor,
    B0: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    path: str = "auto",
) -> Tensor:
    """x @ (weight + scale * dW)^T + bias with SoKA's dW = sum_k (A0_k + dA_k) (x) (B0_k + dB_k) - A0_k (x) B0_k.

    The update of arXiv:2506.15251 with the starting terms kept apart. The 2K terms of `delta_terms` go through one pair
    of products; the gradients of dA and dB are those of A = A0 + dA and B = B0 + dB and cost as much as for K terms.

    Args:
        x: (..., n1*n2).
        dA: (K, m1, n1), trained; zero at the start.
        dB: (K, m2, n2), trained; zero at the start.
        A0: (K, m1, n1), a constant: it gets no gradient.
        B0: (K, m2, n2), a constant.
        weight: as for `kron_linear`, like bias, scale and path.
        bias: (m1*m2,), or None.
        scale: multiplies dW; dimensionless.
        path: one of `PATHS`, or "auto".

    Returns:
        (..., m1*m2), dtype of x. At dA = dB = 0 the update is exactly zero.

    Raises:
        ShapeError: sizes that do not fit together.
        ConfigError: an unknown path.
    """
    check_start(dA, dB, A0, B0)
    return _linear(x, weight, bias, scale, path, dA, dB, A0.detach(), B0.detach())


def _linear(x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, path: str, *factors: Tensor) -> Tensor:
    """`factors` are (A, B), or (dA, dB, A0, B0)."""
    shape = sum_shape(*factors[:2])
    if factors[0].dim() != 3 or x.shape[-1] != shape.n or (weight is not None and weight.shape != (shape.m, shape.n)):
        raise ShapeError(
            f"x is {tuple(x.shape)}, the factors {tuple(factors[0].shape)} and {tuple(factors[1].shape)}, weight "
            f"{None if weight is None else tuple(weight.shape)}; {shape} needs x (..., {shape.n}), factors "
            f"(K, {shape.m1}, {shape.n1}) and (K, {shape.m2}, {shape.n2}), weight ({shape.m}, {shape.n})."
        )
    if path not in (*PATHS, "auto"):
        raise ConfigError(f"path {path!r} is unknown; allowed: auto, {', '.join(PATHS)}.")
    x = to_compute(x)
    if path == "auto":
        K = len(factors[0])
        terms, trained = (K if len(factors) == 2 else 2 * K), (K if has_backward(x, weight, bias, *factors) else 0)
        path = _choose(math.prod(x.shape[:-1]), shape, terms, trained, _folds(weight, x), x.device.type)
    return apply_product(_PRODUCT, x, weight, bias, scale, path, *factors)


def _choose(tokens: int, shape: KronShape, terms: int, trained: int, fold_weight: bool, device: str) -> str:
    """`choose_path`, remembered; in torch.compile for a power of four of tokens, so that a graph holds for a range."""
    prices = prices_of(device)
    if not torch.compiler.is_compiling():
        return _remembered_choice(tokens, shape, terms, trained, fold_weight=fold_weight, prices=prices)
    nominal = 1
    while tokens > 2 * nominal and nominal < 4**8:
        nominal *= 4
    return choose_path(nominal, shape, terms, trained, fold_weight=fold_weight, prices=prices)


def _folds(weight: Tensor | None, x: Tensor) -> bool:
    """Whether the merged path adds into the weight: not in 16 bits, which would round a small update away."""
    return weight is not None and x.itemsize >= 4


def _terms(factors: tuple[Tensor, ...], scale: float, path: str, dtype: torch.dtype) -> Terms:
    """The terms to multiply: A (x) B, or for (dA, dB, A0, B0) those whose sum is A (x) B - A0 (x) B0."""
    if len(factors) == 2:
        A, B = factors
    else:
        dA, dB, A0, B0 = factors
        if path.startswith("a"):  # A0 (x) dB + dA (x) B
            A, B = torch.cat([A0, dA]), torch.cat([dB, B0 + dB])
        else:  # dA (x) B0 + A (x) dB
            A, B = torch.cat([dA, A0 + dA]), torch.cat([B0, dB])
    return Terms(_scaled(A, scale).to(dtype), B.to(dtype))


def _trained(factors: tuple[Tensor, ...], scale: float, path: str, value: Terms) -> Terms:
    """The terms A (x) B that gradients are taken at, as `terms_grads` wants them; one side is in `value` already."""
    if len(factors) == 2:
        return value
    dA, dB, A0, B0 = factors
    if path.startswith("a"):
        return Terms(_scaled(A0 + dA, scale).to(value.A.dtype), value.B[len(dB) :])
    return Terms(value.A[len(dA) :], (B0 + dB).to(value.B.dtype))


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    """Small tensors, in every forward of every layer: it is the number of operations that costs."""
    return tensor if scale == 1 else scale * tensor


def _plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, path: str, *factors: Tensor) -> Tensor:
    """In differentiable torch operations alone: what torch.compile, torch.func and second derivatives see."""
    value = _terms(factors, scale, path, x.dtype)
    W, b = cast_to(weight, x), cast_to(bias, x)
    if path == "merged":
        dense = kron_sum(*value)
        if W is not None and _folds(weight, x):
            return F.linear(x, W + dense, b)
        y = F.linear(x, dense)
    else:
        y = apply_terms(flat(x), value, path).reshape(*x.shape[:-1], -1)
    if W is not None:
        return y + F.linear(x, W, b)
    return y if b is None else y + b


def _fast(x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float, path: str, *factors: Tensor) -> Tensor:
    """The same in fewer passes over memory: the weight's product is added into the sum's."""
    value = _terms(factors, scale, path, x.dtype)
    W, b = cast_to(weight, x), cast_to(bias, x)
    rows, fold = flat(x), path == "merged" and _folds(weight, x)
    y = apply_terms(rows, value, path, W if fold else None)
    if b is not None:
        y += b
    if W is not None and not fold:
        y.addmm_(rows, W.mT)
    return y.view(*x.shape[:-1], y.shape[-1])


def _grads(
    rows: Tensor,
    g: Tensor,
    W: Tensor | None,
    scale: float,
    path: str,
    factors: Sequence[Tensor],
    need_x: bool,
    need_factors: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of the rows and of the first two factors, as `Product.grads` wants them."""
    value = _terms(tuple(factors), scale, path, rows.dtype)
    trained = _trained(tuple(factors), scale, path, value)
    fold = path == "merged" and _folds(W, rows)
    wanted = (need_x, need_factors[0], need_factors[1])
    gx, gA, gB = terms_grads(rows, g, value, trained, path, wanted, W if fold else None)
    if gx is not None and W is not None and not fold:
        gx = gx.addmm_(g, W)
    return gx, [gA if gA is None else _scaled(gA, scale), gB, *(None for _ in factors[2:])]


_PRODUCT = Product(_plain, _fast, _grads)
