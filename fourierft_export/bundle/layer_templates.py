r"""Layer names in few bytes: templates such as `layers.{0-31}.self_attn.{q_proj,v_proj}`.

A template is a dotted path whose segments may be sets of alternatives in braces; `a-b` in braces is
a range of whole numbers. Backslash takes the meaning from `\\ { } , -`. Templates say *which* names
there are; their order is always the natural one, so one set of names has one form.

The limits keep a hostile file of a few bytes from standing for gigabytes of names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import product
from math import prod

MAX_NAMES = 100_000
MAX_NAME_LENGTH = 1_000
MAX_SEGMENTS = 100
MAX_CHARACTERS = 10_000_000
_ONE = r"(?:[^\\{},.\-]|\\[\\{},\-])"  # a character, or one that a backslash makes plain
_WORD = f"{_ONE}{{1,{MAX_NAME_LENGTH}}}"
_CHOICE = re.compile(f"({_WORD})(?:-({_WORD}))?")
_RANGE = f"{_WORD}(?:-{_WORD})?"
_SEGMENT = re.compile(rf"(?:({_WORD})|\{{({_RANGE}(?:,{_RANGE})*)\}})(\.|\Z)")
_ESCAPED = re.compile(r"\\([\\{},\-])")
_SPECIAL = re.compile(r"[\\{},\-]")


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key of a module path: whole numbers by value and before words, words by code point."""
    return tuple(_segment_key(segment) for segment in name.split("."))


@lru_cache(maxsize=4096)  # many names share their segments
def _segment_key(segment: str) -> tuple[int, int, str]:
    return (0, int(segment), "") if _is_index(segment) else (1, 0, segment)


def name_problem(name: str) -> str | None:
    """Says why `name` cannot be a layer's name; None if it can."""
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
    """Writes distinct module paths as templates."""
    return _compress([name.split(".") for name in sorted(names, key=natural_key)])


def _compress(paths: Sequence[list[str]]) -> list[str]:
    """Join the first segments that are followed by the same templates."""
    heads: dict[str, list[list[str]]] = {}
    for head, *rest in paths:
        heads.setdefault(head, []).append(rest)
    by_tail: dict[tuple[str, ...], list[str]] = {}
    for head, rests in heads.items():
        ends = [""] if [] in rests else []
        longer = [f".{template}" for template in _compress([rest for rest in rests if rest])]
        by_tail.setdefault((*ends, *longer), []).append(head)
    return [_braces(heads) + tail for tails, heads in by_tail.items() for tail in tails]


def _braces(segments: list[str]) -> str:
    """Alternatives as one segment: runs of whole numbers as ranges, words as they are."""
    if len(segments) == 1:
        return _escape(segments[0])
    runs: list[list[int]] = []
    for number in sorted(int(s) for s in segments if _is_index(s)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    items = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    items += [_escape(s) for s in segments if not _is_index(s)]
    return "{" + ",".join(items) + "}"


def _escape(segment: str) -> str:
    return _SPECIAL.sub(r"\\\g<0>", segment)


def expand(templates: Sequence[str], most: int = MAX_NAMES) -> list[str]:
    """Gives the at most `most` module paths that templates stand for, in natural order.

    A ValueError says what is malformed or too large; sizes are checked before any name is made.
    """
    parsed: list[list[list[str]]] = []
    total = characters = 0
    for template in templates:
        parsed.append(_parse(template))
        longest = sum(max(map(len, choices)) + 1 for choices in parsed[-1]) - 1
        if longest > MAX_NAME_LENGTH:
            raise ValueError(f"a layer name longer than {MAX_NAME_LENGTH} characters")
        count = prod(map(len, parsed[-1]))
        total += count
        characters += count * longest
        if total > most:
            raise ValueError(f"{total} layer names, where at most {most} are allowed")
        if characters > MAX_CHARACTERS:
            raise ValueError(f"layer names of more than {MAX_CHARACTERS} characters in all")
    names = [".".join(path) for segments in parsed for path in product(*segments)]
    if len(set(names)) != len(names):
        raise ValueError("a layer name twice")
    return sorted(names, key=natural_key)


def _parse(template: str) -> list[list[str]]:
    """The alternatives of each segment."""
    segments: list[list[str]] = []
    at, dot = 0, "."
    while dot:
        found = _SEGMENT.match(template, at)
        if found is None:
            raise ValueError(f"template {template[:80]!r}: malformed at character {at}")
        plain, inside, dot = found.groups()
        segments.append([_unescape(plain)] if inside is None else _alternatives(inside))
        if len(segments) > MAX_SEGMENTS or prod(map(len, segments)) > MAX_NAMES:
            limits = f"over {MAX_SEGMENTS} segments or {MAX_NAMES} names"
            raise ValueError(f"template {template[:80]!r}: {limits}")
        at = found.end()
    return segments


def _alternatives(inside: str) -> list[str]:
    """The words that stand in braces."""
    choices: list[str] = []
    for low, high in _CHOICE.findall(inside):
        if not high:
            choices.append(_unescape(low))
        elif _is_index(low) and _is_index(high) and 0 < int(high) - int(low) < MAX_NAMES:
            choices += map(str, range(int(low), int(high) + 1))
        else:
            raise ValueError(f"bad range {low[:20]}-{high[:20]} in a template")
        if len(choices) > MAX_NAMES:
            raise ValueError(f"a template of more than {MAX_NAMES} names")
    return choices


def _unescape(segment: str) -> str:
    return _ESCAPED.sub(r"\1", segment)
