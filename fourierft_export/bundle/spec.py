"""What an adapter is, apart from its numbers: frozen specs from which everything else is derived.

A bundle *is* an `AdapterSpec` plus one spectrum per layer plus the dense tensors that ride along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

EXPLICIT_RULE = "explicit"
SEED_MODULUS = 2**32


@dataclass(frozen=True)
class Fingerprint:
    """Evidence of which base weight a layer was trained on (FORMAT.md, section Fingerprint).

    Attributes:
        dtype: safetensors dtype of the base weight as it was fingerprinted ("F32", "BF16", ...).
        digest: first 16 bytes of the sha256 of the weight's little-endian bytes, as stored.
        samples: eight of its values as bfloat16 bit patterns (16 bytes, little-endian uint16).
    """

    dtype: str
    digest: bytes
    samples: bytes


@dataclass(frozen=True)
class LayerSpec:
    """One adapted linear layer.

    Attributes:
        name: module path in the model the adapter was trained on,
            e.g. "bert.encoder.layer.0.attention.self.query".
        n_frequency: number of spectral coefficients.
        shape: (out_features, in_features), the shape of delta_W; None while unbound.
        fan_in_fan_out: the base stores this weight as (in_features, out_features), as GPT-2's
            Conv1D does; delta_W is transposed when it is added. False while unbound.
        entry_rule: "small", "r64" or "explicit"; None while unbound.
        entries_sha256: hash of the entries (`spectral.entries.entries_sha256`); None while unbound.
        fingerprint: of the base weight; None while unbound.
    """

    name: str
    n_frequency: int
    shape: tuple[int, int] | None = None
    fan_in_fan_out: bool = False
    entry_rule: str | None = None
    entries_sha256: str | None = None
    fingerprint: Fingerprint | None = None

    @property
    def is_bound(self) -> bool:
        """Whether the layer knows its shape and entries."""
        return self.shape is not None


@dataclass(frozen=True)
class AdapterSpec:
    """A whole adapter.

    Attributes:
        seed: random_loc_seed as the adapter's author wrote it; entries use it modulo 2^32.
        scaling: multiplies every delta_W; kept as int or float as written.
        layers: in natural order of their names (`bundle.names.natural_key`).
        task_type: PEFT's task type ("SEQ_CLS", "CAUSAL_LM", ...) or None.
        base_model: base_model_name_or_path as written, or None.
        peft_config: the adapter_config.json it came from, every field as written; empty for an
            adapter that did not come from PEFT.
    """

    seed: int
    scaling: int | float
    layers: tuple[LayerSpec, ...]
    task_type: str | None = None
    base_model: str | None = None
    peft_config: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def is_bound(self) -> bool:
        """Whether every layer is bound to a base."""
        return all(layer.is_bound for layer in self.layers)

    @property
    def entry_seed(self) -> int:
        """The seed torch's generator really uses: `seed` modulo 2^32."""
        return int(self.seed) % SEED_MODULUS
