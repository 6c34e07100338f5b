"""Content <-> the bytes of a bundle file (FORMAT.md is normative).

Reading trusts nothing: the container's header is checked against the file's length, the hash
against every byte that follows, each field against its type and range, before arrays are made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..checkpoint import dtypes, strict_json
from ..checkpoint.container import DTYPE_BITS, FLOAT_DTYPES, Header, encode_header
from ..checkpoint.strict_json import canonical
from ..errors import BadInputError
from ..spectral.entries import ENTRY_RULES
from . import names, peft_config
from .fingerprint import DIGEST_BYTES, FINGERPRINT_BYTES
from .spec import EXPLICIT_RULE, AdapterSpec, Fingerprint, LayerSpec

VERSION = 1
RESERVED = "fourierft."
SPEC_KEY = "fourierft"
HASH_KEY = "sha256"

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Content:
    """What a bundle holds, as `bundle.file.Bundle` takes it."""

    spec: AdapterSpec
    spectra: Mapping[str, Array]
    saved: Mapping[str, Array] = field(default_factory=dict)
    explicit_entries: Mapping[str, Array] = field(default_factory=dict)


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
    order = sorted(tensors, key=lambda n: (-DTYPE_BITS[dtypes.to_name(tensors[n].dtype)], n))
    table = [(n, dtypes.to_name(tensors[n].dtype), tensors[n].shape) for n in order]
    payload = b"".join(_little_endian(tensors[n]) for n in order)
    text = canonical(_spec_object(spec, list(groups.values())))
    digest = _digest(text, table, payload)
    return encode_header(table, {SPEC_KEY: text, HASH_KEY: digest}) + payload


def _little_endian(array: Array) -> bytes:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def _digest(text: str, table: list[tuple[str, str, tuple[int, ...]]], payload: bytes) -> str:
    """The hash that tells damage from data: over the spec, the tensor table and the payload."""
    shapes = canonical([[name, dtype, list(shape)] for name, dtype, shape in table])
    digest = hashlib.sha256(f"{text}\n{shapes}\n".encode())
    digest.update(payload)
    return digest.hexdigest()


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


def likely_peft_config(spec: AdapterSpec) -> dict[str, Any]:
    """The template that the stored PEFT config is a difference to."""
    return peft_config.template(
        seed=spec.seed,
        scaling=spec.scaling,
        n_frequencies=[layer.n_frequency for layer in spec.layers],
        task_type=spec.task_type,
        base_model=spec.base_model,
    )


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


def check_kind(header: Header, where: str) -> None:
    """Refuse a safetensors file that is no bundle; to be called before its payload is read.

    Raises:
        BadInputError: no FourierFT metadata.
    """
    if SPEC_KEY not in header.metadata:
        raise BadInputError(
            where,
            expected="a FourierFT bundle",
            found="a safetensors file without FourierFT metadata",
            remedy="to make a bundle of a PEFT adapter, run: fourierft-export pack ADAPTER_DIR",
        )


def decode(header: Header, payload: bytes, where: str) -> Content:
    """The content of a bundle.

    Args:
        header: of the safetensors container, already checked against the file's length.
        payload: every byte after the header.
        where: the file, for errors.

    Raises:
        BadInputError: not a bundle, damaged, or with fields that do not fit.
    """
    check_kind(header, where)
    text = header.metadata[SPEC_KEY]
    table = [(t.name, t.dtype, t.shape) for t in header.tensors.values()]
    if header.metadata.get(HASH_KEY) != _digest(text, table, payload):
        raise BadInputError(
            where,
            expected="a payload with the hash that the file states",
            found="another hash",
            remedy="the file is damaged: get it again, or pack it again",
        )
    value = strict_json.loads(text, where)
    if canonical(value) != text:
        raise BadInputError(
            where, expected="canonical JSON as metadata", found="another form of it"
        )
    fields = _Fields(value, where, "bundle metadata")
    version = fields.take("version", int)
    if version != VERSION:
        raise BadInputError(
            where,
            expected=f"bundle version {VERSION}",
            found=f"version {version}",
            remedy="use the version of fourierft-export that wrote it, or a newer one",
        )
    rows = sum(
        t.shape[0]
        for t in header.tensors.values()
        if t.name.startswith(f"{RESERVED}spectrum.") and t.shape
    )
    if rows > names.MAX_NAMES:
        raise BadInputError(where, expected=f"at most {names.MAX_NAMES} layers", found=f"{rows}")
    origin = next((t.start for t in header.tensors.values()), 0)
    arrays = {
        t.name: _array(payload, t.start - origin, t.dtype, t.shape, where)
        for t in header.tensors.values()
    }
    seed, scaling = fields.take("seed", int), fields.take("scaling", (int, float))
    task_type = fields.take("task_type", str, None)
    base_model = fields.take("base_model", str, None)
    short = fields.take("peft", dict, None)
    groups = fields.take("groups", list)
    fields.finish()
    layers: list[LayerSpec] = []
    spectra: dict[str, Array] = {}
    explicit: dict[str, Array] = {}
    for i, group in enumerate(groups):
        for layer, spectrum, entries in _group(i, group, arrays, where):
            if layer.name in spectra:
                raise BadInputError(f"{where}, layer {layer.name}", expected="one spectrum",
                                    found="two")  # fmt: skip
            layers.append(layer)
            spectra[layer.name] = spectrum
            if entries is not None:
                explicit[layer.name] = entries
    layers.sort(key=lambda m: names.natural_key(m.name))
    spec = AdapterSpec(seed, scaling, tuple(layers), task_type, base_model)
    if short is not None:
        difference = _Fields(short, where, "the PEFT config")
        differing, absent = difference.take("set", dict, {}), difference.take("absent", list, [])
        difference.finish()
        config = peft_config.restore(differing, absent, likely_peft_config(spec))
        spec = AdapterSpec(seed, scaling, tuple(layers), task_type, base_model, config)
    return Content(spec, spectra, arrays, explicit)


def _array(payload: bytes, at: int, dtype: str, shape: tuple[int, ...], where: str) -> Array:
    """A view of the payload as an array."""
    try:
        kind = dtypes.to_numpy(dtype)
    except KeyError:
        raise BadInputError(
            where, expected="tensors of whole bytes per element", found=f"dtype {dtype}"
        ) from None
    count = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(payload, kind, count, at).reshape(shape)


def _group(
    i: int, group: Any, arrays: dict[str, Array], where: str
) -> Iterator[tuple[LayerSpec, Array, Array | None]]:
    """The layers of one group; takes the group's tensors out of `arrays`."""
    at = f"{where}, group {i}"
    fields = _Fields(group, where, f"group {i}")
    templates = fields.take("layers", list)
    n_frequency = fields.take("n_frequency", int)
    shape = fields.take("shape", list, None)
    rule = fields.take("entry_rule", str, None)
    digest = fields.take("entries_sha256", str, None)
    fan_in_fan_out = fields.take("fan_in_fan_out", bool, False)
    base_dtype = fields.take("base_dtype", str, None)
    fields.finish()
    if not all(isinstance(t, str) for t in templates):
        raise BadInputError(at, expected="layer templates as text", found="something else")
    if n_frequency < 1:
        raise BadInputError(at, expected="an n_frequency from 1", found=str(n_frequency)[:80])
    spectrum = arrays.pop(f"{RESERVED}spectrum.{i}", None)
    if spectrum is None or spectrum.ndim != 2 or spectrum.shape[1] != n_frequency:
        raise BadInputError(
            at,
            expected=f"a tensor {RESERVED}spectrum.{i} with {str(n_frequency)[:20]} columns",
            found="none" if spectrum is None else f"shape {list(spectrum.shape)}",
        )
    try:
        # One row for each layer, so the file's size bounds how many names are made.
        layer_names = names.expand(templates, len(spectrum))
    except ValueError as error:
        raise BadInputError(at, expected="well-formed layer templates", found=str(error)) from None
    bound = shape is not None
    if bound != (rule is not None) or bound != (digest is not None):
        raise BadInputError(
            at, expected="shape, entry_rule and entries_sha256 together", found="some of them"
        )
    if bound and (len(shape) != 2 or not all(type(n) is int for n in shape)):
        raise BadInputError(at, expected="a shape of two whole numbers", found=repr(shape)[:80])
    if bound and rule not in (*ENTRY_RULES, EXPLICIT_RULE):
        raise BadInputError(at, expected="a known entry rule", found=repr(rule)[:80])
    if len(layer_names) != len(spectrum):
        raise BadInputError(
            at,
            expected=f"{len(spectrum)} layers, one for each spectrum",
            found=f"{len(layer_names)}",
        )
    if dtypes.to_name(spectrum.dtype) not in FLOAT_DTYPES:
        raise BadInputError(at, expected="a float spectrum", found=str(spectrum.dtype))
    entries = None
    if rule == EXPLICIT_RULE:
        stored = _stack(f"{RESERVED}entries.{i}", (n_frequency, 2), arrays, at)
        if stored.dtype != np.uint32:
            raise BadInputError(at, expected="entries of dtype U32", found=str(stored.dtype))
        entries = stored.astype(np.int64)
    prints = None
    if base_dtype is not None:
        size = (len(layer_names), FINGERPRINT_BYTES)
        prints = _stack(f"{RESERVED}fingerprint.{i}", size, arrays, at)
        if base_dtype not in DTYPE_BITS or prints.dtype != np.uint8:
            raise BadInputError(at, expected="fingerprints of a known dtype", found=base_dtype[:20])
    for row, name in enumerate(layer_names):
        mark = None
        if prints is not None and base_dtype is not None:
            raw = prints[row].tobytes()
            mark = Fingerprint(base_dtype, raw[:DIGEST_BYTES], raw[DIGEST_BYTES:])
        yield (
            LayerSpec(
                name,
                n_frequency,
                (shape[0], shape[1]) if bound else None,
                fan_in_fan_out,
                rule,
                digest,
                mark,
            ),
            spectrum[row],
            entries,
        )


def _stack(name: str, shape: tuple[int, ...], arrays: dict[str, Array], where: str) -> Array:
    """Take the tensor `name` of this shape out of `arrays`."""
    found = arrays.pop(name, None)
    if found is None or found.shape != shape:
        raise BadInputError(
            where,
            expected=f"a tensor {name} of shape {list(shape)}",
            found="none" if found is None else f"shape {list(found.shape)}",
        )
    return found


_MISSING = object()


class _Fields:
    """Takes typed fields out of a JSON object and complains about what is left."""

    def __init__(self, value: Any, where: str, what: str) -> None:
        self.where = f"{where}, {what}"
        if not isinstance(value, dict):
            raise BadInputError(self.where, expected="a JSON object", found=type(value).__name__)
        self.values = dict(value)

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = _MISSING) -> Any:
        """The field `key`; bool is not taken for a number."""
        value = self.values.pop(key, default)
        if value is default and default is not _MISSING:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(value) not in kinds:
            wanted = " or ".join(k.__name__ for k in kinds)
            found = "nothing" if value is _MISSING else type(value).__name__
            raise BadInputError(f"{self.where}, field {key}", expected=wanted, found=found)
        return value

    def finish(self) -> None:
        """Refuse fields that nobody took."""
        if self.values:
            extra = ", ".join(sorted(self.values)[:5])
            raise BadInputError(self.where, expected="no unknown fields", found=extra)
