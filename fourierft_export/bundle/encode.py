"""Content -> the bytes of a bundle file; equal content gives equal bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..files import dtypes
from ..files.container import encode_header
from ..files.strict_json import canonical
from . import names, peft_config
from .content import (
    HASH_KEY,
    RESERVED,
    SPEC_KEY,
    VERSION,
    Array,
    Content,
    content_digest,
    likely_peft_config,
    place,
)
from .fingerprint import FINGERPRINT_BYTES
from .spec import EXPLICIT_RULE, AdapterSpec, LayerSpec


def encode(content: Content) -> bytes:
    """The bytes of a bundle; equal content gives equal bytes."""
    spec = content.spec
    groups: dict[tuple[object, ...], list[LayerSpec]] = {}
    for layer in spec.layers:
        key = _group_key(layer, dtypes.to_name(content.spectra[layer.name].dtype))
        groups.setdefault(key, []).append(layer)
    tensors: dict[str, Array] = dict(content.saved)
    for i, layers in enumerate(groups.values()):
        tensors[f"{RESERVED}spectrum.{i}"] = np.stack([content.spectra[m.name] for m in layers])
        if layers[0].entry_rule == EXPLICIT_RULE:
            entries = content.explicit_entries[layers[0].name]
            tensors[f"{RESERVED}entries.{i}"] = entries.astype("<u4")
        if layers[0].fingerprint:
            prints = b"".join(m.fingerprint.digest + m.fingerprint.samples for m in layers)  # type: ignore[union-attr]
            tensors[f"{RESERVED}fingerprint.{i}"] = np.frombuffer(prints, np.uint8).reshape(
                len(layers), FINGERPRINT_BYTES
            )
    rows = ((name, dtypes.to_name(array.dtype), array.shape) for name, array in tensors.items())
    table = sorted(rows, key=place)
    payload = b"".join(_little_endian(tensors[name]) for name, *_ in table)
    text = canonical(_spec_object(spec, list(groups.values())))
    digest = content_digest(text, table, payload)
    return encode_header(table, {SPEC_KEY: text, HASH_KEY: digest}) + payload


def _group_key(layer: LayerSpec, dtype: str) -> tuple[object, ...]:
    """Layers with equal keys share one stack."""
    print_dtype = layer.fingerprint.dtype if layer.fingerprint else None
    return (
        layer.n_frequency,
        dtype,
        layer.shape,
        layer.fan_in_fan_out,
        layer.entry_rule,
        layer.entries_sha256,
        print_dtype,
    )


def _little_endian(array: Array) -> bytes:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def _spec_object(spec: AdapterSpec, groups: list[list[LayerSpec]]) -> dict[str, Any]:
    """The JSON object of the metadata; keys without information are left out."""
    return {
        "version": VERSION,
        "seed": spec.seed,
        "scaling": spec.scaling,
        "groups": [_group_object(layers) for layers in groups],
        **({"task_type": spec.task_type} if spec.task_type is not None else {}),
        **({"base_model": spec.base_model} if spec.base_model is not None else {}),
        **(
            {"peft": peft_config.shorten(spec.peft_config, likely_peft_config(spec))}
            if spec.peft_config
            else {}
        ),
    }


def _group_object(layers: list[LayerSpec]) -> dict[str, Any]:
    first = layers[0]
    group: dict[str, Any] = {
        "layers": names.compress(m.name for m in layers),
        "n_frequency": first.n_frequency,
    }
    if first.shape is not None:
        group["shape"] = list(first.shape)
        group["entry_rule"] = first.entry_rule
        group["entries_sha256"] = first.entries_sha256
    if first.fan_in_fan_out:
        group["fan_in_fan_out"] = True
    if first.fingerprint:
        group["base_dtype"] = first.fingerprint.dtype
    return group
