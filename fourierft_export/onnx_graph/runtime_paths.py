"""Files that belong together."""

from __future__ import annotations

import os
from pathlib import Path

EXPAND_SUFFIX = ".expand.onnx"


def expander_path(path: str | os.PathLike[str]) -> Path:
    """Where the expander of a paired graph lies: FILE.onnx -> FILE.expand.onnx."""
    return Path(path).with_suffix(EXPAND_SUFFIX)
