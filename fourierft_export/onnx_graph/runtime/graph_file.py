"""What a session needs to know of an exported file before it runs it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...bundle.file import Bundle
from ...errors import BadInputError, UsageError
from ...files.container import open_regular, read_exactly
from ...files.external import EXTERNAL, external_ranges, tensor_bytes
from ...types import Array
from ..fit import fit
from ..groups import BASE_PREFIX, Interface
from ..metadata import KEY
from ..mode_names import BANK, PAIRED
from ..runtime_paths import expander_path
from ..weight_input import WeightInput

if TYPE_CHECKING:
    import onnx


def parameters_for(
    path: str | os.PathLike[str],
    bundle: Bundle,
    *,
    both_graphs: bool = False,
    allow_base_mismatch: bool = False,
    allow_links: bool = False,
) -> dict[str, Array]:
    """What an adapter feeds a swappable graph, or the expander of a paired one, input by input.

    Of a paired graph itself these are its saved heads and biases; with `both_graphs` also what its
    expander takes. `allow_links` as in `read_model`.

    Raises:
        UsageError: the graph takes no single adapter, or nothing of this one.
        BaseMismatchError: the adapter does not fit the graph.
        BadInputError, FileAccessError: not a file that this package made.
    """
    model = read_model(path, allow_links=allow_links)
    facts = facts_of({p.key: p.value for p in model.metadata_props}, os.fspath(path))
    taken = {value.name for value in model.graph.input}
    if facts.interface is None or facts.mode == BANK:
        raise UsageError(
            path,
            expected="a graph of mode swappable, or the expander of a paired one",
            found=f"mode {facts.mode}",
            remedy="export the base with --mode swappable",
        )
    takes_spectra = any(group.spectrum in taken for group in facts.interface.groups)
    # An expander takes no saved tensors, and holds none.
    expands = facts.mode == PAIRED and takes_spectra
    zeros = {s.name: np.zeros(s.shape, s.dtype) for s in facts.interface.saved}
    base = zeros if expands else base_saved(path, facts, allow_links=allow_links)
    feeds = fit(
        facts.interface,
        bundle,
        base,
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
            found="one of mode paired, which takes nothing of this adapter but the weights that "
            "its expander makes",
            remedy=f"name the expander, {expander_path(path).name}",
        )
    return wanted


@dataclass(frozen=True, eq=False)
class GraphFacts:
    """An exported file's own account of itself.

    Attributes:
        mode: how it was exported.
        interface: its adapter inputs; None where it has none.
        adapters: names of the adapters in it, in the order of a bank's rows.
        weights: layer -> (name of its weight, whether that is (in, out)), one or several each.
    """

    mode: str
    interface: Interface | None
    adapters: tuple[str, ...]
    weights: Mapping[str, tuple[tuple[str, bool], ...]]


def facts_of(metadata: Mapping[str, str], where: str) -> GraphFacts:
    """The facts in a model's metadata.

    Raises:
        BadInputError: it has none of ours, or they are damaged.
    """
    try:
        content = json.loads(metadata[KEY])
        inputs = content.get("inputs")
        names = inputs["rows"] if inputs else content["adapters"]
        return GraphFacts(
            content["mode"],
            Interface.from_dict(inputs) if inputs else None,
            tuple(map(str, names)),
            {
                layer: tuple((str(s["initializer"]), bool(s["transposed"])) for s in sites)
                for layer, sites in content["weights"].items()
            },
        )
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise BadInputError(
            where,
            expected=f"an ONNX file made by this package, with its metadata under {KEY!r}",
            found="none" if KEY not in metadata else f"other metadata ({error})",
            remedy="export or apply the adapter again; tools that rewrite a file may drop metadata",
        ) from None


def base_saved(
    path: str | os.PathLike[str], facts: GraphFacts, *, allow_links: bool = False
) -> dict[str, Array]:
    """The base's saved tensors, which an exported file keeps beside the adapter's.

    `allow_links` as in `read_model`.

    Raises:
        BadInputError: they are not in the file.
    """
    if facts.interface is None or not facts.interface.saved:
        return {}
    constants = _Constants(path, allow_links)
    found = {}
    missing = []
    for saved in facts.interface.saved:
        array = constants.get(BASE_PREFIX + saved.name)
        if array is None and facts.mode != BANK:
            array = constants.get(saved.name)
        if array is None:
            missing.append(saved.name)
        else:
            found[saved.name] = array.reshape(saved.shape)
    if missing:
        raise BadInputError(
            path,
            expected="the base's saved tensors",
            found=f"{len(missing)} that are not in the file",
            offenders=missing,
        )
    return found


def weight_inputs(
    path: str | os.PathLike[str], facts: GraphFacts, *, allow_links: bool = False
) -> list[WeightInput]:
    """The weights that an expander makes, with their base values.

    `allow_links` as in `read_model`.

    Raises:
        BadInputError: the expander lacks some.
    """
    constants = _Constants(path, allow_links)
    inputs = []
    missing = []
    for layer, sites in facts.weights.items():
        for name, transposed in sites:
            array = constants.get(f"{name}.base")
            if array is None:
                missing.append(f"{name}.base")
            else:
                inputs.append(WeightInput(name, layer, array, transposed))
    if missing:
        raise BadInputError(
            path,
            expected="the base weights of every adapted layer",
            found=f"{len(missing)} that are not in the file",
            offenders=missing,
        )
    return inputs


class _Constants:
    """Initializers by name, read when asked for.

    Args:
        path: the file; its external data is checked, and read from where the check saw it.
        allow_links: as in `read_model`.

    Raises:
        FileAccessError, BadInputError: as `read_model`.
    """

    def __init__(self, path: str | os.PathLike[str], allow_links: bool) -> None:
        model = read_model(path, allow_links=allow_links)
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._ranges = external_ranges(model, path, allow_links=allow_links)

    def get(self, name: str) -> Array | None:
        """The array of this name, or None."""
        from onnx import TensorProto, numpy_helper

        tensor = self._tensors.get(name)
        if tensor is None:
            return None
        if tensor.data_location != EXTERNAL:
            return np.array(numpy_helper.to_array(tensor))
        keys = {entry.key: entry.value for entry in tensor.external_data}
        where = self._ranges[keys["location"], int(keys.get("offset", 0))]
        fd = open_regular(where.file)
        try:
            # Not `where.length`: of tensors that begin at one place it is the longest's.
            stop = where.offset + tensor_bytes(tensor)
            data = read_exactly(fd, where.offset, stop, where.file)
        finally:
            os.close(fd)
        plain = TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=data)
        return np.array(numpy_helper.to_array(plain))


def read_model(path: str | os.PathLike[str], *, allow_links: bool = False) -> onnx.ModelProto:
    """An ONNX file without its external data, of which it is known that it may be read.

    Args:
        path: an .onnx file.
        allow_links: also accept external data behind links that end inside the model's folder.

    Raises:
        FileAccessError: missing or unreadable, or its external data is.
        BadInputError: not an ONNX model, or external data that must not be read.
    """
    import onnx
    from google.protobuf.message import DecodeError

    os.close(open_regular(path))
    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
    except DecodeError:
        raise BadInputError(path, expected="an ONNX model", found="something else") from None
    external_ranges(model, path, allow_links=allow_links)
    return model
