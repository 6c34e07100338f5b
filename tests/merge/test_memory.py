"""The memory that is available, in a machine and in a container."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from fourierft_export.merge.memory import read_available_memory

MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n"}


def group(folder: str, limit: str, usage: int, files: int = 0) -> dict[str, str]:
    """The files of a control group; of its use, `files` bytes hold pages of files."""
    stat = f"anon 1\ninactive_file {files - files // 3}\nactive_file {files // 3}\n"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{usage}\n",
        f"{folder}/memory.stat": stat,
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (MACHINE, 8000 << 10),
        # A container with a namespace of its own sees its group as the root.
        (
            {"proc/self/cgroup": "0::/\n", **group("sys/fs/cgroup", "1000000", 700_000)},
            300_000,
        ),
        (
            {"proc/self/cgroup": "0::/\n", **group("sys/fs/cgroup", "1000000", 700_000, 600_000)},
            900_000,
        ),
        ({"proc/self/cgroup": "0::/\n", **group("sys/fs/cgroup", "max", 700_000)}, 8000 << 10),
        ({"proc/self/cgroup": "0::/\n", **group("sys/fs/cgroup", "1000", 2000)}, 0),
        ({"proc/self/cgroup": "0::/\n", **group("sys/fs/cgroup", "99999999", 0)}, 8000 << 10),
        # The group around a group may be the narrower one.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                **group("sys/fs/cgroup/a/b", "900000", 100_000),
                **group("sys/fs/cgroup/a", "1000000", 500_000),
            },
            500_000,
        ),
        ({"proc/self/cgroup": "0::/gone\n"}, 8000 << 10),
    ],
)
def test_the_least_of_machine_and_groups(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    for name, text in {**MACHINE, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_available_memory(tmp_path) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/meminfo")
def test_the_memory_of_this_machine_is_known() -> None:
    available = read_available_memory()
    assert available is not None
    assert 1 << 20 < available <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
