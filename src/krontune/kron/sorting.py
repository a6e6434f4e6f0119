"""Orders of a weight's channels under which its Kronecker spectrum falls faster."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from krontune.errors import ConfigError, ShapeError

SORTS = ("svd", "norm")
_ITERATIONS = 30


class ChannelOrder(NamedTuple):
    """How the channels of a weight W stand in the sorted weight S, as a product with S wants to know it.

    S x, for an x in W's order, is then (S @ x[cols])[rows]: two gathers and no search.
    """

    rows: Tensor  # (..., m) int32: row i of W is row rows[i] of S
    cols: Tensor  # (..., n) int32: column j of S is column cols[j] of W

    def sort(self, W: Tensor) -> Tensor:
        """W -> S, (..., m, n) each."""
        return _gathered(W, self.rows.argsort(-1), self.cols)

    def unsort(self, S: Tensor) -> Tensor:
        """S -> W, bit for bit."""
        return _gathered(S, self.rows, self.cols.argsort(-1))


def channel_order(W: Tensor, how: str) -> ChannelOrder:
    """The order of the rows and columns of W that brings alike channels together.

    A Kronecker term repeats one block with a factor each; neighbouring channels that look alike make better blocks.
    Deterministic for a weight.

    >>> W = torch.tensor([[1.0, 5.0], [3.0, 20.0]])
    >>> order = channel_order(W, "norm")
    >>> order.sort(W).tolist(), order.unsort(order.sort(W)).tolist() == W.tolist()
    ([[20.0, 3.0], [5.0, 1.0]], True)

    Args:
        W: (m, n), or (experts, m, n) for an order each; any float dtype.
        how: "svd" orders channels by their entry in the leading singular vectors, "norm" by their norm, largest first.

    Returns:
        The order, on W's device.

    Raises:
        ConfigError: an unknown order.
        ShapeError: W is not a matrix.

    Cost: a few passes over W.
    """
    if how not in SORTS:
        raise ConfigError(f"channel order {how!r} is unknown; allowed: {', '.join(SORTS)}.")
    if W.dim() not in (2, 3):
        raise ShapeError(f"W is {tuple(W.shape)}; a matrix (m, n), or one for each expert, is needed.")
    if W.dim() == 3:
        orders = [channel_order(matrix, how) for matrix in W]
        return ChannelOrder(*(torch.stack(same) for same in zip(*orders, strict=True)))
    with torch.no_grad():
        W = W.detach().float()
        keys = (W.norm(dim=1), W.norm(dim=0)) if how == "norm" else _leading_vectors(W)
        rows, cols = (key.argsort(descending=True, stable=True) for key in keys)
        return ChannelOrder(rows.argsort().int(), cols.int())


def _gathered(W: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """W[rows][:, cols], for every matrix of a batch."""
    W = torch.take_along_dim(W, rows.long()[..., :, None], -2)
    return torch.take_along_dim(W, cols.long()[..., None, :], -1)


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
