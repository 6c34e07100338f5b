"""JSON from files that others made: nothing ambiguous, nothing unbounded.

Python's parser accepts duplicate keys, NaN, 1e999 and integers of any length. Each of these lets
one file mean two things to two readers, so all of them are errors here.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from ..errors import BadInputError

MAX_NUMBER_LENGTH = 400


def loads(text: str | bytes, where: str) -> Any:
    """Parse JSON strictly.

    Args:
        text: the JSON text; bytes must be UTF-8.
        where: what to name in errors.

    Raises:
        BadInputError: not UTF-8, not JSON, nested too deeply, duplicate keys, a number that is
            not finite or longer than 400 characters.
    """

    def fail(found: str) -> NoReturn:
        raise BadInputError(where, expected="strict JSON", found=found, remedy="get the file again")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            names = [key for key, _ in pairs]
            fail(f"the key {next(n for n in names if names.count(n) > 1)!r} twice")
        return keys

    def integer(digits: str) -> int:
        if len(digits) > MAX_NUMBER_LENGTH:
            fail(f"an integer of {len(digits)} characters")
        return int(digits)

    def real(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            fail(f"the number {digits[:20]}, which is not finite")
        return value

    try:
        return json.loads(
            text if isinstance(text, str) else text.decode("utf-8"),
            object_pairs_hook=unique,
            parse_int=integer,
            parse_float=real,
            parse_constant=lambda word: fail(f"the number {word}"),
        )
    except RecursionError:
        fail("nesting too deep to read")
    except UnicodeDecodeError as error:
        fail(f"bytes that are not UTF-8 at offset {error.start}")
    except json.JSONDecodeError as error:
        fail(f"{error.msg} at character {error.pos}")


def canonical(value: Any) -> str:
    """`value` as the one JSON text for it: sorted keys, no spaces, ASCII only, finite numbers."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def pretty(value: Any) -> str:
    """`value` as JSON for people: two spaces, sorted keys, a newline at the end."""
    return json.dumps(value, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
