"""The versions that an ONNX file says it needs: of the operators, and of the file format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import UsageError
from ..modes.functions import IR_VERSION as FUNCTIONS_IR_VERSION

if TYPE_CHECKING:
    import onnx_ir as ir

# torch.onnx writes no older opset, and the adapters' functions need it; onnxscript's converter
# writes no newer one.
MIN_OPSET, MAX_OPSET = 18, 25


def check_versions(opset: int | None, ir_version: int | None, *, functions: bool) -> None:
    """Refuse an opset that cannot be written, or a format version that cannot hold the model.

    Args:
        opset: of the standard operators; None for the exporter's choice.
        ir_version: of the file format; None for the least that the opset allows.
        functions: the model has model-local functions.

    Raises:
        UsageError: for either.
    """
    from onnx import IR_VERSION

    if opset is not None and not MIN_OPSET <= opset <= MAX_OPSET:
        raise UsageError("opset", expected=f"{MIN_OPSET} to {MAX_OPSET}", found=str(opset))
    lowest = max(_ir_version_of(opset or MIN_OPSET), FUNCTIONS_IR_VERSION if functions else 0)
    if ir_version is not None and not lowest <= ir_version <= IR_VERSION:
        raise UsageError(
            "ir_version",
            expected=f"{lowest} to {IR_VERSION}",
            found=str(ir_version),
            remedy="choose an older opset for an older IR version" if ir_version < lowest else "",
        )


def set_ir_version(model: ir.Model, version: int | None) -> None:
    """Make `version` the model's format version, by default the least its opset allows.

    Raises:
        UsageError: see `check_versions`.
    """
    opset = model.opset_imports[""]
    check_versions(opset, version, functions=bool(model.functions))
    model.ir_version = version or max(model.ir_version, _ir_version_of(opset))


def _ir_version_of(opset: int) -> int:
    """The format version that came with an opset."""
    from onnx.helper import find_min_ir_version_for, make_opsetid

    return find_min_ir_version_for([make_opsetid("", opset)])
