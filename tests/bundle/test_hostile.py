"""Damaged and hostile bundle files: refused in one line, with the right code, nothing written."""

from __future__ import annotations

import json
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fourierft_export.bundle.file import Bundle
from fourierft_export.cli.main import run
from fourierft_export.errors import BadInputError, FileAccessError

Craft = Callable[..., bytes]
ESC = "\x1b[31m"


def check_refused(
    path: Path,
    words: str,
    capsys: pytest.CaptureFixture[str],
    code: int = 3,
    verbs: tuple[str, ...] = ("inspect", "unpack"),
) -> None:
    """`path` is refused by the library and by every verb that reads it, in the same way."""
    error = BadInputError if code == 3 else FileAccessError
    tracemalloc.start()
    try:
        with pytest.raises(error, match=words) as caught:
            Bundle.load(path)
        assert tracemalloc.get_traced_memory()[1] < 64_000_000
    finally:
        tracemalloc.stop()
    assert path.name in caught.value.where
    assert caught.value.summary.isprintable()
    before = sorted(os.listdir(path.parent))
    out = path.parent / "out"
    for verb in verbs:
        command = [verb, str(path), *(["-o", str(out)] if verb == "unpack" else [])]
        assert run(command) == code
        shown = capsys.readouterr()
        lines = shown.err.rstrip("\n").split("\n")
        assert shown.out == ""
        assert lines[0].startswith("error: ")
        assert path.name in lines[0]
        assert len(lines) <= 21
        assert all(line.isprintable() for line in lines)
        assert "Traceback" not in shown.err
        assert run([*command, "--json"]) == code
        fields = json.loads(capsys.readouterr().out)["error"]
        assert fields["code"] == code
        assert path.name in fields["where"]
    assert sorted(os.listdir(path.parent)) == before


# --- row 1: the container ------------------------------------------------------------------------

CONTAINERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda good: b"", "an empty file"),
    "three bytes": (lambda good: good[:3], "a file of 3 bytes"),
    "length only": (lambda good: good[:8], "a header length of"),
    "header of 2^63 bytes": (lambda good: (1 << 63).to_bytes(8, "little") + good[8:], "header le"),
    "header of all bits": (lambda good: b"\xff" * 8 + good[8:], "header length"),
    "header of no bytes": (lambda good: bytes(8) + good[8:], "header length of 0"),
    "header longer than the file": (
        lambda good: (len(good) - 7).to_bytes(8, "little") + good[8:],
        "header length",
    ),
    "header shorter than its JSON": (
        lambda good: (int.from_bytes(good[:8], "little") - 8).to_bytes(8, "little") + good[8:],
        "strict JSON",
    ),
    "one byte less": (lambda good: good[:-1], "truncated"),
    "half": (lambda good: good[: len(good) // 2], "truncated"),
    "one byte more": (lambda good: good + b"\0", "trailing"),
    "twice": (lambda good: good + good, "trailing"),
    "not UTF-8": (lambda good: good[:9] + b"\xff" + good[10:], "not UTF-8"),
    "zeros": (lambda good: bytes(1000), "header length of 0"),
    "text": (lambda good: b"hello, this is not a bundle at all", "header length"),
    "pickle": (lambda good: b"\x80\x04\x95" + bytes(200), "pickle or zip"),
    "old pickle": (lambda good: b"\x80\x02ctorch\nload\n" + bytes(200), "pickle or zip"),
}


@pytest.mark.parametrize(("change", "words"), CONTAINERS.values(), ids=CONTAINERS.keys())
def test_containers(
    change: Callable[[bytes], bytes],
    words: str,
    craft: Craft,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "bad.fourierft.safetensors"
    path.write_bytes(change(craft()))
    check_refused(path, words, capsys)


def test_every_truncation_is_refused(craft: Craft) -> None:
    good = craft()
    for size in range(len(good)):
        with pytest.raises(BadInputError):
            Bundle.from_bytes(good[:size])


def test_every_flipped_bit_is_refused(craft: Craft) -> None:
    """Spaces after the header's JSON apart, no bit can change unnoticed."""
    good = craft()
    for at in range(len(good)):
        for bit in (0, 6):
            damaged = bytearray(good)
            damaged[at] ^= 1 << bit
            with pytest.raises(BadInputError):
                Bundle.from_bytes(bytes(damaged))


def test_a_zip_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    check_refused(path, "pickle or zip archive, which can run code", capsys)


FOUR = [0.0, 1.0, 2.0, 3.0]
GOOD_TENSOR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HEADERS: dict[str, tuple[Any, str]] = {
    "overlap": (
        {"a": GOOD_TENSOR, "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
        "overlap or leave a hole",
    ),
    "hole at the start": (
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [4, 16]}},
        "overlap or leave a hole",
    ),
    "hole between": (
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        },
        "tensor 'b' to begin at byte",
    ),
    "hole at the end": (
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}},
        "trailing bytes",
    ),
    "offsets backwards": ({"a": {**GOOD_TENSOR, "data_offsets": [16, 0]}}, "tensor 'a'"),
    "offsets negative": ({"a": {**GOOD_TENSOR, "data_offsets": [-16, 0]}}, "two byte offsets"),
    "three offsets": ({"a": {**GOOD_TENSOR, "data_offsets": [0, 8, 16]}}, "two byte offsets"),
    "offsets of text": ({"a": {**GOOD_TENSOR, "data_offsets": ["0", "16"]}}, "two byte offsets"),
    "offset true": ({"a": {**GOOD_TENSOR, "data_offsets": [False, 16]}}, "two byte offsets"),
    "offset 16.0": ({"a": {**GOOD_TENSOR, "data_offsets": [0, 16.0]}}, "two byte offsets"),
    "size and offsets disagree": ({"a": {**GOOD_TENSOR, "shape": [5]}}, "20 bytes for F32"),
    "unknown dtype": ({"a": {**GOOD_TENSOR, "dtype": "F33"}}, "a known dtype"),
    "dtype a list": ({"a": {**GOOD_TENSOR, "dtype": ["F32"]}}, "a known dtype"),
    "dtype missing": ({"a": {"shape": [4], "data_offsets": [0, 16]}}, "exactly dtype, shape"),
    "extra key": ({"a": {**GOOD_TENSOR, "offset": 0}}, "exactly dtype, shape"),
    "shape negative": ({"a": {**GOOD_TENSOR, "shape": [-4]}}, "whole numbers from 0"),
    "shape negative twice": ({"a": {**GOOD_TENSOR, "shape": [-2, -2]}}, "whole numbers from 0"),
    "shape 4.0": ({"a": {**GOOD_TENSOR, "shape": [4.0]}}, "whole numbers from 0"),
    "shape true": ({"a": {**GOOD_TENSOR, "shape": [True, 4]}}, "whole numbers from 0"),
    "shape null": ({"a": {**GOOD_TENSOR, "shape": None}}, "whole numbers from 0"),
    "shape that overflows": ({"a": {**GOOD_TENSOR, "shape": [2**32, 2**32, 4]}}, "at most"),
    "shape with 0 that overflows": (
        {
            "a": GOOD_TENSOR,
            "b": {"dtype": "F32", "shape": [2**62, 4, 0], "data_offsets": [16, 16]},
        },
        "at most",
    ),
    "shape of 20 huge axes": ({"a": {**GOOD_TENSOR, "shape": [2**62] * 20}}, "at most"),
    "shape of 33 axes": ({"a": {**GOOD_TENSOR, "shape": [4] + [1] * 32}}, "at most 32"),
    "shape of 10,000 axes": ({"a": {**GOOD_TENSOR, "shape": [2**62] * 10_000}}, "at most 32"),
    "a tensor that is a number": ({"a": 5}, "exactly dtype, shape"),
    "a list": ([1, 2], "a JSON object as header"),
    "a number": (5, "a JSON object as header"),
    # row 3: what lies in the JSON
    "metadata of numbers": ({"__metadata__": {"n": 5}, "a": GOOD_TENSOR}, "text to text"),
    "metadata null": ({"__metadata__": None, "a": GOOD_TENSOR}, "text to text"),
    "metadata a list": ({"__metadata__": ["x"], "a": GOOD_TENSOR}, "text to text"),
    "a tensor twice": (
        '{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
        '"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        "the key 'a' twice",
    ),
    "metadata twice": ('{"__metadata__":{},"__metadata__":{"fourierft":"x"}}', "twice"),
    "a key of the metadata twice": ('{"__metadata__":{"k":"1","k":"2"}}', "the key 'k' twice"),
    "20,000 keys, one twice": (
        "{" + ",".join(f'"{i}":1' for i in range(20_000)) + ',"19999":1}',
        "'19999' twice",
    ),
    "nested lists": ("[" * 100_000 + "]" * 100_000, "nesting too deep"),
    "nested objects": ('{"a":' * 100_000 + "1" + "}" * 100_000, "nesting too deep"),
    "nested 150 deep": ('{"a":' * 150 + "1" + "}" * 150, "nesting too deep"),
    "nested, not closed": ("[" * 100_000, "strict JSON"),
    "an integer of 5,000 digits": ('{"a":' + "9" * 5000 + "}", "an integer of 5000 characters"),
    "NaN": ('{"a":NaN}', "the number NaN"),
    "Infinity": ('{"a":-Infinity}', "the number -Infinity"),
    "1e999": ('{"a":1e999}', "which is not finite"),
    "half a surrogate pair": ('{"\\ud800":' + json.dumps(GOOD_TENSOR) + "}", "surrogate"),
    "no JSON": ("hello there", "strict JSON"),
    "a comment": ('{"a":1}// x', "strict JSON"),
    "no metadata": ({"a": GOOD_TENSOR}, "without FourierFT metadata"),
    "other metadata": ({"__metadata__": {"format": "pt"}, "a": GOOD_TENSOR}, "without FourierFT"),
    "no hash": ({"__metadata__": {"fourierft": "{}"}, "a": GOOD_TENSOR}, "found another hash"),
    "escape sequence in a name": ({f"a{ESC}": 5}, "exactly dtype, shape"),
}


@pytest.mark.parametrize(("header", "words"), HEADERS.values(), ids=HEADERS.keys())
def test_headers(
    header: Any,
    words: str,
    raw_container: Callable[..., bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "bad.fourierft.safetensors"
    path.write_bytes(raw_container(header, np.array(FOUR, "<f4").tobytes()))
    is_checkpoint = "without FourierFT" in words  # which `inspect` describes
    check_refused(
        path, words, capsys, verbs=("unpack",) if is_checkpoint else ("inspect", "unpack")
    )


# --- rows 3 to 6: the metadata and the arrays, under a hash that fits ----------------------------

GROUP = {"layers": ["block.{0-1}.lin"], "n_frequency": 4}
HEX = "0" * 64
BOUND = {**GROUP, "shape": [4, 4], "entry_rule": "small", "entries_sha256": HEX}


def group(**fields: Any) -> dict[str, Any]:
    """One group with these fields (None: left out)."""
    merged = {**BOUND, **fields}
    return {"groups": [{key: value for key, value in merged.items() if value is not None}]}


def floats(values: list[float], kind: str = "<f4") -> bytes:
    return np.array(values, kind).tobytes()


def stack(shape: list[int], data: bytes, dtype: str = "F32", i: int = 0) -> tuple[Any, ...]:
    return (f"fourierft.spectrum.{i}", dtype, shape, data)


EIGHT = stack([2, 4], floats([1.0] * 8))
FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    # the metadata as text
    "empty text": ({"text": ""}, "strict JSON"),
    "text is no object": ({"text": "[]"}, "bundle metadata: expected a JSON object"),
    "text not canonical": (
        {"text": '{"version": 1, "seed": 1, "scaling": 1, "groups": []}'},
        "canonical JSON",
    ),
    "keys not sorted": ({"text": '{"version":1,"seed":1}'}, "canonical JSON"),
    "not ASCII": ({"text": '{"base_model":"é"}'}, "canonical JSON"),
    "key twice": ({"text": '{"seed":1,"seed":2}'}, "the key 'seed' twice"),
    "nested": ({"text": "[" * 100_000 + "]" * 100_000}, "nesting too deep"),
    "nested 900 deep": ({"text": "[" * 900 + "]" * 900}, "nesting too deep"),
    "long integer": ({"text": '{"seed":' + "1" * 5000 + "}"}, "an integer of 5000"),
    "NaN": ({"text": '{"scaling":NaN}'}, "the number NaN"),
    "1e999": ({"text": '{"scaling":1e999}'}, "not finite"),
    "wrong hash": ({"digest": HEX}, "found another hash"),
    "hash is no hash": ({"digest": "x"}, "found another hash"),
    "tensors in another order": (
        {"tensors": [("x", "F32", [1], bytes(4)), EIGHT], "as_given": True},
        "another form of the file",
    ),
    "small elements first": (
        {"tensors": [("a", "F16", [4], bytes(8)), EIGHT], "as_given": True},
        "another form of the file",
    ),
    # plain fields
    "version 2": ({"version": 2}, "found version 2"),
    "version 1.0": ({"version": 1.0}, "field version: expected int"),
    "version true": ({"version": True}, "field version: expected int, found bool"),
    "no version": ({"version": None}, "field version: expected int, found nothing"),
    "unknown key": ({"later": 1}, "no unknown fields, found later"),
    "seed text": ({"seed": "777"}, "field seed: expected int, found str"),
    "seed true": ({"seed": True}, "field seed: expected int, found bool"),
    "seed 1.5": ({"seed": 1.5}, "field seed: expected int, found float"),
    "seed of 80 bits": ({"seed": 2**80}, "64 bits"),
    "seed of 300 digits": ({"seed": 10**300}, "64 bits"),
    "scaling text": ({"scaling": "150"}, "field scaling: expected int or float"),
    "scaling true": ({"scaling": True}, "field scaling: expected int or float"),
    "scaling 1e39": ({"scaling": 1e39}, "float32 number"),
    "scaling of 390 digits": ({"scaling": 10**389}, "float32 number"),
    "task_type a number": ({"task_type": 5}, "field task_type: expected str"),
    "base_model a list": ({"base_model": []}, "field base_model: expected str"),
    "groups an object": ({"groups": {}}, "field groups: expected list"),
    "no groups": ({"groups": []}, "no layers"),
    "a group is a number": ({"groups": [5]}, "group 0: expected a JSON object"),
    "peft a list": ({"peft": []}, "field peft: expected dict"),
    "peft with other keys": ({"peft": {"put": {}}}, "no unknown fields, found put"),
    "peft set a list": ({"peft": {"set": [["a", 1]]}}, "field set: expected dict"),
    "peft set text": ({"peft": {"set": "abc"}}, "field set: expected dict"),
    "peft absent a number": ({"peft": {"absent": 5}}, "field absent: expected list"),
    "peft absent text": ({"peft": {"absent": "bias"}}, "field absent: expected list"),
    # layers
    "layers text": (group(layers="a"), "field layers: expected list"),
    "layers of numbers": (group(layers=[1]), "templates as text"),
    "no layers": (group(layers=[]), "2 layers, one for each spectrum, found 0"),
    "a layer name twice": (group(layers=["a", "a"]), "a layer name twice"),
    "a bad template": (group(layers=["a.{0-"]), "well-formed layer templates"),
    "a million layers": (group(layers=["a.{0-999999}"]), "well-formed layer templates"),
    "100,000 layers": (group(layers=["a.{0-99999}"]), "100000 layer names, where 2 are the most"),
    "2^100 layers": (group(layers=[".".join(["{0-1}"] * 99)]), "well-formed layer templates"),
    "gigabytes of names": (group(layers=["{0-99999}." + "a" * 10**6]), "well-formed"),
    "three layers for two rows": (group(layers=["a.{0-2}"]), "3 layer names, where 2 are the most"),
    "a layer in two groups": (
        {
            "groups": [GROUP, GROUP],
            "tensors": [EIGHT, stack([2, 4], floats([1.0] * 8), i=1)],
        },
        "layer block.0.lin: expected one spectrum, found two",
    ),
    "many groups of 100,000 empty layers": (
        {
            "groups": [{"layers": [f"a{i}.{{0-99999}}"], "n_frequency": 0} for i in range(50)],
            "tensors": [stack([100_000, 0], b"", i=i) for i in range(50)],
        },
        "at most 100000 layers, found 5000000",
    ),
    "more than 100,000 layers in all": (
        {
            "groups": [{"layers": [f"a{i}.{{0-49999}}"], "n_frequency": 1} for i in range(3)],
            "tensors": [stack([50_000, 1], bytes(100_000), "F16", i) for i in range(3)],
        },
        "at most 100000 layers",
    ),
    # row 4: sizes
    "1e9 x 1e9": (group(shape=[10**9, 10**9]), "outside 1 to 2\\^33"),
    "1 x 2^33+1": (group(shape=[1, 2**33 + 1]), "outside 1 to 2\\^33"),
    "a shape of 300 digits": (group(shape=[10**300, 1]), "outside 1 to 2\\^33"),
    "shape 0": (group(shape=[0, 4]), "outside 1 to 2\\^33"),
    "shape negative": (group(shape=[-4, -4]), "outside 1 to 2\\^33"),
    "shape of one size": (group(shape=[16]), "two whole numbers"),
    "shape of text": (group(shape=["4", "4"]), "two whole numbers"),
    "shape 4.0": (group(shape=[4.0, 4]), "two whole numbers"),
    "shape true": (group(shape=[True, 4]), "two whole numbers"),
    "n 0": (group(n_frequency=0), "n_frequency from 1, found 0"),
    "n 0, and its tensor": (
        {**group(n_frequency=0), "tensors": [stack([2, 0], b"")]},
        "n_frequency from 1, found 0",
    ),
    "n negative": (group(n_frequency=-4), "n_frequency from 1, found -4"),
    "n 1e9": (group(n_frequency=10**9), "with 1000000000 columns, found shape \\[2, 4\\]"),
    "n of 300 digits": (group(n_frequency=10**300), "columns"),
    "n 4.0": (group(n_frequency=4.0), "field n_frequency: expected int"),
    "n true": (group(n_frequency=True), "field n_frequency: expected int"),
    "n above M*N": (group(shape=[1, 3]), "above the 3 elements"),
    "n and the spectrum differ": (group(n_frequency=3), "found shape \\[2, 4\\]"),
    # binding
    "shape alone": (group(entry_rule=None, entries_sha256=None), "together"),
    "rule alone": (group(shape=None, entries_sha256=None), "together"),
    "hash missing": (group(entries_sha256=None), "together"),
    "unknown rule": (group(entry_rule="large"), "unknown entry rule 'large'"),
    "hash a number": (group(entries_sha256=5), "field entries_sha256: expected str"),
    "fan_in_fan_out 1": (group(fan_in_fan_out=1), "field fan_in_fan_out: expected bool"),
    "unknown key of a group": (group(rank=8), "no unknown fields, found rank"),
    "fingerprints promised": (group(base_dtype="F32"), "fourierft.fingerprint.0"),
    "fingerprints of another size": (
        {
            **group(base_dtype="F32"),
            "tensors": [EIGHT, ("fourierft.fingerprint.0", "U8", [2, 31], bytes(62))],
        },
        "of shape \\[2, 32\\]",
    ),
    "fingerprints of an unknown dtype": (
        {
            **group(base_dtype="F31"),
            "tensors": [EIGHT, ("fourierft.fingerprint.0", "U8", [2, 32], bytes(64))],
        },
        "known dtype",
    ),
    "fingerprints nobody asked for": (
        {"tensors": [EIGHT, ("fourierft.fingerprint.0", "U8", [2, 32], bytes(64))]},
        "reserved",
    ),
    # explicit entries
    "entries promised": (group(entry_rule="explicit"), "fourierft.entries.0"),
    "entries of floats": (
        {
            **group(entry_rule="explicit"),
            "tensors": [EIGHT, ("fourierft.entries.0", "F32", [4, 2], floats([0.5] * 8))],
        },
        "entries of dtype U32",
    ),
    "entries outside": (
        {
            **group(entry_rule="explicit"),
            "tensors": [
                EIGHT,
                ("fourierft.entries.0", "U32", [4, 2], np.array([4] * 8, "<u4").tobytes()),
            ],
        },
        "outside \\[4, 4\\], and 1 more",
    ),
    "an entry twice": (
        {
            **group(entry_rule="explicit", layers=["a"]),
            "tensors": [
                stack([1, 4], floats([1.0] * 4)),
                ("fourierft.entries.0", "U32", [4, 2], bytes(32)),
            ],
        },
        "layer a: an entry twice",
    ),
    # tensors
    "no spectrum": ({"tensors": [("x", "F32", [1], bytes(4))]}, "found none"),
    "spectrum of integers": ({"tensors": [stack([2, 4], bytes(32), "I32")]}, "which is no float"),
    "spectrum of float8": (
        {"tensors": [stack([2, 4], bytes(8), "F8_E4M3")]},
        "which is no float",
    ),
    "tensor of half bytes": (
        {"tensors": [EIGHT, ("x", "F4", [4], bytes(2))]},
        "whole bytes per element",
    ),
    "a reserved name": ({"tensors": [EIGHT, ("fourierft.x", "F32", [1], bytes(4))]}, "reserved"),
    # row 5
    "NaN in float32": (
        {"tensors": [stack([2, 4], floats([1.0] * 7 + [float("nan")]))]},
        "block.1.lin: NaN or infinity",
    ),
    "infinity in float16": (
        {"tensors": [stack([2, 4], floats([float("inf")] + [1.0] * 7, "<f2"), "F16")]},
        "block.0.lin: NaN or infinity",
    ),
    "NaN in bfloat16": (
        {"tensors": [stack([2, 4], b"\xc0\x7f" + bytes(14), "BF16")]},
        "block.0.lin: NaN or infinity",
    ),
    "infinity in float64": (
        {"tensors": [stack([2, 4], floats([-float("inf")] + [1.0] * 7, "<f8"), "F64")]},
        "block.0.lin: NaN or infinity",
    ),
}


@pytest.mark.parametrize(("change", "words"), FIELDS.values(), ids=FIELDS.keys())
def test_fields(
    change: dict[str, Any],
    words: str,
    craft: Craft,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "bad.fourierft.safetensors"
    path.write_bytes(craft(**change))
    check_refused(path, words, capsys)


def test_entries_with_a_wrong_hash_are_refused_where_they_are_used(craft: Craft) -> None:
    """Opening derives no entries: for large layers that takes seconds."""
    bundle = Bundle.from_bytes(craft(**group()))
    with pytest.raises(BadInputError, match=f"entries with sha256 {HEX}"):
        bundle.entries("block.0.lin")


@pytest.mark.parametrize("change", ["one more key", "the keys the other way round", "no padding"])
def test_other_forms_of_the_same_content_are_refused(
    change: str, craft: Craft, raw_container: Callable[..., bytes]
) -> None:
    """The same content is the same bytes; what the hash does not cover may not vary either."""
    good = craft()
    start = 8 + int.from_bytes(good[:8], "little")
    header = json.loads(good[8:start])
    metadata = header["__metadata__"]
    if change == "one more key":
        metadata["format"] = "pt"
    elif change == "the keys the other way round":
        header["__metadata__"] = dict(reversed(metadata.items()))
    bad = raw_container(header, good[start:])
    if change == "no padding":
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8 + 1)
        bad = len(text).to_bytes(8, "little") + text + good[start:]
    with pytest.raises(BadInputError, match="another form of the file"):
        Bundle.from_bytes(bad)


# --- row 8: what is no file ----------------------------------------------------------------------


def test_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fifo = tmp_path / "fifo.fourierft.safetensors"
    os.mkfifo(fifo)
    check_refused(fifo, "a FIFO, device or socket", capsys)  # and does not wait for a writer
    check_refused(tmp_path / "missing.safetensors", "nothing there", capsys, code=6)
    with pytest.raises(BadInputError, match="found a directory"):
        Bundle.load(tmp_path)
    with pytest.raises(BadInputError, match="a FIFO, device or socket"):
        Bundle.load("/dev/zero")
    assert run(["inspect", "/dev/zero"]) == 3
    assert run(["unpack", str(tmp_path), "-o", f"{tmp_path}-out"]) == 3
    capsys.readouterr()
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "gone")
    check_refused(link, "nothing there", capsys, code=6)
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    check_refused(loop, "symbolic links", capsys, code=6)


# --- row 10: names that speak to the terminal ----------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_escape_sequences_are_printed_escaped(
    flags: list[str], craft: Craft, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.fourierft.safetensors"
    name = f"w{ESC}\n\u202e[bold]"
    tensors = [
        ("fourierft.spectrum.0", "F32", [2, 4], bytes(32)),
        (name, "F32", [1], bytes(4)),
    ]
    path.write_bytes(
        craft(
            groups=[{"layers": [f"a{ESC}\a.{{0-1}}"], "n_frequency": 4}],
            base_model=f"base{ESC}",
            task_type="\x07[red]",
            tensors=tensors,
        )
    )
    assert Bundle.load(path).saved.keys() == {name}
    assert run(["inspect", str(path), *flags]) == 0
    shown = capsys.readouterr()
    assert (shown.out + shown.err).replace("\n", "").isprintable()
    if flags:
        facts = json.loads(shown.out)["inspect"]
        assert facts["saved"][0]["name"] == name
    else:
        assert r"w\x1b[31m\n\u202e[bold]" in shown.out
        assert r"a\x1b[31m\x07" in shown.out
        assert r"\x07[red]" in shown.out


# --- row 11, and the same for PEFT directories ---------------------------------------------------


def test_at_most_twenty_offenders_are_printed(
    craft: Craft, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nan.fourierft.safetensors"
    bad = floats([float("nan")] * 400)
    path.write_bytes(
        craft(
            groups=[{"layers": ["a.{0-99}"], "n_frequency": 4}],
            tensors=[stack([100, 4], bad)],
        )
    )
    assert run(["inspect", str(path), "--json"]) == 3
    shown = capsys.readouterr()
    assert len(json.loads(shown.out)["error"]["offenders"]) == 100
    lines = shown.err.rstrip("\n").split("\n")
    assert len(lines) == 21
    assert lines[1] == "  layer a.0: NaN or infinity in the spectrum"
    assert lines[20] == "  ... and 81 more"
