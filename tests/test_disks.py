"""Full and read-only disks, folders that vanish and two writers at once, for every verb.

Verbs that need torch are marked slow: `pytest -m slow tests/test_disks.py`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from tests.kill import TORCH, VERBS, Forks, files_in, make_inputs

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"),
    pytest.mark.parametrize(
        "verb",
        [
            pytest.param(verb, marks=[pytest.mark.slow] * verb.startswith(("export", "train")))
            for verb in VERBS
        ],
    ),
]
Mount = Callable[[str], Path]
Run = Callable[..., int]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disks")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def make_forks() -> Iterator[Callable[[bool, int], Forks]]:
    """Warm processes, with torch or without, by number."""
    made = []

    @cache
    def make(torch: bool, number: int) -> Forks:
        made.append(Forks(*(TORCH if torch else [])))
        return made[-1]

    yield make
    for forks in made:
        forks.close()


@pytest.fixture
def run(verb: str, inputs: Path, make_forks: Callable[[bool, int], Forks], tmp_path: Path) -> Run:
    """Runs the verb with an output in a folder; stderr goes to a file of that number."""
    words = VERBS[verb].replace("@", f"{inputs}/").split()
    name = "out.onnx" if words[0] in ("apply", "export") else "out"

    def run(folder: Path, number: int = 0, **options: object) -> int:
        forks = make_forks(words[0] in ("export", "train"), number)
        stderr = tmp_path / f"stderr{number}"
        stderr.write_text("")
        options.setdefault("stderr", stderr)
        return forks.run([*words, "-o", folder / name], **options)  # type: ignore[arg-type]

    return run


@pytest.fixture
def whole(run: Run, tmp_path: Path) -> dict[str, bytes]:
    """The files of an undisturbed run."""
    (tmp_path / "whole").mkdir()
    assert run(tmp_path / "whole") == 0
    return files_in(tmp_path / "whole")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts an empty file system; skips where none may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no file system may be mounted")
        return disk

    yield mount
    subprocess.run(["umount", str(disk)], check=False, capture_output=True)


def find_errors(tmp_path: Path, number: int = 0) -> list[str]:
    text = (tmp_path / f"stderr{number}").read_text()
    assert "Traceback" not in text
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_full_disk(
    verb: str, run: Run, whole: dict[str, bytes], mount: Mount, tmp_path: Path, share: float
) -> None:
    """Room for that share of what is written."""
    page = 4096
    pages = max(2, int(share * sum(map(len, whole.values())) // page))
    disk = mount(f"size={pages * page}")
    if pages * page >= sum(map(len, whole.values())):
        (disk / "other").write_bytes(bytes((pages - int(share > 0)) * page))
    before = files_in(disk)
    assert run(disk) == 6, (tmp_path / "stderr0").read_text()
    assert len(find_errors(tmp_path)) == 1
    if verb != "train":  # it keeps its best bundle so far, and checkpoints for --resume
        assert files_in(disk) == before


def test_a_read_only_disk(run: Run, mount: Mount, tmp_path: Path) -> None:
    disk = mount("ro,size=64k")
    assert run(disk) == 6
    assert len(find_errors(tmp_path)) == 1


def test_a_folder_that_vanishes(
    verb: str, run: Run, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Right before each operation on files in it: the error says so, or the output is whole."""
    folder = tmp_path / "folder"
    codes = []
    for operation in range(1, 60, 4 if verb.startswith(("export", "train")) else 1):
        folder.mkdir(exist_ok=True)
        codes.append(run(folder, before=(operation, str(folder)), vanish=True))
        found = files_in(folder) if folder.exists() else {}
        if codes[-1] == 0 and found == whole:
            break
        assert codes[-1] in (0, 6), (operation, (tmp_path / "stderr0").read_text())
        assert len(find_errors(tmp_path)) == (codes[-1] == 6)
        assert verb == "train" or found in ({}, whole), operation
    assert 6 in codes


def test_two_writers(verb: str, run: Run, whole: dict[str, bytes], tmp_path: Path) -> None:
    """One writes the output; the other finds it there, or writes the same."""
    for number in range(3):
        folder = tmp_path / f"both{number}"
        folder.mkdir()
        with ThreadPoolExecutor() as threads:
            codes = sorted(threads.map(run, [folder] * 2, range(2)))
        assert codes[0] == 0
        assert codes[1] in (0, 2, 6)
        assert files_in(folder).keys() == whole.keys()
        if verb == "train":  # its metrics hold times
            assert files_in(folder)["out"] == whole["out"]
        else:
            assert files_in(folder) == whole
        assert sum(len(find_errors(tmp_path, n)) for n in range(2)) == (codes[1] != 0)
