"""Clones where the file system can share blocks, and nothing at all where it cannot."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from fourierft_export.files.clone import try_clone

fcntl = pytest.importorskip("fcntl")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="FICLONE is Linux's")


def test_a_clone_is_the_file_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10_000)
    made = try_clone(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").exists() == made
    assert not made or (tmp_path / "b").read_bytes() == b"x" * 10_000


def test_the_kernel_is_asked_for_source_and_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copying(target: int, request: int, source: int) -> int:
        """What FICLONE does, where this file system cannot."""
        assert request == 0x40049409
        os.write(target, os.pread(source, 1 << 20, 0))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", copying)
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "a").chmod(0o600)
    old = os.umask(0o022)
    try:
        assert try_clone(tmp_path / "a", tmp_path / "b")
    finally:
        os.umask(old)
    assert (tmp_path / "b").read_bytes() == b"content"
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o644
    (tmp_path / "c").write_bytes(b"already there")
    assert not try_clone(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == b"already there"
