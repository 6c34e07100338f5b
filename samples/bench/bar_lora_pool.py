"""lora: truncated decompositions of delta_W against PEFT's. pool: 10,000 adapters in one file."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from harness import Row, check_close, faster, in_turn, within
from peers import linear, peft_layer

import fourierft_export as ff
from fourierft_export.bundle.spec import AdapterSpec, Fingerprint, LayerSpec
from fourierft_export.spectral.entries import entries_sha256, spectral_entries
from fourierft_export.spectral.singular import singular_values

RANK = 64


def lora() -> Iterator[Row]:
    size, n = 4096, 1000
    layer = peft_layer(linear(size, size), n)
    spectrum = layer.fourierft_spectrum["default"].detach().numpy()
    entries = layer.indices["default"].T.numpy().astype(np.int64)
    scaling = float(layer.fourierft_scaling["default"])
    found = []

    def ours() -> None:
        one = singular_values(spectrum, entries, (size, size), scaling)
        found[:] = [one.values[:RANK], one.factors(RANK)]

    def theirs() -> None:  # as in peft/tuners/lora/conversion.py
        delta = layer.get_delta_weight("default").detach()
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        found[2:] = [values[:RANK].numpy(), left[:, :RANK] * values[:RANK] @ right[:RANK]]

    mine, peer = in_turn(ours, theirs, seconds=0, least=1, warm_up=0)
    check_close("lora", found[0], found[2], 1e-4)
    case = f"{size} x {size}, n {n}, rank {RANK}"
    yield faster("lora", case, mine, peer, 5, "PEFT's convert_to_lora (dense SVD)")


def pool() -> Iterator[Row]:
    names = [f"encoder.layer.{i}.attention.self.{p}" for i in range(6) for p in ("query", "value")]
    mark, random, count = Fingerprint("F32", b"d" * 16, b"s" * 16), np.random.default_rng(0), 10_000

    def adapter(seed: int) -> ff.Bundle:
        digest = entries_sha256(spectral_entries(seed, (384, 384), 1000))
        layers = tuple(
            LayerSpec(name, 1000, (384, 384), False, "small", digest, mark) for name in names
        )
        spectra = {name: random.standard_normal(1000).astype(np.float32) for name in names}
        return ff.Bundle.build(AdapterSpec(seed, 150.0, layers, "SEQ_CLS", "minilm"), spectra)

    few = [adapter(seed) for seed in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tenants.fourierft.pool"
        adapters = {f"tenant-{i:05}": few[i % 4] for i in range(count)}
        ff.Pool.create(path, adapters).close()
        raw = 4 * 1000 * len(names)
        size = os.stat(path).st_size / count
        yield within("pool", "bytes per adapter", size, raw, 1.02, "its coefficients", "bytes")
        (opening,) = in_turn(lambda: ff.Pool(path).close())
        yield within("pool", f"opening {count:,} adapters", opening, 0.05, 1, "the bar, 50 ms")
        opened, order = ff.Pool(path), itertools.cycle(adapters)
        (reading,) = in_turn(lambda: opened[next(order)])
        yield within("pool", "reading one adapter", reading, 0.001, 1, "the bar, 1 ms")
        more = replace(few[0])
        (adding,) = in_turn(lambda: opened.add({"new": more}), seconds=1)
        yield within("pool", "adding one adapter", adding, 1.0, 1, "one second")


BARS = {"lora": lora, "pool": pool}
