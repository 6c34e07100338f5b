"""Lets torch's exporter trace each model once: a second export of the same gets a copy."""

from __future__ import annotations

import hashlib
import inspect
from copy import deepcopy
from typing import Any

import pytest

_MODELS = 16  # kept at most


def remember_exports(patch: pytest.MonkeyPatch) -> None:
    """Wraps `torch.onnx.export`; calls that write a file are not remembered."""
    import onnx_ir as ir
    import torch
    from torch.onnx import ONNXProgram

    export, kept = torch.onnx.export, {}

    def remembering(model: Any, args: Any = (), f: Any = None, **options: Any) -> Any:
        if f is not None or not isinstance(model, torch.nn.Module):
            return export(model, args, f, **options)
        key = _describe(model, args, options)
        if key not in kept:
            program = export(model, args, f, **options)
            for value in program.model.graph.initializers.values():
                # The model's own memory may change.
                value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
            kept[key] = program.model
            while len(kept) > _MODELS:
                del kept[next(iter(kept))]
        copy = kept[key].clone()
        # The copy numbers new nodes as the original would.
        copy.graph._name_authority = deepcopy(kept[key].graph._name_authority)
        return ONNXProgram(copy, None)

    patch.setattr(torch.onnx, "export", remembering)


def _describe(model: Any, args: Any, options: Any) -> tuple[Any, ...]:
    """Everything that the graph of a model depends on; of types their names and `forward`."""
    import torch

    own = vars(torch.nn.Module())
    digest = hashlib.sha256(repr((_plain(args), _plain(options))).encode())
    first: dict[int, str] = {}
    for path, module in model.named_modules():
        fields = {n: _plain(value) for n, value in vars(module).items() if n not in own}
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        digest.update(repr((path, module.training, module.extra_repr(), fields, hooks)).encode())
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                same_as = first.setdefault(id(tensor), f"{path}.{name}")
                digest.update(repr((name, same_as, _plain(tensor))).encode())
    kinds = [type(module) for module in model.modules()]
    return tuple((kind.__qualname__, _code(kind.forward)) for kind in kinds), digest.hexdigest()


def _code(function: Any) -> Any:
    return getattr(inspect.unwrap(function), "__code__", None)


def _plain(value: Any) -> Any:
    """A value without tensors: their content is hashed."""
    import torch

    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().view(-1).view(torch.uint8) if value.numel() else value
        return value.dtype, tuple(value.shape), hashlib.sha256(data.numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if hasattr(value, "to_json_string"):  # a config, wherever its model was loaded from
        return [(n, repr(one)) for n, one in value.to_dict().items() if n != "_name_or_path"]
    return repr(value)
