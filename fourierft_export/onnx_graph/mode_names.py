"""The export modes, by name, and where the second file of mode paired lies."""

from __future__ import annotations

import os
from pathlib import Path

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


def expander_path(path: str | os.PathLike[str]) -> Path:
    """Where the expander of a paired graph lies: FILE.onnx -> FILE.expand.onnx."""
    return Path(path).with_suffix(".expand.onnx")
