"""Kills at chosen moments, full disks, interrupts, other writers: one whole result or none."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fourierft_export.bundle.file import Bundle
from fourierft_export.errors import BadInputError, BaseMismatchError, FileAccessError, UsageError
from fourierft_export.files.checkpoint import Checkpoint
from fourierft_export.merge import executors, memory, run
from fourierft_export.merge.merge import merge_checkpoint

MakeBase = Callable[..., Path]
MakeBundle = Callable[..., Bundle]
FilesOf = Callable[[Path], dict[str, bytes]]
LAYERS = [f"layers.{number}.q" for number in range(4)]


@pytest.fixture
def base(tmp_path: Path, make_base: MakeBase) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def bundle(base: Path, make_bundle: MakeBundle, tmp_path: Path) -> Path:
    return make_bundle(base, LAYERS).save(tmp_path / "b")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_process(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script that has `merge(base, bundle, out, **options)` and `Journal` at hand."""
    head = """
        import os, signal, sys, time
        from fourierft_export.merge.journal import Journal
        from fourierft_export.merge.merge import merge_checkpoint as merge
    """
    code = textwrap.dedent(head) + textwrap.dedent(script)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# Kills its process once two shards are in the journal.
KILL_AFTER_TWO = """
    add, added = Journal.add, []
    def add_and_die(self, number, shard):
        add(self, number, shard)
        added.append(number)
        if len(added) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    Journal.add = add_and_die
    merge(*sys.argv[1:])
"""


def test_a_killed_merge_goes_on_where_it_was(
    base: Path, bundle: Path, tmp_path: Path, files_of: FilesOf
) -> None:
    merge_checkpoint(base, bundle, tmp_path / "whole")
    assert in_process(KILL_AFTER_TWO, base, bundle, tmp_path / "out").returncode == -signal.SIGKILL
    (left,) = tmp_path.glob("out.partial-*")
    first, second, *_ = sorted(Checkpoint.open(base).shards)
    stamps = {p.name: p.stat().st_mtime_ns for p in (left / "out").iterdir()}
    assert set(stamps) == {first.name, second.name}
    (left / ".writing-x").write_text("half a shard")
    calls: list[tuple[str, int, int]] = []
    report = merge_checkpoint(
        base, bundle, tmp_path / "out", progress=lambda *call: calls.append(call)
    )
    assert report.resumed == (first.name, second.name)
    assert {n: (tmp_path / "out" / n).stat().st_mtime_ns for n in stamps} == stamps
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert names(tmp_path) == ["b", "base", "out", "whole"]
    assert calls[-1][1] == calls[-1][2] == report.nbytes


@pytest.mark.parametrize("damage", ["shard", "journal", "journal cut", "shard gone"])
def test_what_a_killed_merge_left_is_not_believed_unseen(
    base: Path, bundle: Path, tmp_path: Path, files_of: FilesOf, damage: str
) -> None:
    merge_checkpoint(base, bundle, tmp_path / "whole")
    in_process(KILL_AFTER_TWO, base, bundle, tmp_path / "out")
    (left,) = tmp_path.glob("out.partial-*")
    first = sorted(Checkpoint.open(base).shards)[0].name
    expected = 1
    if damage == "shard":
        data = bytearray((left / "out" / first).read_bytes())
        data[-1] ^= 1
        (left / "out" / first).write_bytes(data)
    elif damage == "shard gone":
        (left / "out" / first).unlink()
    else:
        journal = left / "journal.jsonl"
        text = journal.read_bytes()
        journal.write_bytes(text[:-20] if damage == "journal cut" else b"\xff\xfe{}\n[1]\n")
        expected = 1 if damage == "journal cut" else 0
    report = merge_checkpoint(base, bundle, tmp_path / "out")
    assert len(report.resumed) == expected
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


# What may stand in the journal's line of the first of four shards, of which it changes the fields.
NOT_OF_THIS_MERGE: list[Any] = [
    {"number": 99}, {"number": -1}, {"number": 1}, {"number": True}, {"number": "0"},
    {"number": None}, {"name": "../../precious"}, {"name": 5}, {"size": -1}, {"size": "1"},
    {"sha256": 5}, {"tensors": []}, {"tensors": {}}, {"tensors": {"x": {}}}, {"survival": "much"},
    {"verdicts": []}, {"verdicts": [[]]}, {"verdicts": ["fine"]}, {"unknown": 1},
    b"[" * 100_000, b"[1]", b"{", b"", b"\xff",
]  # fmt: skip


def journal_line(good: bytes, wrong: Any) -> bytes:
    """The good line with `wrong` in it."""
    if isinstance(wrong, bytes):
        return b"\n" + wrong
    line = json.loads(good)
    (tensor,) = line["tensors"].values()
    for fields in (line, tensor):
        fields.update({k: value for k, value in wrong.items() if k in (*fields, "unknown")})
    return b"\n" + json.dumps(line).encode()


def test_lines_of_the_journal_that_are_not_of_this_merge_do_not_count(
    base: Path, bundle: Path, tmp_path: Path, files_of: FilesOf
) -> None:
    merge_checkpoint(base, bundle, tmp_path / "whole")
    in_process(KILL_AFTER_TWO.replace("== 2", "== 1"), base, bundle, tmp_path / "out")
    (left,) = tmp_path.glob("out.partial-*")
    good = (left / "journal.jsonl").read_bytes()[1:]
    shutil.copytree(left, tmp_path / "kept")
    (tmp_path / "precious").write_text("precious")
    lines = [journal_line(good, wrong) for wrong in NOT_OF_THIS_MERGE]
    for line in [*lines, b"".join(lines)]:
        shutil.copytree(tmp_path / "kept", left, dirs_exist_ok=True)
        (left / "journal.jsonl").write_bytes(line)
        report = merge_checkpoint(base, bundle, tmp_path / "out", force=True)
        assert report.resumed == (), line[:200]
        assert (tmp_path / "precious").read_text() == "precious", line[:200]
        assert files_of(tmp_path / "out") == files_of(tmp_path / "whole"), line[:200]
    shutil.copytree(tmp_path / "kept", left)
    (left / "journal.jsonl").write_bytes(b"".join(lines) + b"\n" + good)
    assert len(merge_checkpoint(base, bundle, tmp_path / "out", force=True).resumed) == 1


def test_a_line_that_was_cut_off_does_not_take_the_next_one_with_it(
    base: Path, bundle: Path, tmp_path: Path
) -> None:
    in_process(KILL_AFTER_TWO, base, bundle, tmp_path / "out")
    (journal,) = tmp_path.glob("out.partial-*/journal.jsonl")
    journal.write_bytes(journal.read_bytes()[:-30])
    in_process(KILL_AFTER_TWO, base, bundle, tmp_path / "out")  # the second and the third
    assert len(merge_checkpoint(base, bundle, tmp_path / "out").resumed) == 3


def test_another_plan_does_not_take_over(
    base: Path, bundle: Path, tmp_path: Path, files_of: FilesOf
) -> None:
    in_process(KILL_AFTER_TWO, base, bundle, tmp_path / "out")
    report = merge_checkpoint(base, bundle, tmp_path / "out", weights=[0.5])
    assert report.resumed == ()
    merge_checkpoint(base, bundle, tmp_path / "half", weights=[0.5])
    assert files_of(tmp_path / "out") == files_of(tmp_path / "half")
    assert names(tmp_path) == ["b", "base", "half", "out"]
    in_process(KILL_AFTER_TWO, base, bundle, tmp_path / "again")
    shard = sorted(Checkpoint.open(base).shards)[3]
    os.utime(shard, (1, 1))  # as if the base had been written anew
    assert merge_checkpoint(base, bundle, tmp_path / "again").resumed == ()


@pytest.mark.parametrize("how", ["written over", "another file"])
def test_a_base_of_the_same_sizes_and_times_is_another_base(
    base: Path, bundle: Path, tmp_path: Path, how: str
) -> None:
    for path in base.iterdir():
        os.utime(path, (1, 1))
    in_process(KILL_AFTER_TWO, base, bundle, tmp_path / "out")
    for number, shard in enumerate(sorted(Checkpoint.open(base).shards)):
        # No fingerprint tells: the adapter leaves this tensor as it is.
        start = Checkpoint.open(base).tensors[f"layers.{number}.k.weight"].start
        if how == "another file":
            (tmp_path / "new").write_bytes(shard.read_bytes())
            os.replace(tmp_path / "new", shard)
        with open(shard, "r+b") as file:
            file.seek(start)
            file.write(bytes(4))
        os.utime(shard, (1, 1))
    assert merge_checkpoint(base, bundle, tmp_path / "out").resumed == ()


def test_a_single_file_survives_a_kill(base: Path, make_bundle: MakeBundle, tmp_path: Path) -> None:
    source = sorted(Checkpoint.open(base).shards)[0]
    bundle = make_bundle(source, LAYERS[:1]).save(tmp_path / "b")
    out = tmp_path / "out.safetensors"
    kill = KILL_AFTER_TWO.replace("== 2", "== 1")
    assert in_process(kill, source, bundle, out).returncode == -signal.SIGKILL
    assert not out.exists()
    report = merge_checkpoint(source, bundle, out)
    assert report.resumed == (source.name,)
    merge_checkpoint(source, bundle, tmp_path / "whole.safetensors")
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert names(tmp_path) == ["b", "base", "out.safetensors", "whole.safetensors"]


@pytest.fixture(params=["tmpfs", "writes that fail"])
def small_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Path]:
    """A file system with room for 300 KB, or (also where none may be mounted) failing writes.

    Checks of the space in advance are off, as if somebody else had filled the disk meanwhile.
    """
    monkeypatch.setattr(run, "check_space", lambda directory, needed: None)
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    mounted = False
    if request.param == "tmpfs" and sys.platform == "linux":
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        left, write = 300_000, os.write

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


def test_a_disk_that_fills_up_is_told_and_left_as_it_was(
    base: Path, bundle: Path, small_disk: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileAccessError, match="no space left") as caught:
        merge_checkpoint(base, bundle, small_disk / "out")
    assert caught.value.exit_code == 6
    assert caught.value.where == str(small_disk / "out")
    needed = merge_checkpoint(base, bundle, tmp_path / "x", dry_run=True).disk_bytes
    assert caught.value.expected == f"to write all of its {needed:,} bytes"
    assert names(small_disk) == []


def test_a_disk_that_is_too_small_is_told_before_any_work(
    base: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1000))
    with pytest.raises(FileAccessError, match="bytes of free space, found 1,000 bytes"):
        merge_checkpoint(base, bundle, tmp_path / "out")
    with pytest.raises(FileAccessError, match="bytes of free space"):
        merge_checkpoint(base, bundle, tmp_path / "out", dry_run=True)
    assert names(tmp_path) == ["b", "base"]


def test_too_little_memory_is_told_before_any_work(
    base: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 400 << 20)
    assert merge_checkpoint(base, bundle, tmp_path / "a").memory_bytes < 400 << 20
    with pytest.raises(FileAccessError, match="419,430,400 bytes available; use fewer workers"):
        merge_checkpoint(base, bundle, tmp_path / "out", workers=2)
    with pytest.raises(FileAccessError, match=r"for 4 process"):  # there are four weight files
        merge_checkpoint(base, bundle, tmp_path / "out", workers=50)
    assert names(tmp_path) == ["a", "b", "base"]


def test_the_memory_of_this_machine_does_not_matter_to_a_cluster(
    base: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(memory, "available_memory", lambda: 0)
    monkeypatch.setattr(executors, "CONNECT_SECONDS", 0.5)
    with pytest.raises(FileAccessError, match="a Dask scheduler"):
        merge_checkpoint(base, bundle, tmp_path / "out", scheduler="tcp://127.0.0.1:1")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupt_ends_with_130_and_cleans_up(
    base: Path, bundle: Path, tmp_path: Path, workers: int
) -> None:
    # A parent in the background may have had SIGINT ignored, which children inherit.
    script = """
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def interrupted(self, number, shard):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(20)
        Journal.add = interrupted
        from fourierft_export.cli.main import main
        main(sys.argv[1:])
    """
    words = ["merge", "--base", base, "--bundle", bundle, "-o", tmp_path / "out"]
    done = in_process(script, *words, "--workers", workers)
    assert done.returncode == 130
    assert done.stderr.strip() == "error: interrupted"
    assert names(tmp_path) == ["b", "base"]


def test_two_writers_at_once_end_with_one_whole_result(
    base: Path, bundle: Path, tmp_path: Path, files_of: FilesOf
) -> None:
    wholes = []
    for weight in ("1", "0.5"):
        merge_checkpoint(base, bundle, tmp_path / f"whole-{weight}", weights=[float(weight)])
        wholes.append(files_of(tmp_path / f"whole-{weight}"))
    (tmp_path / "outputs").mkdir()
    for force in ((), ("--force",)):
        for other_weight in ("1", "0.5"):
            out = tmp_path / "outputs" / f"out{len(force)}{other_weight}"
            command = [sys.executable, "-m", "fourierft_export", "merge", "--base", str(base)]
            command += ["--bundle", str(bundle), "-o", str(out), *force]
            writers = [
                subprocess.Popen([*command, "--weight", weight], stderr=subprocess.PIPE)
                for weight in ("1", other_weight)
            ]
            codes = [writer.wait() for writer in writers]
            for writer in writers:
                assert writer.stderr is not None
                writer.stderr.close()
            assert 0 in codes
            assert set(codes) <= {0, 2, 6}
            assert files_of(out) in wholes
    assert not list((tmp_path / "outputs").glob("*.partial-*"))


def test_a_busy_output_is_told(base: Path, bundle: Path, tmp_path: Path) -> None:
    codes = []

    def meanwhile(what: str, done: int, total: int) -> None:
        if what == "merging" and not codes:
            codes.append(in_process("merge(*sys.argv[1:])", base, bundle, tmp_path / "out"))

    merge_checkpoint(base, bundle, tmp_path / "out", progress=meanwhile)
    assert "another process at work" in codes[0].stderr


def test_an_output_made_meanwhile_by_others_is_not_replaced(
    base: Path, bundle: Path, tmp_path: Path
) -> None:
    def meanwhile(what: str, done: int, total: int) -> None:
        if what == "merging":
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / "theirs").touch()

    with pytest.raises(UsageError, match="appeared meanwhile"):
        merge_checkpoint(base, bundle, tmp_path / "out", progress=meanwhile)
    assert names(tmp_path / "out") == ["theirs"]
    assert names(tmp_path) == ["b", "base", "out"]


def test_a_base_that_is_cut_while_it_is_read_is_an_error(
    base: Path, bundle: Path, tmp_path: Path
) -> None:
    last = sorted(Checkpoint.open(base).shards)[-1]

    def meanwhile(what: str, done: int, total: int) -> None:
        if what == "merging":
            os.truncate(last, 1000)

    with pytest.raises(BadInputError) as caught:
        merge_checkpoint(base, bundle, tmp_path / "out", progress=meanwhile)
    assert caught.value.where == str(last)
    assert names(tmp_path) == ["b", "base"]


def test_weights_that_differ_beside_the_samples_are_found_while_merging(
    base: Path, bundle: Path, tmp_path: Path
) -> None:
    """One element of each of two weights, which the fingerprints' samples do not touch."""
    for shard in sorted(Checkpoint.open(base).shards)[1:3]:
        data = bytearray(shard.read_bytes())
        info = next(i for i in Checkpoint.open(shard).parts[0].tensors if ".q." in i.name)
        data[info.start] ^= 1
        shard.write_bytes(data)
    with pytest.raises(BaseMismatchError) as caught:
        merge_checkpoint(base, bundle, tmp_path / "out")
    assert [line.split(":")[0] for line in caught.value.offenders] == LAYERS[1:3]
    assert "--allow-base-mismatch" in caught.value.remedy
    assert names(tmp_path) == ["b", "base"]
    with pytest.raises(BaseMismatchError):
        merge_checkpoint(base, bundle, tmp_path / "out", dry_run=True)
    report = merge_checkpoint(base, bundle, tmp_path / "out", allow_base_mismatch=True)
    assert report.bundles[0].base_check == "mismatch"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["allow_base_mismatch"] is True


def test_links_between_files_are_followed_when_allowed(
    base: Path, bundle: Path, tmp_path: Path, files_of: FilesOf
) -> None:
    merge_checkpoint(base, bundle, tmp_path / "whole")
    shard = sorted(Checkpoint.open(base).shards)[0]
    (base / "store").mkdir()
    shard.rename(base / "store" / "blob")
    shard.symlink_to("store/blob")
    tokenizer = base / "tokenizer.json"
    tokenizer.rename(base / "store" / "other")
    tokenizer.symlink_to("store/other")
    with pytest.raises(BadInputError, match="--allow-links"):
        merge_checkpoint(base, bundle, tmp_path / "out")
    merge_checkpoint(base, bundle, tmp_path / "out", allow_links=True)
    found, whole = files_of(tmp_path / "out"), files_of(tmp_path / "whole")
    assert {name: found[name] for name in whole if name != "manifest.json"} == {
        name: whole[name] for name in whole if name != "manifest.json"
    }


def test_memory_does_not_grow_with_the_checkpoint(
    tmp_path: Path, make_base: MakeBase, make_bundle: MakeBundle
) -> None:
    """Peak memory of a process for 16 MB and for 128 MB of weights."""
    peaks = []
    for shards in (2, 16):
        folder = make_base(tmp_path / f"base{shards}", shards=shards, size=1024)
        bundle = make_bundle(folder, ["layers.0.q"]).save(tmp_path / f"b{shards}")
        script = """
            import resource
            merge(*sys.argv[1:])
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        """
        done = in_process(script, folder, bundle, tmp_path / f"out{shards}")
        peaks.append(int(done.stdout) * 1024)
        assert np.sum([p.stat().st_size for p in folder.iterdir()]) > shards << 23
    assert peaks[1] - peaks[0] < 80 << 20
