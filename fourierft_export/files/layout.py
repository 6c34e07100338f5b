"""How a checkpoint folder is laid out: which files hold the weights, what a shard index may say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import BadInputError, FileAccessError
from . import strict_json
from .container import read_file
from .links import is_plain_path

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_INDEX_BYTES = 256 << 20


def find_weights_file(directory: Path) -> Path:
    """Find the shard index, or else the one .safetensors file, of a folder's weights.

    The names that transformers looks for come first; else there may be only one candidate.

    Raises:
        FileAccessError: the folder cannot be listed.
        BadInputError: no weights, pickled ones only, or several candidates.
    """
    for name in (SINGLE, INDEX):
        if os.path.lexists(directory / name):
            return directory / name
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise FileAccessError(
            directory, expected="a readable folder", found=error.strerror or str(error)
        ) from None
    indices = [n for n in names if n.endswith(f"{SUFFIX}.index.json")]
    files = [n for n in names if n.endswith(SUFFIX) and n != "adapter_model.safetensors"]
    if len(indices) == 1:
        return directory / indices[0]
    if len(files) == 1 and not indices:
        return directory / files[0]
    pickled = [n for n in names if n.endswith(PICKLED)]
    if pickled and not files:
        raise make_pickled_error(directory / pickled[0])
    raise BadInputError(
        directory,
        expected=f"{SINGLE} or {INDEX}",
        found=f"{len(files)} other .safetensors files" if files else "no weights",
        remedy="name the weight file itself" if files else "is this a model's folder?",
    )


def read_index(index: Path) -> tuple[dict[str, tuple[str, ...]], dict[str, Any]]:
    """Read a shard index as {shard's file name: its tensors' names}, and its metadata.

    Raises:
        BadInputError: it is damaged, or names anything but plain files in its folder.
    """
    content = strict_json.loads(read_file(index, MAX_INDEX_BYTES), os.fspath(index))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    metadata = content.get("metadata", {}) if isinstance(content, dict) else {}
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise BadInputError(
            index, expected="a weight_map of tensor names to shard files", found="none"
        )
    bad = sorted({repr(f) for f in weight_map.values() if not _is_plain_name(f)})
    if bad:
        raise BadInputError(
            index,
            expected=f"shards named by plain file names that end in {SUFFIX}",
            found=bad[0],
            remedy="the index is damaged or hostile: download it again",
            offenders=bad,
        )
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        shards.setdefault(file, []).append(name)
    return {file: tuple(names) for file, names in shards.items()}, metadata


def _is_plain_name(name: object) -> bool:
    """Whether `name` is that of a .safetensors file, without a folder."""
    if not isinstance(name, str) or "/" in name:
        return False
    return name.endswith(SUFFIX) and is_plain_path(name)


def make_pickled_error(path: Path) -> BadInputError:
    """Make the error for a checkpoint that only pickle could read."""
    return BadInputError(
        path,
        expected="safetensors weights",
        found="a pickled checkpoint, which can run code when it is loaded",
        remedy="get the model's safetensors files, or convert it where you trust it",
    )
