"""Outputs are absent or complete."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from fourierft_export.checkpoint.staging import check_output, staged_directory, staged_file
from fourierft_export.errors import FileAccessError, UsageError


def listing(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "x"
    with staged_file(out) as partial:
        partial.write_text("done")
        assert not out.exists()
        assert partial.parent == tmp_path
    assert out.read_text() == "done"
    assert listing(tmp_path) == ["x"]


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "x", plan="abc") as partial:
        assert partial.name == "x.partial-abc"
        (partial / "sub").mkdir()
        (partial / "sub" / "f").write_text("done")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x" / "sub" / "f").read_text() == "done"
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


def test_leftovers_of_a_killed_run_are_cleaned_by_the_same_plan(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import os, signal, sys
        from fourierft_export.checkpoint.staging import staged_directory
        with staged_directory(sys.argv[1], plan="p") as partial:
            (partial / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x")], check=False)
    assert run.returncode == -signal.SIGKILL
    assert listing(tmp_path) == ["x.partial-p"]
    with staged_directory(tmp_path / "x", plan="p") as partial:
        assert listing(partial) == []
        (partial / "whole").write_text("y")
    assert listing(tmp_path) == ["x"]
    assert listing(tmp_path / "x") == ["whole"]


def test_files_get_the_mode_of_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        with staged_file(tmp_path / "x") as partial:
            partial.write_text("x")
            partial.chmod(0o600)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644


def test_an_output_that_exists_is_refused_even_a_broken_link(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="--force"):
        check_output(tmp_path / "x", force=False)
    assert check_output(tmp_path / "x", force=True) == tmp_path / "x"


def test_an_output_that_is_or_holds_an_input_is_refused_even_with_force(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "f").write_text("x")
    (tmp_path / "alias").symlink_to(tmp_path / "in")
    for out in ("in", "alias", "in/../in", "in/../alias"):
        for source in ("in", "in/f", "alias/f"):
            with pytest.raises(UsageError, match="the input"):
                check_output(tmp_path / out, force=True, inputs=(tmp_path / source,))


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileAccessError) as caught:
        check_output(tmp_path / "absent" / "x", force=False)
    assert caught.value.where == str(tmp_path / "absent")


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
