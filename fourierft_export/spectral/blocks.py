"""delta_W put together: blocks of rows, their mirror images, layers and threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..types import Entries
from .cost import choose_delta_path, useful_threads
from .half_spectrum import ROW_MAKERS, half_spectrum
from .threads import default_threads, run_shares

Float32 = npt.NDArray[np.float32]
AnyFloat = npt.NDArray[Any]  # numpy's own floats or ml_dtypes.bfloat16
# Takes (layer, rows, float32 values of them); the values are overwritten afterwards.
Put = Callable[[int, slice, Float32], None]


def adder(sources: Sequence[AnyFloat] | None, targets: Sequence[AnyFloat]) -> Put:
    """What puts delta_W, added to its source if there are any, where it belongs."""

    def put(layer: int, where: slice, values: Float32) -> None:
        target = targets[layer][where]
        if sources is None:
            target[...] = values
        elif target.dtype == sources[layer].dtype in (np.float32, np.float64):
            np.add(sources[layer][where], values, out=target)
        else:
            values += sources[layer][where].astype(np.float32)
            target[...] = values

    return put


def rebuild_blocks(
    shape: tuple[int, int],
    spectra: AnyFloat,
    entries: Entries,
    scaling: float,
    threads: int | None,
    put: Put,
    path: str | None = None,
) -> None:
    """Call `put` with (layer, rows, float32 values) until every delta_W is complete."""
    rows, columns = shape
    shared = half_spectrum(entries, shape)
    amplitudes = shared.amplitudes(spectra, float(scaling))
    count, blocks = len(spectra), range(shared.block_count)
    limit = default_threads() if threads is None else threads
    used = useful_threads(shape, count, limit)
    path = path or choose_delta_path(shape, len(entries), layers=count, threads=used)
    make_rows = ROW_MAKERS[path]

    def work(layers: range, blocks: range) -> None:
        for where, index, values in make_rows(shared, amplitudes[layers], blocks):
            layer = layers[index]
            # Rows 1 .. (M-1)//2 have a mirror image: row M-p holds columns -q.
            first, last = max(where.start, 1), min(where.stop, (rows + 1) // 2)
            if first < last:
                mirrored = np.empty((last - first, columns), np.float32)
                upside_down = values[first - where.start : last - where.start][::-1]
                mirrored[:, 0] = upside_down[:, 0]
                mirrored[:, 1:] = upside_down[:, :0:-1]
                put(layer, slice(rows - last + 1, rows - first + 1), mirrored)
            put(layer, where, values)

    if path == "products":  # the library beneath has threads of its own
        work(range(count), blocks)
    elif path == "columns" or count >= used:
        run_shares(lambda layers: work(layers, blocks), count, min(used, count))
    else:
        run_shares(lambda share: work(range(count), share), len(blocks), used)
