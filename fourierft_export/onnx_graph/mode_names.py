"""The export modes, by name."""

from __future__ import annotations

MERGED = "merged"
UNMERGED = "unmerged"
SWAPPABLE = "swappable"
PAIRED = "paired"
BANK = "bank"
RUNTIME_MODES = (SWAPPABLE, PAIRED, BANK)
MODES = (MERGED, UNMERGED, *RUNTIME_MODES)

# What an adapter input is when nothing is fed: the exported adapter's, the base's, or it must be
# fed (some languages' ONNX Runtime cannot feed inputs that have a default).
REQUIRED = "required"
DEFAULTS = ("bundle", "base", REQUIRED)
