"""Opening and reading checkpoints: real ones, damaged ones, hostile ones."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from fourierft_export.errors import BadInputError, FileAccessError
from fourierft_export.files.checkpoint import Checkpoint

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.weight": np.arange(6, dtype=np.float16).reshape(2, 3),
    "c.ids": np.arange(5, dtype=np.int64),
    "d": np.array([[1.5, -2.25], [3e38, 1e-30]], ml_dtypes.bfloat16),
}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    save_file({k: TENSORS[k] for k in ("a.weight", "c.ids", "d")}, directory / A, {"format": "pt"})
    save_file({"b.weight": TENSORS["b.weight"]}, directory / B, {"format": "pt"})
    write_index(directory, {"a.weight": A, "b.weight": B, "c.ids": A, "d": A})
    return directory


def write_index(directory: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 100}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))


def test_sharded_tensors_equal_the_safetensors_library(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    assert [path.name for path in checkpoint.shards] == [A, B]
    assert set(checkpoint.tensors) == set(TENSORS)
    for name, value in TENSORS.items():
        found = checkpoint.read(name)
        assert found.dtype == value.dtype
        np.testing.assert_array_equal(found, value)
        assert not found.flags.writeable
    assert checkpoint.tensors["b.weight"].path == sharded / B
    assert checkpoint.index_metadata == {"total_size": 100}
    assert checkpoint.headers[0].metadata == {"format": "pt"}


def test_blocks_join_to_the_payload(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    pieces = list(checkpoint.read_blocks("a.weight", 7))
    assert [len(piece) for piece in pieces] == [7] * 6 + [6]
    assert b"".join(pieces) == TENSORS["a.weight"].tobytes()
    assert b"".join(checkpoint.read_file_blocks(sharded / B, 16)) == (sharded / B).read_bytes()


@pytest.mark.parametrize(
    "shard",
    ["../../x.safetensors", "/etc/x.safetensors", "a/../b.safetensors", "a\\b.safetensors",
     "C:x.safetensors", "x\0.safetensors", "..", "", "a/b.safetensors", "x.bin",
     "\x1b[31mx.safetensors", 7, None, ["model.safetensors"]],
)  # fmt: skip
def test_an_index_may_only_name_plain_files(sharded: Path, shard: object) -> None:
    write_index(sharded, {"a.weight": A, "b.weight": shard})
    with pytest.raises(BadInputError) as caught:
        Checkpoint.open(sharded)
    assert "model.safetensors.index.json" in caught.value.where
    assert "plain file names" in caught.value.expected
    assert "\x1b" not in str(caught.value)


def link(path: Path, target: Path) -> None:
    """Move a file elsewhere, and put a link to it in its place."""
    path.rename(target)
    path.symlink_to(target)


SWAPPED = {name: TENSORS[name] for name in ("b.weight", "a.weight")}
SPOILED: list[tuple[Callable[[Path], object], str]] = [
    (lambda d: (d / B).unlink(), B),
    (lambda d: write_index(d, dict.fromkeys(TENSORS, A)), f"b.weight in {A}"),
    (lambda d: save_file(SWAPPED, d / B), "a.weight in"),
    (lambda d: os.truncate(d / B, (d / B).stat().st_size - 1), "truncated"),
    (lambda d: (d / B).write_bytes(pickle.dumps({"b.weight": [1.0]})), "pickle"),
    (lambda d: write_index(d, {}), "weight_map"),
    (lambda d: write_index(d, [A, B]), "weight_map"),
    (lambda d: (d / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}'), "twice"),
    (lambda d: ((d / INDEX).unlink(), (d / INDEX).mkdir()), "a directory"),
    (lambda d: link(d / B, d.parent / "outside.safetensors"), "a link to"),
    (lambda d: link(d / B, d / "other.safetensors"), "--allow-links"),
]


@pytest.mark.parametrize(("spoil", "says"), SPOILED)
def test_bad_checkpoints_are_refused(
    sharded: Path, spoil: Callable[[Path], object], says: str
) -> None:
    spoil(sharded)
    with pytest.raises(BadInputError) as caught:
        Checkpoint.open(sharded)
    text = "\n".join([str(caught.value), *caught.value.offenders])
    assert says in text
    assert str(sharded) in text
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_itself_a_link_is_the_users_own(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(sharded)
    found = Checkpoint.open(tmp_path / "alias").read("b.weight")
    np.testing.assert_array_equal(found, TENSORS["b.weight"])


@pytest.mark.parametrize("name", ["absent", "absent.safetensors", "file/below", "x\0y"])
def test_missing_paths(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileAccessError) as caught:
        Checkpoint.open(tmp_path / name)
    assert caught.value.exit_code == 6


def test_a_pickled_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(BadInputError, match="pickled checkpoint"):
            Checkpoint.open(path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInputError, match="no weights"):
        Checkpoint.open(tmp_path)


def test_other_file_names_are_found_when_there_is_one(sharded: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    save_file(TENSORS, other / "diffusion_pytorch_model.safetensors")
    assert set(Checkpoint.open(other).tensors) == set(TENSORS)
    save_file(TENSORS, other / "second.safetensors")
    with pytest.raises(BadInputError, match="name the weight file itself"):
        Checkpoint.open(other)


def test_a_file_replaced_while_reading_is_an_error(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    changed = {"b.weight": TENSORS["b.weight"] + np.float16(1)}
    save_file(changed, sharded / "new", {"format": "pt"})
    os.replace(sharded / "new", sharded / B)
    with pytest.raises(BadInputError, match="changed since it was opened"):
        checkpoint.read("b.weight")


def test_dtypes_that_numpy_lacks_are_copied_but_not_read(tmp_path: Path) -> None:
    text = b'{"w":{"dtype":"F4","shape":[2,3],"data_offsets":[0,3]}}'
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"abc")
    checkpoint = Checkpoint.open(tmp_path)
    assert b"".join(checkpoint.read_blocks("w")) == b"abc"
    with pytest.raises(BadInputError, match="F4"):
        checkpoint.read("w")
    with pytest.raises(BadInputError, match="'v'"):
        checkpoint.read("v")
