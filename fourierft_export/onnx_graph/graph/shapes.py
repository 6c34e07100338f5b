"""Shapes and types of values that a graph leaves out, or gives with sizes under names of its own.

onnx infers them for its own operators only. ONNX Runtime's symbolic inference also knows ONNX
Runtime's operators; it needs sympy. Neither reads weights here.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .contrib_shapes import contrib_operators

if TYPE_CHECKING:
    import onnx_ir as ir

log = logging.getLogger(__name__)

_LARGE = 1000  # bytes of a constant above which it cannot hold sizes of shapes
# Bounds of symbolic inference, so that no graph makes it run or grow without end: characters of an
# expression, sizes in a list, elements of a constant, nested subgraphs.
_MAX_TEXT, _MAX_LENGTH, _MAX_ELEMENTS, _MAX_DEPTH = 400, 4096, 1 << 22, 4
# Attributes of symbolic inference that are private to onnxruntime, and used here.
_PRIVATE = (
    *("_infer_impl", "_preprocess", "_try_get_value"),
    *("dispatcher_", "prefix_", "run_", "suggested_merge_"),
)


def fill_shapes(model: ir.Model) -> None:
    """Infer the shapes and types that a graph leaves out.

    A size that equals one of the inputs' sizes gets its name, instead of one such as `unk__12`; the
    graph's inputs and outputs keep their shapes.
    """
    names = {size.value for value in model.graph.inputs for size in _symbols(value)}
    values = [value for node in model.graph for value in node.outputs if value.name]
    if all(
        value.shape is not None
        and value.dtype is not None
        and all(size.value in names for size in _symbols(value))
        for value in values
    ):
        return
    complete, inferred = _infer_with_onnxruntime(model.clone())
    if not complete:
        inferred = _infer_with_onnx(model.clone(), names) | inferred
    for value in values:
        if value.name in inferred:
            _refine(value, inferred[value.name])


def _infer_with_onnx(model: ir.Model, names: set[str | None]) -> dict[str | None, ir.Value]:
    """What onnx infers, by name; `model` is changed."""
    import onnx_ir as ir
    from onnx_ir.passes.common import ShapeInferencePass

    for node in model.graph:
        for value in node.outputs:
            # Inference would keep the names of sizes that are not the inputs'.
            if value.shape is not None:
                value.shape = ir.Shape(
                    [s if isinstance(s, int) or s.value in names else None for s in value.shape]
                )
    # Not `data_prop`: onnx sets no limit to lists of sizes that grow.
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    return {value.name: value for node in model.graph for value in node.outputs}


@cache
def _load_symbolic_inference() -> Any:
    """Import symbolic_shape_infer.py by its path, since `onnxruntime.tools` imports torch.

    Returns None where it is not there, or not of the form that can be bounded.
    """
    runtime = importlib.util.find_spec("onnxruntime")
    path = Path(runtime.origin if runtime and runtime.origin else "").parent
    path = path / "tools" / "symbolic_shape_infer.py"
    spec = importlib.util.spec_from_file_location("_onnxruntime_symbolic_shape_infer", path)
    if not path.exists() or spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        base = module.SymbolicShapeInference
        plain = base(2**31 - 1, auto_merge=True, guess_output_rank=False, verbose=0)
    except ImportError:  # sympy
        return None
    except Exception as error:  # noqa: BLE001 - code of another version may raise anything
        log.warning("shapes: onnxruntime's symbolic inference is not used: %s", error)
        return None
    missing = [name for name in _PRIVATE if not hasattr(plain, name)]
    if missing:
        log.warning(
            "shapes: onnxruntime's symbolic inference is not used, as this version of it has no %s",
            ", ".join(missing),
        )
        return None

    class BoundedInference(base):  # type: ignore[misc, valid-type]
        """Stops where a graph makes sizes, lists of sizes or nested subgraphs grow without end."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            for kind, infer in contrib_operators(self).items():
                self.dispatcher_.setdefault(kind, infer)
            for kind, infer in self.dispatcher_.items():
                self.dispatcher_[kind] = partial(self._infer_bounded, infer)

        def _infer_bounded(self, infer: Callable[[Any], None], node: Any) -> None:
            if self.prefix_.count("_") > _MAX_DEPTH:
                raise ValueError(f"subgraphs nested more than {_MAX_DEPTH} deep")
            shape = self._try_get_value(node, 0) if node.op_type == "ConstantOfShape" else None
            if shape is not None and np.size(shape) and np.prod(shape) > _MAX_ELEMENTS:
                raise ValueError(f"{node.name} makes a constant of shape {shape}")
            known = len(self.symbolic_dims_)
            infer(node)
            sizes = list(itertools.islice(self.symbolic_dims_.values(), known, None))
            for name in node.output:
                value = self.sympy_data_.get(name, ())
                if isinstance(value, list) and len(value) > _MAX_LENGTH:
                    raise ValueError(f"{name} lists {len(value)} sizes")
                if not isinstance(value, np.ndarray):
                    sizes += value if isinstance(value, (list, tuple)) else [value]
            if any(len(str(size)) > _MAX_TEXT for size in sizes):
                raise ValueError(f"a size that {node.name} computes is too large an expression")

    # The module's own inference of subgraphs looks this name up.
    module.SymbolicShapeInference = BoundedInference  # type: ignore[attr-defined]
    return module


def _infer_with_onnxruntime(model: ir.Model) -> tuple[bool, dict[str | None, ir.Value]]:
    """What ONNX Runtime's symbolic inference infers, by name, and whether that is everything.

    `model` is changed. The inference ends early at an operator that it does not know, at sizes
    beyond the bounds above, and where sympy is not installed.
    """
    import onnx_ir as ir

    symbolic_shape_infer, graph = _load_symbolic_inference(), model.graph
    # sympy may evaluate names as expressions: it gets harmless ones only.
    harmless = all(node.op_type.isidentifier() for node in graph.all_nodes())
    if symbolic_shape_infer is None or not harmless:
        return False, {}
    for name, value in tuple(graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _LARGE:
            value.shape, value.type = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
            del graph.initializers[name]
            value.const_value = None
            if value not in graph.inputs:
                graph.inputs.append(value)
    symbols: dict[str, str] = {}
    unnamed = itertools.count()

    def rename(size: int | ir.SymbolicDim) -> int | str:
        if isinstance(size, int):
            return size
        if size.value is None:
            return f"unnamed{next(unnamed)}"
        return symbols.setdefault(size.value, f"size{len(symbols)}")

    for each in model.graphs():
        for value in each.inputs:
            if value.shape is not None:
                value.shape = ir.Shape([rename(size) for size in value.shape])
    for value in graph.outputs:
        value.shape = None
    inference = symbolic_shape_infer.SymbolicShapeInference(
        2**31 - 1, auto_merge=True, guess_output_rank=False, verbose=0
    )
    complete = False
    try:
        # Not `infer_shapes`, which writes a file into the working folder where it fails.
        inference._preprocess(ir.serde.serialize_model(model))
        merged = None
        while inference.run_ and merged != inference.suggested_merge_:  # else it is endless
            merged = dict(inference.suggested_merge_)
            complete = inference._infer_impl()
    except Exception as error:  # noqa: BLE001 - it raises anything, also bare Exception
        log.debug("symbolic shape inference stopped: %s", error)
    # Expressions of sizes are unknown sizes, as are those that had no name.
    names = {symbol: name for name, symbol in symbols.items()}
    found: dict[str | None, ir.Value] = {}
    for name, info in getattr(inference, "known_vi_", {}).items():
        if info.type.tensor_type.elem_type:
            found[name] = value = ir.serde.deserialize_value_info_proto(info, None)
            if value.shape is not None:
                value.shape = ir.Shape(
                    [s if isinstance(s, int) else names.get(str(s.value)) for s in value.shape]
                )
    return complete, found


def _symbols(value: ir.Value) -> list[ir.SymbolicDim]:
    return [size for size in value.shape or () if not isinstance(size, int)]


def _refine(value: ir.Value, inferred: ir.Value) -> None:
    """Set the inferred type and shape of a value where they say more than its own."""
    import onnx_ir as ir

    if value.dtype is None and inferred.dtype is not None:
        value.type = ir.TensorType(inferred.dtype)
    if inferred.shape is None or (value.shape is not None and value.is_graph_output()):
        return
    if value.shape is None or len(value.shape) != len(inferred.shape):
        value.shape = inferred.shape
        return
    value.shape = ir.Shape(
        [
            old if not isinstance(new, int) and new.value is None else new
            for old, new in zip(value.shape, inferred.shape, strict=True)
        ]
    )
