"""SokaConfig, what a user says, and SokaSpec, what it means for one module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from krontune.errors import ConfigError
from krontune.kron import SORTS, FactorShape, KronShape, resolve_shape
from krontune.tuners.base_config import KronConfig, check_choice, check_number, check_positive_int, whole_number

RULES = ("fixed", "energy", "elbow", "spectrum", "budget")


@dataclass(frozen=True)
class SokaSpec:
    """The sizes of one module's adapter: K = r terms A_k (x) B_k.

    Args:
        r: K, the number of Kronecker terms.
        left: (m1, n1), the shape of each A_k.
        right: (m2, n2), the shape of each B_k.
        experts: number of matrices of a 3-D expert weight, each with terms of its own.
        is_sorted: whether the terms are of the weight with its channels in another order, which is stored.
        start_dtype: of the frozen A0 and B0.
    """

    r: int
    left: tuple[int, int]
    right: tuple[int, int]
    experts: int | None = None
    is_sorted: bool = False
    start_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        check_choice("start_dtype", self.start_dtype, ("bfloat16", "float32"))
        check_positive_int("r", self.r)
        check_positive_int("experts", self.experts, or_none=True)
        for name in ("left", "right"):
            sizes = tuple(getattr(self, name))
            object.__setattr__(self, name, sizes)
            if len(sizes) != 2:
                raise ConfigError(f"{name}={sizes} is not a pair of sizes.")
            for size in sizes:
                check_positive_int(name, size)

    @property
    def shape(self) -> KronShape:
        """Both factor shapes in one."""
        return KronShape(*self.left, *self.right)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """(m, n), or (experts, m, n)."""
        shape = (self.shape.m, self.shape.n)
        return shape if self.experts is None else (self.experts, *shape)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """{name in the checkpoint: shape}: the trained soka_dA and soka_dB, the frozen soka_A0 and soka_B0, and, where
        the channels are sorted, a ChannelOrder's rows and cols.
        """
        experts = () if self.experts is None else (self.experts,)
        left, right = (*experts, self.r, *self.left), (*experts, self.r, *self.right)
        factors = {"soka_dA": left, "soka_dB": right, "soka_A0": left, "soka_B0": right}
        orders = {"soka_rows": (*experts, self.shape.m), "soka_cols": (*experts, self.shape.n)}
        return factors | orders if self.is_sorted else factors

    @property
    def n_params(self) -> int:
        """Trainable parameters: (experts *) K * (m1*n1 + m2*n2)."""
        return (self.experts or 1) * self.r * self.shape.n_params


@dataclass
class SokaConfig(KronConfig):
    """SoKA: W' = W + alpha * (sum_k A_k (x) B_k - sum_k A0_k (x) B0_k), A and B started at A0 and B0.

    The update of arXiv:2506.15251, with the starting terms kept beside the weight in place of being subtracted
    from it: the base weight is never changed. Takes the fields of KronConfig as well. r * (m1*n1 + m2*n2) parameters a
    module; the frozen start, of the same size, is stored with the adapter.

    Args:
        r: K, the number of Kronecker terms; 8 if None. With a rank_selection rule, the largest K that it may choose; 32
            if None. rank_pattern sets the same per module.
        rank_selection: how K is chosen for each module. "fixed": r. "energy": the least K whose terms hold
            energy_threshold of ||W||_F^2. "elbow": the elbow of the spectrum, where it has one. "spectrum": the smaller
            of the two. "budget": "energy" with the largest threshold, one for all modules, that `budget`
            parameters in total pay for. Where a rule finds nothing, K is r, and `resolved` says so.
        energy_threshold: theta, in (0, 1]; for "energy" and "spectrum".
        budget: trainable parameters in total; for "budget".
        min_r: the smallest K that a rule may choose.
        factor_shape: shape of the factors. "auto": the family of p = 4 (A is (m/p, p), B is (p, n/p)), or of the
            largest p below that divides both sizes. An int: the family of that p; 1 is a plain low rank. "square":
            near-square factors, the paper's. (m1, n1): A's shape, the same for every module.
        channel_sort: None, or an order for the outputs and inputs of every weight before it is split into terms: "norm"
            by their norm, "svd" by their entry in the leading singular vectors. Alike channels then stand together,
            and the same terms hold more of the weight. The orders are stored with the adapter; the layer's own inputs
            and outputs keep theirs.
        init_weights: the start. True and "principal": the KPSVD of the weight. "zero": A0 random, B0 = 0, as LoRA
            starts. "gradient": A0 from the mean gradient's KPSVD, B0 = 0; call preprocess_gradient first. The update
            is exactly zero in all of these. False: random, not the identity.

    Raises:
        ConfigError: a setting out of range, or one that has no effect.

    >>> config = SokaConfig(r=8, target_modules=["q_proj", "v_proj"])
    >>> config.spec_for(768, 768).n_params          # as LoRA r=8
    12288
    """

    r: int | None = field(default=None, metadata={"help": "Number of Kronecker terms, or a rule's largest."})
    rank_selection: str = field(default="fixed", metadata={"help": f"One of {', '.join(RULES)}."})
    energy_threshold: float = field(default=0.9, metadata={"help": "Share of the weight's energy to hold, in (0, 1]."})
    budget: int | None = field(default=None, metadata={"help": "Trainable parameters in total, for 'budget'."})
    min_r: int = field(default=1, metadata={"help": "The smallest rank that a rule may choose."})
    factor_shape: FactorShape = field(default="auto", metadata={"help": "'auto', 'square', an int p, or (m1, n1)."})
    channel_sort: str | None = field(default=None, metadata={"help": "None, 'norm' or 'svd'."})
    init_weights: bool | str = field(
        default=True, metadata={"help": "True, 'principal', 'zero', 'gradient', or False for a random non-identity."}
    )

    method = "SOKA"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.r = check_positive_int("r", self.r, or_none=True)
        self.min_r = check_positive_int("min_r", self.min_r)
        self.budget = check_positive_int("budget", self.budget, or_none=True)
        check_choice("rank_selection", self.rank_selection, RULES)
        check_choice("channel_sort", self.channel_sort, (None, *SORTS))
        check_choice("init_weights", self.init_weights, (True, False, "principal", "zero", "gradient"))
        check_number("energy_threshold", self.energy_threshold)
        self.factor_shape = self._parse_shape()
        self._check_rule()

    def _parse_shape(self) -> FactorShape:
        shape: Any = self.factor_shape
        if isinstance(shape, str) and shape in ("auto", "square"):
            return cast(FactorShape, shape)
        is_pair = isinstance(shape, (list, tuple)) and len(shape) == 2  # JSON has no tuples
        try:
            sizes = [whole_number(size) for size in (shape if is_pair else [shape])]
        except TypeError:
            sizes = [0]
        if min(sizes) < 1:
            raise ConfigError(
                f"factor_shape={shape!r} is not allowed. It is 'auto', 'square', an integer p of at least 1, or a pair "
                "(m1, n1) of them."
            )
        return (sizes[0], sizes[1]) if is_pair else sizes[0]

    def _check_rule(self) -> None:
        if not 0 < self.energy_threshold <= 1:
            raise ConfigError(f"energy_threshold={self.energy_threshold} is not allowed. It must be in (0, 1].")
        if self.rank_selection not in ("energy", "spectrum") and self.energy_threshold != 0.9:
            raise ConfigError(
                f"energy_threshold has no effect with rank_selection={self.rank_selection!r}, only with 'energy' and "
                "'spectrum'."
            )
        if (self.rank_selection == "budget") != (self.budget is not None):
            raise ConfigError(
                f"budget={self.budget} and rank_selection={self.rank_selection!r} do not go together. "
                "Set rank_selection='budget' and budget=<number of parameters>, or neither."
            )
        if self.rank_selection == "fixed" and self.min_r != 1:
            raise ConfigError(f"min_r={self.min_r} has no effect with rank_selection='fixed'. Set r.")
        if self.min_r > self.max_r:
            raise ConfigError(f"min_r={self.min_r} is above the largest rank allowed, r={self.max_r}.")

    @property
    def max_r(self) -> int:
        """K where it is fixed, else the largest K that a rule may choose."""
        return self.r or (8 if self.rank_selection == "fixed" else 32)

    def spec_for(self, m: int, n: int, r: int | None = None, experts: int | None = None, name: str = "") -> SokaSpec:
        """What this config means for a weight of (m, n), or `experts` of them; K is clamped to what the shapes hold."""
        shape = resolve_shape(m, n, self.factor_shape, name)
        rank, is_sorted = min(r or self.max_r, shape.max_terms), self.channel_sort is not None
        return SokaSpec(rank, (shape.m1, shape.n1), (shape.m2, shape.n2), experts, is_sorted)

    def spec(self, name: str) -> SokaSpec:
        """The resolved sizes of a module."""
        entry: dict[str, Any] = (self.resolved or {})[name]
        return SokaSpec(**entry["spec"])
