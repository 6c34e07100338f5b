"""What a merge will need, before it begins: space on the disk, and memory."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import FileAccessError
from ..files.container import DTYPE_BITS
from ..files.pipe import IN_FLIGHT
from ..spectral.cost import choose_delta_path
from .memory import available_memory
from .plan import OutShard, OutTensor

# Headers, config, index and manifest, on top of what is counted byte by byte.
SMALL_FILES = 1 << 20
# The interpreter, numpy, blocks of delta_W and their tables.
_PROCESS = 192 << 20


def memory_needed(shards: Sequence[OutShard]) -> int:
    """Bytes of memory that one process needs: three of the largest changed weight, and more.

    The size of the checkpoint does not matter: one is being written, one waits, one is worked on.
    """
    changed = [_changed_bytes(t) for s in shards for t in s.tensors if t.change is not None]
    dense = sum(t.value.nbytes for s in shards for t in s.tensors if t.value is not None)
    return 3 * max(changed, default=0) + 2 * dense + IN_FLIGHT + _PROCESS


def _changed_bytes(tensor: OutTensor) -> int:
    change, slot = tensor.change, tensor.slot
    if change is None:
        return 0
    count = slot.nbytes * 8 // DTYPE_BITS[slot.dtype]
    frequencies = sum(len(p.ingredient.bundle.spectra[p.layer]) for p in change.parts)
    by_columns = choose_delta_path((slot.shape[0], slot.shape[1]), frequencies) == "columns"
    # Another dtype needs a second array (float64 at most); that path, a layer's half spectrum.
    return slot.nbytes + count * (8 if tensor.converts else 0) + count * (8 if by_columns else 0)


def check_memory(needed: int, workers: int) -> None:
    """Refuse work that cannot fit in memory, before any of it is done.

    Args:
        needed: bytes of one process.
        workers: processes of this machine.

    Raises:
        FileAccessError: less is available.
    """
    available = available_memory()
    if available is not None and needed * workers > available:
        raise FileAccessError(
            "memory",
            expected=f"{needed * workers:,} bytes for {workers} process(es)",
            found=f"{available:,} bytes available",
            remedy="use fewer workers" if workers > 1 else "merge on a machine with more memory",
        )
