r"""Layer names in few bytes: templates such as `layers.{0-31}.self_attn.{q_proj,v_proj}`.

A template is a dotted path whose segments may be sets of alternatives in braces; `a-b` in braces is
a range of whole numbers. Backslash takes the meaning from `\\ { } , -`. Templates say *which* names
there are; their order is always the natural one, so one set of names has one form.

The limits keep a hostile file of a few bytes from standing for gigabytes of names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import product
from math import prod

MAX_NAMES = 100_000
MAX_NAME_LENGTH = 1_000
MAX_SEGMENTS = 100
MAX_CHARACTERS = 10_000_000
_SPECIAL = frozenset("\\{},-")

Path = tuple[str, ...]


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key of a module path: whole numbers by value and before words, words by code point."""
    return tuple(_segment_key(segment) for segment in name.split("."))


@lru_cache(maxsize=4096)  # the same segments come again in many names: their keys are shared
def _segment_key(segment: str) -> tuple[int, int, str]:
    return (0, int(segment), "") if _is_index(segment) else (1, 0, segment)


def why_not(name: str) -> str | None:
    """Why `name` cannot be a layer's name, or None when it can."""
    if len(name) > MAX_NAME_LENGTH:
        return f"longer than {MAX_NAME_LENGTH} characters"
    segments = name.split(".")
    if len(segments) > MAX_SEGMENTS:
        return f"more than {MAX_SEGMENTS} segments"
    return None if all(segments) else "an empty segment"


def _is_index(segment: str) -> bool:
    """Whether a segment is a whole number in its shortest form, of at most nine digits."""
    plain = segment.isascii() and segment.isdigit() and len(segment) <= 9
    return plain and (segment == "0" or segment[0] != "0")


def compress(names: Iterable[str]) -> list[str]:
    """The templates that stand for exactly these names.

    Args:
        names: distinct module paths, in any order.

    Returns:
        Templates; `expand` gives back the names in natural order.
    """
    return _compress(
        sorted((tuple(n.split(".")) for n in names), key=lambda p: natural_key(".".join(p)))
    )


def _compress(paths: Sequence[Path]) -> list[str]:
    """Join the first segments that are followed by the same templates."""
    heads: dict[str, list[Path]] = {}
    for path in paths:
        heads.setdefault(path[0], []).append(path[1:])
    by_tail: dict[tuple[str | None, ...], list[str]] = {}
    for head, rests in heads.items():
        ends: list[str | None] = [None] if () in rests else []
        tails = tuple(ends + list(_compress([r for r in rests if r])))
        by_tail.setdefault(tails, []).append(head)
    return [
        _braces(segments) + ("" if tail is None else f".{tail}")
        for tails, segments in by_tail.items()
        for tail in tails
    ]


def _braces(segments: list[str]) -> str:
    """Alternatives as one segment: runs of whole numbers as ranges, words as they are."""
    if len(segments) == 1:
        return _escape(segments[0])
    numbers = sorted(int(s) for s in segments if _is_index(s))
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    items = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    items += [_escape(s) for s in segments if not _is_index(s)]
    return "{" + ",".join(items) + "}"


def _escape(segment: str) -> str:
    return "".join(f"\\{c}" if c in _SPECIAL else c for c in segment)


def expand(templates: Sequence[str], most: int = MAX_NAMES) -> list[str]:
    """The names that templates stand for, in natural order.

    Args:
        templates: as `compress` makes them.
        most: how many names there may be.

    Raises:
        ValueError: a template is malformed; a name appears twice, or is longer than 1,000
            characters or 100 segments; there are more than `most` names, or 10,000,000
            characters in all. Sizes are checked before any name is made.
    """
    parsed: list[list[Sequence[str]]] = []
    total = characters = 0
    for template in templates:
        parsed.append(_parse(template))
        longest = sum(max(map(len, choices)) + 1 for choices in parsed[-1]) - 1
        if longest > MAX_NAME_LENGTH:
            raise ValueError(f"a layer name longer than {MAX_NAME_LENGTH} characters")
        count = prod(len(choices) for choices in parsed[-1])
        total += count
        characters += count * longest
        if total > most:
            raise ValueError(f"{total} layer names, where {most} are the most")
        if characters > MAX_CHARACTERS:
            raise ValueError(f"layer names of more than {MAX_CHARACTERS} characters in all")
    names = [".".join(path) for segments in parsed for path in product(*segments)]
    if len(set(names)) != len(names):
        raise ValueError("a layer name twice")
    return sorted(names, key=natural_key)


def _parse(template: str) -> list[Sequence[str]]:
    """The alternatives of each segment."""
    segments: list[Sequence[str]] = []
    total = 1
    rest = 0
    while rest <= len(template):
        if template[rest : rest + 1] == "{":
            choices, rest = _parse_braces(template, rest + 1)
        else:
            word, rest = _parse_word(template, rest, ".")
            choices = [word]
        if rest < len(template) and template[rest] != ".":
            raise ValueError(f"template {template[:80]!r}: expected '.' at character {rest}")
        total *= len(choices)
        if total > MAX_NAMES:
            raise ValueError(f"template {template[:80]!r}: more than {MAX_NAMES} names")
        segments.append(choices)
        if len(segments) > MAX_SEGMENTS:
            raise ValueError(f"template {template[:80]!r}: more than {MAX_SEGMENTS} segments")
        rest += 1
    return segments


def _parse_braces(template: str, at: int) -> tuple[list[str], int]:
    """The alternatives from just after `{`, and the position after `}`."""
    choices: list[str] = []
    while True:
        low, at = _parse_word(template, at, ",-}")
        if template[at : at + 1] == "-":
            high, at = _parse_word(template, at + 1, ",}")
            if not (_is_index(low) and _is_index(high) and int(low) < int(high)):
                raise ValueError(f"template {template[:80]!r}: bad range {low}-{high}")
            if int(high) - int(low) >= MAX_NAMES:
                raise ValueError(f"template {template[:80]!r}: range {low}-{high} is too long")
            choices += [str(i) for i in range(int(low), int(high) + 1)]
        else:
            choices.append(low)
        if len(choices) > MAX_NAMES:
            raise ValueError(f"template {template[:80]!r}: more than {MAX_NAMES} names")
        if at >= len(template):
            raise ValueError(f"template {template[:80]!r}: a brace is not closed")
        at += 1
        if template[at - 1] == "}":
            return choices, at


def _parse_word(template: str, at: int, stops: str) -> tuple[str, int]:
    """Characters up to one of `stops`, with escapes undone, and the position of the stop."""
    word = []
    while at < len(template) and template[at] not in stops:
        if template[at] == "\\":
            at += 1
            if template[at : at + 1] not in _SPECIAL:
                raise ValueError(f"template {template[:80]!r}: a backslash before nothing special")
        elif template[at] in _SPECIAL or template[at] == ".":
            raise ValueError(f"template {template[:80]!r}: {template[at]!r} at character {at}")
        word.append(template[at])
        at += 1
        if len(word) > MAX_NAME_LENGTH:
            raise ValueError(f"a layer name longer than {MAX_NAME_LENGTH} characters")
    if not word:
        raise ValueError(f"template {template[:80]!r}: an empty segment at character {at}")
    return "".join(word), at
