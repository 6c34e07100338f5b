"""Checks that a model is a valid ONNX graph before a library reads it.

The libraries either print names from the file, or fail later with an error that names nothing. What
ONNX Runtime accepts beyond the standard is accepted: nodes in any order, its own operators in any
domain, operators of newer opsets, domains that are not imported.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import Any

from ...files.onnx_external_data import EXTERNAL, tensors

_STANDARD = ("", "ai.onnx")
_MAX_VERSION = 1000  # of opsets of the standard operators, and of the IR
_MAX_KIND = 14  # of attributes
_MESSAGES = {4: "t", 5: "g", 11: "sparse_tensor", 13: "tp"}  # kind of attribute -> required field

_N_BITS = {"N": None, "K": None, "block_size": None, "bits": 2}  # and the kind where it is absent


def find_faults(model: Any) -> Iterator[str]:
    """Yield what is wrong with an onnx.ModelProto, one line for each fault."""
    if not 1 <= model.ir_version <= _MAX_VERSION:
        yield f"IR version {model.ir_version}"
    if broken := [one for one in _texts(model) if type(one) is bytes]:
        yield f"text that is not UTF-8: {broken[0]!r}"
        return
    yield from (fault for tensor in tensors(model) if (fault := _fault_of_tensor(tensor)))
    functions = Counter((one.domain, one.name, one.overload) for one in model.functions)
    yield from (f"the function {name[1]!r} twice" for name, k in functions.items() if k > 1)
    known = {(domain, name) for domain, name, _ in functions}
    for one in (model, *model.functions):
        opsets = {entry.version for entry in one.opset_import if entry.domain in _STANDARD}
        if one is not model and not opsets:
            opsets = {0}  # no standard operators
        elif len(opsets) != 1 or not 1 <= min(opsets) <= _MAX_VERSION:
            yield f"opset {', '.join(map(str, sorted(opsets))) or 'of no standard operators'}"
            continue
        yield from _faults_of_graph(getattr(one, "graph", one), min(opsets), known)


def _texts(message: Any) -> Iterator[str | bytes]:
    """Yield all names and settings; protobuf gives text that is not UTF-8 as bytes."""
    if message.DESCRIPTOR.name == "TensorProto":  # its data would be copied
        yield message.name
        return
    for field, value in message.ListFields():
        values = value if field.is_repeated else [value]
        if field.type == field.TYPE_STRING and field.name != "doc_string":
            yield from values
        elif field.type == field.TYPE_MESSAGE:
            for one in values:
                yield from _texts(one)


def _fault_of_tensor(tensor: Any) -> str:
    """Return what is wrong with a tensor's type or the size of its data, "" if nothing."""
    import onnx
    import onnx_ir as ir

    kind = tensor.data_type
    if kind == 0 and not tensor.dims:
        return ""  # the empty sparse tensor of another kind of attribute
    try:
        field = onnx.helper.tensor_dtype_to_field(kind)
        bits = 0 if kind == ir.DataType.STRING else int(ir.DataType(kind).bitwidth)
    except (KeyError, ValueError, TypeError):
        return f"tensor {tensor.name!r} has the unknown element type {kind}"
    if min(tensor.dims, default=0) < 0:
        return f"tensor {tensor.name!r} has the shape {list(tensor.dims)}"
    if tensor.data_location == EXTERNAL:
        return ""
    size = math.prod(map(int, tensor.dims))
    needed, held, unit = -(-size * bits // 8), len(tensor.raw_data), "bytes"
    if not held:
        held, unit = len(getattr(tensor, field)), f"values in {field}"
        if not 0 < bits < 6:  # those are packed in bytes
            needed = size * (2 if "COMPLEX" in ir.DataType(kind).name else 1)
    if held == needed:
        return ""
    return f"tensor {tensor.name!r} has {held} {unit}, its shape needs {needed}"


def _faults_of_graph(
    graph: Any,
    opset: int,
    functions: Collection[tuple[str, str]],
    outer: tuple[Collection[str], ...] = (),
) -> Iterator[str]:
    """Yield the faults of a GraphProto or FunctionProto; `outer` are the names around it."""
    stored = Counter(tensor.name for tensor in getattr(graph, "initializer", ()))
    inputs = Counter(getattr(value, "name", value) for value in graph.input)
    made = Counter(name for node in graph.node for name in node.output if name)
    made.update({*stored, *inputs} - {""})
    for what, names in (("initializer", stored), ("graph input", inputs), ("value", made)):
        yield from (f"the {what} {n!r}, made {k} times" for n, k in names.items() if k > 1)
        if "" in names:
            yield f"the {what} number {[*names].index('') + 1}, without a name"
    if getattr(graph, "sparse_initializer", ()):
        yield "a sparse initializer, which no verb reads"
    for what in ("input", "output", "value_info"):
        for value in getattr(graph, what, ()):
            if not _is_known(getattr(value, "type", None), what == "input" and not outer):
                yield f"the {what} {value.name!r} is no tensor of a known type"
    known = (*outer, {*made, ""})
    for node in graph.node:
        title = f"the node {node.name!r} ({node.op_type})"
        for name in node.input:
            if not any(name in names for names in known):
                yield f"the input {name!r} of {title}, from nowhere"
        yield from (f"{title} {fault}" for fault in _faults_of_node(node, opset, functions))
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _faults_of_graph(inner, opset, functions, known)
    for value in graph.output:
        name = getattr(value, "name", value)
        if name not in made:
            yield f"the output {name!r}, which no node makes"


def _is_known(kind: Any, required: bool) -> bool:
    """Whether a TypeProto is of tensors of a known type; names in functions have no TypeProto."""
    import onnx_ir as ir

    field = kind and kind.WhichOneof("value")
    if field is None:
        return kind is None or not required
    while field in ("sequence_type", "optional_type"):
        kind = getattr(kind, field).elem_type
        field = kind.WhichOneof("value")
    if field not in ("tensor_type", "sparse_tensor_type"):
        return False
    return getattr(kind, field).elem_type in range(1, len(ir.DataType))


def _faults_of_node(node: Any, opset: int, functions: Collection[tuple[str, str]]) -> Iterator[str]:
    """Yield what a node lacks or has too much of, by the standard where that knows its operator."""
    if not node.op_type:
        yield "without an operator"
    if not node.output:
        yield "without outputs"
    given = {one.name: one for one in node.attribute}
    if len(given) < len(node.attribute):
        yield "with an attribute twice"
    for name, one in given.items():
        lacks = one.type in _MESSAGES and not one.HasField(_MESSAGES[one.type])
        if not one.ref_attr_name and (not name or not 0 < one.type <= _MAX_KIND or lacks):
            yield f"with the attribute {name!r} of an unknown type or without a value"
    if node.op_type == "MatMulNBits" and (  # of ONNX Runtime
        len(node.input) < 3
        or any((given[n].type if n in given else kind) != 2 for n, kind in _N_BITS.items())
    ):
        yield f"without its 3 inputs and the numbers {', '.join(_N_BITS)}"
    own = node.domain not in _STANDARD or (node.domain, node.op_type) in functions
    schema = None if own else _find_schema(node.op_type, opset)
    if schema is None:
        return
    if not schema.min_input <= len(node.input) <= schema.max_input:
        yield f"with {len(node.input)} inputs"
    for formal, name in zip(schema.inputs, node.input, strict=False) if "" in node.input else ():
        if not name and formal.option == schema.FormalParameterOption.Single:
            yield f"without its input {formal.name!r}"
    if not schema.min_output <= len(node.output) <= schema.max_output:
        yield f"with {len(node.output)} outputs"
    for name, wanted in schema.attributes.items():
        if name not in given and wanted.required:
            yield f"without the attribute {name!r}"
        elif name in given and given[name].type != wanted.type.value:
            yield f"with the attribute {name!r} of another type"
    if node.op_type == "Constant" and len(given) != 1:
        yield f"with {len(given)} values"
    if node.op_type == "Transpose" and "perm" in given:
        perm = list(given["perm"].ints)
        if sorted(perm) != list(range(len(perm))):
            yield f"with the permutation {perm[:8]}"


@lru_cache(1000)
def _find_schema(operator: str, opset: int) -> Any:
    """Return ONNX's definition of a standard operator, None if this onnx does not know it."""
    import onnx

    if 1 <= opset <= onnx.defs.onnx_opset_version():
        with contextlib.suppress(onnx.defs.SchemaError):
            return onnx.defs.get_schema(operator, opset, "")
    return None
