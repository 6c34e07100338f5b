"""Model-local functions expanded where they are called.

onnx.version_converter and the usual float16 converters fail on functions or leave them as they are;
after this a graph holds standard operators only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def inline_functions(model: ir.Model) -> None:
    """Replace every call of a function by the function's nodes; no function is left.

    Args:
        model: changed in place; inputs, outputs and initializers keep their names.
    """
    from onnx_ir.passes.common import InlinePass

    domains = {function.domain for function in model.functions.values()}
    InlinePass()(model)
    for domain in domains - {node.domain for node in model.graph.all_nodes()}:
        model.opset_imports.pop(domain, None)
