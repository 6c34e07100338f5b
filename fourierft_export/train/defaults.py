"""What is used where the user says nothing: constants found by experiment, and rules from shapes.

A coefficient vector c gives delta_W the root mean square scaling * rms(c) * sqrt(n / 2) / (M N),
while a trained weight's is near 1 / sqrt(N). Their quotient for rms(c) = 1 is the layer's gain;
with the gain and the learning rate alike, weights of any size and n move alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

# Found by experiment; see samples/quality.
GAIN = 0.4  # rms(delta_W) of unit coefficients, against 1 / sqrt(N): decides scaling
LEARNING_RATE = 0.15  # of the spectra, at that gain, if it falls to zero within so many steps:
STEPS = 190
CONSTANT = 0.5  # what a constant rate is of one that falls to zero: both have the same mean
RATE_RANGE = (1 / 8, 3)  # what shorter and longer runs may multiply it by
HEAD_LEARNING_RATE = 5e-3
N_FREQUENCY = 1000
FILL = 4  # a layer's spectrum is left at least so many times larger than n
INIT_ZEROS = True
EPOCHS = 3
BATCH_SIZE = 32
WARMUP = 0.06
AVERAGE = 0.33
MAX_GRAD_NORM = 1.0

SCALING_DIGITS = 4


@dataclass(frozen=True)
class LayerSize:
    """What the rules need of a layer: delta_W's shape (M, N) and its coefficients n."""

    shape: tuple[int, int]
    n_frequency: int

    @property
    def unit_gain(self) -> float:
        """The layer's gain at scaling 1."""
        rows, columns = self.shape
        return math.sqrt(self.n_frequency / 2) / (rows * math.sqrt(columns))


def n_frequency(shapes: list[tuple[int, int]]) -> int:
    """Coefficients per layer that suit every layer of these shapes."""
    return max(1, min(N_FREQUENCY, *(rows * columns // FILL for rows, columns in shapes)))


def spend(budget: int, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Spread `budget` coefficients over layers: alike, but small ones get what they hold."""
    found: dict[str, int] = {}
    left = budget
    for path in sorted(shapes, key=lambda path: math.prod(shapes[path])):
        most = max(1, math.prod(shapes[path]) // FILL)
        found[path] = min(most, left // (len(shapes) - len(found)))
        if found[path] < most:  # from here on all layers have room for the same number
            return found | dict.fromkeys(set(shapes) - set(found), found[path])
        left -= found[path]
    return found


def scaling(sizes: Mapping[str, LayerSize]) -> float:
    """The scaling at which the median layer has the gain `GAIN`, to four digits."""
    value = GAIN / median(size.unit_gain for size in sizes.values())
    return float(f"{value:.{SCALING_DIGITS}g}")


def typical_rate(steps: int | None = None, schedule: str = "linear") -> float:
    """The spectra's highest learning rate at `GAIN`: a long run takes smaller steps."""
    least, most = RATE_RANGE
    longer = min(most, max(least, math.sqrt(STEPS / (steps or STEPS))))
    return LEARNING_RATE * longer * (CONSTANT if schedule == "constant" else 1.0)


def spectrum_rates(
    sizes: Mapping[str, LayerSize],
    scaling: float,
    learning_rate: float | None = None,
    *,
    steps: int | None = None,
    schedule: str = "linear",
    same: bool = False,
) -> dict[str, float]:
    """The highest learning rate of each layer's spectrum: inversely as its gain."""
    typical = median(size.unit_gain for size in sizes.values())
    if learning_rate is None:
        learning_rate = typical_rate(steps, schedule) * GAIN / (abs(scaling) * typical)
    if same:
        return dict.fromkeys(sizes, learning_rate)
    return {path: learning_rate * typical / size.unit_gain for path, size in sizes.items()}
