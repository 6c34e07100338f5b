"""Evidence of which base weight an adapter was trained on, at 32 bytes a layer.

Two parts answer two questions: 128 bits of a sha256 say "these very bytes"; eight sampled values
say "these values, perhaps in another precision" (trained in float32, deployed in bfloat16 is
normal). How the weight was cut into shards does not matter.
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
    """The fingerprint of a weight as its checkpoint stores it.

    Args:
        weight: any float dtype that safetensors knows, at least one element.
        sha256: of its bytes, where it is known already.
    """
    stored = np.ascontiguousarray(weight)
    digest = sha256 or hashlib.sha256(stored.reshape(-1).view(np.uint8).data).digest()
    return Fingerprint(dtypes.to_name(stored.dtype), digest[:DIGEST_BYTES], _samples(stored))


def fingerprint_of_samples(expected: Fingerprint, values: Array) -> Fingerprint:
    """What the fingerprint of a weight is for all that its samples tell.

    Args:
        expected: what it is going to be compared with.
        values: (8,), the weight's values at `sample_positions`, in its own dtype.
    """
    samples = _samples(values)  # the eight sampled values of eight values are themselves
    digest = expected.digest if samples == expected.samples else bytes(DIGEST_BYTES)
    return Fingerprint(dtypes.to_name(values.dtype), digest, samples)


def _samples(weight: Array) -> bytes:
    values = weight.reshape(-1)[sample_positions(weight.size)]
    with np.errstate(over="ignore"):
        bits = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    return bits.astype("<u2").tobytes()


def compare(expected: Fingerprint, weight: Array) -> Verdict:
    """Whether `weight` is the one that was fingerprinted; see `judge`."""
    return judge(expected, fingerprint(weight))


def judge(expected: Fingerprint, found: Fingerprint) -> Verdict:
    """Whether two fingerprints are of one weight.

    Returns:
        "same" for equal bytes of equal dtype; "precision" when the dtype differs and the sampled
        values agree to a bfloat16's precision; "different" otherwise.
    """
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
