"""The cost model behind path="auto": which way to multiply a Kronecker sum is cheapest on a device.

A path is a handful of matrix products and copies. A product of (M, K) and (K, N) makes M*N*K multiply-adds and touches
M*N + N*K + M*K elements. So a path's cost is linear in five counts (`Work`), and a device is five prices (`Device`), in
units of one multiply-add of a large matrix product. `python -m benchmarks calibrate` fits them by least squares.
"""

from __future__ import annotations

from typing import NamedTuple

from krontune.kron.paths import PATHS
from krontune.kron.shapes import KronShape


class Work(NamedTuple):
    """What a path does beyond the frozen weight's own products."""

    gemm: float = 0.0  # multiply-adds in single matrix products
    batched: float = 0.0  # multiply-adds in products of one small matrix for each token or block
    touched: float = 0.0  # elements that the products read and write
    copied: float = 0.0  # elements moved by permuting copies
    calls: float = 0.0  # operations launched

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(*(a + b for a, b in zip(self, other)))


class Device(NamedTuple):
    """The price of each count of `Work`, in multiply-adds of a large matrix product."""

    gemm: float = 1.0
    batched: float = 1.0
    touched: float = 1.0
    copied: float = 1.0
    calls: float = 1.0


#: The prices, by device type. CPU: fitted on one core of an AVX2 server, to an
#: earlier run than the one in docs/performance.md, which gives their regret. CUDA: from data sheets (100 multiply-adds
#: in the time that one element of memory traffic takes, 5 us a launch), not measured; calibrate to refine.
DEVICES: dict[str, Device] = {
    "cpu": Device(gemm=1.0, batched=1.2, touched=12.0, copied=40.0, calls=2e5),
    "cuda": Device(gemm=1.0, batched=1.5, touched=100.0, copied=250.0, calls=1e9),
}


def prices_of(device_type: str) -> Device:
    """The prices of a torch device type; those of "cuda" for accelerators without an entry."""
    return DEVICES.get(device_type, DEVICES["cuda"])


def choose_path(
    tokens: int,
    shape: KronShape,
    terms: int,
    trained: int = 0,
    *,
    fold_weight: bool = True,
    prices: Device = DEVICES["cpu"],
) -> str:
    """The cheapest path. See `path_costs`, whose least entry it is.

    >>> choose_path(2048, KronShape(192, 4, 4, 192), terms=16, trained=8)
    'b-fold'
    >>> choose_path(2048, KronShape(32, 32, 24, 24), terms=32, trained=16)
    'merged'
    """
    costs = path_costs(tokens, shape, terms, trained, fold_weight=fold_weight, prices=prices)
    best = PATHS[0]
    for path in PATHS[1:]:
        best = path if costs[path] < costs[best] else best
    return best


def path_costs(
    tokens: int,
    shape: KronShape,
    terms: int,
    trained: int = 0,
    *,
    fold_weight: bool = True,
    prices: Device = DEVICES["cpu"],
) -> dict[str, float]:
    """The modelled cost of every path beyond the frozen weight's own products, in multiply-adds.

    Args:
        tokens: T, rows of x.
        shape: of a term.
        terms: terms multiplied in the forward and for x's gradient (SoKA's update has 2K).
        trained: terms whose factors get a gradient; 0 for a forward without a backward.
        fold_weight: the merged path adds the sum into the frozen weight instead of making a product of its own.
        prices: of the device; see `prices_of`.
    """
    return {
        path: sum(w * p for w, p in zip(path_work(path, tokens, shape, terms, trained, fold_weight), prices))
        for path in PATHS
    }


def path_work(path: str, T: int, shape: KronShape, K: int, k: int, fold_weight: bool = True) -> Work:
    """The counts of one path: T tokens, K terms, k of them trained (0: forward alone)."""
    if path == "merged":
        return _merged_work(T, shape, K, k, fold_weight)
    # The a side is the b side of the transposed problem, run backwards: what one does first the other does last.
    m1, n1, m2, n2 = shape
    if path.startswith("b"):
        last, middle = (T * n1, m2, n2), (T, m1, n1, m2)
        in_copied, out_copied = 0, T * shape.m
    else:
        last, middle = (T * m1, n2, m2), (T, n1, m1, n2)
        in_copied, out_copied = T * shape.n, 0
    fold = path.endswith("fold")

    def last_axis(terms: int) -> Work:
        rows, small, inner = last
        return _gemm(rows, terms * small, inner)

    def middle_axis(terms: int) -> Work:
        tokens, outer, inner, columns = middle
        if not fold:
            return _bmm(tokens, outer, columns, inner * terms)
        return _gemm(tokens * columns, outer, inner * terms) + _copy(tokens * columns * inner * terms)

    pair = last_axis(K) + middle_axis(K)
    edge = _copy(in_copied + out_copied) if fold else Work()
    if not k:
        return pair + edge
    tokens, _, inner, columns = middle
    z_copy = Work() if fold else _copy(tokens * columns * inner * k)
    recomputed = last_axis(k) if path.startswith("b") else middle_axis(k)  # Z, which is not kept
    factors = recomputed + last_axis(k) + middle_axis(k) + z_copy + _copy(in_copied + out_copied)
    return pair + edge + pair + factors


def _merged_work(T: int, shape: KronShape, K: int, k: int, fold_weight: bool) -> Work:
    m1, n1, m2, n2 = shape
    build = _gemm(m1 * n1, m2 * n2, K) + _copy(shape.m * shape.n)
    product = Work() if fold_weight else _gemm(T, shape.m, shape.n)
    if not k:
        return build + product
    gradient = _gemm(shape.m, shape.n, T) + _copy(shape.m * shape.n)
    factors = _gemm(k, m1 * n1, m2 * n2) + _gemm(k, m2 * n2, m1 * n1)
    return build + product + build + product + gradient + factors


def _gemm(M: float, N: float, K: float) -> Work:
    return Work(gemm=M * N * K, touched=M * N + N * K + M * K, calls=1)


def _bmm(batch: float, M: float, N: float, K: float) -> Work:
    return Work(batched=batch * M * N * K, touched=batch * (M * N + N * K + M * K), calls=1)


def _copy(elements: float) -> Work:
    return Work(copied=elements, calls=1 if elements else 0)
