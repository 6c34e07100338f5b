"""ONNX Runtime with many adapters on one base."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle.peft import BundleSource, open_bundle
from ...bundle.pool import Pool
from ...errors import UsageError
from ...types import Array
from ..adapter_interface import ADAPTER_ID, Interface
from ..feeds import base_feeds, check_parameters, feed_bundle, has_fingerprints, table
from ..mode_names import BANK, PAIRED
from .adapter_file import SUFFIX, read_adapter
from .exported_file import open_expander, open_exported
from .feed_cache import KeptValues
from .ort_session import device_of, load_session, run_session, to_value
from .run_checks import Adapter, check_baked_in, check_inputs, check_known, per_row

log = logging.getLogger(__name__)


class AdapterSession:
    """An ONNX Runtime session whose adapter is chosen at every run; threads may share it.

    What a run does with an adapter depends on the mode of the file: swappable feeds it; paired
    feeds the adapted weights, which are made at the adapter's first run and kept; bank feeds a
    table of all loaded adapters. In merged and unmerged files the adapter is fixed.

    Args:
        onnx_path: a file that `export_onnx` or `apply_onnx` wrote.
        providers: as onnxruntime.InferenceSession takes them; by default the CPU.
        session_options: an onnxruntime.SessionOptions; its log level is raised while the file is
            loaded, since ONNX Runtime warns of every overridable input. Where it has no entry
            `session.x64quantprecision`, "1" is added: without it, x86-64 CPUs that lack VNNI
            compute int8 products with sums that saturate (3 to 27 times the error).
        memory_limit: bytes of weights to keep for the adapters and the base (mode paired); the
            least recently used are dropped first. No limit by default.
        allow_links: follow links of external data that end inside the model's folder.

    Attributes:
        mode: of the file.
        inputs: names of the model's own inputs.
        outputs: names of its outputs.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        FileAccessError: the file, or its expander, is missing or unreadable.
        BadInputError: not a file that this package made, external data that must not be read, or
            a file that ONNX Runtime cannot load.

    Example:
        >>> import fourierft_export as ff, numpy, tempfile, torch
        >>> config = ff.FourierFTConfig(n_frequency=5, target_modules=["0"])
        >>> model = ff.inject(torch.nn.Sequential(torch.nn.Linear(8, 4)).eval(), config)
        >>> path = tempfile.mkdtemp() + "/model.onnx"
        >>> _ = ff.export_onnx(model, torch.ones(2, 8), path, mode="swappable")
        >>> session = ff.AdapterSession(path)
        >>> session.load("mine", ff.capture(model))
        >>> outputs = session.run({"input": numpy.ones((2, 8), numpy.float32)}, adapter="mine")
        >>> outputs["output"].shape
        (2, 4)
    """

    def __init__(
        self,
        onnx_path: str | os.PathLike[str],
        *,
        providers: Sequence[Any] | None = None,
        session_options: Any = None,
        memory_limit: int | None = None,
        allow_links: bool = False,
    ) -> None:
        self.path = Path(onnx_path)
        # ONNX Runtime follows links: what it reads is checked before it opens anything.
        graph = open_exported(onnx_path, allow_links=allow_links)
        self.mode, self._interface = graph.mode, graph.interface
        self._session = load_session(
            self.path, list(providers or ["CPUExecutionProvider"]), session_options
        )
        self._device = device_of(
            self._session.get_providers(), self._session.get_provider_options()
        )
        self._lock = threading.RLock()
        self._baked_in = graph.adapters
        self._adapters: dict[str, dict[str, Array]] = {}
        self._pool: tuple[Pool, bool] | None = None
        self._table: tuple[dict[str, Any], dict[str | None, int]] | None = None
        weights, interface = None, self._interface or Interface(())
        if self.mode == PAIRED:
            expander = open_expander(graph, allow_links=allow_links)
            weights = expander.weight_inputs(interface)
        self._base = base_feeds(interface.groups) | graph.base_saved()
        self._kept = KeptValues(interface, weights, self._device, memory_limit)
        reserved = {ADAPTER_ID, *self._base, *(weight.name for weight in weights or ())}
        self.inputs = tuple(i.name for i in self._session.get_inputs() if i.name not in reserved)
        self._reserved = reserved if self._interface is not None else set()
        self.outputs = tuple(output.name for output in self._session.get_outputs())

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters; of a merged or unmerged file those in it."""
        if self._interface is None:
            return self._baked_in
        return tuple(self._adapters)

    @property
    def resident(self) -> dict[str | None, int]:
        """Bytes kept ready per adapter that has run, None for the base, least recently used first;
        empty for banks.
        """
        with self._lock:
            return self._kept.sizes

    def load(
        self,
        name: str,
        bundle: BundleSource,
        *,
        allow_base_mismatch: bool = False,
    ) -> None:
        """Make an adapter available; it replaces one of the same name.

        Args:
            name: the adapter's name in `run`.
            bundle: a bundle, its file, a PEFT adapter directory, or an `.onnx_adapter` file, of
                which only names, sizes and dtypes can be checked. A warning is logged for an
                unbound bundle, as it does not identify its base.
            allow_base_mismatch: accept a base other than the one it was trained on.

        Raises:
            UsageError: the file's mode takes no adapters.
            BaseMismatchError: it does not belong to this graph: all misfits listed.
            BadInputError: a damaged file, or parameters of an `.onnx_adapter` that do not fit.
        """
        interface = self._interface
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
            feeds = self._base | parameters
        else:
            bundle = open_bundle(bundle, bind=True)
            feeds = feed_bundle(
                interface,
                bundle,
                self._base,
                where=f"adapter {name!r}",
                allow_base_mismatch=allow_base_mismatch,
            )
            if not has_fingerprints(bundle):
                log.warning("adapter %r: no check was possible that it belongs to this base", name)
        with self._lock:
            self._adapters[name] = feeds
            self._kept.forget(name)
            self._table = None

    def load_pool(
        self, pool: Pool | str | os.PathLike[str], *, allow_base_mismatch: bool = False
    ) -> None:
        """Make all adapters of a pool available under their names.

        Each is read and checked when a run first names it; in a bank all at once.

        Args:
            pool: an open pool, or its file.
            allow_base_mismatch: accept a base other than the one they were trained on.

        Raises:
            UsageError: a name that cannot be an adapter's.
            BaseMismatchError: an adapter of another base.
            BadInputError: the pool, or a bundle in it, is damaged.
        """
        opened = pool if isinstance(pool, Pool) else Pool(pool)
        if self._interface is not None and self.mode != BANK:
            self._pool = opened, allow_base_mismatch
            return
        for name, bundle in opened.items():
            self.load(name, bundle, allow_base_mismatch=allow_base_mismatch)

    def prepare(self, name: str | None) -> None:
        """Compute an adapter's inputs (mode paired: its weights) now instead of at its next run.

        Raises:
            UsageError: no adapter of that name.
        """
        if self._interface is None:
            check_baked_in(name, self.adapters)
        elif self.mode == BANK:
            _, ids = self._bank()
            check_known([name], ids, self.adapters)
        else:
            self._values(name)

    def unload(self, name: str) -> None:
        """Remove an adapter; running calls finish with it.

        Raises:
            UsageError: no adapter of that name.
        """
        with self._lock:
            check_known([name], self._adapters, self.adapters)
            del self._adapters[name]
            self._kept.forget(name)
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
            UsageError: an adapter that is not loaded, inputs that are missing, unknown or of
                another dtype or size than the model's, or rows that do not match the batch.
            BadInputError: ONNX Runtime fails at the model with these inputs.
        """
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        check_inputs(arrays, self.inputs, self._reserved)
        if self._interface is None:
            check_baked_in(adapter, self.adapters)
            return self._run(arrays, {}, run_options)
        if self.mode == BANK:
            values, ids = self._bank()
            names = per_row(adapter, arrays, self.inputs[0])
            check_known(names, ids, self.adapters)
            rows = np.array([ids[name] for name in names], np.int64)
            return self._run(arrays | {ADAPTER_ID: rows}, values, run_options)
        if adapter is None or isinstance(adapter, str):
            return self._run(arrays, self._values(adapter), run_options)
        return self._run_rows(arrays, per_row(adapter, arrays, self.inputs[0]), run_options)

    def _run(
        self, arrays: Mapping[str, Array], values: Mapping[str, Any], run_options: Any
    ) -> dict[str, Array]:
        feeds = {name: to_value(array) for name, array in arrays.items()} | dict(values)
        results = run_session(self._session, self.outputs, feeds, run_options, self.path)
        return {n: value.numpy() for n, value in zip(self.outputs, results, strict=True)}

    def _run_rows(
        self, arrays: Mapping[str, Array], names: Sequence[str | None], run_options: Any
    ) -> dict[str, Array]:
        """Run the batch once for each adapter, with its rows, and join the outputs."""
        if not names:
            return self._run(arrays, self._values(None), run_options)
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
        """The inputs of a swappable or paired graph for one adapter."""
        with self._lock:
            if name is None:
                return self._kept.values(None, self._base)
            if self._pool is not None and name not in self._adapters and name in self._pool[0]:
                pool, allow_base_mismatch = self._pool
                self.load(name, pool[name], allow_base_mismatch=allow_base_mismatch)
            check_known([name], self._adapters, self.adapters)
            return self._kept.values(name, self._adapters[name])

    def _bank(self) -> tuple[dict[str, Any], dict[str | None, int]]:
        """The table of all adapters, and the row of each; made anew after a load or unload."""
        interface = self._interface
        with self._lock:
            if self._table is None and interface is not None:
                feeds = [*self._adapters.values()] or [self._base]
                values = {
                    name: to_value(array, *self._device)
                    for name, array in table(interface.groups, feeds).items()
                }
                ids = {name: row for row, name in enumerate([None, *self._adapters])}
                self._table = values, ids
            return self._table or ({}, {})
