"""Factor shapes: how a weight of (m, n) is split into the factors (m1, n1) and (m2, n2) of a Kronecker term."""

from __future__ import annotations

import math
from functools import cache
from typing import Literal, NamedTuple

from krontune.errors import ShapeError

FactorShape = Literal["auto", "square"] | int | tuple[int, int]

#: The largest p of the family that "auto" takes: beyond it a term's cost grows and its matrix rank rarely pays.
AUTO_P = 4


class KronShape(NamedTuple):
    """The shape of one Kronecker term: A is (m1, n1), B is (m2, n2), A (x) B is (m, n) = (m1*m2, n1*n2)."""

    m1: int
    n1: int
    m2: int
    n2: int

    @property
    def m(self) -> int:
        """Rows of the weight (its output size)."""
        return self.m1 * self.m2

    @property
    def n(self) -> int:
        """Columns of the weight (its input size)."""
        return self.n1 * self.n2

    @property
    def n_params(self) -> int:
        """Parameters of one term."""
        return self.m1 * self.n1 + self.m2 * self.n2

    @property
    def max_terms(self) -> int:
        """The number of terms that reproduces any (m, n) matrix: min(R(W).shape)."""
        return min(self.m1 * self.n1, self.m2 * self.n2)


@cache
def split_dim(size: int, d: int = 2) -> tuple[int, ...]:
    """Split a size into d balanced factors, largest first: the d divisors with product `size` and the least sum.

    A prime gives (size, 1, ...): it works, but a factor of 1 carries no structure.

    >>> split_dim(768), split_dim(4), split_dim(7), split_dim(768, 3)
    ((32, 24), (2, 2), (7, 1), (12, 8, 8))

    Args:
        size: the size to split, >= 1.
        d: the number of factors, >= 1.

    Raises:
        ShapeError: size or d is below 1.
    """
    if size < 1 or d < 1:
        raise ShapeError(f"cannot split size {size} into {d} factors; both must be at least 1.")
    if d == 1:
        return (size,)
    splits = [(f, *split_dim(size // f, d - 1)) for f in _divisors(size)]
    return min((tuple(sorted(s, reverse=True)) for s in splits), key=sum)


def square_shape(m: int, n: int) -> KronShape:
    """Near-square factors, the papers' choice: both sizes split as evenly as they go.

    >>> square_shape(768, 768)
    KronShape(m1=32, n1=32, m2=24, n2=24)
    """
    (m1, m2), (n1, n2) = split_dim(m), split_dim(n)
    return KronShape(m1, n1, m2, n2)


def family_shape(m: int, n: int, p: int) -> KronShape:
    """The p-family: A (m/p, p), B (p, n/p), m + n parameters a term for every p, matrix rank up to p^2.

    p = 1 is plain low rank (a LoRA). A term costs p*(m + n) multiply-adds a token.

    >>> family_shape(768, 576, 4)
    KronShape(m1=192, n1=4, m2=4, n2=144)

    Raises:
        ShapeError: p does not divide both m and n.
    """
    if p < 1 or m % p or n % p:
        raise ShapeError(_p_message(m, n, p))
    return KronShape(m // p, p, p, n // p)


def resolve_shape(m: int, n: int, factor_shape: FactorShape = "auto", name: str = "") -> KronShape:
    """The factor shapes that a setting means for a weight of (m, n).

    >>> resolve_shape(768, 768), resolve_shape(768, 510)
    (KronShape(m1=192, n1=4, m2=4, n2=192), KronShape(m1=256, n1=3, m2=3, n2=170))

    Args:
        m: rows of the weight.
        n: columns of the weight.
        factor_shape: "auto" (the p = 4 family, or the largest p below 4 that divides both sizes; p = 1 is plain low
            rank), "square" (near-square factors), an int p (that member of the family) or (m1, n1), A's shape.
        name: the module's name, for the error.

    Raises:
        ShapeError: the shape does not divide (m, n), or the setting is unknown; names the nearest that divide.
    """
    where = f"{name or 'the weight'} is ({m}, {n}); "
    if factor_shape == "auto":
        return family_shape(m, n, max(p for p in range(1, AUTO_P + 1) if m % p == 0 and n % p == 0))
    if factor_shape == "square":
        return square_shape(m, n)
    if isinstance(factor_shape, int) and not isinstance(factor_shape, bool):
        if factor_shape < 1 or m % factor_shape or n % factor_shape:
            raise ShapeError(where + _p_message(m, n, factor_shape))
        return family_shape(m, n, factor_shape)
    if isinstance(factor_shape, (tuple, list)) and len(factor_shape) == 2:
        return _explicit_shape(m, n, *factor_shape, where=where)
    raise ShapeError(where + f'factor_shape {factor_shape!r} is not one of "auto", "square", an int p or (m1, n1).')


def _explicit_shape(m: int, n: int, m1: int, n1: int, where: str) -> KronShape:
    if m1 >= 1 and n1 >= 1 and m % m1 == 0 and n % n1 == 0:
        return KronShape(m1, n1, m // m1, n // n1)
    nearest = [(a, b) for a in _nearest(_divisors(m), m1) for b in _nearest(_divisors(n), n1)]
    wrong = f"out={m}" if m1 < 1 or m % m1 else f"in={n}"
    raise ShapeError(
        where + f"factor_shape ({m1}, {n1}) does not divide {wrong}. Nearest that do: {', '.join(map(str, nearest))}. "
        'Or leave it at "auto".'
    )


def _p_message(m: int, n: int, p: int) -> str:
    nearest = _nearest(_divisors(math.gcd(m, n)), p)
    return f"p = {p} does not divide both {m} and {n}. Nearest that do: {', '.join(map(str, nearest))}."


def _nearest(values: list[int], wanted: int) -> list[int]:
    """The wanted value if it is there, else its neighbours below and above."""
    if wanted in values:
        return [wanted]
    below, above = [v for v in values if v < wanted], [v for v in values if v > wanted]
    return below[-1:] + above[:1]


@cache
def _divisors(size: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    return small + [size // d for d in reversed(small) if d * d != size]
