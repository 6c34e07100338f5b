"""manifest.json of a merged folder: what it was made of, by what, and its hashes.

It holds no time and no machine, so the same merge gives the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from .plan import OutShard
from .report import MergeReport
from .shard import WrittenTensor

SCHEMA = 1
KIND = "fourierft_export.merge"


def base_facts(
    shards: Sequence[OutShard], written: Mapping[str, str], manifest: str | None
) -> dict[str, Any]:
    """By what the base can be told: the hashes that are known without reading it once more.

    Args:
        shards: of the output.
        written: sha256 of the output's weight files, by name.
        manifest: sha256 of the base's own manifest.json, if it has one.

    Returns:
        "shards": bytes of each, and sha256 of those that went along byte for byte; of the others,
        the manifest has the hashes of the tensors that changed. "manifest_sha256".
    """
    facts: dict[str, Any] = {"shards": {}, "manifest_sha256": manifest}
    for shard in shards:
        fields: dict[str, Any] = {"bytes": shard.source.size}
        if not shard.tensors:
            fields["sha256"] = written[shard.name]
        facts["shards"][shard.name] = fields
    return facts


def manifest_text(
    report: MergeReport,
    base: Mapping[str, Any],
    tensors: Mapping[str, WrittenTensor],
    sources: Mapping[str, str],
    files: Mapping[str, tuple[str, int]],
    *,
    allow_base_mismatch: bool,
) -> str:
    """The manifest of a merge, as JSON text.

    Args:
        report: of the finished merge.
        base: what was merged into, of `base_facts`.
        tensors: the weights that got delta_W, by their names in the output.
        sources: the base's names of these.
        files: sha256 and bytes of every other file of the output, by its path with "/".
        allow_base_mismatch: whether the caller let another base pass.
    """
    layers = {layer.tensor: layer.name for layer in report.layers}
    content = {
        "schema": SCHEMA,
        "kind": KIND,
        "versions": {"fourierft_export": __version__, "numpy": np.__version__},
        "base": {"name": report.base.name, **base},
        "bundles": [
            asdict(b) | {"name": Path(os.path.abspath(b.name)).name} for b in report.bundles
        ],
        "dtype": report.dtype,
        "allow_base_mismatch": allow_base_mismatch,
        "tensors": {
            name: {
                "layer": layers[name],
                "sha256": tensor.sha256,
                "source": sources[name],
                "source_sha256": tensor.source_sha256,
                "survival": tensor.survival,
                "error": tensor.error,
            }
            for name, tensor in sorted(tensors.items())
        },
        "replaced": list(report.replaced),
        "added": list(report.added),
        "notes": list(report.notes),
        "shards": dict(sorted(report.shards.items())),
        "files": {
            name: {"sha256": sha256, "bytes": size}
            for name, (sha256, size) in sorted(files.items())
        },
    }
    return json.dumps(content, indent=2) + "\n"
