"""Orders of a weight's channels under which its Kronecker spectrum falls faster."""

from __future__ import annotations

import torch
from torch import Tensor

from krontune.errors import ConfigError, ShapeError

SORTS = ("svd", "norm")
_ITERATIONS = 30


def channel_order(W: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """Permutations of the rows and columns of W that bring alike channels together.

    A Kronecker term repeats one block with a factor each; neighbouring channels that look alike make better blocks. The
    sorted weight is W[rows][:, cols]. Deterministic for a weight.

    >>> W = torch.tensor([[1.0, 5.0], [3.0, 20.0]])
    >>> [order.tolist() for order in channel_order(W, "norm")]
    [[1, 0], [1, 0]]

    Args:
        W: (m, n), any float dtype.
        how: "svd" orders channels by their entry in the leading singular vectors, "norm" by their norm, largest first.

    Returns:
        rows (m,) and cols (n,), int64, on W's device.

    Raises:
        ConfigError: an unknown order.
        ShapeError: W is not a matrix.

    Cost: a few passes over W.
    """
    if how not in SORTS:
        raise ConfigError(f"channel order {how!r} is unknown; allowed: {', '.join(SORTS)}.")
    if W.dim() != 2:
        raise ShapeError(f"W is {tuple(W.shape)}; a matrix (m, n) is needed.")
    with torch.no_grad():
        W = W.detach().float()
        rows, cols = (W.norm(dim=1), W.norm(dim=0)) if how == "norm" else _leading_vectors(W)
        return tuple(v.argsort(descending=True, stable=True) for v in (rows, cols))  # type: ignore[return-value]


def _leading_vectors(W: Tensor) -> tuple[Tensor, Tensor]:
    """The leading singular vectors by power iteration; an order needs no more digits than that gives."""
    generator = torch.Generator(W.device).manual_seed(0)
    v = torch.randn(W.shape[1], generator=generator, device=W.device)
    u = W @ v
    for _ in range(_ITERATIONS):
        u = W @ v
        v = W.mT @ (u / u.norm().clamp_min(torch.finfo(u.dtype).tiny))
        v = v / v.norm().clamp_min(torch.finfo(v.dtype).tiny)
    sign = torch.where(v[v.abs().argmax()] < 0, -1.0, 1.0)
    return u * sign, v * sign
