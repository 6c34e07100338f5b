"""Settings from a TOML file: one flat table, every key known."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from ..errors import BadInputError, UsageError
from ..files.container import read_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_BYTES = 1 << 20
_WORDS = {str: "a text", bool: "true or false", list: "a text or a list of texts"}


def read_settings(
    path: str | os.PathLike[str],
    known: Collection[str],
    kinds: Mapping[str, type] = MappingProxyType({}),
) -> dict[str, Any]:
    """The keys and values of a settings file; dashes in keys count as underscores.

    Args:
        path: a TOML file of at most 1 MiB.
        known: the keys that may stand in it.
        kinds: what their values must be: str, bool, or list for one text or several.

    Raises:
        FileAccessError: missing or unreadable.
        BadInputError: not TOML.
        UsageError: unknown keys, values of another kind, or one key in both spellings; all listed.
    """
    try:
        found = tomllib.loads(read_file(path, MAX_BYTES).decode("utf-8"))
    # A ValueError for what is not UTF-8 or not TOML, and for numbers of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise BadInputError(path, expected="a TOML file", found=str(error)) from error
    wrong = []
    values: dict[str, Any] = {}
    for key, value in found.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            wrong.append(f"{key}: no such setting" + (f"; did you mean {near[0]}?" if near else ""))
        elif name in values:
            wrong.append(f"{key}: given twice")
        elif name in kinds and not _is(kinds[name], value):
            wrong.append(f"{key}: expected {_WORDS[kinds[name]]}, found {value!r}")
        values[name] = value
    if wrong:
        raise UsageError(
            path,
            expected="known settings",
            found=wrong[0] if len(wrong) == 1 else f"{len(wrong)} that are not",
            remedy="see fourierft-export train --help for their names",
            offenders=wrong if len(wrong) > 1 else (),
        )
    return values


def _is(kind: type, value: Any) -> bool:
    if kind is list and isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str if kind is list else kind)
