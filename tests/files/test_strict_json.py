"""JSON from strangers: nothing ambiguous, nothing unbounded."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourierft_export.errors import BadInputError
from fourierft_export.files.strict_json import MAX_DEPTH, canonical, loads, pretty

# Keys that fail to encode (half surrogate pairs) are refused; hypothesis makes none.
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
@settings(deadline=None)
def test_one_value_has_one_canonical_text(value: object) -> None:
    text = canonical(value)
    for written in (json.dumps(value), json.dumps(value, ensure_ascii=False), text):
        assert loads(written, "w") == loads(written.encode(), "w") == value
    assert json.loads(pretty(value)) == value
    assert text.isascii()
    assert canonical(loads(text, "w")) == text
    if isinstance(value, dict):
        assert canonical(dict(reversed(value.items()))) == text


@given(st.text(max_size=60))
@settings(deadline=None)
def test_any_text_is_read_as_python_reads_it_or_refused(text: str) -> None:
    try:
        value = loads(text, "w")
    except BadInputError as error:
        assert error.where == "w"
        return
    assert value == json.loads(text)


REFUSED: dict[str | bytes, str] = {
    "": "Expecting value",
    "nope": "Expecting value",
    "[1,]": "character",
    "{'a': 1}": "character",
    "[1] 2": "Extra data",
    '{"a":1,"a":1}': "the key 'a' twice",
    '[{"b":{"c":1,"d":2,"c":3}}]': "the key 'c' twice",
    "NaN": "the number NaN",
    "[-Infinity]": "the number -Infinity",
    "1e400": "not finite",
    "-1e400": "not finite",
    "1" * 401: "an integer of 401 characters",
    '"\\ud800"': "surrogate",
    '{"\\udfff": 1}': "surrogate",
    '"\x00"': "control character",
    '"\\x"': "escape",
    "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2): "nesting too deep",
    "[" * 200_000: "nesting too deep",
    '{"a":' * 200_000: "nesting too deep",
    b"\xff\xfe": "not UTF-8 at offset 0",
    b'"\xed\xa0\x80"': "not UTF-8 at offset 1",
}


@pytest.mark.parametrize(("text", "words"), REFUSED.items(), ids=range(len(REFUSED)))
def test_refused(text: str | bytes, words: str) -> None:
    with pytest.raises(BadInputError, match=f"(?i){words}"):
        loads(text, "file")


def test_limits_are_met_exactly() -> None:
    assert loads("9" * 400, "w") == int("9" * 400)
    assert loads("[" * MAX_DEPTH + "]" * MAX_DEPTH, "w")
    assert loads('"\\ud83d\\ude00"', "w") == "\N{GRINNING FACE}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_canonical_writes_no_number_that_json_lacks(value: object) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical(value)
