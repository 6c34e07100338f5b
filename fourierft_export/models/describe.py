"""A checkpoint as plain facts, for `inspect`."""

from __future__ import annotations

import os
from collections import Counter
from math import prod
from typing import Any

from .base import open_base


def describe_base(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a model directory or safetensors file holds, as JSON values; no tensor is read.

    Raises:
        FileAccessError, BadInputError: it cannot be opened.
    """
    base = open_base(path)
    tensors = list(base.tensors.values())
    dtypes = Counter(tensor.dtype for tensor in tensors)
    architectures = base.config.get("architectures")
    return {
        "kind": "checkpoint",
        "path": os.fspath(path),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "shards": len(base.checkpoint.shards),
        "tensors": len(tensors),
        "parameters": sum(prod(tensor.shape) for tensor in tensors),
        "dtypes": dict(dtypes.most_common()),
        "model_type": base.model_type,
        "architectures": architectures if isinstance(architectures, list) else [],
    }
