"""The tensors of a LoRA's or LoKr's file, checked against each other and against the config before any is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from krontune.convert.lokr_factors import lokr_shape
from krontune.errors import CheckpointError, ConfigError

Shape = tuple[int, ...]


class Stored(NamedTuple):
    """The tensors of one module."""

    where: str  # the file and the module, for messages
    shapes: Mapping[str, Shape]  # {name after the module's own: shape}

    def need(self, *tails: str) -> None:
        """Raise CheckpointError unless all of them are there."""
        for tail in tails:
            if tail not in self.shapes:
                raise CheckpointError(f"{self.where}{tail} is missing. The file is incomplete or was edited.")

    def size(self, tail: str, axis: int, size: int, why: str) -> None:
        """Raise CheckpointError unless a tensor has this size there."""
        shape = self.shapes[tail]
        if len(shape) <= axis or shape[axis] != size:
            raise CheckpointError(
                f"{self.where}{tail} has the shape {shape}, and size {size} is needed in place {axis}: {why}. One of "
                "the adapter's files was edited or belongs to another adapter."
            )

    def nothing_but(self, *tails: str) -> None:
        """Raise ConfigError where a tensor is stored that the method's product does not have."""
        others = sorted(set(self.shapes) - set(tails))
        if others:
            raise ConfigError(
                f"{self.where}{others[0]} is more than a plain update of a weight: it cannot be converted."
            )


def lora_matrix(stored: Stored, r: int) -> tuple[int, int]:
    """(m, n) of the weight that a LoRA's tensors are for.

    Raises:
        CheckpointError: one of the pair is missing, or not of rank r.
        ConfigError: there is more than the pair.
    """
    is_embedding = any(tail.startswith(".lora_embedding_") for tail in stored.shapes)
    a, b = (".lora_embedding_A", ".lora_embedding_B") if is_embedding else (".lora_A.weight", ".lora_B.weight")
    stored.need(a, b)
    stored.nothing_but(a, b)
    why = f"adapter_config.json says rank {r}"
    stored.size(a, 0, r, why)
    stored.size(b, 1, r, why)
    m, n = stored.shapes[b][0], math.prod(stored.shapes[a][1:])
    return (n, m) if is_embedding else (m, n)


def lokr_matrix(stored: Stored, r: int | None = None, decompose_factor: int | None = None) -> tuple[int, int]:
    """(m, n) of the weight that a LoKr's tensors are for, a kernel's positions counted as columns.

    Args:
        stored: the module's tensors.
        r: the rank that the config says; None (LyCORIS) takes what the tensors have.
        decompose_factor: the config's; None (LyCORIS) leaves the factors' sizes unchecked.

    Raises:
        CheckpointError: a factor is missing, or of another size than the config or its partner says.
        ConfigError: there is more than the factors.
    """
    parts = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    stored.nothing_but(*(f".lokr_{part}" for part in parts))
    (m1, n1), (m2, n2) = (_side(stored, name, r) for name in ("w1", "w2"))
    if decompose_factor is not None:
        expected = lokr_shape(m1 * m2, n1 * n2, decompose_factor)
        why = f"adapter_config.json has decompose_factor {decompose_factor} for its {m1 * m2} rows"
        stored.size(_left_tail(stored), 0, expected.m1, why)
        if len(stored.shapes.get(".lokr_w2", ())) == 2 and ".lokr_w1" in stored.shapes:  # else n2 may hold a kernel
            why = f"adapter_config.json has decompose_factor {decompose_factor} for its {n1 * n2} columns"
            stored.size(".lokr_w1", 1, expected.n1, why)
    return m1 * m2, n1 * n2


def _left_tail(stored: Stored) -> str:
    return ".lokr_w1" if ".lokr_w1" in stored.shapes else ".lokr_w1_a"


def _side(stored: Stored, name: str, r: int | None) -> tuple[int, int]:
    """Rows and columns of one factor, whole or a product."""
    whole, a, b, core = (f".lokr_{part}" for part in (name, f"{name}_a", f"{name}_b", "t2"))
    if whole in stored.shapes:
        rows, *columns = stored.shapes[whole]
        return rows, math.prod(columns)
    stored.need(a, b)
    is_tucker = name == "w2" and core in stored.shapes
    inner, outer = (0, 1) if is_tucker else (1, 0)
    rank = r or stored.shapes[a][inner]
    why = f"the rank is {rank}"
    for tail, axis in ((a, inner), (b, 0), *(((core, 0), (core, 1)) if is_tucker else ())):
        stored.size(tail, axis, rank, why)
    kernel = math.prod(stored.shapes[core][2:]) if is_tucker else 1
    return stored.shapes[a][outer], stored.shapes[b][1] * kernel
