"""The versions that an ONNX file says it needs: of the operators, and of the file format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import UsageError

if TYPE_CHECKING:
    import onnx_ir as ir

MIN_OPSET = 18
"""torch.onnx writes no older one, and the functions of the adapters need it."""

MAX_OPSET = 25
"""The newest that onnxscript's converter writes."""

FUNCTIONS_IR_VERSION = 8
"""The first with model-local functions."""


def check_opset(opset: int | None) -> None:
    """Refuse an opset that cannot be written.

    Args:
        opset: of the standard operators; None for the exporter's choice.

    Raises:
        UsageError: older than 18 or newer than 25.
    """
    if opset is not None and not MIN_OPSET <= opset <= MAX_OPSET:
        raise UsageError("opset", expected=f"{MIN_OPSET} to {MAX_OPSET}", found=str(opset))


def check_ir_version(version: int | None, opset: int | None = None, *, functions: bool) -> None:
    """Refuse a format version that cannot hold the model.

    Args:
        version: the one asked for; None for no wish.
        opset: of the standard operators, if known.
        functions: the model has model-local functions.

    Raises:
        UsageError: too old for the opset or for functions, or newer than the installed onnx knows.
    """
    from onnx import IR_VERSION

    if version is None:
        return
    lowest = max(_for_opset(opset or MIN_OPSET), FUNCTIONS_IR_VERSION if functions else 0)
    if not lowest <= version <= IR_VERSION:
        raise UsageError(
            "ir_version",
            expected=f"{lowest} to {IR_VERSION}",
            found=str(version),
            remedy="choose an older opset for an older IR version" if version < lowest else "",
        )


def set_ir_version(model: ir.Model, version: int | None = None) -> None:
    """Make `version` the model's format version, by default the least its opset allows.

    Raises:
        UsageError: see `check_ir_version`.
    """
    opset = model.opset_imports[""]
    check_ir_version(version, opset, functions=bool(model.functions))
    model.ir_version = max(model.ir_version, _for_opset(opset)) if version is None else version


def _for_opset(opset: int) -> int:
    """The format version that came with an opset."""
    from onnx.helper import find_min_ir_version_for, make_opsetid

    return find_min_ir_version_for([make_opsetid("", opset)])
