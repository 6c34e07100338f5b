"""Kills at chosen moments, full disks, interrupts, other writers: one whole result or none."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fourierft_export as ff
from fourierft_export.errors import BadInputError, BaseMismatchError, FileAccessError, UsageError
from fourierft_export.files.safetensors_reader import read_header
from fourierft_export.merge import executors, plan, run
from tests.kill import Forks, files_in

LAYERS = [f"layers.{number}.q" for number in range(4)]
SHARDS = [f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)]
KILLED = -signal.SIGKILL


@pytest.fixture
def base(tmp_path: Path, make_base: Any) -> Path:
    return Path(make_base(tmp_path / "base", size=64))


@pytest.fixture
def bundle(base: Path, make_bundle: Any, tmp_path: Path) -> Path:
    return Path(make_bundle(base, LAYERS).save(tmp_path / "b"))


@pytest.fixture
def whole(base: Path, bundle: Path, tmp_path: Path) -> dict[str, bytes]:
    """What an undisturbed merge writes."""
    ff.merge_checkpoint(base, bundle, tmp_path / "whole")
    files = files_in(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole")
    return files


@pytest.fixture
def left(forks: Forks, base: Path, bundle: Path, tmp_path: Path) -> Path:
    """What a merge into `out` leaves that is killed after two shards; the base's times are old."""
    for path in base.iterdir():
        os.utime(path, (1, 1))
    words = ["merge", "--base", base, "--bundle", bundle, "-o", tmp_path / "out"]
    assert forks.run(words, at_shard=(signal.SIGKILL, 2)) == KILLED
    (left,) = tmp_path.glob("*.partial-*")
    return left


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_killed_merge_resumes(
    base: Path, bundle: Path, tmp_path: Path, whole: dict[str, bytes], left: Path
) -> None:
    stamps = {p.name: p.stat().st_mtime_ns for p in (left / "out").iterdir()}
    assert [*stamps] and set(stamps) == set(SHARDS[:2])
    (left / ".writing-x").write_text("half a shard")
    calls: list[tuple[str, int, int]] = []
    report = ff.merge_checkpoint(
        base, bundle, tmp_path / "out", progress=lambda *call: calls.append(call)
    )
    assert report.resumed == tuple(SHARDS[:2])
    assert {n: (tmp_path / "out" / n).stat().st_mtime_ns for n in stamps} == stamps
    assert files_in(tmp_path / "out") == whole
    assert names(tmp_path) == ["b", "base", "out"]
    assert calls[-1][1] == calls[-1][2] == report.nbytes


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def replace_in(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


FIRST = "finished-0.json"


@pytest.mark.parametrize(
    ("damage", "resumed"),
    [
        (lambda left: flip_last_bit(left / "out" / SHARDS[0]), 1),
        (lambda left: (left / "out" / SHARDS[0]).unlink(), 1),
        (lambda left: os.truncate(left / FIRST, 100), 1),
        (lambda left: (left / FIRST).write_bytes(b"\xff[" * 1000), 1),
        (lambda left: replace_in(left / FIRST, SHARDS[0], "../../precious"), 1),
        (lambda left: replace_in(left / FIRST, "layers.0.q", "layers.9.q"), 1),
        (lambda left: [path.write_text("[1]") for path in left.glob("*.json")], 0),
    ],
    ids=["shard", "shard gone", "record cut", "no JSON", "name", "tensor", "all records"],
)
def test_what_a_killed_merge_left_is_checked(
    base: Path, bundle: Path, tmp_path: Path, whole: dict[str, bytes], left: Path,
    damage: Callable[[Path], None], resumed: int,
) -> None:  # fmt: skip
    damage(left)
    assert len(ff.merge_checkpoint(base, bundle, tmp_path / "out").resumed) == resumed
    assert files_in(tmp_path / "out") == whole


@pytest.mark.parametrize("how", ["options", "its time", "written over", "another file"])
@pytest.mark.usefixtures("left")
def test_another_merge_does_not_resume(base: Path, bundle: Path, tmp_path: Path, how: str) -> None:
    """Another weight, time of modification, or content of the same sizes and times."""
    weights = [0.5] if how == "options" else None
    for number, shard in enumerate(base / name for name in SHARDS):
        if how == "another file":
            (tmp_path / "new").write_bytes(shard.read_bytes())
            os.replace(tmp_path / "new", shard)
        if how in ("written over", "another file"):
            # The fingerprints do not help: the adapter leaves this tensor as it is.
            with open(shard, "r+b") as file:
                file.seek(read_header(shard).tensors[f"layers.{number}.k.weight"].start)
                file.write(bytes(4))
        if how != "options":
            os.utime(shard, (2, 2) if how == "its time" else (1, 1))
    assert ff.merge_checkpoint(base, bundle, tmp_path / "out", weights=weights).resumed == ()
    assert names(tmp_path) == ["b", "base", "out"]


def test_a_single_file_survives_a_kill(
    base: Path, make_bundle: Any, tmp_path: Path, forks: Forks
) -> None:
    source, out = base / SHARDS[0], tmp_path / "out.safetensors"
    bundle = make_bundle(source, LAYERS[:1]).save(tmp_path / "b")
    words = ["merge", "--base", source, "--bundle", bundle, "-o", out]
    assert forks.run(words, at_shard=(signal.SIGKILL, 1)) == KILLED
    assert not out.exists()
    assert ff.merge_checkpoint(source, bundle, out).resumed == (source.name,)
    ff.merge_checkpoint(source, bundle, tmp_path / "whole.safetensors")
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert names(tmp_path) == ["b", "base", "out.safetensors", "whole.safetensors"]


@pytest.fixture(params=["tmpfs", "writes that fail"])
def small_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Path]:
    """A file system with room for 70 KB, or (also where none may be mounted) failing writes.

    Checks of the space in advance are off, as if somebody else had filled the disk meanwhile.
    """
    monkeypatch.setattr(run, "check_space", lambda directory, needed: None)
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=70k", "tmpfs", str(disk)]
    mounted = False
    if request.param == "tmpfs" and sys.platform == "linux":
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        left, write = 70_000, os.write

        def limited(fd: int, data: Any) -> int:
            nonlocal left
            if len(data) > left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left -= len(data)
            return write(fd, data)

        monkeypatch.setattr(os, "write", limited)
    yield disk
    if mounted:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_is_named_and_left_as_it_was(
    base: Path, bundle: Path, small_disk: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileAccessError, match="no space left") as caught:
        ff.merge_checkpoint(base, bundle, small_disk / "out")
    assert caught.value.exit_code == 6
    assert caught.value.where == str(small_disk / "out")
    needed = ff.merge_checkpoint(base, bundle, tmp_path / "x", dry_run=True).disk_bytes
    assert caught.value.expected == f"to write all of its {needed:,} bytes"
    assert names(small_disk) == []


@pytest.mark.parametrize(
    ("limit", "kilobytes"), [(None, 8000), ("max", 8000), ("1024000", 1000), ("99999999", 8000)]
)
def test_available_memory_is_the_least_of_machine_and_container(
    tmp_path: Path, limit: str | None, kilobytes: int
) -> None:
    files = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n"}
    files |= {} if limit is None else {"sys/fs/cgroup/memory.max": f"{limit}\n"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert plan.read_available_memory(tmp_path) == kilobytes << 10


def test_too_little_space_or_memory_is_found_before_any_work(
    base: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        usage = namedtuple("usage", "total used free")
        patch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1000))
        for dry_run in (False, True):
            with pytest.raises(FileAccessError, match="bytes of free space, found 1,000 bytes"):
                ff.merge_checkpoint(base, bundle, tmp_path / "out", dry_run=dry_run)
    monkeypatch.setattr(plan, "read_available_memory", lambda: 400 << 20)
    assert ff.merge_checkpoint(base, bundle, tmp_path / "a").memory_bytes < 400 << 20
    with pytest.raises(FileAccessError, match="419,430,400 bytes available; use fewer workers"):
        ff.merge_checkpoint(base, bundle, tmp_path / "out", workers=2)
    with pytest.raises(FileAccessError, match=r"for 4 process"):  # there are four weight files
        ff.merge_checkpoint(base, bundle, tmp_path / "out", workers=50)
    # The memory of this machine does not matter to a cluster.
    monkeypatch.setattr(plan, "read_available_memory", lambda: 0)
    monkeypatch.setattr(executors, "CONNECT_SECONDS", 0.5)
    with pytest.raises(FileAccessError, match="a Dask scheduler"):
        ff.merge_checkpoint(base, bundle, tmp_path / "out", scheduler="tcp://127.0.0.1:1")
    assert names(tmp_path) == ["a", "b", "base"]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupt_ends_with_130_and_cleans_up(
    base: Path, bundle: Path, tmp_path: Path, forks: Forks, workers: int
) -> None:
    words = ["merge", "--base", base, "--bundle", bundle, "-o", tmp_path / "out"]
    words += ["--workers", workers]
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "stderr"
    assert forks.run(words, at_shard=(signal.SIGINT, 1), stderr=log) == 130
    # Python's resource tracker may warn of its own that the interrupted pool left semaphores.
    said = log.read_text().split("\n/", 1)[0]
    assert said.strip() == "error: interrupted"
    assert names(tmp_path) == ["b", "base", "logs"]


def test_two_writers_at_once_end_with_one_whole_result(
    base: Path, bundle: Path, tmp_path: Path
) -> None:
    wholes = []
    for weight in ("1", "0.5"):
        ff.merge_checkpoint(base, bundle, tmp_path / f"whole-{weight}", weights=[float(weight)])
        wholes.append(files_in(tmp_path / f"whole-{weight}"))
    (tmp_path / "outputs").mkdir()
    for force, other_weight in (((), "1"), (("--force",), "0.5")):
        out = tmp_path / "outputs" / f"out{other_weight}"
        command = [sys.executable, "-m", "fourierft_export", "merge", "--base", str(base)]
        command += ["--bundle", str(bundle), "-o", str(out), *force]
        writers = [
            subprocess.Popen([*command, "--weight", weight], stderr=subprocess.DEVNULL)
            for weight in ("1", other_weight)
        ]
        codes = {writer.wait() for writer in writers}
        assert 0 in codes and codes <= {0, 2, 6}
        assert files_in(out) in wholes
    assert not list((tmp_path / "outputs").glob("*.partial-*"))


def test_what_happens_meanwhile_is_noticed(
    base: Path, bundle: Path, tmp_path: Path, forks: Forks
) -> None:
    """Another writer at the same work, an output that appears, a base that is cut short."""
    out, codes = tmp_path / "out", []
    words = ["merge", "--base", base, "--bundle", bundle, "-o", out]

    def merge_too(what: str, done: int, total: int) -> None:
        if what == "merging" and not codes:
            codes.append(forks.run(words, stderr=tmp_path / "log"))

    ff.merge_checkpoint(base, bundle, out, progress=merge_too)
    assert codes == [6] and "another process at work" in (tmp_path / "log").read_text()
    shutil.rmtree(out)

    def make_output(what: str, done: int, total: int) -> None:
        if what == "merging":
            out.mkdir(exist_ok=True)
            (out / "theirs").touch()

    with pytest.raises(UsageError, match="appeared meanwhile"):
        ff.merge_checkpoint(base, bundle, out, progress=make_output)
    assert names(out) == ["theirs"]

    def cut_base(what: str, done: int, total: int) -> None:
        if what == "merging":
            os.truncate(base / SHARDS[-1], 1000)

    with pytest.raises(BadInputError) as caught:
        ff.merge_checkpoint(base, bundle, tmp_path / "new", progress=cut_base)
    assert caught.value.where == str(base / SHARDS[-1])
    assert names(tmp_path) == ["b", "base", "log", "out"]


def test_weights_that_differ_between_the_samples_are_found_while_merging(
    base: Path, bundle: Path, tmp_path: Path
) -> None:
    """One element of each of two weights, which the fingerprints' samples do not touch."""
    for number in (1, 2):
        shard = base / SHARDS[number]
        data = bytearray(shard.read_bytes())
        data[read_header(shard).tensors[f"layers.{number}.q.weight"].start] ^= 1
        shard.write_bytes(data)
    for dry_run in (False, True):
        with pytest.raises(BaseMismatchError) as caught:
            ff.merge_checkpoint(base, bundle, tmp_path / "out", dry_run=dry_run)
        assert [line.split(":")[0] for line in caught.value.offenders] == LAYERS[1:3]
        assert "--allow-base-mismatch" in caught.value.remedy
    assert names(tmp_path) == ["b", "base"]
    report = ff.merge_checkpoint(base, bundle, tmp_path / "out", allow_base_mismatch=True)
    assert report.bundles[0].base_check == "mismatch"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["allow_base_mismatch"] is True


def test_memory_does_not_grow_with_the_checkpoint(
    tmp_path: Path, make_base: Any, make_bundle: Any
) -> None:
    """Peak memory of a process for 16 MB and for 128 MB of weights."""
    peaks = []
    for shards in (2, 16):
        folder = make_base(tmp_path / f"base{shards}", shards=shards, size=1024)
        bundle = make_bundle(folder, ["layers.0.q"]).save(tmp_path / f"b{shards}")
        script = (
            "import resource, sys, fourierft_export as ff; ff.merge_checkpoint(*sys.argv[1:]); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        command = [sys.executable, "-c", script, folder, bundle, tmp_path / f"out{shards}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) * 1024)
    assert peaks[1] - peaks[0] < 80 << 20
