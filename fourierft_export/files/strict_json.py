"""JSON of files that may be hostile: nothing ambiguous, nothing unbounded.

Python's parser accepts duplicate keys, NaN, 1e999, integers of any length and half a surrogate pair
as text. Each of these lets one file mean two things to two readers, so all of them are errors here.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, NoReturn

from ..errors import BadInputError

MAX_NUMBER_LENGTH = 400
MAX_DEPTH = 100


def loads(text: str | bytes, where: str) -> Any:
    """Parse JSON strictly, or raise a BadInputError that names `where`; bytes must be UTF-8."""

    def fail(found: str) -> NoReturn:
        raise BadInputError(where, expected="strict JSON", found=found, remedy="get the file again")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            fail(f"the key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} twice")
        return keys

    def integer(digits: str) -> int:
        if len(digits) > MAX_NUMBER_LENGTH:
            fail(f"an integer of {len(digits)} characters")
        return int(digits)

    def real(digits: str) -> float:
        if not math.isfinite(float(digits)):
            fail(f"the number {digits[:20]}, which is not finite")
        return float(digits)

    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=unique,
            parse_int=integer,
            parse_float=real,
            parse_constant=lambda word: fail(f"the number {word}"),
        )
        nested = [value]
        for _ in range(MAX_DEPTH + 1):
            nested = [inner for outer in nested for inner in _inside(outer)]
        if nested:
            fail("nesting too deep to read")
        if "\\u" in text:  # only an escape can smuggle in half a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        fail("nesting too deep to read")
    except UnicodeDecodeError as error:
        fail(f"bytes that are not UTF-8 at offset {error.start}")
    except UnicodeEncodeError:
        fail("half a surrogate pair, which is not text")
    except json.JSONDecodeError as error:
        fail(f"{error.msg} at character {error.pos}")


def _inside(value: Any) -> list[Any]:
    return [*value.values()] if isinstance(value, dict) else value if type(value) is list else []


def canonical(value: Any) -> str:
    """Write the one JSON text for `value`: sorted keys, no spaces, ASCII only, finite numbers."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def pretty(value: Any) -> str:
    """Write `value` for people: two spaces, sorted keys, a newline at the end."""
    return json.dumps(value, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
