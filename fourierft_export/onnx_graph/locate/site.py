"""Records of the layers to find in a graph, and of where they are; also used by trace and modes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...bundle.spec import Fingerprint
from ..graph.source import constant_shape
from .quantised import QuantisedLinear
from .uses import Use

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Wanted:
    """A layer to find.

    Attributes:
        name: module path, as the adapter names it.
        shape: (out, in), if known.
        transposed: the base stores its weight as (in, out).
        fingerprint: of the base weight as stored, if known.
    """

    name: str
    shape: tuple[int, int] | None = None
    transposed: bool = False
    fingerprint: Fingerprint | None = None


@dataclass(frozen=True, eq=False)
class Site:
    """A constant, or a part of it, that is a layer's weight.

    Attributes:
        layer: module path, as the adapter names it.
        value: the constant that holds the weight, or a quantised weight's integers.
        shape: (out, in) of the layer.
        transposed: the constant holds the weight as (in, out).
        uses: the consumers that are this layer.
        start: the layer's first output, where its weight is a part of a packed one; else None.
        shared: other consumers use the constant, too, and keep the base's weight.
        quantised: the quantised linear layer that this is; None for a float weight.
        verdict: of the fingerprint: "same", "precision", "different", or None without one.
    """

    layer: str
    value: ir.Value
    shape: tuple[int, int]
    transposed: bool
    uses: tuple[Use, ...] = ()
    start: int | None = None
    shared: bool = False
    quantised: QuantisedLinear | None = None
    verdict: str | None = None

    @property
    def name(self) -> str:
        """The constant's name."""
        return str(self.value.name)

    @property
    def rows(self) -> slice:
        """The layer's outputs among those of the constant."""
        return slice(self.start or 0, (self.start or 0) + self.shape[0])

    @property
    def outputs(self) -> int:
        """Number of outputs of the whole constant, of which the layer's are a part."""
        if self.quantised is not None:
            return self.quantised.shape[0]
        shape = constant_shape(self.value)
        return shape[1 if self.transposed else 0] if shape else 0

    @property
    def consumers(self) -> tuple[tuple[ir.Node, int], ...]:
        """The nodes that take the constant as this layer's weight: (node, index of its input)."""
        return tuple(dict.fromkeys((use.node, use.index) for use in self.uses))

    @property
    def products(self) -> list[tuple[tuple[ir.Node, int], ir.Value]]:
        """Where x comes in (node, index of its input), and the y of the whole constant, per use."""
        if self.quantised is not None:
            return [(self.quantised.fed, self.quantised.y)]
        return [((use.linear, 0), use.linear.outputs[0]) for use in self.uses]

    def describe(self) -> str:
        """The site for a list that a person chooses from."""
        if self.quantised is not None:
            part = "" if self.start is None else f"[{self.rows.start}:{self.rows.stop}]"
            return f"{self.name}{part} {list(self.shape)} ({self.quantised.kind})"
        scopes = sorted({use.path for use in self.uses if use.path})
        return f"{self.name} {list(constant_shape(self.value))}" + (
            f" at {scopes[0]}" if scopes else ""
        )
