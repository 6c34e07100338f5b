"""manifest.json of a merged folder: what it was made of, by what, and its hashes.

It holds no time and no machine, so the same merge gives the same bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import BadInputError
from ..files import strict_json
from ..files.container import read_file
from ..files.links import is_plain_path
from .plan import MergePlan, list_changed_tensors
from .report import MergeReport
from .shard import WrittenTensor

SCHEMA = 1
KIND = "fourierft_export.merge"


def format_manifest(
    plan: MergePlan,
    report: MergeReport,
    written: Mapping[str, WrittenTensor],
    files: Mapping[str, tuple[str, int]],
) -> str:
    """Write the manifest of a finished merge, as JSON text.

    The base is identified by hashes that are known without reading it once more: those of shards
    that were copied byte for byte, and those of the weights that were changed.

    Args:
        plan: of the merge.
        report: of the merge.
        written: the changed weights, by their names in the output.
        files: sha256 in hex and size in bytes of every file of the output but the manifest.
    """
    changed = list_changed_tensors(plan.shards)
    content = {
        "schema": SCHEMA,
        "kind": KIND,
        "versions": {"fourierft_export": __version__, "numpy": np.__version__},
        "base": {
            "name": report.base.name,
            "shards": {
                shard.name: {"bytes": shard.source.size}
                | ({} if shard.tensors else {"sha256": report.shards[shard.name]})
                for shard in plan.shards
            },
            "manifest_sha256": plan.base_manifest,
        },
        "bundles": [
            asdict(b) | {"name": Path(os.path.abspath(b.name)).name} for b in report.bundles
        ],
        "dtype": report.dtype,
        "allow_base_mismatch": plan.allow_base_mismatch,
        "tensors": {
            name: {
                "layer": changed[name].layer,
                "sha256": tensor.sha256,
                "source": source.name if (source := changed[name].source) else None,
                "source_sha256": tensor.source_sha256,
                "survival": tensor.survival,
                "error": tensor.error,
            }
            for name, tensor in sorted(written.items())
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


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest, and check all that `verify_merged` uses.

    Raises:
        BadInputError: no manifest of a merge, a damaged one, or one that names files outside of
            its folder.
    """
    manifest = strict_json.loads(read_file(path), os.fspath(path))
    bad = ""
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        bad = "something else"
    elif manifest.get("schema") != SCHEMA:
        bad = f"schema {manifest.get('schema')!r}"
    elif not isinstance(manifest.get("files"), dict):
        bad = "one without files"
    else:
        files = manifest["files"].items()
        wrong = [name for name, entry in files if not (is_plain_path(name) and _is_file(entry))]
        bad = f"a bad entry {wrong[0]!r}" if wrong else ""
    if bad:
        raise BadInputError(
            path,
            expected=f"a manifest of a merge, schema {SCHEMA}",
            found=bad,
            remedy="merge again",
        )
    checked: dict[str, Any] = manifest
    return checked


def _is_file(entry: object) -> bool:
    """Return whether an entry of the manifest states a hash and a size."""
    fields = entry if isinstance(entry, dict) else {}
    sha256, size = fields.get("sha256"), fields.get("bytes")
    is_hash = isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256) is not None
    return is_hash and type(size) is int and 0 <= size < 2**63
