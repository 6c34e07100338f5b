"""ONNX Runtime with adapters that come and go: one session, one base, many adapters."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bundle.file import Bundle
from ..bundle.peft import from_peft
from ..errors import UsageError
from ..spectral.delta import Term
from .adapter_file import SUFFIX, read_adapter, to_value
from .fit import check_parameters, fit, knows_base
from .graph_file import base_saved, facts_of, read_model, weight_inputs
from .groups import ADAPTER_ID, base_feeds, table
from .modes import BANK, PAIRED
from .ort_session import load_session
from .runtime_paths import expander_path

Array = npt.NDArray[Any]

log = logging.getLogger(__name__)

Adapter = str | Sequence[str | None] | None


class AdapterSession:
    """An ONNX Runtime session whose adapter is chosen at every run; safe to share among threads.

    What a run does with an adapter depends on the mode of the file: swappable feeds it; paired
    feeds the adapted weights, which are made at the adapter's first run and kept; bank feeds a
    table of all loaded adapters. Files of mode merged and unmerged run as they are.

    Args:
        onnx_path: a file that `export_onnx` or `apply_onnx` wrote.
        providers: as onnxruntime.InferenceSession takes them; by default the CPU.
        session_options: an onnxruntime.SessionOptions; its log level is raised while the file is
            loaded, since ONNX Runtime warns of every overridable input.
        memory_limit: bytes of weights to keep for the adapters (mode paired), the base's among
            them: what was used longest ago goes first. No limit by default.

    Attributes:
        mode: of the file.
        inputs: names of the model's own inputs.
        outputs: names of its outputs.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        FileAccessError: the file, or the expander beside it, is missing.
        BadInputError: not a file that this package made, external data that must not be read, or
            a file that ONNX Runtime cannot load.
    """

    def __init__(
        self,
        onnx_path: str | os.PathLike[str],
        *,
        providers: Sequence[Any] | None = None,
        session_options: Any = None,
        memory_limit: int | None = None,
    ) -> None:
        self.path = Path(onnx_path)
        # ONNX Runtime follows links: what it reads is checked before it opens anything.
        read_model(onnx_path)
        providers = list(providers or ["CPUExecutionProvider"])
        self._session = load_session(self.path, providers, session_options)
        metadata = self._session.get_modelmeta().custom_metadata_map
        self._facts = facts_of(metadata, str(onnx_path))
        self.mode = self._facts.mode
        self._base = base_saved(onnx_path, self._facts)
        self._memory_limit = memory_limit
        self._device = "cuda" if "CUDA" in str(self._session.get_providers()[0]) else "cpu"
        self._lock = threading.RLock()
        self._adapters: dict[str, dict[str, Array]] = {}
        self._expanded: OrderedDict[str | None, dict[str, Any]] = OrderedDict()
        self._table: tuple[dict[str, Any], dict[str | None, int]] | None = None
        self._weights = []
        if self.mode == PAIRED:
            self._weights = weight_inputs(expander_path(onnx_path), self._facts)
        own = {w.name for w in self._weights} | {ADAPTER_ID}
        interface = self._facts.interface
        if interface is not None:
            own |= {saved.name for saved in interface.saved}
            own |= {n for g in interface.groups for n in (g.spectrum, g.entries, g.scaling)}
        self.inputs = tuple(i.name for i in self._session.get_inputs() if i.name not in own)
        self._reserved = own if interface is not None else set()
        self.outputs = tuple(output.name for output in self._session.get_outputs())

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters; of a merged or unmerged file those in it."""
        if self._facts.interface is None:
            return self._facts.adapters
        return tuple(self._adapters)

    @property
    def resident(self) -> dict[str | None, int]:
        """Bytes kept ready per adapter that has run, None for the base, least recently used first;
        empty for banks.
        """
        with self._lock:
            return {
                name: sum(v.tensor_size_in_bytes() for v in values.values())
                for name, values in self._expanded.items()
            }

    def load(
        self,
        name: str,
        bundle: Bundle | str | os.PathLike[str],
        *,
        allow_base_mismatch: bool = False,
    ) -> None:
        """Make an adapter available; it replaces one of the same name.

        Args:
            name: to ask for it by.
            bundle: a bundle, its file, a PEFT adapter directory, or an `.onnx_adapter` file (which
                says nothing of its base, so that only names, sizes and dtypes are checked). Of an
                unbound bundle nothing tells its base either: a warning is logged.
            allow_base_mismatch: accept a base other than the one it was trained on.

        Raises:
            UsageError: the file's mode takes no adapters.
            BaseMismatchError: it does not belong to this graph: all misfits listed.
            BadInputError: a damaged file, or parameters of an `.onnx_adapter` that do not fit.
        """
        interface = self._facts.interface
        if interface is None:
            raise UsageError(
                f"adapter {name!r}",
                expected="a file of mode swappable, paired or bank",
                found=f"mode {self.mode}",
                remedy="export the model in one of these modes",
            )
        if isinstance(bundle, (str, os.PathLike)) and os.fspath(bundle).endswith(SUFFIX):
            parameters = read_adapter(bundle)
            check_parameters(interface, parameters, os.fspath(bundle))
            feeds = base_feeds(interface.groups) | self._base | parameters
        else:
            if isinstance(bundle, (str, os.PathLike)):
                bundle = from_peft(bundle) if os.path.isdir(bundle) else Bundle.load(bundle)
            feeds = fit(
                interface,
                bundle,
                self._base,
                where=f"adapter {name!r}",
                allow_base_mismatch=allow_base_mismatch,
            )
            if not knows_base(bundle):
                log.warning("adapter %r: no check was possible that it belongs to this base", name)
        with self._lock:
            self._adapters[name] = feeds
            self._expanded.pop(name, None)
            self._table = None

    def prepare(self, name: str | None) -> None:
        """Make an adapter's inputs ready (mode paired: its weights), so that its next run is not
        the one that waits for it.

        Raises:
            UsageError: no adapter of that name.
        """
        if self._facts.interface is None:
            self._check_baked_in(name)
        elif self.mode == BANK:
            _, ids = self._bank()
            self._check_known([name], ids)
        else:
            self._values(name)

    def unload(self, name: str) -> None:
        """Forget an adapter; runs that are under way keep what they need.

        Raises:
            UsageError: no adapter of that name.
        """
        with self._lock:
            self._check_known([name])
            del self._adapters[name]
            self._expanded.pop(name, None)
            self._table = None

    def run(
        self, inputs: Mapping[str, Any], adapter: Adapter = None, *, run_options: Any = None
    ) -> dict[str, Array]:
        """The model's outputs by name.

        Args:
            inputs: the model's own inputs by name.
            adapter: a name; or one per row of the batch, where None is the base; None is the base
                for all rows. A merged or unmerged file takes None, or the name of what is in it.
            run_options: an onnxruntime.RunOptions.

        Raises:
            UsageError: an adapter that is not loaded, inputs that are missing or unknown, or rows
                that do not match the batch.
        """
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        self._check_inputs(arrays)
        if self._facts.interface is None:
            self._check_baked_in(adapter)
            return self._run(arrays, {}, run_options)
        if self.mode == BANK:
            values, ids = self._bank()
            names = self._per_row(adapter, arrays)
            self._check_known(names, ids)
            rows = np.array([ids[name] for name in names], np.int64)
            return self._run(arrays | {ADAPTER_ID: rows}, values, run_options)
        if adapter is None or isinstance(adapter, str):
            return self._run(arrays, self._values(adapter), run_options)
        return self._run_rows(arrays, self._per_row(adapter, arrays), run_options)

    def _run(
        self, arrays: Mapping[str, Array], values: Mapping[str, Any], run_options: Any
    ) -> dict[str, Array]:
        feeds = {name: to_value(array) for name, array in arrays.items()} | dict(values)
        results = self._session.run_with_ort_values(list(self.outputs), feeds, run_options)
        return {n: value.numpy() for n, value in zip(self.outputs, results, strict=True)}

    def _run_rows(
        self, arrays: Mapping[str, Array], names: Sequence[str | None], run_options: Any
    ) -> dict[str, Array]:
        """Rows of the batch with different adapters: one run for each adapter."""
        places: dict[str | None, list[int]] = {}
        for row, name in enumerate(names):
            places.setdefault(name, []).append(row)
        parts = {
            name: self._run(
                {n: array[rows] for n, array in arrays.items()}, self._values(name), run_options
            )
            for name, rows in places.items()
        }
        order = np.argsort([row for rows in places.values() for row in rows])
        outputs = {}
        for output in self.outputs:
            pieces = [parts[name][output] for name in places]
            if any(len(p) != len(r) for p, r in zip(pieces, places.values(), strict=True)):
                raise UsageError(
                    f"output {output}",
                    expected="one row for each row of the batch",
                    found="another first dimension",
                    remedy="run one adapter at a time",
                )
            outputs[output] = np.concatenate(pieces)[order]
        return outputs

    def _values(self, name: str | None) -> dict[str, Any]:
        """What a swappable or paired graph is fed for one adapter."""
        interface = self._facts.interface
        if interface is None:
            return {}
        with self._lock:
            if name is not None:
                self._check_known([name])
            if name in self._expanded:
                self._expanded.move_to_end(name)
                return self._expanded[name]
            feeds = base_feeds(interface.groups) | self._base
            if name is not None:
                feeds = self._adapters[name]
            if self.mode != PAIRED:
                values = {n: to_value(a, self._device) for n, a in feeds.items()}
            else:
                values = {
                    saved.name: to_value(feeds[saved.name], self._device)
                    for saved in interface.saved
                }
                groups = interface.layers
                for weight in self._weights:
                    group = groups[weight.layer]
                    row = group.layers.index(weight.layer)
                    term = Term(
                        feeds[group.spectrum][row],
                        feeds[group.entries],
                        float(feeds[group.scaling][row]),
                    )
                    array = weight.base if name is None else weight.adapted([term])
                    values[weight.name] = to_value(array, self._device)
            self._expanded[name] = values
            if self.mode == PAIRED and self._memory_limit is not None:
                self._make_room(name)
            return values

    def _make_room(self, newest: str | None) -> None:
        sizes = self.resident
        for name in list(sizes):
            if sum(sizes.values()) <= (self._memory_limit or 0):
                return
            if name != newest:
                del self._expanded[name], sizes[name]

    def _bank(self) -> tuple[dict[str, Any], dict[str | None, int]]:
        """The table of all adapters, and the row of each; kept until one comes or goes."""
        interface = self._facts.interface
        with self._lock:
            if self._table is None and interface is not None:
                feeds = [*self._adapters.values()] or [base_feeds(interface.groups) | self._base]
                values = {
                    name: to_value(array, self._device)
                    for name, array in table(interface.groups, feeds).items()
                }
                ids = {name: row for row, name in enumerate([None, *self._adapters])}
                self._table = values, ids
            return self._table or ({}, {})

    def _per_row(self, adapter: Adapter, arrays: Mapping[str, Array]) -> list[str | None]:
        sizes = {len(array) if array.ndim else 0 for array in arrays.values()}
        if adapter is None or isinstance(adapter, str):
            return [adapter] * len(arrays[self.inputs[0]])
        if sizes != {len(adapter)}:
            raise UsageError(
                "adapter",
                expected=f"one name for each of {' or '.join(map(str, sorted(sizes)))} rows",
                found=f"{len(adapter)} names",
            )
        return list(adapter)

    def _check_known(
        self, names: Sequence[str | None], known: Mapping[str | None, int] | None = None
    ) -> None:
        unknown = sorted({n for n in names if n is not None and n not in (known or self._adapters)})
        if unknown:
            raise UsageError(
                "adapter " + ", ".join(repr(name) for name in unknown),
                expected=f"one of {', '.join(self.adapters)}" if self.adapters else "a loaded one",
                found="no adapter of that name",
                remedy="load it first",
            )

    def _check_baked_in(self, adapter: Adapter) -> None:
        names = {adapter} if adapter is None or isinstance(adapter, str) else {*adapter}
        if not names <= {None, *(self._facts.adapters if len(self._facts.adapters) == 1 else ())}:
            raise UsageError(
                "adapter",
                expected=f"None: the file holds {', '.join(self._facts.adapters)} for good",
                found=", ".join(map(repr, names)),
                remedy="export in mode swappable, paired or bank to choose at run time",
            )

    def _check_inputs(self, arrays: Mapping[str, Array]) -> None:
        wrong = [f"{name}: missing" for name in self.inputs if name not in arrays]
        for name in arrays:
            if name in self._reserved:
                wrong.append(f"{name}: belongs to the adapter")
            elif name not in self.inputs:
                wrong.append(f"{name}: no such input")
        if wrong:
            raise UsageError(
                "inputs", expected=", ".join(self.inputs), found=wrong[0], offenders=wrong
            )
