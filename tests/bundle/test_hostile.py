"""Bundle files written from FORMAT.md alone: read if sound, refused if damaged or hostile.

A refusal is one line with the right code, and nothing is written. Headers of safetensors files are
tested in tests/files; here are the bundle's own rules, and one of each kind of damage through every
verb that reads a bundle.
"""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fourierft_export import Bundle
from fourierft_export.bundle.spec import AdapterSpec, LayerSpec
from fourierft_export.cli.main import run
from fourierft_export.errors import BadInputError, FileAccessError

ESC = "\x1b[31m"
GOLDEN = Path(__file__).parent.parent / "golden"
Tensor = tuple[str, str, list[int], bytes]
# The crafted bundle by default: two unbound layers, n = 4.
SPEC: dict[str, Any] = {
    "version": 1,
    "seed": 777,
    "scaling": 150.0,
    "groups": [{"layers": ["block.{0-1}.lin"], "n_frequency": 4}],
}


def canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def digest_of(text: str, tensors: Sequence[Tensor]) -> str:
    table = canonical([[name, dtype, shape] for name, dtype, shape, _ in tensors])
    payload = b"".join(data for *_, data in tensors)
    return hashlib.sha256(text.encode() + b"\n" + table.encode() + b"\n" + payload).hexdigest()


def container(entries: Mapping[str, Any] | str, payload: bytes) -> bytes:
    """A safetensors file of this header (as JSON or as text) and this payload."""
    text = entries if isinstance(entries, str) else json.dumps(entries, separators=(",", ":"))
    raw = text.encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + payload


def craft(
    *,
    text: str | None = None,
    tensors: Sequence[Tensor] | None = None,
    digest: str | None = None,
    as_given: bool = False,
    **fields: Any,
) -> bytes:
    """The bytes of a bundle file.

    `fields` replace fields of the usual spec (None: left out); `text` is the metadata itself.
    `digest` replaces the right hash. A tensor is (name, dtype, shape, bytes), put in the format's
    order unless `as_given`.
    """
    spec = {key: value for key, value in {**SPEC, **fields}.items() if value is not None}
    text = canonical(spec) if text is None else text
    if tensors is None:
        tensors = [("fourierft.spectrum.0", "F32", [2, 4], np.arange(8, dtype="<f4").tobytes())]
    if not as_given:
        widths = {"U8": 1, "BOOL": 1, "F4": 0.5, "F8_E4M3": 1, "F16": 2, "BF16": 2, "F64": 8}
        tensors = sorted(tensors, key=lambda t: (-widths.get(t[1], 4), t[0]))
    metadata = {"fourierft": text, "sha256": digest or digest_of(text, tensors)}
    entries: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, dtype, shape, data in tensors:
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    return container(entries, b"".join(data for *_, data in tensors))


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


def test_the_writer_makes_what_the_format_says() -> None:
    layers = tuple(LayerSpec(f"block.{i}.lin", 4) for i in range(2))
    spectra = {f"block.{i}.lin": np.arange(4 * i, 4 * i + 4, dtype=np.float32) for i in range(2)}
    bundle = Bundle.build(AdapterSpec(777, 150.0, layers), spectra)
    assert bundle.to_bytes() == craft() == (GOLDEN / "unbound.fourierft.safetensors").read_bytes()
    again = Bundle.from_bytes(craft())
    assert again.spec == bundle.spec
    assert {name: list(row) for name, row in again.spectra.items()} == {
        name: list(row) for name, row in spectra.items()
    }


# --- rows 1 to 3: the container ------------------------------------------------------------------


def with_header(header: object) -> bytes:
    """A safetensors file of this header (a value, or its JSON) and 16 bytes of payload."""
    return container(header, np.arange(4, dtype="<f4").tobytes())  # type: ignore[arg-type]


TENSOR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
GOOD = craft()
CONTAINERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "header of 2^63 bytes": ((1 << 63).to_bytes(8, "little") + GOOD[8:], "header le"),
    "one byte less": (GOOD[:-1], "truncated"),
    "one byte more": (GOOD + b"\0", "trailing"),
    "pickle": (b"\x80\x04\x95" + bytes(200), "pickle or zip archive, which can run code"),
    "hole": (with_header({"a": {**TENSOR, "shape": [3], "data_offsets": [4, 16]}}), "leave a hole"),
    "a tensor twice": (with_header('{"a":1,"a":1}'), "the key 'a' twice"),
    "nested 100,000 deep": (with_header("[" * 100_000 + "]" * 100_000), "nesting too deep"),
    "no hash": (with_header({"__metadata__": {"fourierft": "{}"}, "a": TENSOR}), "another hash"),
    "escape sequence in a name": (with_header({f"a{ESC}": 5}), "exactly dtype"),
}


@pytest.mark.parametrize(("data", "words"), CONTAINERS.values(), ids=CONTAINERS.keys())
def test_containers(
    data: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.fourierft.safetensors"
    path.write_bytes(data)
    check_refused(path, words, capsys)


def test_a_checkpoint_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header({"__metadata__": {"format": "pt"}, "a": TENSOR}))
    check_refused(path, "without FourierFT metadata", capsys, verbs=("unpack",))


def test_every_truncation_and_every_flipped_bit_is_refused() -> None:
    """Spaces after the header's JSON apart, no bit can change unnoticed."""
    good = craft()
    for at in range(len(good)):
        flipped = (good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :] for bit in (0, 6))
        for damaged in (good[:at], *flipped):
            with pytest.raises(BadInputError):
                Bundle.from_bytes(damaged)


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


def more(name: str, shape: list[int], data: bytes, dtype: str = "F32") -> dict[str, Any]:
    """The usual spectra and one more tensor."""
    return {"tensors": [EIGHT, (name, dtype, shape, data)]}


PRINTS = more("fourierft.fingerprint.0", [2, 32], bytes(64), "U8")
FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    # the metadata as text
    "text not canonical": ({"text": '{"version": 1}'}, "canonical JSON"),
    "text is no object": ({"text": "[]"}, "bundle metadata: expected a JSON object"),
    "key twice": ({"text": '{"seed":1,"seed":2}'}, "the key 'seed' twice"),
    "wrong hash": ({"digest": HEX}, "found another hash"),
    "tensors in another order": (
        {"tensors": [("x", "F32", [1], bytes(4)), EIGHT], "as_given": True},
        "another form of the file",
    ),
    # plain fields
    "version 2": ({"version": 2}, "found version 2"),
    "version true": ({"version": True}, "field version: expected int, found bool"),
    "unknown key": ({"later": 1}, "no unknown fields, found later"),
    "seed true": ({"seed": True}, "field seed: expected int, found bool"),
    "seed of 80 bits": ({"seed": 2**80}, "64 bits"),
    "scaling true": ({"scaling": True}, "field scaling: expected int or float"),
    "scaling 1e39": ({"scaling": 1e39}, "float32 number"),
    "scaling of 390 digits": ({"scaling": 10**389}, "float32 number"),
    "groups an object": ({"groups": {}}, "field groups: expected list"),
    "no groups": ({"groups": []}, "no layers"),
    "a group is a number": ({"groups": [5]}, "group 0: expected a JSON object"),
    "peft a list": ({"peft": []}, "field peft: expected dict"),
    "peft with other keys": ({"peft": {"put": {}}}, "no unknown fields, found put"),
    "peft absent a number": ({"peft": {"absent": 5}}, "field absent: expected list"),
    # layers
    "layers text": (group(layers="a"), "field layers: expected list"),
    "layers of numbers": (group(layers=[1]), "templates as text"),
    "a layer name twice": (group(layers=["a", "a"]), "a layer name twice"),
    "a million layers": (group(layers=["a.{0-999999}"]), "well-formed layer templates"),
    "100,000 layers": (group(layers=["a.{0-99999}"]), "at most 2 are allowed"),
    "a layer in two groups": (
        {"groups": [GROUP, GROUP], "tensors": [EIGHT, stack([2, 4], floats([1.0] * 8), i=1)]},
        "layer block.0.lin: its name appears twice",
    ),
    "many groups of 100,000 empty layers": (
        {
            "groups": [{"layers": [f"a{i}.{{0-99999}}"], "n_frequency": 0} for i in range(50)],
            "tensors": [stack([100_000, 0], b"", i=i) for i in range(50)],
        },
        "at most 100000 layers, found 5000000",
    ),
    # row 4: sizes
    "1e9 x 1e9": (group(shape=[10**9, 10**9]), "outside 1 to 2\\^33"),
    "shape 0": (group(shape=[0, 4]), "outside 1 to 2\\^33"),
    "shape true": (group(shape=[True, 4]), "two whole numbers"),
    "n 0": (group(n_frequency=0), "of shape .L, 0., found shape"),
    "n 1e9": (group(n_frequency=10**9), ".L, 1000000000., found shape \\[2, 4\\]"),
    "n above M*N": (group(shape=[1, 3]), "above the 3 elements"),
    "n and the spectrum differ": (group(n_frequency=3), "found shape \\[2, 4\\]"),
    # binding
    "shape alone": (group(entry_rule=None, entries_sha256=None), "given together"),
    "hash missing": (group(entries_sha256=None), "together"),
    "unknown rule": (group(entry_rule="large"), "unknown entry rule 'large'"),
    "fan_in_fan_out 1": (group(fan_in_fan_out=1), "field fan_in_fan_out: expected bool"),
    "unknown key of a group": (group(rank=8), "no unknown fields, found rank"),
    "fingerprints promised": (group(base_dtype="F32"), "fourierft.fingerprint.0"),
    "fingerprints of an unknown dtype": ({**group(base_dtype="F31"), **PRINTS}, "known dtype"),
    "fingerprints without base_dtype": (PRINTS, "reserved"),
    # explicit entries
    "entries promised": (group(entry_rule="explicit"), "fourierft.entries.0"),
    "entries of floats": (
        {**group(entry_rule="explicit"), **more("fourierft.entries.0", [4, 2], bytes(32))},
        "entries of dtype U32",
    ),
    # tensors
    "no spectrum": ({"tensors": [("x", "F32", [1], bytes(4))]}, "found none"),
    "spectrum of integers": ({"tensors": [stack([2, 4], bytes(32), "I32")]}, "which is no float"),
    "tensor of half bytes": (more("x", [4], bytes(2), "F4"), "whole bytes per element"),
    "a reserved name": (more("fourierft.x", [1], bytes(4)), "reserved"),
    # row 5
    "NaN in float32": (
        {"tensors": [stack([2, 4], floats([1.0] * 7 + [float("nan")]))]},
        "block.1.lin: NaN or infinity",
    ),
    "infinity in float16": (
        {"tensors": [stack([2, 4], floats([float("inf")] + [1.0] * 7, "<f2"), "F16")]},
        "block.0.lin: NaN or infinity",
    ),
}


@pytest.mark.parametrize(("change", "words"), FIELDS.values(), ids=FIELDS.keys())
def test_fields(
    change: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.fourierft.safetensors"
    path.write_bytes(craft(**change))
    check_refused(path, words, capsys)


@pytest.mark.parametrize("change", ["one more key", "the keys the other way round", "no padding"])
def test_other_forms_of_the_same_content_are_refused(change: str) -> None:
    """The same content is the same bytes; what the hash does not cover may not vary either."""
    good = craft()
    start = 8 + int.from_bytes(good[:8], "little")
    header = json.loads(good[8:start])
    metadata = header["__metadata__"]
    if change == "one more key":
        metadata["format"] = "pt"
    elif change == "the keys the other way round":
        header["__metadata__"] = dict(reversed(metadata.items()))
    bad = container(header, good[start:])
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


# --- row 10: names with escape sequences ---------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_escape_sequences_are_printed_escaped(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.fourierft.safetensors"
    name = f"w{ESC}\n\u202e[bold]"
    tensors = [stack([2, 4], bytes(32)), (name, "F32", [1], bytes(4))]
    groups = [{"layers": [f"a{ESC}\a.{{0-1}}"], "n_frequency": 4}]
    fields = {"base_model": f"base{ESC}", "task_type": "\x07[red]"}
    path.write_bytes(craft(groups=groups, tensors=tensors, **fields))
    assert Bundle.load(path).saved.keys() == {name}
    assert run(["inspect", str(path), *flags]) == 0
    shown = capsys.readouterr()
    assert (shown.out + shown.err).replace("\n", "").isprintable()
    if flags:
        facts = json.loads(shown.out)["inspect"]
        assert facts["saved"][0]["name"] == name
    else:
        for escaped in (r"w\x1b[31m", r"\u202e[bold]", r"a\x1b[31m\x07", r"\x07[red]"):
            assert escaped in shown.out


def test_at_most_twenty_offenders_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nan.fourierft.safetensors"
    groups = [{"layers": ["a.{0-99}"], "n_frequency": 4}]
    path.write_bytes(craft(groups=groups, tensors=[stack([100, 4], floats([np.nan] * 400))]))
    assert run(["inspect", str(path), "--json"]) == 3
    shown = capsys.readouterr()
    assert len(json.loads(shown.out)["error"]["offenders"]) == 100
    lines = shown.err.rstrip("\n").split("\n")
    assert len(lines) == 21
    assert lines[1] == "  layer a.0: NaN or infinity in the spectrum"
    assert lines[20] == "  ... and 81 more"
