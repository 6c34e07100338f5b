"""delta-4096, delta-768: delta_W against PEFT's get_delta_weight; delta-memory; paths."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness import THREADS, Row, check_close, faster, in_turn, within
from peers import SCALING, SEED, linear, peft_layer

from fourierft_export.spectral import cost, torch_ops
from fourierft_export.spectral.delta import adder, rebuild
from fourierft_export.spectral.entries import spectral_entries

PEER = "PEFT get_delta_weight"


def delta_4096() -> Iterator[Row]:
    yield fresh((4096, 4096), 1000)
    yield fresh((11008, 4096), 2000)
    for dtype in (torch.float32, torch.bfloat16):
        yield merge_eight(dtype)


@torch.no_grad()
def fresh(shape: tuple[int, int], n: int) -> Row:
    layer = peft_layer(linear(*shape), n)
    spectrum = layer.fourierft_spectrum["default"].detach()
    entries = placed(*shape, n)

    def ours() -> torch.Tensor:
        return torch_ops.delta_weight(spectrum, entries, shape, SCALING)

    def peer() -> torch.Tensor:
        return layer.get_delta_weight("default")

    case = f"{shape[0]}x{shape[1]}, n {n}, fresh"
    check_close(case, ours(), peer(), 1e-6)
    return faster("delta-4096", case, *in_turn(ours, peer), 6.0, PEER)


def merge_eight(dtype: torch.dtype) -> Row:
    """Eight layers merged in place; PEFT keeps one set of indices for each."""
    n, shape, count = 1000, (4096, 4096), 8
    entries = placed(*shape, n)
    spectra = [torch.randn(n) for _ in range(count)]
    layer = peft_layer(linear(*shape, dtype), n)
    layer.fourierft_spectrum["default"].data = spectra[0]
    start = layer.base_layer.weight.data.clone()
    weights = [start.clone() for _ in range(count)]

    def ours() -> None:  # what `unload(model, merge=True)` does to the layers of one shape
        torch_ops.merge_delta_weights(weights, spectra, entries, SCALING, in_place=True)

    def peer() -> None:  # one layer: the others would take as long
        layer.merge()
        layer.merged_adapters.clear()

    ours()
    peer()
    changes = (w.float() - start.float() for w in (weights[0], layer.base_layer.weight.data))
    case = f"8 in place, {str(dtype).removeprefix('torch.')}"
    check_close(case, *changes, 2e-4 if dtype == torch.float32 else 0.1)
    eight, one = in_turn(ours, peer, least=9)
    return faster("delta-4096", case + ", each", eight / count, one, 14.0, "PEFT merge")


def delta_768() -> Iterator[Row]:
    yield many_small(768, 3.0)
    yield many_small(384, 1.0)


@torch.no_grad()
def many_small(size: int, bar: float, n: int = 1000, count: int = 24) -> Row:
    layers = [peft_layer(linear(size, size), n, torch.randn(n)) for _ in range(count)]
    entries = spectral_entries(SEED, (size, size), n)
    spectra = np.stack([layer.fourierft_spectrum["default"].detach() for layer in layers])

    def ours() -> list[np.ndarray]:
        deltas = [np.empty((size, size), np.float32) for _ in spectra]
        rebuild((size, size), spectra, entries, SCALING, adder(None, deltas))
        return deltas

    def peer() -> list[torch.Tensor]:
        return [layer.get_delta_weight("default") for layer in layers]

    case = f"{count} layers {size}x{size}, n {n}, each"
    check_close(case, ours(), torch.stack(peer()), 1e-6)
    mine, theirs = in_turn(ours, peer)
    return faster("delta-768", case, mine / count, theirs / count, bar, PEER)


def delta_memory() -> Iterator[Row]:
    """Growth of the peak of a fresh process, each side in its own."""
    for dtype in ("float32", "bfloat16"):
        ours, peer = (peak_growth(side, dtype) for side in ("ours", "peer"))
        weight = 4096 * 4096 * 4 / 2**20
        case = f"in place, {dtype} (PEFT: {peer / weight:.1f}x)"
        yield within("delta-memory", case, ours, weight, 0.3, "the float32 weight", "MiB")


def peak_growth(side: str, dtype: str) -> float:
    script = Path(__file__).with_name("peak.py")
    found = subprocess.run(
        [sys.executable, str(script), side, dtype], capture_output=True, text=True, check=True
    )
    return float(found.stdout)


def paths() -> Iterator[Row]:
    """The path that the cost model takes against every path, forced: never 10 % off the best."""
    cases = [(4096, 4096, 1000), (4096, 4096, 30), (4096, 4096, 60000), (768, 768, 1000)]
    cases += [(768, 768, 20), (384, 384, 1000), (384, 384, 100), (64, 64, 200), (1024, 4096, 500)]
    for rows, columns, n in cases:
        yield forced_paths((rows, columns), n)


def forced_paths(shape: tuple[int, int], n: int) -> Row:
    entries = spectral_entries(SEED, shape, n)
    spectrum = np.random.default_rng(1).standard_normal(n).astype(np.float32)

    def by_path(path: str | None) -> np.ndarray:
        with cost.force(delta=path):
            delta = np.empty(shape, np.float32)
            rebuild(shape, spectrum[None], entries, 1.0, adder(None, [delta]))
            return delta

    reference = by_path(None)
    for path in cost.DELTA_PATHS:
        check_close(f"paths, {path}", by_path(path), reference, 1e-6)
    medians = in_turn(*(partial(by_path, path) for path in cost.DELTA_PATHS), seconds=1.5)
    times = dict(zip(cost.DELTA_PATHS, medians, strict=True))
    chosen = cost.choose_delta_path(shape, n, threads=THREADS)
    listed = ", ".join(f"{name} {1e3 * t:.3g}" for name, t in times.items())
    case = f"{shape[0]}x{shape[1]}, n {n}: {chosen}"
    return within("paths", case, times[chosen], min(times.values()), 1.1, f"best of {listed}")


def placed(rows: int, columns: int, n: int) -> torch.Tensor:
    return torch.from_numpy(spectral_entries(SEED, (rows, columns), n).copy())


BARS = {
    "delta-4096": delta_4096,
    "delta-768": delta_768,
    "delta-memory": delta_memory,
    "paths": paths,
}
