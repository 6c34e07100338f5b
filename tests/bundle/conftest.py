"""Bundles by hand: written from FORMAT.md, without the package's writer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import pytest

Tensor = tuple[str, str, list[int], bytes]
Craft = Callable[..., bytes]

# What the crafted bundle says when nobody asks for anything else: two unbound layers, n = 4.
SPEC: dict[str, Any] = {
    "version": 1,
    "seed": 777,
    "scaling": 150.0,
    "groups": [{"layers": ["block.{0-1}.lin"], "n_frequency": 4}],
}


def canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def digest_of(text: str, tensors: Sequence[Tensor]) -> str:
    table = canonical([[name, dtype, shape] for name, dtype, shape, _ in tensors])
    payload = b"".join(data for *_, data in tensors)
    return hashlib.sha256(text.encode() + b"\n" + table.encode() + b"\n" + payload).hexdigest()


def container(entries: Mapping[str, Any] | str, payload: bytes) -> bytes:
    """A safetensors file of this header (as JSON or as text) and this payload."""
    text = entries if isinstance(entries, str) else json.dumps(entries, separators=(",", ":"))
    raw = text.encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + payload


@pytest.fixture(scope="session")
def craft() -> Craft:
    """`craft(spec=..., tensors=..., text=..., digest=..., **fields)`: the bytes of a bundle file.

    `fields` replace fields of the usual spec (None: left out); `text` is the metadata itself.
    `digest` replaces the right hash. A tensor is (name, dtype, shape, bytes).
    """

    def make(
        *,
        text: str | None = None,
        tensors: Sequence[Tensor] | None = None,
        digest: str | None = None,
        **fields: Any,
    ) -> bytes:
        spec = {key: value for key, value in {**SPEC, **fields}.items() if value is not None}
        text = canonical(spec) if text is None else text
        if tensors is None:
            values = np.arange(8, dtype="<f4").tobytes()
            tensors = [("fourierft.spectrum.0", "F32", [2, 4], values)]
        metadata = {"fourierft": text, "sha256": digest or digest_of(text, tensors)}
        entries: dict[str, Any] = {"__metadata__": metadata}
        at = 0
        for name, dtype, shape, data in tensors:
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        return container(entries, b"".join(data for *_, data in tensors))

    return make


@pytest.fixture(scope="session")
def spectrum_of() -> Callable[..., Tensor]:
    """`spectrum_of([L, n], dtype="F32", group=0)`: a stack of spectra with distinct values."""

    def make(shape: list[int], dtype: str = "F32", group: int = 0, start: int = 0) -> Tensor:
        kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]
        values = np.arange(start, start + prod(shape), dtype=kind).tobytes()
        return (f"fourierft.spectrum.{group}", dtype, shape, values)

    return make


@pytest.fixture(scope="session")
def raw_container() -> Callable[..., bytes]:
    """`raw_container(header, payload)`: a safetensors file of any header, as JSON or as text."""
    return container
