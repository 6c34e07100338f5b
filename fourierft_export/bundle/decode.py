"""The bytes of a bundle file -> content.

Reading trusts nothing: the container's header is checked against the file's length, the hash
against every byte that follows, each field against its type and range, before arrays are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import BadInputError
from ..files import dtypes, strict_json
from ..files.container import DTYPE_BITS, FLOAT_DTYPES, Header
from ..files.fields import Fields
from ..files.strict_json import canonical
from ..spectral.entries import ENTRY_RULES
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
from .fingerprint import DIGEST_BYTES, FINGERPRINT_BYTES
from .spec import EXPLICIT_RULE, AdapterSpec, Fingerprint, LayerSpec


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
    if header.metadata.get(HASH_KEY) != content_digest(text, table, payload):
        raise BadInputError(
            where,
            expected="a payload with the hash that the file states",
            found="another hash",
            remedy="the file is damaged: get it again, or pack it again",
        )
    origin = next((t.start for t in header.tensors.values()), 0)
    ordered = [*header.metadata] == [SPEC_KEY, HASH_KEY] and table == sorted(table, key=place)
    if not ordered or origin % 8:
        raise BadInputError(
            where,
            expected="the one order of metadata and tensors, and a header padded to 8 bytes",
            found="another form of the file",
            remedy="pack the adapter again",
        )
    value = strict_json.loads(text, where)
    if canonical(value) != text:
        raise BadInputError(
            where, expected="canonical JSON as metadata", found="another form of it"
        )
    fields = Fields(value, where, "bundle metadata")
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
        difference = Fields(short, where, "the PEFT config")
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
    fields = Fields(group, where, f"group {i}")
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
