"""Writes and reads the bytes of a bundle file, version 1 (FORMAT.md is normative).

Before arrays are made, a reader checks the header against the file's length, the hash against every
byte, and each field's type. `Bundle.build` checks whether the fields fit together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import BadInputError
from ..files import dtypes, strict_json
from ..files.dtypes import DTYPE_BITS
from ..files.safetensors_reader import Header, decode_header_length, encode_header, parse_header
from ..files.strict_json import canonical
from ..types import Array
from . import layer_templates as names
from . import peft_config
from .fingerprint import DIGEST_BYTES, FINGERPRINT_BYTES
from .spec import EXPLICIT_RULE, RESERVED, AdapterSpec, Fingerprint, LayerSpec

Kinds = dict[str, str]
"""Field -> the names of the types that it may have."""
VERSION = 1
SPEC_KEY, HASH_KEY = "fourierft", "sha256"
_REQUIRED: Kinds = {"version": "int", "seed": "int", "scaling": "int or float", "groups": "list"}
_OPTIONAL: Kinds = {"task_type": "str", "base_model": "str", "peft": "dict"}
_GROUP: Kinds = {"layers": "list", "n_frequency": "int"}
_GROUP_OPTIONAL: Kinds = {
    "shape": "list",
    "entry_rule": "str",
    "entries_sha256": "str",
    "fan_in_fan_out": "bool",
    "base_dtype": "str",
}
_PEFT: Kinds = {"set": "dict", "absent": "list"}

TensorRow = tuple[str, str, tuple[int, ...]]
"""A tensor's name, dtype and shape."""


def encode(
    spec: AdapterSpec,
    spectra: Mapping[str, Array],
    saved: Mapping[str, Array],
    explicit_entries: Mapping[str, Array],
) -> bytes:
    """Writes the fields of a checked bundle as the bytes of its file."""
    groups: dict[tuple[object, ...], list[LayerSpec]] = {}
    for layer in spec.layers:
        # Layers that share all of this are one group.
        base_dtype = layer.fingerprint.dtype if layer.fingerprint else None
        shared = replace(layer, name="", fingerprint=None)
        key = shared, dtypes.to_name(spectra[layer.name].dtype), base_dtype
        groups.setdefault(key, []).append(layer)
    tensors = dict(saved)
    for i, layers in enumerate(groups.values()):
        tensors[f"{RESERVED}spectrum.{i}"] = np.stack([spectra[layer.name] for layer in layers])
        if layers[0].entry_rule == EXPLICIT_RULE:
            tensors[f"{RESERVED}entries.{i}"] = explicit_entries[layers[0].name].astype("<u4")
        prints = [layer.fingerprint for layer in layers if layer.fingerprint]
        if prints:
            data = np.frombuffer(b"".join(p.digest + p.samples for p in prints), np.uint8)
            tensors[f"{RESERVED}fingerprint.{i}"] = data.reshape(len(prints), FINGERPRINT_BYTES)
    rows = ((name, dtypes.to_name(array.dtype), array.shape) for name, array in tensors.items())
    table = sorted(rows, key=_file_order)
    arrays = (tensors[name] for name, *_ in table)
    payload = b"".join(np.asarray(a, a.dtype.newbyteorder("<")).tobytes() for a in arrays)
    text = canonical(_spec_object(spec, groups.values()))
    return encode_header(table, {SPEC_KEY: text, HASH_KEY: _digest(text, table, payload)}) + payload


def _file_order(row: TensorRow) -> tuple[int, str]:
    """Sort key of a tensor: by falling element size, then by name."""
    return -DTYPE_BITS[row[1]], row[0]


def _digest(text: str, table: Sequence[TensorRow], payload: bytes) -> str:
    """The hash by which damage is recognised: of the spec, the tensor table and the payload."""
    digest = hashlib.sha256(f"{text}\n{canonical(table)}\n".encode())
    digest.update(payload)
    return digest.hexdigest()


def _spec_object(spec: AdapterSpec, groups: Iterable[list[LayerSpec]]) -> dict[str, Any]:
    """The JSON object of the metadata; keys without information are left out."""
    content: dict[str, Any] = {
        "version": VERSION,
        "seed": spec.seed,
        "scaling": spec.scaling,
        "groups": [],
        "task_type": spec.task_type,
        "base_model": spec.base_model,
        "peft": peft_config.config_difference(spec) if spec.peft_config else None,
    }
    for first, *more in groups:
        fields = {
            "layers": names.compress(layer.name for layer in (first, *more)),
            "n_frequency": first.n_frequency,
            "shape": first.shape,
            "entry_rule": first.entry_rule,
            "entries_sha256": first.entries_sha256,
            "fan_in_fan_out": first.fan_in_fan_out or None,
            "base_dtype": first.fingerprint and first.fingerprint.dtype,
        }
        content["groups"].append({key: v for key, v in fields.items() if v is not None})
    return {key: value for key, value in content.items() if value is not None}


def _fields(value: Any, where: str, required: Kinds, optional: Kinds) -> dict[str, Any]:
    """Checks a JSON object's fields and their types (bool is no int); absent ones are None."""
    _require(isinstance(value, dict), where, "a JSON object", type(value).__name__)
    for key, wanted in {**required, **optional}.items():
        if key in required or key in value:
            found = type(value[key]).__name__ if key in value else "nothing"
            _require(found in wanted.split(" or "), f"{where}, field {key}", wanted, found)
    extra = ", ".join(sorted(value.keys() - {*required, *optional})[:5])
    _require(not extra, where, "no unknown fields", extra)
    return {key: value.get(key) for key in (*required, *optional)}


def _require(holds: bool, where: str, expected: str, found: str, remedy: str = "") -> None:
    if not holds:
        raise BadInputError(where, expected=expected, found=found, remedy=remedy)


def split_file(data: bytes, where: str) -> tuple[Header, bytes]:
    """Splits the bytes of a bundle file into header and payload, checked against each other."""
    end = 8 + decode_header_length(data[:8], len(data), where)
    return parse_header(data[8:end], len(data), where), data[end:]


def check_kind(header: Header, where: str) -> None:
    """Refuses a safetensors file that is no bundle, before its payload is read."""
    _require(
        SPEC_KEY in header.metadata,
        where,
        "a FourierFT bundle",
        "a safetensors file without FourierFT metadata",
        "to make a bundle of a PEFT adapter, run: fourierft-export pack ADAPTER_DIR",
    )


def decode(
    data: bytes, where: str
) -> tuple[AdapterSpec, dict[str, Array], dict[str, Array], dict[str, Array]]:
    """Reads the fields of a bundle, which `Bundle.build` then checks, from its bytes."""
    header, payload = split_file(data, where)
    check_kind(header, where)
    text, tensors = header.metadata[SPEC_KEY], header.tensors.values()
    table = [(t.name, t.dtype, t.shape) for t in tensors]
    _require(
        header.metadata.get(HASH_KEY) == _digest(text, table, payload),
        where,
        "content with the hash that its metadata says",
        "another hash",
        "the file is damaged: get it again, or pack the adapter again",
    )
    origin = next((t.start for t in tensors), 0)
    ordered = [*header.metadata] == [SPEC_KEY, HASH_KEY] and table == sorted(table, key=_file_order)
    order = "metadata and tensors in the format's order, and a header padded to 8 bytes"
    again = "pack the adapter again"
    _require(ordered and origin % 8 == 0, where, order, "another form of the file", again)
    value = strict_json.loads(text, where)
    _require(canonical(value) == text, where, "canonical JSON as metadata", "another form of it")
    version = value.get("version") if isinstance(value, dict) else None
    if type(version) is int:
        newer = "use the version of fourierft-export that wrote it, or a newer one"
        expected, found = f"bundle version {VERSION}", f"version {version}"
        _require(version == VERSION, where, expected, found, newer)
    fields = _fields(value, f"{where}, bundle metadata", _REQUIRED, _OPTIONAL)
    stacks = [t.shape for t in tensors if t.name.startswith(f"{RESERVED}spectrum.")]
    rows = sum(shape[0] for shape in stacks if shape)
    _require(rows <= names.MAX_NAMES, where, f"at most {names.MAX_NAMES} layers", f"{rows}")
    arrays = {t.name: _array(payload, t.start - origin, t.dtype, t.shape, where) for t in tensors}
    layers: list[LayerSpec] = []
    spectra: dict[str, Array] = {}
    explicit: dict[str, Array] = {}
    for i, group in enumerate(fields["groups"]):
        for layer, spectrum, entries in _read_group(i, group, arrays, where):
            layers.append(layer)
            spectra[layer.name] = spectrum
            if entries is not None:
                explicit[layer.name] = entries
    known = (fields[key] for key in ("task_type", "base_model"))
    spec = AdapterSpec(fields["seed"], fields["scaling"], tuple(layers), *known)
    if fields["peft"] is not None:
        short = _fields(fields["peft"], f"{where}, the PEFT config", {}, _PEFT)
        config = peft_config.restore_config(spec, short["set"] or {}, short["absent"] or [])
        spec = replace(spec, peft_config=config)
    return spec, spectra, arrays, explicit


def _array(payload: bytes, at: int, dtype: str, shape: tuple[int, ...], where: str) -> Array:
    """A view of the payload as an array."""
    _require(DTYPE_BITS[dtype] >= 8, where, "tensors of whole bytes per element", f"dtype {dtype}")
    count = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(payload, dtypes.to_numpy(dtype), count, at).reshape(shape)


def _read_group(
    i: int, group: Any, arrays: dict[str, Array], where: str
) -> Iterator[tuple[LayerSpec, Array, Array | None]]:
    """Yields the layers of one group with spectrum and entries; pops its tensors from `arrays`."""
    where = f"{where}, group {i}"
    fields = _fields(group, where, _GROUP, _GROUP_OPTIONAL)
    templates, n, shape = fields["layers"], fields["n_frequency"], fields["shape"]
    rule, digest, base_dtype = (fields[k] for k in ("entry_rule", "entries_sha256", "base_dtype"))
    is_text = all(isinstance(template, str) for template in templates)
    _require(is_text, where, "layer templates as text", "something else")
    whole = shape is None or (len(shape) == 2 and all(type(size) is int for size in shape))
    _require(whole, where, "a shape of two whole numbers", repr(shape)[:80])
    spectrum = _pop_tensor(f"{RESERVED}spectrum.{i}", (None, n), arrays, where)
    try:
        # One row for each layer, so the file's size bounds how many names are made.
        layer_names = names.expand(templates, len(spectrum))
    except ValueError as error:
        wanted = "well-formed layer templates"
        raise BadInputError(where, expected=wanted, found=str(error)) from None
    rows, count = len(spectrum), len(layer_names)
    _require(count == rows, where, f"{rows} layers, one for each spectrum", f"{count}")
    entries = None
    if rule == EXPLICIT_RULE:
        stored = _pop_tensor(f"{RESERVED}entries.{i}", (n, 2), arrays, where)
        _require(stored.dtype == np.uint32, where, "entries of dtype U32", str(stored.dtype))
        entries = stored.astype(np.int64)
    prints: list[Fingerprint | None] = [None] * rows
    if base_dtype is not None:
        table = _pop_tensor(f"{RESERVED}fingerprint.{i}", (rows, FINGERPRINT_BYTES), arrays, where)
        known = base_dtype in DTYPE_BITS and table.dtype == np.uint8
        _require(known, where, "fingerprints of a known dtype", base_dtype[:20])
        raw = [row.tobytes() for row in table]
        prints = [Fingerprint(base_dtype, r[:DIGEST_BYTES], r[DIGEST_BYTES:]) for r in raw]
    size = shape and (shape[0], shape[1])
    transposed = fields["fan_in_fan_out"] is True
    for name, row, fingerprint in zip(layer_names, spectrum, prints, strict=True):
        yield LayerSpec(name, n, size, transposed, rule, digest, fingerprint), row, entries


def _pop_tensor(
    name: str, shape: tuple[int | None, int], arrays: dict[str, Array], where: str
) -> Array:
    """Pops the tensor `name`, which must have this shape (None: any number of rows)."""
    found = arrays.pop(name, np.empty(()))
    wanted = "[{}, {}]".format(*("L" if size is None else str(size)[:20] for size in shape))
    rows = len(found) if shape[0] is None and found.ndim else shape[0]
    shown = f"shape {list(found.shape)}" if found.ndim else "none"
    _require(found.shape == (rows, shape[1]), where, f"a tensor {name} of shape {wanted}", shown)
    return found
