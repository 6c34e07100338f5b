"""How much memory programs can still get: of the machine, and of the groups that limit them.

A container sees the memory of its machine in /proc/meminfo; what it may use is its control group's
limit (Linux: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process can still get; None where the system does not tell.

    Args:
        root: of the file system.
    """
    machine = _of_the_machine(root)
    found = [*_of_the_groups(root), *([] if machine is None else [machine])]
    return min(found, default=None)


def _of_the_machine(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, OSError, ValueError):
            return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) << 10 if "MemAvailable" in fields else None


def _of_the_groups(root: Path) -> Iterator[int]:
    """What is left in each control group that this process is in, and in those around them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            mount, files, prefix = root / "sys/fs/cgroup", ("memory.max", "memory.current"), ""
        elif "memory" in controllers.split(","):
            mount, prefix = root / "sys/fs/cgroup/memory", "total_"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            left = _left(folder, *files, prefix)
            if left is not None:
                yield left
            if folder == mount:
                break


def _left(folder: Path, limit: str, usage: str, prefix: str) -> int | None:
    """A group's limit less what it uses; None without one.

    Pages of files count as used, and are given up when memory is wanted: all that a merge reads
    and writes would count against it.
    """
    try:
        allowed = int((folder / limit).read_text())
        used = int((folder / usage).read_text())
        pages = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        files = sum(int(pages.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    except (OSError, ValueError):  # no such group is seen from here, or its limit is "max"
        return None
    return max(allowed - used + min(files, used), 0)
