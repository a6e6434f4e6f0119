"""Work on many weights, shared out over the ranks of torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from krontune.errors import ConfigError, KrontuneError

T = TypeVar("T")
R = TypeVar("R")

_spreading: ContextVar[bool] = ContextVar("krontune_spreading", default=False)


@contextmanager
def spread_over_ranks() -> Iterator[None]:
    """Share the KPSVDs of a new SoKA adapter out over the ranks of torch.distributed, and their results with all.

    It has to be asked for, as every rank must then add the same adapter to the same model: a rank that does not would
    leave the others waiting. Without a process group, or with one rank, nothing changes.

    >>> with spread_over_ranks():
    ...     pass  # model = get_peft_model(model, SokaConfig(r=8)), on every rank
    """
    token = _spreading.set(True)
    try:
        yield
    finally:
        _spreading.reset(token)


@torch.no_grad()
def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of the ranks' tensors, summed in float32, with equal bits on all; the tensor itself without a group."""
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world == 1:
        return tensor
    total = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
    dist.all_reduce(total)
    return (total / world).to(tensor.dtype)


def shared_out(items: Mapping[str, T], work: Callable[[T], R], watch: Callable = iter) -> dict[str, R]:
    """{name: work(item)}; within `spread_over_ranks` every rank does its share, and all get the same bits.

    Args:
        items: equal names in equal order on every rank.
        work: its results are sent between the ranks: tensors in them are on the CPU.
        watch: wraps the items as they are done, for a progress bar.

    Raises:
        KrontuneError: on every rank, where `work` raised one on any.
        ConfigError: on every rank, where the names differ.
    """
    world = dist.get_world_size() if _spreading.get() and dist.is_available() and dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    done: dict[str, R] | KrontuneError
    try:
        done = {name: work(item) for name, item in watch(list(items.items())[rank::world])}
    except KrontuneError as error:  # the other ranks wait for this one's share
        done = error
    everyone = [(list(items), done)]
    if world > 1:
        everyone = [everyone[0]] * world
        dist.all_gather_object(everyone, (list(items), done))
    for names, found in everyone:
        if isinstance(found, KrontuneError):
            raise found
        if names != everyone[0][0]:
            raise ConfigError(
                f"the ranks adapt different modules: one has {len(names)}, rank 0 has {len(everyone[0][0])}. Within "
                "spread_over_ranks every rank must add the same adapter to the same model."
            )
    results = {name: result for _, found in everyone if isinstance(found, dict) for name, result in found.items()}
    return {name: results[name] for name in items}
