"""Memory: what a merge needs, and what the machine and its control groups have left.

A container sees the memory of its machine in /proc/meminfo; what it may use is the limit of its
control group (Linux: Documentation/admin-guide/cgroup-v2.rst).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import FileAccessError
from ..files.dtypes import DTYPE_BITS
from ..files.write import IN_FLIGHT
from ..spectral.cost import choose_delta_path
from .changes import TensorPlan
from .plan import ShardPlan

# The interpreter, numpy, blocks of delta_W and their tables.
_PROCESS = 192 << 20


def estimate_memory(shards: Sequence[ShardPlan]) -> int:
    """Estimate the bytes of memory that one process needs.

    It holds three changed weights at a time (one is written, one waits, one is computed), whatever
    the size of the checkpoint.
    """
    changed = [_changed_bytes(t) for s in shards for t in s.tensors if t.shares]
    dense = sum(t.value.nbytes for s in shards for t in s.tensors if t.value is not None)
    return 3 * max(changed, default=0) + 2 * dense + IN_FLIGHT + _PROCESS


def _changed_bytes(plan: TensorPlan) -> int:
    slot = plan.slot
    count = slot.nbytes * 8 // DTYPE_BITS[slot.dtype]
    frequencies = sum(len(share.bundle.spectra[share.layer]) for share in plan.shares)
    by_columns = choose_delta_path((slot.shape[0], slot.shape[1]), frequencies) == "columns"
    converts = plan.source is not None and plan.source.dtype != slot.dtype
    # Another dtype needs a second array (float64 at most); that path, a layer's half spectrum.
    return slot.nbytes + count * (8 if converts else 0) + count * (8 if by_columns else 0)


def check_memory(needed: int, workers: int) -> None:
    """Refuse work of `workers` processes that need `needed` bytes each, if there are less."""
    available = read_available_memory()
    if available is not None and needed * workers > available:
        raise FileAccessError(
            "memory",
            expected=f"{needed * workers:,} bytes for {workers} process(es)",
            found=f"{available:,} bytes available",
            remedy="use fewer workers" if workers > 1 else "merge on a machine with more memory",
        )


def read_available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that this process can still get; None if unknown."""
    machine = _left_in_machine(root)
    return min([*_left_in_groups(root), *([] if machine is None else [machine])], default=None)


def _left_in_machine(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, OSError, ValueError):
            return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) << 10 if "MemAvailable" in fields else None


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield the bytes left in this process's control group, and in those around it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for path in (line[3:] for line in lines if line.startswith("0::")):
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            try:
                allowed = int((folder / "memory.max").read_text())
                used = int((folder / "memory.current").read_text())
                stat = (folder / "memory.stat").read_text().splitlines()
            except (OSError, ValueError):  # no such group is seen from here, or its limit is "max"
                pass
            else:
                # Cached files count as used but are evicted when memory is needed: else all that a
                # merge reads and writes would count against it.
                pages = dict(line.split() for line in stat)
                files = int(pages.get("active_file", 0)) + int(pages.get("inactive_file", 0))
                yield max(allowed - used + min(files, used), 0)
            if folder == mount:
                break
