"""Data files become the same table whatever their format, and bad rows are all told."""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fourierft_export.errors import (
    BadInputError,
    FileAccessError,
    FourierFTError,
    MissingExtraError,
    UsageError,
)
from fourierft_export.train.data.images import read_images
from fourierft_export.train.data.labels import label_ids, make_labels, read_labels
from fourierft_export.train.data.pictures import load_image
from fourierft_export.train.data.rows import MAX_LINE_BYTES, read_table
from fourierft_export.train.data.split import SplitSettings, split
from fourierft_export.train.data.table import Table
from fourierft_export.train.data.text import TextSettings

TEXTS = ['say "hi"', "naïve, 3 € – ok", 'a " b', "x"]
LABELS = [1, 0, 2, 0]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def csv_cell(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


@pytest.fixture(params=["tsv", "tsv-crlf-bom", "csv", "jsonl", "parquet"])
def same_rows(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same rows in each format."""
    rows = list(zip(TEXTS, LABELS, strict=True))
    tsv = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows)
    if request.param == "tsv":
        return write(tmp_path, "a.tsv", tsv)
    if request.param == "tsv-crlf-bom":
        return write(tmp_path, "a.tsv", "\ufeff" + tsv.replace("\n", "\r\n"))
    if request.param == "csv":
        lines = "".join(f"{csv_cell(text)},{label}\r\n" for text, label in rows)
        return write(tmp_path, "a.csv", "text,label\r\n" + lines)
    if request.param == "jsonl":
        lines = "".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in rows)
        return write(tmp_path, "a.jsonl", lines + "\n")
    pq.write_table(pa.table({"text": TEXTS, "label": LABELS}), tmp_path / "a.parquet")
    return tmp_path / "a.parquet"


def test_every_format_gives_the_same_rows(same_rows: Path) -> None:
    table = read_table(same_rows)
    assert list(table.columns) == ["text", "label"]
    assert list(table.columns["text"]) == TEXTS
    assert read_labels(table, table.columns["label"]) == LABELS
    assert len(table) == 4


def test_the_data_files_are_read_as_a_plain_split_reads_them(data_dir: Path) -> None:
    for path in sorted((data_dir / "text").rglob("*.tsv")):
        lines = path.read_text("utf-8").split("\n")[1:-1]
        table = read_table(path)
        rows = zip(*table.columns.values(), strict=True)
        assert ["\t".join(row) for row in rows] == lines
        assert table.places[0] == "line 2" and table.places[-1] == f"line {len(lines) + 1}"


def test_a_csv_cell_may_span_lines(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a.csv", 'text,label\n"one\ntwo",1\nthree,0\n'))
    assert table.columns["text"] == ["one\ntwo", "three"]
    assert table.places == ["line 3", "line 4"]


def test_arrays_keep_their_rows(tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).standard_normal((5, 2, 3))
    np.savez(tmp_path / "a.npz", inputs=inputs, labels=np.arange(5))
    table = read_table(tmp_path / "a.npz")
    assert np.array_equal(table.columns["inputs"], inputs)
    assert read_labels(table, table.columns["labels"]) == [0, 1, 2, 3, 4]


GOOD = b"text\tlabel\nfine\t1\n"
BAD: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.tsv", b"", "an empty file"),
    "only a header": ("a.tsv", b"text\tlabel\n", "expected rows, found none"),
    "empty jsonl": ("a.jsonl", b"\n", "expected rows, found none"),
    "a column too many": ("a.tsv", GOOD + b"a\tb\t1\n", "line 3: 3 columns, the header has 2"),
    "a column too few": ("a.csv", b"text,label\na,1\nb\n", "line 3: 1 columns"),
    "not UTF-8": ("a.tsv", GOOD + b"caf\xe9\t1\n", "line 3: bytes that are not UTF-8 at offset 3"),
    "a NUL": ("a.tsv", GOOD + b"a\0b\t1\n", "line 3: a NUL byte"),
    "a column twice": ("a.tsv", b"text\ttext\na\tb\n", "line 1: column names"),
    "an open quote": ("a.csv", b'text,label\n"a,1\n', "not CSV"),
    "not JSON": ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: Expecting value"),
    "not an object": ("a.jsonl", b"[1]\n", "line 1: list, not an object"),
    "NaN": ("a.jsonl", b'{"inputs": [NaN]}\n', "line 1: the number NaN"),
    "a key twice": ("a.jsonl", b'{"a": 1, "a": 2}\n', "line 1: the key 'a' twice"),
    "half a surrogate pair": ("a.jsonl", b'{"text": "\\ud800"}\n', "not text"),
    "not parquet": ("a.parquet", b"PAR1 no", "expected a parquet file"),
    "not npz": ("a.npz", b"PK no", "expected an npz file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_says_what_and_where(name: str, tmp_path: Path) -> None:
    file, content, message = BAD[name]
    path = write(tmp_path, file, content)
    with pytest.raises(BadInputError) as caught:
        read_table(path)
    assert message in caught.value.summary
    assert caught.value.where == str(path)


def test_all_bad_rows_are_told_at_once(tmp_path: Path) -> None:
    rows = b"".join(b"a\tb\tc\n" if i % 2 else b"a\t1\n" for i in range(50))
    with pytest.raises(BadInputError, match="25 bad rows, first line 3: 3 columns") as caught:
        read_table(write(tmp_path, "a.tsv", b"text\tlabel\n" + rows))
    assert [line.split(":")[0] for line in caught.value.offenders] == [
        f"line {i}" for i in range(3, 52, 2)
    ]


def test_a_huge_line_is_refused_and_the_next_one_is_read(tmp_path: Path) -> None:
    huge = b"x" * (MAX_LINE_BYTES + 100) + b"\t1\n"
    with pytest.raises(BadInputError) as caught:
        read_table(write(tmp_path, "a.tsv", b"text\tlabel\n" + huge + b"y\t1\t1\n"))
    assert caught.value.offenders == (
        f"line 2: more than {MAX_LINE_BYTES} bytes",
        "line 3: 3 columns, the header has 2",
    )


def test_an_array_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**9)}
    np.lib.format.write_array_header_1_0(buffer, header)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("inputs.npy", buffer.getvalue() + bytes(64))
    with pytest.raises(BadInputError, match="a claim of 8000000000000000"):
        read_table(tmp_path / "a.npz")


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", inputs=np.array([{}], dtype=object))
    with pytest.raises(BadInputError, match="an npz file of plain arrays"):
        read_table(tmp_path / "a.npz")


def test_arrays_of_different_lengths_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", inputs=np.zeros((3, 2)), labels=np.zeros(4, dtype=int))
    with pytest.raises(BadInputError) as caught:
        read_table(tmp_path / "a.npz")
    assert caught.value.offenders == ("inputs: shape [3, 2]", "labels: shape [4]")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda path: None, FileAccessError),
        (lambda path: path.mkdir(), BadInputError),
        (os.mkfifo, BadInputError),
    ],
    ids=["missing", "folder", "fifo"],
)
def test_what_is_no_file(make: Any, kind: type[FourierFTError], tmp_path: Path) -> None:
    make(tmp_path / "a.tsv")
    with pytest.raises(kind):
        read_table(tmp_path / "a.tsv")


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.tsv, \.csv, \.jsonl"):
        read_table(write(tmp_path, "a.xlsx", b"x"))


def table_of(values: list[Any]) -> Table:
    return Table("data", {"label": values}, [f"line {i + 2}" for i in range(len(values))])


@pytest.mark.parametrize(
    ("values", "names", "ids"),
    [
        (["1", "0", "1"], ("0", "1"), [1, 0, 1]),
        ([0, 3, 1], ("0", "1", "2", "3"), [0, 3, 1]),  # one class has no row
        (["-1", "1", "-1"], ("-1", "1"), [0, 1, 0]),
        ([100, 7, 100], ("7", "100"), [1, 0, 1]),
        (["pos", " neg", "pos"], ("neg", "pos"), [1, 0, 1]),
        (["1.5", "10", "2"], None, "line 2: label '1.5'"),  # text among integers
        ([1, "one", 2, 0], None, "line 3: label 'one'"),
        ([1, None, 0], None, "line 3: no label"),
        (["a", "", "b"], None, "line 3: no label"),
        ([1.0, 0.5], None, "line 2: label 1.0"),
        ([True, False], None, "label True"),
        ([1, 1, 1], None, "at least two different labels"),
    ],
)
def test_labels_become_ids(values: list[Any], names: tuple[str, ...] | None, ids: Any) -> None:
    table = table_of(values)
    if names is None:
        with pytest.raises(BadInputError) as caught:
            make_labels(table, read_labels(table, values))
        assert ids in "\n".join((caught.value.summary, *caught.value.offenders))
        return
    found = read_labels(table, values)
    labels = make_labels(table, found)
    assert labels.names == names
    assert label_ids(table, found, table.places, labels) == ids


def test_labels_that_training_rows_lack_are_told() -> None:
    train, other = table_of(["a", "b"]), table_of(["a", "c", "b", "d"])
    labels = make_labels(train, read_labels(train, ["a", "b"]))
    found = read_labels(other, other.columns["label"])
    with pytest.raises(BadInputError, match="labels of the training rows") as caught:
        label_ids(other, found, other.places, labels)
    assert caught.value.offenders == (
        "line 3: label 'c', which no training row has",
        "line 5: label 'd', which no training row has",
    )


def test_a_trained_heads_classes_are_kept() -> None:
    known = {"sad": 1, "happy": 0, "calm": 2}
    table = table_of(["sad", "calm", "sad"])
    labels = make_labels(table, ["sad", "calm", "sad"], known)
    assert labels.names == ("happy", "sad", "calm")
    assert label_ids(table, ["sad", "calm"], ["", ""], labels) == [1, 2]
    labels = make_labels(table, [2, 0], known)
    assert (labels.names, dict(labels.ids)) == (("happy", "sad", "calm"), {2: 2, 0: 0})
    assert make_labels(table, ["sad", "angry"], known).names == ("angry", "sad")


@pytest.mark.parametrize(
    ("count", "share", "held"), [(100, 0.1, 10), (3, 0.1, 1), (20000, 0.1, 1000), (2, 0.9, 1)]
)
def test_rows_are_held_out(count: int, share: float, held: int) -> None:
    rows = list(range(count))
    train, scored, notes = split(rows, None, SplitSettings(eval_share=share))
    assert scored is not None and len(scored) == held
    assert sorted(train + scored) == rows  # none twice, none lost
    assert train == sorted(train)
    assert notes == (f"no rows to score were given: {held} of {count} training rows are held out",)


def test_a_draw_follows_its_seed_and_not_max_rows() -> None:
    rows = list(range(200))
    first = split(rows, None, SplitSettings(seed=1))
    assert split(rows, None, SplitSettings(seed=1)) == first
    assert split(rows, None, SplitSettings(seed=2))[1] != first[1]
    fewer, scored, notes = split(rows, None, SplitSettings(max_rows=50, seed=1))
    assert scored == first[1]
    assert len(fewer) == 50 and set(fewer) < set(first[0])
    assert notes[-1] == "50 of 180 training rows are used"
    assert split(rows, [7], SplitSettings())[:2] == (rows, [7])
    assert split(rows, None, SplitSettings(eval_share=0))[:2] == (rows, None)


@pytest.mark.parametrize("settings", [{"max_rows": 0}, {"eval_share": 1.0}, {"seed": -1}])
def test_split_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        SplitSettings(**settings)


def test_a_single_row_cannot_be_shared() -> None:
    with pytest.raises(UsageError, match="--eval-share 0"):
        split([1], None, SplitSettings())


@pytest.mark.parametrize(("package", "name"), [("pyarrow", "a.parquet"), ("PIL", "folder")])
def test_a_package_that_is_missing_is_named(
    package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder/cat").mkdir(parents=True)
    write(tmp_path, "folder/cat/a.png", b"x")
    write(tmp_path, "a.parquet", b"x")
    for module in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"fourierft-export\[hf\]") as caught:
        if package == "PIL":
            read_images(tmp_path / name, TextSettings())
        else:
            read_table(tmp_path / name)
    assert package in caught.value.expected


def whole_files() -> dict[str, bytes]:
    """A sound file of each kind, by its name."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 9, 3), dtype=np.uint8)
    packed, table = io.BytesIO(), io.BytesIO()
    np.savez_compressed(packed, images=pixels, labels=np.arange(3))
    pq.write_table(pa.table({"text": TEXTS, "label": LABELS}), table)
    files = {
        "a.tsv": "text\tlabel\nü a\t1\nb\t0\n".encode(),
        "a.csv": 'text,label\n"ü, ""a",1\nb,0\n'.encode(),
        "a.jsonl": b'{"text":"\\u00fc","label":1}\n{"inputs":[1,2.5]}\n',
        "a.npz": packed.getvalue(),
        "a.parquet": table.getvalue(),
    }
    for kind in ("png", "jpeg", "gif", "tiff", "webp"):
        picture = io.BytesIO()
        Image.fromarray(pixels[0]).save(picture, kind)
        files[f"cat/a.{kind}"] = picture.getvalue()
    return files


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """A byte changed, some cut off, put in or taken out."""
    out = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(0, len(out) + 1))
        kind = rng.integers(0, 4)
        if kind == 0:
            del out[at:]
        elif kind == 1:
            out[at:at] = rng.bytes(int(rng.integers(1, 5)))
        elif kind == 2:
            del out[at : at + int(rng.integers(1, 6))]
        elif at < len(out):
            out[at] = rng.integers(0, 256)
    return bytes(out)


@pytest.mark.parametrize("name", whole_files())
def test_damaged_files_raise_only_the_packages_own_errors(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(list(name.encode()))
    content = whole_files()[name]
    path = tmp_path / "data" / name
    path.parent.mkdir(parents=True)

    def read(what: bytes) -> bool:
        path.write_bytes(what)
        try:
            if name.startswith("cat/"):
                load_image(read_images(tmp_path / "data", TextSettings())[1][0], "RGB")
            else:
                read_table(path)
        except FourierFTError:
            return False
        return True

    assert read(content)
    assert sum(not read(damaged(content, rng)) for _ in range(60)) > 5
