"""Outputs are absent or complete."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from fourierft_export.errors import FileAccessError, UsageError
from fourierft_export.files.staging import (
    check_output,
    open_work_folder,
    staged_directory,
    staged_file,
)


def listing(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("stage", [staged_file, staged_directory])
def test_an_output_appears_only_when_it_is_complete(
    tmp_path: Path, stage: Callable[..., object]
) -> None:
    out = tmp_path / "x"
    with stage(out) as partial:  # type: ignore[attr-defined]
        file = partial / "sub" / "f" if partial.is_dir() else partial
        file.parent.mkdir(exist_ok=True)
        file.write_text("done")
        assert not out.exists()
        assert partial.parent.name.startswith("x.partial-")
    assert (out / "sub" / "f" if out.is_dir() else out).read_text() == "done"
    assert listing(tmp_path) == ["x"]


@pytest.mark.parametrize("stage", [staged_file, staged_directory])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, stage: Callable[..., object], error: type[BaseException], there: bool
) -> None:
    out = tmp_path / "x"
    if there:
        out.write_text("old")
    expected = FileAccessError if error is OSError else error
    with pytest.raises(expected), stage(out, force=there) as partial:  # type: ignore[attr-defined]
        if partial.is_dir():
            (partial / "f").write_text("half")
        else:
            partial.write_text("half")
        raise error
    assert listing(tmp_path) == (["x"] if there else [])
    assert not there or out.read_text() == "old"


def test_force_replaces_folders_files_and_links(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "keep").write_text("mine")
    out = tmp_path / "x"
    for make in (lambda: out.symlink_to(target), out.mkdir, lambda: out.write_text("file")):
        make()
        with staged_directory(out, force=True) as partial:
            (partial / "f").write_text("new")
        assert listing(out) == ["f"]
        assert not out.is_symlink()
        (out / "f").unlink()
        out.rmdir()
    assert (target / "keep").read_text() == "mine"
    assert listing(tmp_path) == ["target"]


KILLED_AT = {
    "folder": "(partial / 'half').write_text('x')",
    "file": "partial.write_text('x')",
    "moved": "out.mkdir(); os.replace(out, partial.with_name('.old'))",
}


def killed(tmp_path: Path, stage: str, then: str) -> list[str]:
    """What a process leaves next to `x` that is killed while it makes it."""
    script = textwrap.dedent(f"""
        import os, signal, sys
        from pathlib import Path
        from fourierft_export.files.staging import {stage}
        out = Path(sys.argv[1])
        with {stage}(out) as partial:
            {then}
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x")], check=False)
    assert run.returncode == -signal.SIGKILL
    return listing(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_leftovers_of_a_killed_run_are_cleaned_by_the_next(tmp_path: Path, kind: str) -> None:
    stage = "staged_directory" if kind == "folder" else "staged_file"
    (left,) = killed(tmp_path, stage, KILLED_AT[kind])
    assert left.startswith("x.partial-")
    (tmp_path / "x.partial-1").mkdir()  # killed between making the folder and locking it
    (tmp_path / "x.partial-mine").write_text("not ours")
    with staged_directory(tmp_path / "x") as partial:
        assert listing(partial) == []
        (partial / "whole").write_text("y")
    assert listing(tmp_path) == ["x", "x.partial-mine"]
    assert listing(tmp_path / "x") == ["whole"]


def test_what_a_killed_run_had_moved_aside_comes_back(tmp_path: Path) -> None:
    killed(tmp_path, "staged_directory", KILLED_AT["moved"])
    with pytest.raises(ValueError), staged_file(tmp_path / "x", force=True):
        assert listing(tmp_path / "x") == []
        raise ValueError
    assert listing(tmp_path) == ["x"]


def test_a_plan_is_taken_over_and_kept_apart(tmp_path: Path) -> None:
    out = tmp_path / "x"
    with open_work_folder(out, plan="p") as folder:
        with (
            pytest.raises(FileAccessError, match="another process at work"),
            open_work_folder(out, plan="p"),
        ):
            raise AssertionError("two may not work in one folder")
        with open_work_folder(out, plan="q") as other:
            assert listing(tmp_path) == ["x.partial-p", "x.partial-q"]
            assert other != folder
        assert listing(tmp_path) == ["x.partial-p"]
    assert listing(tmp_path) == []


@pytest.mark.parametrize("stage", [staged_file, staged_directory])
def test_an_output_that_appears_meanwhile_is_not_touched(
    tmp_path: Path, stage: Callable[..., object]
) -> None:
    out = tmp_path / "x"

    def fill(path: Path, text: str) -> None:
        if path.is_dir():
            path = path / "f"
        path.write_text(text)

    with pytest.raises(UsageError, match="appeared meanwhile"), stage(out) as mine:  # type: ignore[attr-defined]
        fill(mine, "mine")
        if mine.is_dir():
            out.mkdir()
        fill(out, "theirs")
    assert (out / "f" if out.is_dir() else out).read_text() == "theirs"
    with stage(out, force=True) as mine:  # type: ignore[attr-defined]
        fill(mine, "mine")
    assert (out / "f" if out.is_dir() else out).read_text() == "mine"
    assert listing(tmp_path) == ["x"]


def test_an_error_while_reading_names_what_was_read(tmp_path: Path) -> None:
    with pytest.raises(FileAccessError) as caught, staged_file(tmp_path / "x"):
        (tmp_path / "input").read_text()
    assert caught.value.where == str(tmp_path / "input")
    with pytest.raises(FileAccessError) as caught, staged_file(tmp_path / "x") as partial:
        (partial / "y").write_text("the parent is missing")
    assert caught.value.where == str(tmp_path / "x")


def test_an_output_that_exists_is_refused_even_a_broken_link(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="--force"):
        check_output(tmp_path / "x", force=False)
    assert check_output(tmp_path / "x", force=True) == tmp_path / "x"


def test_an_output_that_holds_what_an_input_links_to_is_refused(tmp_path: Path) -> None:
    """A snapshot of the Hugging Face cache is a folder of links to its `blobs`."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    (snapshot / "pool").mkdir(parents=True)
    (blobs / "1").touch()
    (snapshot / "pool" / "config.json").symlink_to("../../../blobs/1")
    for out in (blobs, blobs / "1", tmp_path):
        with pytest.raises(UsageError, match="apart from the inputs"):
            check_output(out, force=True, inputs=(snapshot,))
    assert check_output(blobs / "2", force=True, inputs=(snapshot,)) == blobs / "2"
    # In the folder of an input file there is room.
    assert check_output(blobs / "2", force=True, inputs=(blobs / "1",)) == blobs / "2"


def test_a_device_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    os.mkfifo(out)
    for force in (False, True):
        with pytest.raises(UsageError):
            check_output(out, force=force)
    with (
        pytest.raises(UsageError, match="found a FIFO, device or socket"),
        staged_file(out, force=True),
    ):
        raise AssertionError("the block must not be reached")
    with pytest.raises(UsageError, match="FIFO"), staged_directory(out, force=True):
        raise AssertionError("the block must not be reached")
    assert out.is_fifo()
    link = tmp_path / "link"
    link.symlink_to(out)
    with staged_file(link, force=True) as partial:  # the link is replaced, not what it names
        partial.write_text("new")
    assert out.is_fifo()
    assert link.read_text() == "new"
