"""A value made from tensors and kept for as long as these hold the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Remembered(Generic[T]):
    """Keeps what was made last, with a copy of what it was made from.

    The numbers themselves are compared each time, not versions or addresses: a write through `.data`, or by a kernel
    that torch does not know of, changes neither. An adapter's few thousand numbers compare in microseconds on the CPU;
    elsewhere the comparison would wait for the device, so that nothing should be remembered there.
    """

    def __init__(self) -> None:
        self._kept: tuple[list[Tensor], object, T] | None = None

    def get(self, tensors: Sequence[Tensor], others: object, make: Callable[[], T]) -> T:
        """make(), or what it returned last if it would return the same now.

        Args:
            tensors: the tensors that `make` depends on.
            others: whatever else it depends on, to be compared with ==.
            make: a function of these.
        """
        kept = self._kept
        if kept is not None and kept[1] == others and all(map(_same, kept[0], tensors)):
            return kept[2]
        value = make()
        self._kept = [t.detach().clone() for t in tensors], others, value
        return value


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
