"""manifest.json of a merged folder: what it was made of, by what, and its hashes.

It holds no time and no machine, so the same merge gives the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from .. import __version__
from .report import MergeReport

SCHEMA = 1


def manifest_text(report: MergeReport, allow_base_mismatch: bool) -> str:
    """The manifest of a merge, as JSON text.

    Args:
        report: of the finished merge.
        allow_base_mismatch: whether the caller let another base pass.
    """
    content = {
        "schema": SCHEMA,
        "kind": "fourierft_export.merge",
        "versions": {"fourierft_export": __version__, "numpy": np.__version__},
        "base": report.base.name,
        "bundles": [asdict(b) | {"name": Path(b.name).name} for b in report.bundles],
        "dtype": report.dtype,
        "allow_base_mismatch": allow_base_mismatch,
        "layers": {layer.tensor: layer.survival for layer in report.layers},
        "replaced": list(report.replaced),
        "added": list(report.added),
        "notes": list(report.notes),
        "shards": dict(sorted(report.shards.items())),
    }
    return json.dumps(content, indent=2) + "\n"
