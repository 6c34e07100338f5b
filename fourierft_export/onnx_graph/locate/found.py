"""What is looked for in a graph, and what was found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...bundle.spec import Fingerprint
from ...models.names import Bridge
from .consumers import Use
from .site import Site

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Wanted:
    """A layer to find.

    Attributes:
        name: module path, in the adapter's language.
        shape: (out, in), if known.
        transposed: the base stores its weight as (in, out).
        fingerprint: of the base weight as stored, if known.
    """

    name: str
    shape: tuple[int, int] | None = None
    transposed: bool = False
    fingerprint: Fingerprint | None = None


@dataclass(frozen=True, eq=False)
class Candidate:
    """A constant matrix of floats that the graph uses.

    Attributes:
        value: an initializer, or the output of a Constant node.
        shape: as the graph holds it.
        uses: those as the weight of a linear layer.
    """

    value: ir.Value
    shape: tuple[int, int]
    uses: tuple[Use, ...]

    @property
    def name(self) -> str:
        """The constant's name."""
        return str(self.value.name)

    def describe(self) -> str:
        """The candidate for a list that a person chooses from."""
        scopes = sorted({use.path for use in self.uses if use.path})
        return f"{self.name} {list(self.shape)}" + (f" at {scopes[0]}" if scopes else "")


@dataclass
class Found:
    """What a search gave.

    Attributes:
        sites: layer -> its sites; several where the graph holds the weight more than once.
        bridge: from the adapter's paths to the graph's.
        missing: layer -> why it has none, with the candidates.
    """

    sites: dict[str, list[Site]] = field(default_factory=dict)
    bridge: Bridge = field(default_factory=Bridge)
    missing: dict[str, str] = field(default_factory=dict)
