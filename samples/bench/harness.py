"""What every bar shares: measuring two sides in turn, and the row that comes out."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

THREADS = 2
_LONG_ENOUGH = 0.004  # seconds
Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One measured bar.

    Attributes:
        name, case: the bar, and which of its rows this is.
        ours, peer: both sides, in `unit`.
        ratio: peer / ours where `wants` is ">=", ours / peer where it is "<=".
        bar: what the ratio has to reach.
        wants: ">=" or "<=".
        unit: of `ours` and `peer`.
        peer_is: what the peer is.
    """

    name: str
    case: str
    ours: float
    peer: float
    bar: float
    wants: str
    unit: str
    peer_is: str

    @property
    def ratio(self) -> float:
        return self.peer / self.ours if self.wants == ">=" else self.ours / self.peer

    @property
    def met(self) -> bool:
        return self.ratio >= self.bar if self.wants == ">=" else self.ratio <= self.bar

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "ratio": self.ratio, "met": self.met}


def set_threads() -> None:
    """Two threads for everything: before torch and numpy's libraries are loaded, and in torch."""
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    import torch

    torch.set_num_threads(THREADS)


def faster(name: str, case: str, ours: float, peer: float, bar: float, peer_is: str) -> Row:
    """Times in seconds; ours has to be `bar` times faster."""
    return Row(name, case, ours * 1e3, peer * 1e3, bar, ">=", "ms", peer_is)


def within(
    name: str, case: str, ours: float, peer: float, bar: float, peer_is: str, unit: str = "ms"
) -> Row:
    """Ours may cost `bar` times the peer; times in seconds, other units as they are."""
    factor = 1e3 if unit == "ms" else 1
    return Row(name, case, ours * factor, peer * factor, bar, "<=", unit, peer_is)


def in_turn(
    *sides: Work, seconds: float = 3.0, least: int = 7, most: int = 400, warm_up: int = 2
) -> list[float]:
    """Median seconds of each side: called in turn, so that what disturbs one disturbs all.

    A side that takes less than `_LONG_ENOUGH` is called several times in its turn, as it would be
    in use: otherwise it would find every cache filled by the other side.

    Args:
        sides: called without arguments.
        seconds: go on until this much has passed, but within `least` and `most` rounds.
        least, most: rounds.
        warm_up: calls of each side before the first round.
    """
    for side in sides:
        for _ in range(warm_up):
            side()
    repeats = [_repeats(side) if warm_up else 1 for side in sides]
    taken: list[list[float]] = [[] for _ in sides]
    end = time.perf_counter() + seconds
    while len(taken[0]) < least or (time.perf_counter() < end and len(taken[0]) < most):
        # Each round starts with another side: no side always runs in the other's wake.
        first = len(taken[0]) % len(sides)
        for index in (*range(first, len(sides)), *range(first)):
            start = time.perf_counter()
            for _ in range(repeats[index]):
                sides[index]()
            taken[index].append((time.perf_counter() - start) / repeats[index])
    return [statistics.median(times) for times in taken]


def _repeats(side: Work) -> int:
    start = time.perf_counter()
    side()
    return max(1, min(20, int(_LONG_ENOUGH / (time.perf_counter() - start))))


def check_close(what: str, got: object, expected: object, relative: float) -> None:
    """Stop the bench where two sides do not compute the same thing."""
    a, b = np.asarray(got, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
    if not error <= relative:
        raise SystemExit(f"{what}: the two sides differ by {error:.2e}, more than {relative:.0e}")


def show(rows: Iterable[Row]) -> Iterator[str]:
    """The table, line by line, as rows come in."""
    yield f"{'name':<14} {'case':<34} {'ours':>10} {'peer':>10} {'ratio':>8} {'bar':>8}  met"
    for row in rows:
        yield (
            f"{row.name:<14} {row.case:<34} {row.ours:>10.4g} {row.peer:>10.4g} "
            f"{row.ratio:>8.3g} {row.wants:>3}{row.bar:>5g}  {'yes' if row.met else 'MISSED'}"
            f"   [{row.unit}; {row.peer_is}]"
        )
