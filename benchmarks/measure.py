"""The measuring itself: interleaved times, the peak of the allocator, and the bytes that autograd keeps."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

#: A sample lasts at least this long: shorter work is repeated within it and divided.
MIN_SAMPLE_S = 2e-3
MAX_REPEATS = 200
MAX_ROUNDS = 200
#: Work that takes longer than this is warmed up by one call.
SLOW_S = 0.2


@dataclass
class Work:
    """One contender of a case, set up and ready: what is timed is also what the memory run calls.

    Args:
        step: the unit of work.
        forward: its forward pass with a graph, for the bytes saved for backward; None where there is none.
        known: tensors that live anyway, which saving costs nothing: the input, parameters and buffers.
        facts: numbers that the setup found and the record should hold, such as `n_params`.
    """

    step: Callable[[], object]
    forward: Callable[[], Tensor] | None = None
    known: Sequence[Tensor] = ()
    facts: dict[str, Any] = field(default_factory=dict)


def interleaved(
    steps: Mapping[str, Callable[[], object]],
    repetitions: int,
    device: str = "cpu",
    seed: int = 0,
    give_up: float = float("inf"),
    seconds: float = 0.0,
    aside: Collection[str] = (),
) -> dict[str, dict[str, Any]]:
    """Time every step `repetitions` times, taking turns in an order that is drawn anew each round.

    Args:
        steps: what to time, by label.
        repetitions: rounds, at the least.
        device: "cpu" or "cuda".
        seed: of the order.
        give_up: a step that takes this many times the fastest one's time leaves after three rounds.
        aside: labels that never leave, and that the others are not held against: what all of them contain, say.
        seconds: rounds are added for so long, up to MAX_ROUNDS: what is short is noisy.

    Returns:
        For each label the raw samples of one call each, in seconds: `wall_s`, and `cpu_s`, the process's own time,
        which other programs on the machine do not lengthen; and `calls`, the calls that each sample is the mean of.
    """
    calls = {label: _calls_per_sample(step, device) for label, step in steps.items()}
    samples: dict[str, dict[str, Any]] = {label: {"calls": calls[label], "wall_s": [], "cpu_s": []} for label in steps}
    order, rng = list(steps), random.Random(seed)
    with _no_gc():
        start = time.perf_counter()
        for done in range(MAX_ROUNDS):
            if done >= repetitions and time.perf_counter() - start >= seconds:
                break
            if done == 3:
                times = {label: min(samples[label]["wall_s"]) for label in order if label not in aside}
                order = [label for label in order if times.get(label, 0.0) <= give_up * min(times.values())]
            rng.shuffle(order)
            for label in order:
                wall, cpu = _sample(steps[label], calls[label], device)
                samples[label]["wall_s"].append(float(f"{wall:.5g}"))
                samples[label]["cpu_s"].append(float(f"{cpu:.5g}"))
    return samples


def peak_bytes(step: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes that one call of `step` holds beyond what was held before, by torch's own allocator.

    Deterministic on the CPU: every allocation is counted. What libraries allocate behind torch's back is not seen.
    """
    step()  # what is only allocated once does not count
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def saved_bytes(forward: Callable[[], Tensor], known: Iterable[Tensor]) -> dict[str, int]:
    """What a forward pass keeps for the backward pass beyond tensors that live anyway.

    Returns:
        `saved_bytes`: of all storages kept that belong to none of `known`; `largest_saved`: elements of the largest
        tensor kept in one of them.
    """
    anyway = {t.untyped_storage().data_ptr() for t in known}
    kept: dict[int, int] = {}
    largest = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal largest
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in anyway:
            kept[storage.data_ptr()] = storage.nbytes()
            largest = max(largest, tensor.numel())
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()  # held until the count is done: freed storages would share addresses
        total = sum(kept.values())
        del output
    return {"saved_bytes": total, "largest_saved": largest}


def _calls_per_sample(step: Callable[[], object], device: str) -> int:
    """How many calls make a sample; the calls made to find out are the warm-up."""
    wall, _ = _sample(step, 1, device)
    if wall < SLOW_S:
        wall = min(_sample(step, 1, device)[0] for _ in range(3))
    return max(1, min(MAX_REPEATS, round(MIN_SAMPLE_S / max(wall, 1e-9))))


def _sample(step: Callable[[], object], calls: int, device: str) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


@contextmanager
def _no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
