"""A merged folder against its manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fourierft_export as ff
from fourierft_export.errors import BadInputError, FileAccessError, ValidationError


@pytest.fixture
def merged(
    tmp_path: Path, make_base: Callable[..., Path], make_bundle: Callable[..., ff.Bundle]
) -> Path:
    base = make_base(tmp_path / "base", shards=2, size=16)
    (base / "sub").mkdir()
    (base / "sub" / "pool.json").write_text("{}")
    ff.merge_checkpoint(base, make_bundle(base, ["layers.0.q", "layers.1.q"]), tmp_path / "out")
    return tmp_path / "out"


def test_a_fresh_merge_is_as_it_was_written(merged: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    report = ff.verify_merged(merged, progress=lambda *call: calls.append(call))
    assert report.ok
    assert (report.problems, report.unlisted) == ((), ())
    others = [p for p in merged.rglob("*") if p.is_file() and p.name != "manifest.json"]
    assert report.files == len(others) == 6
    assert report.nbytes == sum(p.stat().st_size for p in others) == calls[-1][1] == calls[-1][2]
    report.raise_for_failure()


def change_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_every_kind_of_damage_is_listed(merged: Path) -> None:
    first, second = sorted(merged.glob("*.safetensors"))
    change_byte(first, -5)
    with open(second, "ab") as file:
        file.write(b"x")
    (merged / "sub" / "pool.json").unlink()
    change_byte(merged / "config.json", -3)
    (merged / "model.safetensors").write_bytes(b"weights that a loader would prefer")
    (merged / "notes.txt").touch()
    report = ff.verify_merged(merged)
    size = second.stat().st_size
    assert report.problems == (
        "config.json: other bytes than were written",
        f"{first.name}: other bytes than were written",
        f"{second.name}: {size:,} bytes instead of {size - 1:,}",
        "sub/pool.json: missing",
        "model.safetensors: weights that the manifest does not list",
    )
    assert report.unlisted == ("model.safetensors", "notes.txt")
    with pytest.raises(ValidationError) as caught:
        report.raise_for_failure()
    assert caught.value.exit_code == 5
    assert caught.value.offenders == report.problems


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kind": "other"}, "something else"),
        ({"schema": 99}, "schema 99"),
        ({"files": []}, "one without files"),
        ({"files": {"../secret": {"sha256": "0" * 64, "bytes": 1}}}, "'../secret'"),
        ({"files": {"/etc/passwd": {"sha256": "0" * 64, "bytes": 1}}}, "'/etc/passwd'"),
        ({"files": {"C:/x": {"sha256": "0" * 64, "bytes": 1}}}, "'C:/x'"),
        ({"files": {"a\\..\\b": {"sha256": "0" * 64, "bytes": 1}}}, "bad entry"),
        ({"files": {"x": {"sha256": "0" * 63, "bytes": 1}}}, "'x'"),
        ({"files": {"x": {"sha256": "0" * 64, "bytes": True}}}, "'x'"),
        ({"files": {"x": {"sha256": "0" * 64, "bytes": -1}}}, "'x'"),
        ({"files": {"x": 1}}, "'x'"),
    ],
)
def test_a_manifest_that_is_not_one_is_refused(
    merged: Path, fields: dict[str, Any], says: str
) -> None:
    path = merged / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(BadInputError) as caught:
        ff.verify_merged(merged)
    assert caught.value.where == str(path)
    assert says in caught.value.found


def test_what_is_no_merged_folder_is_refused(merged: Path, tmp_path: Path) -> None:
    for name in ("absent", "base"):
        with pytest.raises(FileAccessError, match="only a folder that merge wrote"):
            ff.verify_merged(tmp_path / name)
    with pytest.raises(BadInputError, match="a folder, found a file"):
        ff.verify_merged(merged / "config.json")
    for name in ("config.json", "tokenizer.json"):
        (merged / name).unlink()
    os.mkfifo(merged / "config.json")
    (merged / "tokenizer.json").mkdir()
    assert ff.verify_merged(merged).problems == (
        "config.json: not a regular file", "tokenizer.json: not a regular file",
    )  # fmt: skip
