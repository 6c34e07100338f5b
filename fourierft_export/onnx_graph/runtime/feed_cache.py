"""The cache of what a swappable or paired graph is fed per adapter, filled at its first run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from ...types import Array
from ..adapter_interface import Interface
from .exported_file import WeightInput, expand_weights
from .ort_session import to_value


class KeptValues:
    """ONNX Runtime values per adapter, least recently used first; not safe for several threads.

    Args:
        interface: the adapter inputs.
        weights: of mode paired, the weights that the graph takes in place of the groups' inputs.
        device: where the values go: ONNX Runtime's device name and number.
        memory_limit: bytes of values to keep, for weights only.
    """

    def __init__(
        self,
        interface: Interface,
        weights: Sequence[WeightInput] | None,
        device: tuple[str, int],
        memory_limit: int | None,
    ) -> None:
        self._interface = interface
        self._weights = weights
        self._device = device
        self._limit = None if weights is None else memory_limit
        self._kept: OrderedDict[str | None, dict[str, Any]] = OrderedDict()
        self._sizes: dict[str | None, int] = {}

    @property
    def sizes(self) -> dict[str | None, int]:
        """Bytes kept per adapter; None is the base."""
        return {name: self._sizes[name] for name in self._kept}

    def forget(self, name: str) -> None:
        """Drop an adapter's values; running calls keep theirs."""
        self._kept.pop(name, None)

    def values(self, name: str | None, feeds: Mapping[str, Array]) -> dict[str, Any]:
        """The inputs of the graph for an adapter (None: the base), made of its `feeds` at first."""
        if name not in self._kept:
            arrays = feeds
            if self._weights is not None:
                arrays = expand_weights(self._interface, self._weights, feeds)
            self._sizes[name] = sum(array.nbytes for array in arrays.values())
            self._kept[name] = {n: to_value(array, *self._device) for n, array in arrays.items()}
            self._make_room(name)
        self._kept.move_to_end(name)
        return self._kept[name]

    def _make_room(self, newest: str | None) -> None:
        sizes = self.sizes
        for name in list(sizes):
            if self._limit is not None and sum(sizes.values()) > self._limit and name != newest:
                del self._kept[name], sizes[name]
