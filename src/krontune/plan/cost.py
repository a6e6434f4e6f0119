"""What an adapter costs: parameters, bytes, multiply-adds, training memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from krontune.kron.cost import choose_path, path_work
from krontune.plan.targets import Target
from krontune.tuners.lsr import LsrSpec
from krontune.tuners.soka import SokaSpec

#: Bytes a trained parameter takes while it is trained: itself, its gradient and AdamW's two moments, in float32.
TRAINING_BYTES = {"adapter": 4, "gradients": 4, "optimizer": 8}
FLOAT_BYTES, START_BYTES = 4, 2  # SoKA's frozen start is kept in 16 bits


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA's sizes for one weight, with the interface of LsrSpec and SokaSpec."""

    r: int
    m: int
    n: int
    experts: int | None = None

    @property
    def n_params(self) -> int:
        return (self.experts or 1) * self.r * (self.m + self.n)


Spec = LsrSpec | SokaSpec | LoraSpec


@dataclass(frozen=True)
class ModulePlan:
    """One weight and the adapter it gets."""

    target: Target
    spec: Spec

    @property
    def n_params(self) -> int:
        """Trained parameters."""
        return self.spec.n_params

    @property
    def n_frozen(self) -> int:
        """Values stored with the adapter and not trained: SoKA's starting factors."""
        return self.spec.n_params if isinstance(self.spec, SokaSpec) else 0

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensors in the file: float32, the start's 16 bits, and the int32 orders of sorted channels."""
        is_sorted = isinstance(self.spec, SokaSpec) and self.spec.is_sorted
        orders = (self.target.m + self.target.n) * (self.target.experts or 1) if is_sorted else 0
        return FLOAT_BYTES * (self.n_params + orders) + START_BYTES * self.n_frozen

    def macs(self, tokens: int) -> float:
        """Multiply-adds a token in a forward over `tokens` tokens; every expert is counted as one that is used."""
        spec, sizes = self.spec, self.target.m + self.target.n
        if isinstance(spec, SokaSpec):
            return soka_path(spec, tokens)[1]
        macs: float = spec.r * sizes
        if isinstance(spec, LsrSpec):  # A and B are built once a step
            macs += spec.separation_rank * spec.r * sizes / tokens
        return macs

    def path(self, tokens: int) -> str:
        """How the update is applied; SoKA's as the cost model expects on a CPU in float32."""
        if isinstance(self.spec, SokaSpec):
            return soka_path(self.spec, tokens)[0]
        return "build A, B; B(Ax)" if isinstance(self.spec, LsrSpec) else "B(Ax)"

    @property
    def factors(self) -> str:
        """The factor shapes, for people."""
        spec = self.spec
        if isinstance(spec, SokaSpec):
            return f"{_size(spec.left)} (x) {_size(spec.right)}"
        if isinstance(spec, LsrSpec):
            a = " (x) ".join(map(_size, zip(spec.rank_factors, spec.in_factors)))
            b = " (x) ".join(map(_size, zip(spec.out_factors, spec.rank_factors)))
            return f"A {a}, B {b}"
        return f"A {_size((spec.r, spec.n))}, B {_size((spec.m, spec.r))}"


def training_bytes(modules: Iterable[ModulePlan], n_other: int = 0) -> dict[str, int]:
    """Bytes that training takes beside the base model and the activations, by what holds them.

    Args:
        modules: the adapted weights.
        n_other: parameters trained beside the updates.
    """
    modules = list(modules)
    n_trained, n_frozen = sum(m.n_params for m in modules) + n_other, sum(m.n_frozen for m in modules)
    memory = {name: size * n_trained for name, size in TRAINING_BYTES.items()}
    return memory | ({"frozen start": START_BYTES * n_frozen} if n_frozen else {})


def soka_path(spec: SokaSpec, tokens: int) -> tuple[str, float]:
    """The expected path in training on a CPU in float32, and its multiply-adds a token in a forward: 2K terms.

    Sorted channels keep the sum apart from the weight, whose channels are not sorted.
    """
    fold = not spec.is_sorted
    path = choose_path(tokens, spec.shape, 2 * spec.r, spec.r, fold_weight=fold)
    work = path_work(path, tokens, spec.shape, 2 * spec.r, 0, fold_weight=fold)
    return path, (work.gemm + work.batched) / tokens


def _size(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
