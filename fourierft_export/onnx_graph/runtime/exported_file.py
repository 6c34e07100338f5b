"""Opens a file that this package exported: its metadata, and the base values that it keeps."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from ...bundle.bundle import Bundle
from ...errors import BadInputError, UsageError
from ...spectral.delta import Term
from ...types import Array
from ..adapter_interface import BASE_PREFIX, KEY, Interface
from ..adapters import adapted_weight
from ..feeds import feed_bundle
from ..graph.source import Source, open_onnx
from ..mode_names import BANK, MODES, PAIRED, RUNTIME_MODES, expander_path

_DAMAGE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True, eq=False)
class WeightInput:
    """A weight that the graph of mode paired takes as an input.

    Attributes:
        name: of the input, and of the expander's output.
        base: the base weight as the graph has it.
        transposed: that is (in, out).
        parts: layer -> its outputs among those of the weight; several where layers are packed.
    """

    name: str
    base: Array
    transposed: bool
    parts: dict[str, slice] = field(default_factory=dict)


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
        replaced: the saved tensors whose default is an adapter's own, not the base's.
        base: saved tensor -> the base's own as base64, for tools that drop unused constants.
    """

    source: Source
    mode: str
    interface: Interface | None
    adapters: tuple[str, ...]
    weights: Mapping[str, tuple[tuple[str, bool, int | None], ...]]
    replaced: frozenset[str] = frozenset()
    base: Mapping[str, str] = field(default_factory=dict)

    def base_saved(self) -> dict[str, Array]:
        """The base's saved tensors, which the file keeps in addition to the adapter's."""
        saved = () if self.interface is None else self.interface.saved
        found = {one.name: self._constant(BASE_PREFIX + one.name) for one in saved}
        with _reading_metadata(self.source.path):
            for one in saved:
                if found[one.name] is None and one.name in self.base:
                    data = base64.b64decode(self.base[one.name], validate=True)
                    found[one.name] = np.frombuffer(data, one.dtype)
        if self.mode != BANK:
            for name in {n for n, array in found.items() if array is None} - self.replaced:
                found[name] = self._constant(name)
        arrays = self._present(found, "the base's saved tensors")
        with _reading_metadata(self.source.path):
            return {one.name: arrays[one.name].reshape(one.shape) for one in saved}

    def weight_inputs(self, interface: Interface) -> list[WeightInput]:
        """The weights that an expander computes for a graph of this interface."""
        groups = interface.layers
        sites = [(layer, *site) for layer, several in self.weights.items() for site in several]
        held = {name: self._constant(f"{name}.base") for _, name, _, _ in sites}
        bases = self._present(held, "the base weights of every adapted layer")
        weights: dict[str, WeightInput] = {}
        with _reading_metadata(self.source.path):
            for layer, name, transposed, start in sites:
                weight = weights.setdefault(name, WeightInput(name, bases[name], transposed))
                part = slice(start or 0, (start or 0) + groups[layer].shape[0])
                rows, columns = weight.base.T.shape if transposed else weight.base.shape
                fits = 0 <= part.start < part.stop <= rows and columns == groups[layer].shape[1]
                if not fits or (start is None and part.stop < rows):
                    raise ValueError(f"{layer} is not in {name} {list(weight.base.shape)}")
                weight.parts[layer] = part
        return [*weights.values()]

    def _constant(self, name: str) -> Array | None:
        value = self.source.model.graph.initializers.get(name)
        if value is None or value.const_value is None:
            return None
        return np.array(self.source.read(value.const_value))

    def _present(self, found: Mapping[str, Array | None], what: str) -> dict[str, Array]:
        """The arrays by name, or an error that lists those that are missing."""
        missing = [name for name, array in found.items() if array is None]
        if missing:
            raise BadInputError(
                self.source.path,
                expected=what,
                found=f"{len(missing)} that are not in the file",
                remedy="export or apply the adapter again; tools that rewrite a file, such as ONNX "
                "Runtime where it saves the optimised model, drop what no node uses",
                offenders=missing,
            )
        return {name: array for name, array in found.items() if array is not None}


def open_exported(path: str | os.PathLike[str], *, allow_links: bool = False) -> Exported:
    """Open a file that this package exported; external data is checked, not read.

    Args:
        path: an .onnx file.
        allow_links: also accept external data behind links that end inside the model's folder.
    """
    source = open_onnx(path, allow_links=allow_links)
    text = source.model.metadata_props.get(KEY)
    with _reading_metadata(path, "none" if text is None else ""):
        content = json.loads(text or "")
        mode, inputs, adapters = content["mode"], content.get("inputs"), content["adapters"]
        if mode not in MODES or (mode in RUNTIME_MODES and not inputs):
            raise ValueError(f"mode {mode!r}")
        weights = {
            layer: tuple(
                (str(site["initializer"]), bool(site["transposed"]), _integer(site.get("start")))
                for site in sites
            )
            for layer, sites in content["weights"].items()
        }
        return Exported(
            source,
            mode,
            Interface.from_dict(inputs) if inputs else None,
            tuple(map(str, inputs["rows"] if inputs else adapters)),
            weights,
            frozenset(str(name) for one in adapters.values() for name in one["saved"]),
            dict(content.get("base", {})),
        )


def open_expander(graph: Exported, *, allow_links: bool = False) -> Exported:
    """Open the second file of a paired graph; it must make just the weights that the graph takes.

    Base, adapter inputs, names of weights and their orientation must be the same. Two exports that
    agree in these may be mixed: they differ in no more than the adapter that is their default.
    """
    path = expander_path(graph.source.path)
    expander = open_exported(path, allow_links=allow_links)
    same = expander.mode == graph.mode and expander.interface == graph.interface
    if not same or expander.weights != graph.weights:
        raise BadInputError(
            path,
            expected=f"the file that was written with {graph.source.path.name}",
            found="one of another base, for other layers, or for weights stored otherwise",
            remedy="get both files of one export, or export or apply the adapter again",
        )
    return expander


@contextmanager
def _reading_metadata(path: str | os.PathLike[str], found: str = "") -> Iterator[None]:
    """Report metadata that is none of this package, or damaged, as bad input."""
    try:
        yield
    except _DAMAGE as error:
        raise BadInputError(
            path,
            expected=f"an ONNX file made by this package, with its metadata under {KEY!r}",
            found=found or f"other metadata ({error})",
            remedy="export or apply the adapter again; tools that rewrite a file may drop metadata",
        ) from None


def _integer(value: object) -> int | None:
    if value is not None and type(value) is not int:
        raise ValueError(f"{value!r} is no integer")
    return value


def expand_weights(
    interface: Interface, weights: Sequence[WeightInput], feeds: Mapping[str, Array]
) -> dict[str, Array]:
    """What a graph of mode paired is fed for an adapter: its weights, and its saved tensors."""
    arrays = {saved.name: feeds[saved.name] for saved in interface.saved}
    groups = interface.layers
    for weight in weights:
        terms = {}
        for layer in weight.parts:
            group = groups[layer]
            row = group.layers.index(layer)
            spectrum, scaling = feeds[group.spectrum][row], float(feeds[group.scaling][row])
            terms[layer] = [Term(spectrum, feeds[group.entries], scaling)] if scaling else []
        arrays[weight.name] = weight.base
        if any(terms.values()):
            arrays[weight.name] = adapted_weight(
                weight.base, weight.parts, terms, transposed=weight.transposed
            )
    return arrays


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
        path: a swappable graph, a paired graph (which takes the adapted weights, saved heads and
            biases) or the expander of a paired one.
        bundle: the adapter.
        both_graphs: for a paired graph, return what its expander takes in place of the weights.
        allow_base_mismatch: accept an adapter that was trained on other weights.
        allow_links: also accept external data behind links that end inside the model's folder.

    Raises:
        UsageError: the graph takes no adapter, or several at once.
        BaseMismatchError: the adapter does not fit the graph.
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
    if graph.mode == PAIRED and not expands:
        expander = open_expander(graph, allow_links=allow_links)
        return expand_weights(graph.interface, expander.weight_inputs(graph.interface), feeds)
    return {name: array for name, array in feeds.items() if name in taken}
