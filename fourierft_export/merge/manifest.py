"""manifest.json of a merged folder: what it was made of, by what, and its hashes.

It holds no time and no machine, so the same merge gives the same bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from .. import __version__
from ..errors import BadInputError
from ..files import strict_json
from ..files.container import read_file
from .changes import TensorPlan
from .plan import ShardPlan
from .report import MergeReport
from .shard import WrittenTensor

SCHEMA = 1
KIND = "fourierft_export.merge"


def manifest_text(
    report: MergeReport,
    shards: Sequence[ShardPlan],
    plans: Mapping[str, TensorPlan],
    written: Mapping[str, WrittenTensor],
    files: Mapping[str, tuple[str, int]],
    *,
    base_manifest: str | None,
    allow_base_mismatch: bool,
) -> str:
    """The manifest of a finished merge, as JSON text.

    The base is identified by hashes that are known without reading it once more: those of shards
    that were copied byte for byte, and those of the weights that were changed. `plans` and
    `written` are of these weights, by their names in the output; `files` gives sha256 and bytes of
    all other files.
    """
    content = {
        "schema": SCHEMA,
        "kind": KIND,
        "versions": {"fourierft_export": __version__, "numpy": np.__version__},
        "base": {
            "name": report.base.name,
            "shards": {
                shard.name: {"bytes": shard.source.size}
                | ({} if shard.tensors else {"sha256": report.shards[shard.name]})
                for shard in shards
            },
            "manifest_sha256": base_manifest,
        },
        "bundles": [
            asdict(b) | {"name": Path(os.path.abspath(b.name)).name} for b in report.bundles
        ],
        "dtype": report.dtype,
        "allow_base_mismatch": allow_base_mismatch,
        "tensors": {
            name: {
                "layer": plans[name].layer,
                "sha256": tensor.sha256,
                "source": source.name if (source := plans[name].source) else None,
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
    """A manifest, checked as far as `verify_merged` relies on it.

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
    elif not all(isinstance(manifest.get(key), dict) for key in ("files", "tensors")):
        bad = "one without files and tensors"
    else:
        files, tensors = manifest["files"].items(), manifest["tensors"].items()
        wrong = [name for name, entry in (*files, *tensors) if not _has_hash(entry)]
        wrong += [name for name, entry in files if not (_is_inside(name) and _has_size(entry))]
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


def _has_hash(entry: object) -> bool:
    sha256 = entry.get("sha256") if isinstance(entry, dict) else None
    return isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256) is not None


def _has_size(entry: object) -> bool:
    size = entry.get("bytes") if isinstance(entry, dict) else None
    return type(size) is int and 0 <= size < 2**63


def _is_inside(name: str) -> bool:
    """Whether `name` is a plain relative path, on every system."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    plain = not posix.is_absolute() and not windows.drive and ".." not in posix.parts
    return bool(name) and plain and "\\" not in name and name.isprintable()
