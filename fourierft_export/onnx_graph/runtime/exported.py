"""Opens a file that this package exported: its metadata, and the base values that it keeps."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ...bundle.file import Bundle
from ...errors import BadInputError, UsageError
from ...types import Array
from ..feeds import feed_bundle
from ..graph.source import Source, open_onnx
from ..interface import BASE_PREFIX, KEY, Interface, WeightInput
from ..mode_names import BANK, PAIRED, expander_path


@dataclass(frozen=True, eq=False)
class Exported:
    """A file that this package exported, opened.

    Attributes:
        source: the graph.
        mode: how it was exported.
        interface: its adapter inputs; None where it has none.
        adapters: names of the adapters in it, in the order of a bank's rows.
        weights: layer -> (name of its weight, whether that is (in, out), the layer's first output
            in it, or None), one or several each.
    """

    source: Source
    mode: str
    interface: Interface | None
    adapters: tuple[str, ...]
    weights: Mapping[str, tuple[tuple[str, bool, int | None], ...]]

    def base_saved(self) -> dict[str, Array]:
        """The base's saved tensors, which the file keeps in addition to the adapter's."""
        saved = () if self.interface is None else self.interface.saved
        found = {one.name: self._constant(BASE_PREFIX + one.name) for one in saved}
        if self.mode != BANK:
            found |= {n: self._constant(n) for n, array in found.items() if array is None}
        return {
            one.name: array.reshape(one.shape)
            for one, array in zip(saved, self._all(found, "the base's saved tensors"), strict=True)
        }

    def weight_inputs(self) -> list[WeightInput]:
        """The weights that an expander computes, with their base values."""
        groups = self.interface.layers if self.interface else {}
        sites = [(layer, *site) for layer, several in self.weights.items() for site in several]
        held = {name: self._constant(f"{name}.base") for _, name, _, _ in sites}
        arrays = self._all(held, "the base weights of every adapted layer")
        bases = dict(zip(held, arrays, strict=True))
        weights: dict[str, WeightInput] = {}
        for layer, name, transposed, start in sites:
            weight = weights.setdefault(name, WeightInput(name, bases[name], transposed))
            weight.parts[layer] = slice(start or 0, (start or 0) + groups[layer].shape[0])
        return [*weights.values()]

    def _constant(self, name: str) -> Array | None:
        value = self.source.model.graph.initializers.get(name)
        if value is None or value.const_value is None:
            return None
        return np.array(self.source.read(value.const_value))

    def _all(self, found: Mapping[str, Array | None], what: str) -> Iterable[Array]:
        missing = [name for name, array in found.items() if array is None]
        if missing:
            raise BadInputError(
                self.source.path,
                expected=what,
                found=f"{len(missing)} that are not in the file",
                offenders=missing,
            )
        return [array for array in found.values() if array is not None]


def open_exported(path: str | os.PathLike[str], *, allow_links: bool = False) -> Exported:
    """Open a file that this package exported; external data is checked, not read.

    Args:
        path: an .onnx file.
        allow_links: also accept external data behind links that end inside the model's folder.

    Raises:
        FileAccessError: missing or unreadable, or its external data is.
        BadInputError: not such a file, or external data that must not be read.
    """
    source = open_onnx(path, allow_links=allow_links)
    metadata = source.model.metadata_props
    try:
        content = json.loads(metadata[KEY])
        inputs = content.get("inputs")
        names = inputs["rows"] if inputs else content["adapters"]
        return Exported(
            source,
            content["mode"],
            Interface.from_dict(inputs) if inputs else None,
            tuple(map(str, names)),
            {
                layer: tuple(
                    (str(s["initializer"]), bool(s["transposed"]), s.get("start")) for s in sites
                )
                for layer, sites in content["weights"].items()
            },
        )
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise BadInputError(
            path,
            expected=f"an ONNX file made by this package, with its metadata under {KEY!r}",
            found="none" if KEY not in metadata else f"other metadata ({error})",
            remedy="export or apply the adapter again; tools that rewrite a file may drop metadata",
        ) from None


def parameters_for(
    path: str | os.PathLike[str],
    bundle: Bundle,
    *,
    both_graphs: bool = False,
    allow_base_mismatch: bool = False,
    allow_links: bool = False,
) -> dict[str, Array]:
    """The inputs (name -> array) that an adapter feeds a graph.

    Args:
        path: a swappable graph, a paired graph (which takes saved heads and biases) or the expander
            of a paired one.
        bundle: the adapter.
        both_graphs: for a paired graph, also return what its expander takes.
        allow_base_mismatch: accept an adapter that was trained on other weights.
        allow_links: also accept external data behind links that end inside the model's folder.

    Raises:
        UsageError: the graph takes no adapter, several at once, or no input of this one.
        BaseMismatchError: the adapter does not fit the graph.
        FileAccessError: the graph or its external data is missing or unreadable.
        BadInputError: not a file of this package, or external data that must not be read.
    """
    graph = open_exported(path, allow_links=allow_links)
    if graph.interface is None or graph.mode == BANK:
        raise UsageError(
            path,
            expected="a graph of mode swappable, or the expander of a paired one",
            found=f"mode {graph.mode}",
            remedy="export the base with --mode swappable",
        )
    taken = {value.name for value in graph.source.model.graph.inputs}
    takes_spectra = any(group.spectrum in taken for group in graph.interface.groups)
    # An expander takes no saved tensors, and holds none.
    expands = graph.mode == PAIRED and takes_spectra
    zeros = {one.name: np.zeros(one.shape, one.dtype) for one in graph.interface.saved}
    feeds = feed_bundle(
        graph.interface,
        bundle,
        zeros if expands else graph.base_saved(),
        where=os.fspath(path),
        allow_base_mismatch=allow_base_mismatch,
    )
    if both_graphs and not takes_spectra:
        return feeds
    wanted = {name: array for name, array in feeds.items() if name in taken}
    if not wanted:
        raise UsageError(
            path,
            expected="a graph with inputs for the adapter",
            found="one of mode paired, which takes only the weights that its expander computes",
            remedy=f"name the expander, {expander_path(path).name}",
        )
    return wanted
