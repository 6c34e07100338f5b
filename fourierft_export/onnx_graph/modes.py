"""The export modes, by name."""

from __future__ import annotations

MERGED = "merged"
UNMERGED = "unmerged"
SWAPPABLE = "swappable"
PAIRED = "paired"
BANK = "bank"
RUNTIME_MODES = (SWAPPABLE, PAIRED, BANK)
