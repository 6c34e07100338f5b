"""Data files of every kind become rows; bad ones are all listed with their places."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fourierft_export.errors import BadInputError, FileAccessError, FourierFTError, UsageError
from fourierft_export.train.data import rows as loading
from fourierft_export.train.data.labels import class_ids
from fourierft_export.train.data.rows import Rows, load_rows
from fourierft_export.train.settings import TrainSettings
from fourierft_export.train.task import hold_out

TEXTS = ['say "hi"', "naïve, 3 € – ok", 'a " b', "NA"]
LABELS = ["1", "0", "2", "0"]
GOOD = b"text\tlabel\nfine\t1\n"


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def csv_cell(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


@pytest.mark.parametrize("kind", ["tsv", "tsv-crlf-bom", "csv", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    rows = list(zip(TEXTS, LABELS, strict=True))
    tsv = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows)
    bom = "\ufeff" + tsv.replace("\n", "\r\n")
    lines = "".join(f"{csv_cell(text)},{label}\r\n" for text, label in rows)
    objects = "".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in rows)
    contents = {"tsv": tsv, "tsv-crlf-bom": bom, "csv": "text,label\r\n" + lines, "jsonl": objects}
    path = tmp_path / f"a.{kind.partition('-')[0]}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": TEXTS, "label": LABELS}), path)
    else:
        path.write_bytes(contents[kind].encode())
    found = load_rows(str(path))
    assert found.columns == ["text", "label"]
    assert found.column("text") == TEXTS and found.column("label") == LABELS
    assert found.places[1] == {"parquet": "row 2", "jsonl": "line 2"}.get(kind, "line 3")
    assert not [name for name in os.listdir(tmp_path) if name != path.name]


def test_places_with_blank_lines_and_cells_of_several_lines(tmp_path: Path) -> None:
    found = load_rows(write(tmp_path, "a.csv", 'text,label\n"one\ntwo",1\n\nthree,0\n'))
    assert found.column("text") == ["one\ntwo", "three"]
    assert found.places == ["line 3", "line 5"]


BAD: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.tsv", b"", "expected rows, found none"),
    "only a header": ("a.tsv", b"text\tlabel\n", "expected rows, found none"),
    "empty jsonl": ("a.jsonl", b"\n", "expected rows, found none"),
    "a column too many": (
        "a.tsv",
        GOOD + b"a\tb\t1\n\nx\ty\tz\n",
        "2 bad rows, first line 3: 3 columns, the header has 2",
    ),
    "not UTF-8": ("a.tsv", GOOD + b"caf\xe9\t1\n", "line 3: bytes that are not UTF-8 at offset 3"),
    "a column twice": ("a.tsv", b"text\ttext\na\tb\n", "columns with names, found line 1"),
    "an open quote": ("a.csv", b'text,label\n"a,1\n', "not CSV"),
    "not JSON": ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: Expecting value"),
    "a key twice": ("a.jsonl", b'{"a": 1, "a": 2}\n', "line 1: the key 'a' twice"),
    "half a surrogate pair": ("a.jsonl", b'{"text": "\\ud800"}\n', "not text"),
    "not parquet": ("a.parquet", b"PAR1 no", "expected a parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_says_what_and_where(name: str, tmp_path: Path) -> None:
    file, content, message = BAD[name]
    with pytest.raises(BadInputError, match=message) as caught:
        load_rows(write(tmp_path, file, content))
    assert str(tmp_path / file) in caught.value.summary


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo.tsv")
    for path in (tmp_path / "fifo.tsv", Path("/dev/zero")):
        with pytest.raises(BadInputError, match="a FIFO, device or socket"):
            load_rows(str(path))
    with pytest.raises(FileAccessError, match="nothing there"):
        load_rows(str(tmp_path / "none.tsv"))
    with pytest.raises(UsageError, match=r"ends in .tsv, .*, found '.x'"):
        load_rows(write(tmp_path, "a.x", GOOD))
    with pytest.raises(FileAccessError, match=r"org/name: expected a data set, .*; no such file"):
        load_rows("org/name")
    pq.write_table(pa.table({"text": ["a"] * 50}), tmp_path / "a.parquet")
    monkeypatch.setattr(loading, "MAX_ROWS", 49)
    with pytest.raises(BadInputError, match="a claim of 50 rows"):
        load_rows(str(tmp_path / "a.parquet"))


@pytest.fixture
def collected() -> Iterator[None]:
    """pandas leaves a damaged file open until it is collected."""
    yield
    gc.collect()


@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files_raise_only_the_packages_own_errors(
    kind: str, data: st.DataObject, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": TEXTS, "label": LABELS}), path)
    elif kind == "csv":
        path.write_bytes(b'text,label\n"one\ntwo",1\nthree,0\n')
    else:
        path.write_bytes(b'{"text": "a", "label": [1, 2.5]}\n{"text": null}\n')
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        found = load_rows(str(path))
        [found.column(name) for name in found.columns]
        assert len(found.places) > 0
    except FourierFTError:
        pass


@pytest.mark.parametrize(
    ("values", "names", "ids"),
    [
        (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
        (["1", "0", "1"], ("0", "1"), [1, 0, 1]),
        ([2, 0, 2], ("0", "1", "2"), [2, 0, 2]),  # a class without a row
        ([5, -1, 5], ("-1", "5"), [1, 0, 1]),
        ([100, 7], ("7", "100"), [1, 0]),
        ([" x ", "y"], ("x", "y"), [0, 1]),
        ([1.0, 2], None, "line 0: label 1.0"),
        ([None, 1], None, "line 0: no label"),
        ([True, 1], None, "label True"),
        (["a", 1, 2], None, "line 0: label 'a'"),
        (["a", "a"], None, "only 'a'"),
    ],
)
def test_labels_become_ids(values: list[Any], names: tuple[str, ...] | None, ids: Any) -> None:
    rows = Rows("f", {}, [f"line {i}" for i in range(len(values))])
    labels = [[value] for value in values]
    if names is None:
        with pytest.raises(BadInputError, match=ids):
            class_ids([rows], [labels], (), 2)
        return
    assert class_ids([rows], [labels], (), 2) == ([[[i] for i in ids]], names)
    if isinstance(values[0], str) and not values[0].isdecimal():
        assert class_ids([rows], [labels], ("z", *names), 2)[1] == ("z", *names)


def test_rows_are_held_out_by_the_seed() -> None:
    settings = TrainSettings(eval_share=0.25, seed=3)
    learnt, scored, notes = hold_out(40, settings, False)
    assert sorted(learnt + scored) == list(range(40)) and len(scored) == 10
    assert notes == ("no rows to score were given: 10 of 40 training rows are held out",)
    few, same, notes = hold_out(40, replace(settings, max_train_rows=7), False)
    assert same == scored and len(few) == 7 and set(few) < set(learnt)
    assert notes[1] == "7 of 30 training rows are used"
    assert hold_out(40, replace(settings, seed=4), False)[1] != scored
    assert hold_out(40, settings, True)[:2] == (list(range(40)), [])
    assert hold_out(40, TrainSettings(eval_share=0.0), False)[1] == []
    assert len(hold_out(30_000, TrainSettings(eval_share=0.5), False)[1]) == 1000


def test_classes_of_folders_are_compared_by_name(tmp_path: Path) -> None:
    """Each data set numbers its classes by itself."""
    from PIL import Image

    for name, classes in (("train", "abc"), ("eval", "bc")):
        for one in classes:
            (tmp_path / name / one).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / name / one / "0.png")
    train = load_rows(str(tmp_path / "train"), images=True)
    scored = load_rows(str(tmp_path / "eval"), split="eval", images=True)
    assert (sorted(train.column("label")), sorted(scored.column("label"))) == (
        ["a", "b", "c"],
        ["b", "c"],
    )
