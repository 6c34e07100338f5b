"""torch.onnx.export, without its noise, and the versions that it can write."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from ...errors import UsageError, first_line
from ..modes.functions import IR_VERSION as FUNCTIONS_IR_VERSION

Inputs = torch.Tensor | Sequence[Any] | Mapping[str, Any]

# Settings of transformers' models: no more outputs, by name; and experts by operators of ONNX.
_SETTINGS = {
    "use_cache": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "_experts_implementation": "batched_mm",
}
# From opset 23 on torch writes fused operators. Its RotaryEmbedding leaves out the broadcast over
# the batch, which ONNX wants and ONNX Runtime checks: so newer graphs are those of 22, converted.
_TRACED_OPSET = 22
# torch.onnx writes no older opset, and the adapters' functions need it; onnxscript's converter
# writes no newer one.
_MIN_OPSET, _MAX_OPSET = 18, 25
_MEDIA = ("pixel_values", "input_features", "input_values", "decoder_input_ids")
_NOISY = ("torch", "torch.onnx", "onnxscript", "onnx_ir")


def trace(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
    opset: int | None = None,
    optimise: Callable[[torch.onnx.ONNXProgram], None],
) -> ir.Model:
    """The graph of `model` in evaluation mode.

    Args:
        model: in any mode; it is traced in evaluation mode.
        example_inputs: a tuple of positional arguments, or a mapping of keyword arguments.
        input_names: names of the graph's inputs, in the order of the arguments.
        dynamic_shapes: as `torch.onnx.export` takes them.
        opset: the newest opset that the graph may use.
        output_names: keys of a dictionary or ModelOutput choose outputs, in this order.
        optimise: optimises the exporter's graph in place.
    """
    args, kwargs = _arguments(example_inputs)
    with _evaluating(model), _settings(model), torch.no_grad():
        every = _output_names(_run(model, args, kwargs), output_names)
        with _quiet():
            try:
                program = torch.onnx.export(
                    model,
                    args,
                    kwargs=kwargs,
                    input_names=input_names,
                    output_names=every,
                    dynamic_shapes=dynamic_shapes,
                    opset_version=None if opset is None else min(opset, _TRACED_OPSET),
                    dynamo=True,
                    optimize=False,
                    verbose=False,
                )
                if program is not None:
                    optimise(program)
            except torch.onnx.OnnxExporterError as error:
                raise UsageError(
                    f"export of {type(model).__name__}",
                    expected="a model that torch.onnx can export with these example inputs",
                    found=_kind_and_line(error.__cause__ or error),
                    remedy="check the example inputs, input names and dynamic shapes",
                ) from error
    if program is None:
        raise UsageError(f"export of {type(model).__name__}", found="no graph from torch.onnx")
    graph = program.model
    found = [str(value.name) for value in graph.graph.outputs]
    if found != every:
        raise UsageError(
            "model outputs",
            expected=f"{len(every)} outputs: {', '.join(every)}",
            found=f"{len(found)}: {', '.join(found)}",
            remedy="give one name per output (output_names=...)",
        )
    if opset is not None:
        _raise_opset(graph, opset)
    _keep_outputs(graph, output_names or every)
    return graph


def list_outputs(model: nn.Module, example_inputs: Inputs, names: Sequence[str]) -> list[str]:
    """Those of these outputs that a model gives by name."""
    with _evaluating(model), _settings(model), torch.no_grad():
        given = _run(model, *_arguments(example_inputs))
    return [name for name in names if given.get(name) is not None]


def _arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return ((inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)), {}


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The model's outputs; what its code raises becomes an error of the example inputs."""
    try:
        return model(*args, **kwargs)
    except MemoryError:
        raise
    except Exception as error:
        accepted = inspect.signature(model.forward).parameters
        media = [name for name in _MEDIA if name in accepted and name not in kwargs]
        remedy = "correct the model's config.json, or call export_onnx with inputs of your own"
        if media:
            remedy = f"it also takes {', '.join(media)}: call export_onnx with inputs of your own"
        raise UsageError(
            f"export of {type(model).__name__}",
            expected=f"a model that runs on the example inputs {', '.join(kwargs) or 'given'}",
            found=_kind_and_line(error),
            remedy=remedy,
        ) from error


def _output_names(outputs: Any, names: Sequence[str] | None) -> list[str]:
    """A name for every output: those given, unless they are keys of a mapping."""
    if isinstance(outputs, Mapping):
        every = [name for key, value in outputs.items() for name in _leaves(str(key), value)]
        return every if names is None or {*names} <= {*every, *outputs} else list(names)
    if names is not None:
        return list(names)
    if isinstance(outputs, torch.Tensor):
        return ["output"]
    if isinstance(outputs, Sequence) and all(isinstance(o, torch.Tensor) for o in outputs):
        return [f"output_{i}" for i in range(len(outputs))]
    raise UsageError(
        "model outputs",
        expected="tensors, in a sequence or by name",
        found=type(outputs).__name__,
        remedy="name the outputs (output_names=...), or wrap the model",
    )


def _leaves(name: str, value: Any) -> Iterator[str]:
    """Names the tensors of an output: a nested one's are NAME.KEY."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    elif isinstance(value, (tuple, list)):
        for i, inner in enumerate(value):
            yield from _leaves(f"{name}.{i}", inner)
    elif value is not None:
        yield name


def _raise_opset(graph: ir.Model, opset: int) -> None:
    """Convert a graph in place to `opset`, which is not older than its own."""
    from onnxscript import version_converter

    if graph.opset_imports[""] < opset:
        with _quiet():
            version_converter.convert_version(graph, opset)
    if graph.opset_imports[""] != opset:
        raise UsageError(
            "opset",
            expected=f"{opset}, as requested",
            found=f"{graph.opset_imports['']}: this model cannot be written in that one",
            remedy="choose another opset",
        )


def _keep_outputs(graph: ir.Model, names: Sequence[str]) -> None:
    """Leave only these outputs, in this order, and what they need."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    outputs = {str(value.name): value for value in graph.graph.outputs}
    kept = [key for name in names for key in outputs if f"{key}.".startswith(f"{name}.")]
    if list(outputs) != kept:
        graph.graph.outputs[:] = [outputs[name] for name in dict.fromkeys(kept)]
        RemoveUnusedNodesPass()(graph)


def _kind_and_line(error: BaseException) -> str:
    name, first = type(error).__name__, first_line(error)
    return first if first == name else f"{name}: {first}"


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode within the block; each module's own mode is put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _settings(model: nn.Module) -> Iterator[None]:
    """A transformers model as it can be exported."""
    config = getattr(model, "config", None)
    before = {name: getattr(config, name) for name in _SETTINGS if hasattr(config, name)}
    try:
        for name in before:
            setattr(config, name, _SETTINGS[name])
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on stdout or stderr from the exporter, which prints, warns and logs."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def check_versions(opset: int | None, ir_version: int | None, *, functions: bool) -> None:
    """Refuse an opset that cannot be written, or a format version that cannot hold the model."""
    from onnx import IR_VERSION

    if opset is not None and not _MIN_OPSET <= opset <= _MAX_OPSET:
        raise UsageError("opset", expected=f"{_MIN_OPSET} to {_MAX_OPSET}", found=str(opset))
    lowest = max(_ir_version_of(opset or _MIN_OPSET), FUNCTIONS_IR_VERSION if functions else 0)
    if ir_version is not None and not lowest <= ir_version <= IR_VERSION:
        raise UsageError(
            "ir_version",
            expected=f"{lowest} to {IR_VERSION}",
            found=str(ir_version),
            remedy="choose an older opset for an older IR version" if ir_version < lowest else "",
        )


def set_ir_version(model: ir.Model, version: int | None) -> None:
    """Make `version` the model's format version, by default the least its opset allows."""
    opset = model.opset_imports[""]
    check_versions(opset, version, functions=bool(model.functions))
    model.ir_version = version or max(model.ir_version, _ir_version_of(opset))


def _ir_version_of(opset: int) -> int:
    """The format version that came with an opset."""
    from onnx.helper import find_min_ir_version_for, make_opsetid

    return find_min_ir_version_for([make_opsetid("", opset)])
