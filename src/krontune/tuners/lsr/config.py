"""LsrConfig, what a user says, and LsrSpec, what it means for one module."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from krontune.errors import ConfigError, ShapeError
from krontune.kron import split_dim
from krontune.tuners.base_config import KronConfig, check_choice, check_positive_int, whole_number


@dataclass(frozen=True)
class LsrSpec:
    """The sizes of one module's adapter: A is (r, n), B is (m, r), each a sum of `separation_rank` Kronecker products.

    Args:
        separation_rank: s.
        rank_factors: (r_1, ..., r_d), their product is r.
        in_factors: (n_1, ..., n_d), their product is n.
        out_factors: (m_1, ..., m_d), their product is m.
        experts: number of matrices of a 3-D expert weight, each with factors of its own.
    """

    separation_rank: int
    rank_factors: tuple[int, ...]
    in_factors: tuple[int, ...]
    out_factors: tuple[int, ...]
    experts: int | None = None

    def __post_init__(self) -> None:
        for name in ("rank_factors", "in_factors", "out_factors"):
            sizes = tuple(getattr(self, name))
            object.__setattr__(self, name, sizes)
            for size in sizes:
                check_positive_int(name, size)
        check_positive_int("separation_rank", self.separation_rank)
        check_positive_int("experts", self.experts, or_none=True)
        if not len(self.rank_factors) == len(self.in_factors) == len(self.out_factors) >= 1:
            raise ConfigError(f"{self} has factors of different lengths; all three need the same number d >= 1.")

    @property
    def r(self) -> int:
        """The rank of the update."""
        return math.prod(self.rank_factors)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """(m, n), or (experts, m, n)."""
        shape = math.prod(self.out_factors), math.prod(self.in_factors)
        return shape if self.experts is None else (self.experts, *shape)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """{name in the checkpoint: shape}: lsr_A.i is (s, r_i, n_i), lsr_B.i is (s, m_i, r_i)."""
        lead = (self.separation_rank,) if self.experts is None else (self.experts, self.separation_rank)
        a = {
            f"lsr_A.{i}": (*lead, r, n) for i, (r, n) in enumerate(zip(self.rank_factors, self.in_factors, strict=True))
        }
        b = {
            f"lsr_B.{i}": (*lead, m, r)
            for i, (m, r) in enumerate(zip(self.out_factors, self.rank_factors, strict=True))
        }
        return a | b

    @property
    def n_params(self) -> int:
        """Trainable parameters: (experts *) s * sum_i r_i * (n_i + m_i)."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())


@dataclass
class LsrConfig(KronConfig):
    """LSR-Adapt: W' = W + alpha * B A, with A = sum_k A1_k (x) A2_k and B = sum_k B1_k (x) B2_k.

    The adapter of arXiv:2502.13568. Takes the fields of KronConfig as well, which mean what they mean in
    LoraConfig. An LSR adapter is a LoRA of rank r with s * sum_i r_i * (n_i + m_i) parameters a module.

    Args:
        r: LoRA rank of the update, shared out over the factors: 4 is 2 x 2, 16 is 4 x 4.
        separation_rank: s, the number of Kronecker terms of A and of B.
        n_factors: d, the number of factors of a term (Definition 3.2); 2 is the paper's and the fast path.
        factor_shapes: "auto" splits every dimension into balanced factors, largest first (768 into 32 x 24). A dict
            {size: factors} says otherwise for dimensions of that size, for r too: {768: (48, 16)}.
        init_weights: the start. True and "zero": A random, B zero, so that the update is exactly zero. The best
            learning rate falls as s grows (on MiniLM, r=16: 6e-3 at s=7, 2e-3 at s=24). "paper": every factor ~
            N(0, 0.01^2), the scale of the authors' start; the update is tiny, not zero. "gradient": A from the top
            right singular vectors of the mean gradient; call preprocess_gradient first. False: everything random,
            not the identity.

    Raises:
        ConfigError: a setting out of range.
        ShapeError: factor_shapes that do not multiply to their size.

    >>> config = LsrConfig(r=4, separation_rank=16, target_modules=["q_proj", "v_proj"])
    >>> config.spec_for(768, 768).n_params          # LoRA r=8 has 12288
    3584
    """

    r: int = field(default=4, metadata={"help": "LoRA rank of the update."})
    separation_rank: int = field(default=16, metadata={"help": "Number of Kronecker terms of each of A and B."})
    n_factors: int = field(default=2, metadata={"help": "Number of factors of a Kronecker term."})
    factor_shapes: str | dict = field(
        default="auto", metadata={"help": "'auto', or {size: its factors} for dimensions to be split otherwise."}
    )
    init_weights: bool | str = field(
        default=True, metadata={"help": "True, 'zero', 'paper', 'gradient', or False for a random non-identity."}
    )

    method = "LSR"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.r = check_positive_int("r", self.r)
        self.separation_rank = check_positive_int("separation_rank", self.separation_rank)
        self.n_factors = check_positive_int("n_factors", self.n_factors)
        check_choice("init_weights", self.init_weights, (True, False, "zero", "paper", "gradient"))
        if self.factor_shapes != "auto":
            self.factor_shapes = self._parse_factor_shapes()
            for size, factors in self.factor_shapes.items():
                self._check_split(size, factors)

    def _parse_factor_shapes(self) -> dict[int, tuple[int, ...]]:
        shapes: Any = self.factor_shapes
        try:  # JSON turns integer keys into strings, and tuples into lists
            return {
                int(size) if isinstance(size, str) else whole_number(size): tuple(map(whole_number, factors))
                for size, factors in shapes.items()
            }
        except (AttributeError, TypeError, ValueError):
            raise ConfigError(
                f"factor_shapes={shapes!r} is not allowed. It is 'auto', or a dict like {{768: (32, 24)}}."
            ) from None

    def _check_split(self, size: int, factors: tuple[int, ...]) -> None:
        if len(factors) != self.n_factors or math.prod(factors) != size or min(factors) < 1:
            raise ShapeError(
                f"factor_shapes says {size}: {factors}, which is not {self.n_factors} factors with the product {size}. "
                f"For instance {split_dim(size, self.n_factors)}."
            )

    def split(self, size: int) -> tuple[int, ...]:
        """The factors of a dimension: the user's, else balanced ones."""
        if isinstance(self.factor_shapes, dict) and size in self.factor_shapes:
            return self.factor_shapes[size]
        return split_dim(size, self.n_factors)

    def spec_for(self, m: int, n: int, r: int | None = None, experts: int | None = None) -> LsrSpec:
        """What this config means for a weight of (m, n), or for `experts` of them."""
        return LsrSpec(self.separation_rank, self.split(r or self.r), self.split(n), self.split(m), experts)

    def spec(self, name: str) -> LsrSpec:
        """The resolved sizes of a module."""
        entry: dict[str, Any] = (self.resolved or {})[name]
        return LsrSpec(**entry["spec"])
