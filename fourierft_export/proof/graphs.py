"""Runs ONNX files with ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import BadInputError, FileAccessError, UsageError, first_line, missing_extra
from ..files.onnx_external_data import check_external_data
from ..files.safetensors_reader import open_regular
from ..types import Array
from .inputs import AS_NPZ

if TYPE_CHECKING:
    import onnx

_METADATA = "fourierft_export"  # of files that hold adapters
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_NUMPY_TYPES = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
}
LEAVE_OUT = (
    "the adapter was quantised with the base: quantise again without the nodes that the file's "
    'metadata "fourierft_export" lists under "nodes" (nodes_to_exclude), or quantise the base first'
)


class Graph:
    """One ONNX file, ready to run.

    Attributes:
        path: the file.
        precision: of most of its weights: "float32", "float16", "bfloat16", "int8", "float64".
        quantised: the nodes of an adapter in it that were quantised with the base.
        inputs, outputs: names of its inputs and outputs.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        """Opens the file; `threads` are for ONNX Runtime, whose own choice is the default."""
        try:
            import onnxruntime
        except ImportError as error:
            raise missing_extra("onnxruntime", "ort", "validate") from error
        self.path = Path(path)
        model = _read_model(self.path)
        self.precision = _weights_precision(model)
        self.quantised = _quantised_nodes(model)
        self._options = onnxruntime.SessionOptions()
        self._options.log_severity_level = 4  # what goes wrong is raised as a package error
        # Else int8 sums saturate on x86-64 CPUs without VNNI, and results depend on the machine.
        self._options.add_session_config_entry("session.x64quantprecision", "1")
        if threads is not None:
            self._options.intra_op_num_threads = threads
        remedy = LEAVE_OUT if self.quantised else ""
        with self._bad_input("an ONNX model that ONNX Runtime loads", remedy):
            self._session = onnxruntime.InferenceSession(
                self.path, self._options, providers=["CPUExecutionProvider"]
            )
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self.inputs: tuple[str, ...] = tuple(self._inputs)
        self.outputs: tuple[str, ...] = tuple(value.name for value in self._session.get_outputs())

    @property
    def fixed_length(self) -> int | None:
        """The sequence length, if the graph fixes it."""
        ids = self._inputs.get("input_ids")
        length = ids.shape[1] if ids is not None and len(ids.shape) == 2 else None
        return length if isinstance(length, int) else None

    @property
    def fixed_batch(self) -> int | None:
        """The number of rows, if the graph fixes it."""
        firsts = [value.shape[0] for value in self._inputs.values() if value.shape]
        return min((size for size in firsts if isinstance(size, int)), default=None)

    def run(
        self, inputs: Mapping[str, Array], *, batch_size: int | None = None
    ) -> dict[str, Array]:
        """Computes every output.

        Args:
            inputs: name -> (rows, ...); names that the graph does not have are left out. A graph
                with a key-value cache that is not given starts with an empty one, and of a bank of
                adapters each row gets the first.
            batch_size: rows per call, if the graph does not fix them; default all at once.
        """
        inputs = self._with_defaults(inputs)
        absent = [name for name in self._inputs if name not in inputs]
        if absent:
            raise UsageError(
                self.path,
                expected=f"inputs {', '.join(self._inputs)}",
                found=f"{', '.join(inputs)}: {', '.join(absent)} missing",
                remedy="give them as arrays of an .npz file (--inputs)",
            )
        feed = {name: self._cast(name, inputs[name]) for name in self._inputs}
        rows = next((array.shape[0] for array in feed.values() if array.ndim), 1)
        step = self.fixed_batch or batch_size or rows
        if rows % step and self.fixed_batch:
            raise UsageError(
                self.path,
                expected=f"a number of rows that {step} divides (the graph fixes its batch)",
                found=f"{rows} rows",
                remedy=f"{AS_NPZ}, or another number of samples",
            )
        parts: list[list[Array]] = []
        for start in range(0, rows, step):
            parts.append(self._call({n: array[start : start + step] for n, array in feed.items()}))
            if step < rows and any(a.shape[:1] != (min(step, rows - start),) for a in parts[-1]):
                # Some output has no row per example: only the whole batch gives its value.
                parts = [self._call(feed)]
                break
        whole = parts[0] if len(parts) == 1 else [*map(np.concatenate, zip(*parts, strict=True))]
        return dict(zip(self.outputs, whole, strict=True))

    def trace(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Computes every float value of the graph, with each node's outputs added to its own."""
        import onnx
        import onnxruntime

        model = _read_model(self.path)
        names = {name for node in model.graph.node for name in node.output if name}
        names -= {value.name for value in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names))
        folder = "session.model_external_initializers_file_folder_path"
        self._options.add_session_config_entry(folder, str(self.path.parent.resolve()))
        with self._bad_input("an ONNX model that ONNX Runtime loads with more outputs"):
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), self._options, providers=["CPUExecutionProvider"]
            )
            found = self._with_defaults(inputs)
            feed = {name: self._cast(name, found[name]) for name in self._inputs if name in found}
            values = session.run(None, feed)
        arrays = (value for value in values if isinstance(value, np.ndarray))
        return [a for a in arrays if a.ndim and np.issubdtype(a.dtype, np.floating)]

    def _with_defaults(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Adds an empty key-value cache and the number of a bank's first adapter, if missing."""
        found = dict(inputs)
        if "adapter_id" in self._inputs and inputs:
            rows = next(iter(inputs.values())).shape[0]
            found.setdefault("adapter_id", np.ones(rows, np.int64))
        mask = inputs.get("attention_mask")
        caches = [name for name in self._inputs if name.startswith("past_key_values.")]
        if mask is not None and caches:
            for name in caches:
                value = self._inputs[name]
                sizes = [size if isinstance(size, int) else 0 for size in value.shape]
                dtype = _NUMPY_TYPES.get(value.type, np.float32)
                found.setdefault(name, np.zeros((mask.shape[0], *sizes[1:]), dtype))
            found.setdefault("position_ids", np.maximum(np.cumsum(mask, axis=1) - 1, 0))
        return found

    def _call(self, feed: dict[str, Array]) -> list[Array]:
        """Runs the graph once."""
        with self._bad_input("a graph that runs on these inputs"):
            outputs: list[Array] = self._session.run(None, feed)
        return outputs

    @contextmanager
    def _bad_input(self, expected: str, remedy: str = "") -> Iterator[None]:
        """Raises ONNX Runtime's errors as a BadInputError, and a lack of memory as a MemoryError.

        ONNX Runtime's exceptions have no root but Exception.
        """
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:
            found = first_line(error)
            if "Failed to allocate memory" in found or "bad_alloc" in found:
                raise MemoryError(f"{self.path}: {found}") from error
            raise BadInputError(self.path, expected=expected, found=found, remedy=remedy) from error

    def _cast(self, name: str, array: Array) -> Array:
        """Converts integers and floats to the width of the graph's input."""
        wanted = _NUMPY_TYPES.get(self._inputs[name].type)
        if wanted is None or np.can_cast(array.dtype, wanted, casting="same_kind"):
            return array if wanted is None else array.astype(wanted, copy=False)
        found = f"an array of {array.dtype}"
        raise UsageError(f"input {name}", expected=np.dtype(wanted).name, found=found)


def _read_model(path: Path) -> onnx.ModelProto:
    """Reads the graph without its external data, whose places it checks."""
    import onnx
    from google.protobuf import message

    try:
        with open(open_regular(path), "rb") as file:  # no FIFO, no device, no folder
            model = onnx.load(file, format="protobuf", load_external_data=False)
    except (message.DecodeError, ValueError) as error:
        raise BadInputError(path, expected="an ONNX model", found=first_line(error)) from error
    except OSError as error:
        found = error.strerror or str(error)
        raise FileAccessError(path, expected="an ONNX file", found=found) from error
    if not model.HasField("graph"):
        found = "no graph in it" if model.ByteSize() else "an empty file"
        raise BadInputError(path, expected="an ONNX model", found=found)
    # ONNX Runtime follows links and any name: nothing is opened before this.
    check_external_data(model, path)
    return model


def _weights_precision(model: onnx.ModelProto) -> str:
    """Finds the type of most values of the graph's initializers; bytes count as "int8"."""
    import onnx

    types = onnx.TensorProto
    kinds = {types.DOUBLE: "float64", types.FLOAT: "float32", types.FLOAT16: "float16"}
    kinds |= {types.BFLOAT16: "bfloat16", types.INT8: "int8", types.UINT8: "int8"}
    constants = [node for node in model.graph.node if node.op_type == "Constant"]
    values = [a.t for node in constants for a in node.attribute if a.name == "value"]
    counts: Counter[str] = Counter()
    for tensor in (*model.graph.initializer, *values):
        if tensor.data_type in kinds:
            counts[kinds[tensor.data_type]] += int(np.prod(tensor.dims, dtype=np.float64))
    return max(counts, key=counts.__getitem__, default="float32")


def _quantised_nodes(model: onnx.ModelProto) -> list[str]:
    """Finds an adapter's nodes that ONNX Runtime's quantisers replaced or put their own next to."""
    text = next((entry.value for entry in model.metadata_props if entry.key == _METADATA), "{}")
    try:
        listed = json.loads(text).get("nodes") or ()
        own = [name for name in listed if name.startswith("fourierft.") or ".adapter." in name]
        products = {f"{name}_quant": name for name in listed}
    except (AttributeError, RecursionError, TypeError, ValueError):
        return []  # metadata of others, or damaged
    tensors = {f"{name}_{kind}": name for name in own for kind in _QDQ}
    names = {node.name for node in model.graph.node}
    return sorted({node for made, node in (products | tensors).items() if made in names})
