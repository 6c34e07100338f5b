"""What a bundle file consists of, for its writer and its reader (FORMAT.md is normative)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..files.container import DTYPE_BITS
from ..files.strict_json import canonical
from ..types import Array
from . import peft_config
from .spec import AdapterSpec

VERSION = 1
RESERVED = "fourierft."
SPEC_KEY = "fourierft"
HASH_KEY = "sha256"


@dataclass(frozen=True)
class Content:
    """What a bundle holds, as `bundle.file.Bundle` takes it."""

    spec: AdapterSpec
    spectra: Mapping[str, Array]
    saved: Mapping[str, Array] = field(default_factory=dict)
    explicit_entries: Mapping[str, Array] = field(default_factory=dict)


def place(row: tuple[str, str, tuple[int, ...]]) -> tuple[int, str]:
    """Where a tensor (name, dtype, shape) stands: by falling element size, then by name."""
    return -DTYPE_BITS[row[1]], row[0]


def content_digest(text: str, table: list[tuple[str, str, tuple[int, ...]]], payload: bytes) -> str:
    """The hash that tells damage from data: over the spec, the tensor table and the payload."""
    shapes = canonical([[name, dtype, list(shape)] for name, dtype, shape in table])
    digest = hashlib.sha256(f"{text}\n{shapes}\n".encode())
    digest.update(payload)
    return digest.hexdigest()


def likely_peft_config(spec: AdapterSpec) -> dict[str, Any]:
    """The template that the stored PEFT config is a difference to."""
    return peft_config.template(
        seed=spec.seed,
        scaling=spec.scaling,
        n_frequencies=[layer.n_frequency for layer in spec.layers],
        task_type=spec.task_type,
        base_model=spec.base_model,
    )
