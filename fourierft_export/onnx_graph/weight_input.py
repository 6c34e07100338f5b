"""What a paired graph takes in place of a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..spectral.delta import Term, add_delta_weight
from ..types import Array


@dataclass(frozen=True, eq=False)
class WeightInput:
    """A weight that the graph takes as an input.

    Attributes:
        name: of the input, and of the expander's output.
        layer: module path.
        base: the base weight as the graph has it.
        transposed: that is (in, out).
    """

    name: str
    layer: str
    base: Array
    transposed: bool

    def adapted(self, terms: Sequence[Term]) -> Array:
        """W + delta_W, rounded once, in the graph's layout."""
        return add_delta_weight(self.base, terms, transposed=self.transposed)
