"""Layer names as templates, both ways, and templates that want too much."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourierft_export.bundle.layer_templates import (
    MAX_NAMES,
    compress,
    expand,
)

SEGMENTS = st.one_of(
    st.integers(0, 40).map(str),
    st.sampled_from(["q_proj", "v_proj", "layers", "007", "00", "1e3", "²", "٣", "1234567890"]),
    st.text(
        st.characters(exclude_characters=".", exclude_categories=["Cs"]), min_size=1, max_size=4
    ),
    st.text("\\{},-0123", min_size=1, max_size=5),
)
NAMES = st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join)


def plain_order(name: str) -> list[tuple[bool, int, str]]:
    """The natural order, said again: numbers in shortest form first, by value; then words."""
    return [
        (False, int(s), "") if s == "0" or (s.isdecimal() and s.isascii() and s[0] != "0"
                                            and len(s) < 10) else (True, 0, s)
        for s in name.split(".")
    ]  # fmt: skip


@given(st.sets(NAMES, max_size=40))
@settings(deadline=None)
def test_templates_give_back_the_names_in_natural_order(names: set[str]) -> None:
    assert expand(compress(names)) == sorted(names, key=plain_order)


@given(st.sets(NAMES, min_size=1, max_size=20), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_one_set_of_names_has_one_form(names: set[str], rng: random.Random) -> None:
    shuffled = sorted(names)
    rng.shuffle(shuffled)
    assert compress(shuffled) == compress(sorted(names))


@pytest.mark.parametrize(
    ("names", "templates"),
    [
        (["a"], ["a"]),
        (["a.0", "a.1", "a.2", "a.5"], ["a.{0-2,5}"]),
        (["a.1", "a.10", "a.2"], ["a.{1-2,10}"]),
        (["a", "a.b"], ["a", "a.b"]),
        (["x.q", "y.q", "y.v"], ["x.q", "y.{q,v}"]),
        (["q-a.{b}"], [r"q\-a.\{b\}"]),
        (["a.00", "a.0"], ["a.{0,00}"]),
        ([f"l.{i}.s.{p}" for i in range(32) for p in ("q_proj", "v")], ["l.{0-31}.s.{q_proj,v}"]),
        ([], []),
    ],
)
def test_forms(names: list[str], templates: list[str]) -> None:
    assert compress(names) == templates
    assert set(expand(templates)) == set(names)


MALFORMED = {
    "empty": "",
    "empty segment": "a..b",
    "dot at the end": "a.",
    "brace not closed": "a.{b",
    "brace closed only": "a.}",
    "empty braces": "{}",
    "empty choice": "{a,}",
    "backslash at the end": "a\\",
    "backslash before a plain character": r"a\b",
    "dot hidden by a backslash": r"a\.b",
    "dot inside braces": "{a.b,c}",
    "text after braces": "{a,b}c",
    "text before braces": "a{b,c}",
    "range of words": "{a-c}",
    "range backwards": "{5-2}",
    "range of one": "{5-5}",
    "range with a leading zero": "{00-31}",
    "range in a range": "{0-1-2}",
    "dash outside braces": "a-b",
    "the same choice twice": "{a,a}",
    "overlapping ranges": "{0-3,2}",
    "range of ten digits": "{0-1000000000}",
    "a million names": "{0-999999}",
    "a million names as a product": "{0-999}.{0-999}",
    "2^100 names": ".".join(["{0-1}"] * 100),
    "a name of 1,001 characters": "a" * 1001,
    "100,000 names of a megabyte each": "{0-99999}." + "a" * 1_000_000,
    "100,000 names of 1,000 characters": "{0-99999}." + "a" * 990,
    "100,000 names of 450 segments": "{0-99999}" + ".a" * 450,
    "a million segments": "a." * 1_000_000 + "a",
}


@pytest.mark.parametrize("template", MALFORMED.values(), ids=MALFORMED.keys())
def test_templates_that_are_refused_without_making_the_names(template: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"."):
            expand([template])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50_000_000


def test_limits_hold_over_all_templates() -> None:
    half = "{0-59999}"
    assert len(expand([f"a.{half}"])) == 60_000
    with pytest.raises(ValueError, match="120000 layer names, where at most 100000 are allowed"):
        expand([f"a.{half}", f"b.{half}"])
    with pytest.raises(ValueError, match="twice"):
        expand(["a.{b,c}", "a.b"])
    assert len(expand([f"a.{{0-{MAX_NAMES - 1}}}"])) == MAX_NAMES
