"""What a merge did, or would do: frozen, plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LOW_SURVIVAL = 0.5


@dataclass(frozen=True)
class BundleReport:
    """One bundle that was merged.

    Attributes:
        name: its path, or a number for one that was given as an object.
        sha256: of its bytes.
        weight: the factor on its delta_W.
        layers: how many layers it changes.
        base_check: "same", "precision" (the base in another precision), "mismatch" (allowed by
            the caller) or "unbound" (it has no fingerprint to check).
    """

    name: str
    sha256: str
    weight: float
    layers: int
    base_check: str


@dataclass(frozen=True)
class LayerReport:
    """One layer that was changed.

    Attributes:
        name: module path, as the adapter names it.
        tensor: name of the weight in the output.
        shape: as stored.
        dtype: safetensors dtype in the output.
        survival: share of its weights that changed once rounded to `dtype`; None in a dry run.
        error: of what was really added, relative to delta_W (Frobenius norms); None in a dry run,
            and where the weight has NaN or infinity in it.
    """

    name: str
    tensor: str
    shape: tuple[int, ...]
    dtype: str
    survival: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class MergeReport:
    """The result of `merge_checkpoint`.

    Attributes:
        out: the folder or file that was (or would be) written.
        base: what was merged into.
        dtype: "keep", or the dtype of the output.
        bundles: what was merged.
        layers: what was changed, in natural order of their names.
        replaced: tensors taken whole from a bundle (heads, biases) that the base has too.
        added: tensors that the base does not have (a head, an untied lm_head).
        carried: files that are not weights, which were copied.
        left_behind: weights of the base folder in other formats, which would be stale.
        shards: sha256 of every weight file; empty in a dry run.
        nbytes: size of the weights.
        disk_bytes: space that the whole output needs.
        memory_bytes: an estimate of one process's peak memory.
        resumed: weight files that a killed run had finished.
        notes: what the user should know.
        dry_run: whether nothing was written.
    """

    out: Path
    base: Path
    dtype: str
    bundles: tuple[BundleReport, ...]
    layers: tuple[LayerReport, ...]
    replaced: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()
    shards: Mapping[str, str] = field(default_factory=dict)
    nbytes: int = 0
    disk_bytes: int = 0
    memory_bytes: int = 0
    resumed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        fields = asdict(self)
        return fields | {"out": str(self.out), "base": str(self.base), "shards": {**self.shards}}


def find_least_survival(layers: Sequence[LayerReport]) -> LayerReport | None:
    """Find the layer of which the smallest share changed; None in a dry run.

    Layers to which nothing was added (a weight of 0, a spectrum of zeros) do not count.
    """
    changed = [x for x in layers if x.survival is not None and (x.survival or x.error != 0)]
    return min(changed, key=lambda layer: layer.survival or 0.0, default=None)


def note_errors(layers: Sequence[LayerReport]) -> tuple[str, ...]:
    """Name weights with NaN in them, and warn when rounding loses most of a change."""
    notes = []
    odd = [layer.tensor for layer in layers if layer.error is None]
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        notes.append(f"{odd[0]}{more}: NaN or infinity in the base's weight, where it stays")
    worst = find_least_survival(layers)
    if worst is not None and (worst.survival or 0.0) < LOW_SURVIVAL:
        low = [x for x in layers if x.error != 0 and (x.survival or 0.0) < LOW_SURVIVAL]
        notes.append(
            f"in {len(low)} of {len(layers)} layers less than half of the weights changed once "
            f"rounded (worst: {worst.name}, {worst.survival:.0%} of {worst.dtype})"
        )
        if worst.dtype in ("F16", "BF16"):
            notes[-1] += "; dtype float32 (--dtype float32) keeps the whole change"
    return tuple(notes)
