"""Fingerprints: 32 bytes per layer that identify the base weight an adapter was trained on.

128 bits of a SHA-256 recognise the same bytes, eight sampled values the same weight in another
precision: training in float32 and deploying in bfloat16 is common.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import ml_dtypes
import numpy as np

from ..files import dtypes
from ..types import Array
from .spec import Fingerprint

DIGEST_BYTES = 16
SAMPLES = 8
FINGERPRINT_BYTES = DIGEST_BYTES + 2 * SAMPLES
# Two roundings of one value (to float16 and to bfloat16, say) lie within two units in the last
# place of bfloat16, 2^-7 relative; values that float16 flushes to zero need the absolute part.
SAMPLE_RTOL = 2.0**-7
SAMPLE_ATOL = 1e-7

Verdict = Literal["same", "precision", "different"]


def sample_positions(count: int) -> Array:
    """Eight flat positions spread over `count` elements: (2 i + 1) * count // 16."""
    positions: Array = (2 * np.arange(SAMPLES, dtype=np.int64) + 1) * count // (2 * SAMPLES)
    return positions


def fingerprint(weight: Array, sha256: bytes | None = None) -> Fingerprint:
    """Computes the fingerprint of a weight as stored, from its bytes' `sha256` if that is known."""
    stored = np.ascontiguousarray(weight)
    digest = sha256 or hashlib.sha256(stored.reshape(-1).view(np.uint8).data).digest()
    return Fingerprint(dtypes.to_name(stored.dtype), digest[:DIGEST_BYTES], _samples(stored))


def fingerprint_of_samples(expected: Fingerprint, values: Array) -> Fingerprint:
    """A stand-in for the fingerprint of a weight of which only the (8,) sampled values were read.

    The hash of `expected`, the fingerprint to compare with, is assumed if the samples are equal.
    """
    samples = _samples(values)  # the eight sampled values of eight values are themselves
    digest = expected.digest if samples == expected.samples else bytes(DIGEST_BYTES)
    return Fingerprint(dtypes.to_name(values.dtype), digest, samples)


def _samples(weight: Array) -> bytes:
    """The weight's values at `sample_positions` as bfloat16 bit patterns."""
    values = weight.reshape(-1)[sample_positions(weight.size)]
    with np.errstate(over="ignore"):
        bits = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    return bits.astype("<u2").tobytes()


def compare_weight(expected: Fingerprint, weight: Array) -> Verdict:
    """Says whether a weight is the fingerprint's: same, same in another precision, or different."""
    return compare_fingerprints(expected, fingerprint(weight))


def compare_fingerprints(expected: Fingerprint, found: Fingerprint) -> Verdict:
    """Compares two fingerprints; "precision" if only the dtypes differ, as far as samples show."""
    if (found.dtype, found.digest) == (expected.dtype, expected.digest):
        return "same"
    if found.dtype == expected.dtype:
        return "different"
    before, now = (
        np.frombuffer(f.samples, "<u2").view(ml_dtypes.bfloat16).astype(np.float64)
        for f in (expected, found)
    )
    close = np.allclose(before, now, rtol=SAMPLE_RTOL, atol=SAMPLE_ATOL)
    return "precision" if close else "different"
