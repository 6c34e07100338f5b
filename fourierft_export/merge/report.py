"""What a merge did, or would do: frozen, plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..types import html_table

LOW_SURVIVAL = 0.5


@dataclass(frozen=True)
class BundleReport:
    """One bundle that was merged."""

    name: str  # its path, or a number for one that was given as an object
    sha256: str  # of its bytes
    weight: float  # the factor on its delta_W
    layers: int  # how many layers it changes
    # "same", "precision" (the base in another precision), "mismatch" (allowed by the caller) or
    # "unbound" (it has no fingerprint to check).
    base_check: str


@dataclass(frozen=True)
class LayerReport:
    """One layer that was changed."""

    name: str  # module path, as the adapter names it
    tensor: str  # name of the weight in the output
    shape: tuple[int, ...]  # as stored
    dtype: str  # safetensors dtype in the output
    # Share of its weights that changed once rounded to `dtype`; None in a dry run.
    survival: float | None = None
    # Of what was really added, relative to delta_W (Frobenius norms); None in a dry run, and where
    # the weight has NaN or infinity in it.
    error: float | None = None


@dataclass(frozen=True)
class MergeReport:
    """The result of `merge_checkpoint`."""

    out: Path  # the folder or file that was (or would be) written
    base: Path  # what was merged into
    dtype: str  # "keep", or the dtype of the output
    bundles: tuple[BundleReport, ...]  # what was merged
    layers: tuple[LayerReport, ...]  # what was changed, in natural order of their names
    replaced: tuple[str, ...] = ()  # heads and biases of a bundle that the base has too
    added: tuple[str, ...] = ()  # tensors that the base does not have
    carried: tuple[str, ...] = ()  # files that are not weights, which were copied
    left_behind: tuple[str, ...] = ()  # weights in other formats, which would be stale
    # sha256 of every weight file; empty in a dry run.
    shards: Mapping[str, str] = field(default_factory=dict)
    nbytes: int = 0  # size of the weights
    disk_bytes: int = 0  # space that the whole output needs
    memory_bytes: int = 0  # an estimate of one process's peak memory
    resumed: tuple[str, ...] = ()  # weight files that a killed run had finished
    notes: tuple[str, ...] = ()  # what the user should know
    dry_run: bool = False  # whether nothing was written

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        fields = asdict(self)
        return fields | {"out": str(self.out), "base": str(self.base), "shards": {**self.shards}}

    def _repr_html_(self) -> str:
        facts = {"out": self.out, "base": self.base, "dtype": self.dtype, "bytes": self.nbytes}
        rows = ((layer.name, layer.shape, layer.survival) for layer in self.layers)
        heading = ("layer", "shape", "share of weights that changed")
        return html_table("Merge", facts, [heading, *rows])


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
