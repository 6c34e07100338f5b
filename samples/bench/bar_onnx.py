"""onnx-*: exported files in ONNX Runtime, every mode against the merged one.

RoBERTa-base shapes are 12 layers of 768 and 50,265 words, with query and value adapted, n 1000, and
8 rows of 64 tokens.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bar_layer import minilm
from harness import THREADS, Row, check_close, in_turn, within
from peers import linear
from torch import nn

import fourierft_export as ff
from fourierft_export.bundle.spec import LayerSpec
from fourierft_export.spectral.entries import entries_sha256, spectral_entries

N_FREQUENCY = 1000
BATCH, LENGTH, VOCABULARY = 8, 64, 50265
FOLDER = tempfile.TemporaryDirectory(prefix="bar-onnx-")


def roberta() -> nn.Module:
    """A BERT of RoBERTa-base's shapes, with random weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=VOCABULARY), add_pooling_layer=False).eval()


def adapted(model: nn.Module) -> ff.Bundle:
    torch.manual_seed(1)
    config = ff.FourierFTConfig(n_frequency=N_FREQUENCY, target_modules=["query", "value"])
    return ff.capture(ff.inject(model, config))


@lru_cache
def exported(name: str) -> tuple[ff.Bundle, Callable[[str], Path]]:
    """The adapter of a model, and a function from mode to its file."""
    model = {"minilm": lambda: minilm().bert, "roberta": roberta}[name]()
    bundle = adapted(model)
    ids = torch.ones(2, 16, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": ids}
    axes = {key: {0: "batch", 1: "sequence"} for key in inputs}

    @lru_cache
    def file(mode: str) -> Path:
        path = Path(FOLDER.name) / f"{name}-{mode}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if mode == "plain":
                bare = ff.detach({"minilm": lambda: minilm().bert, "roberta": roberta}[name]())
                torch.onnx.export(
                    bare,
                    (),
                    path,
                    kwargs=inputs,
                    dynamic_shapes=axes,
                    dynamo=True,
                    external_data=False,
                    verbose=False,
                )
            else:
                ff.export_onnx(model, inputs, path, mode=mode, dynamic_shapes=axes)
        return path

    return bundle, file


def feeds() -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(1, 1000, (BATCH, LENGTH))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def options() -> Any:
    import onnxruntime as ort

    made = ort.SessionOptions()
    made.intra_op_num_threads = THREADS
    made.log_severity_level = 3
    return made


def session(path: Path) -> Any:
    import onnxruntime as ort

    return ort.InferenceSession(str(path), options(), providers=["CPUExecutionProvider"])


def created(*paths: Path, rounds: int = 5) -> list[float]:
    """Least seconds to create a session of each file, in turn."""
    taken: list[list[float]] = [[] for _ in paths]
    for _ in range(rounds):
        for path, times in zip(paths, taken, strict=True):
            start = time.perf_counter()
            session(path)
            times.append(time.perf_counter() - start)
    return [min(times) for times in taken]


def merged() -> Iterator[Row]:
    """A merged file is the plain export with other numbers."""
    import onnx

    _, file = exported("minilm")
    nodes = [
        [(n.op_type, n.name) for n in onnx.load(file(mode)).graph.node]
        for mode in ("plain", "merged")
    ]
    if nodes[0] != nodes[1]:
        raise SystemExit("onnx-merged: other nodes than the plain export's")
    inputs = feeds()
    plain, ours = (session(file(mode)) for mode in ("plain", "merged"))
    mine, bare = in_turn(
        lambda: ours.run(None, inputs), lambda: plain.run(None, inputs), seconds=10
    )
    yield within("onnx-merged", "MiniLM, 8 x 64", mine, bare, 1.05, "plain export")


def unmerged() -> Iterator[Row]:
    inputs = feeds()
    for name in ("minilm", "roberta"):
        _, file = exported(name)
        ours, theirs = (session(file(mode)) for mode in ("unmerged", "merged"))
        check_close(name, ours.run(None, inputs)[0], theirs.run(None, inputs)[0], 1e-4)
        mine, other = in_turn(
            lambda ours=ours: ours.run(None, inputs),
            lambda theirs=theirs: theirs.run(None, inputs),
            seconds=10,
        )
        yield within("onnx-unmerged", f"{name}, latency", mine, other, 1.05, "merged")
        mine, other = created(file("unmerged"), file("merged"))
        yield within("onnx-unmerged", f"{name}, session creation", mine, other, 2.0, "merged")
    path = Path(FOLDER.name) / "layer.onnx"
    layer = ff.inject(
        nn.Sequential(linear(4096, 4096)),
        ff.FourierFTConfig(n_frequency=N_FREQUENCY, target_modules=["0"]),
    )
    ff.export_onnx(layer, torch.zeros(2, 3, 4096), path, mode="unmerged", external_data=False)
    (mine,) = created(path)
    yield within("onnx-unmerged", "one 4096x4096, creation", mine, 1.0, 0.3, "a second", "s")


def others(count: int, bundle: ff.Bundle, seeds: Sequence[int]) -> list[ff.Bundle]:
    """Adapters like `bundle`, with other spectra and these seeds in turn."""
    made = []
    for number in range(count):
        seed = seeds[number % len(seeds)]
        random = np.random.default_rng(number)
        spectra = {k: random.standard_normal(v.shape, v.dtype) for k, v in bundle.spectra.items()}
        layers = tuple(reseeded(layer, seed) for layer in bundle.layers)
        made.append(ff.Bundle.build(replace(bundle.spec, seed=seed, layers=layers), spectra))
    return made


def reseeded(layer: LayerSpec, seed: int) -> LayerSpec:
    entries = spectral_entries(seed, layer.shape or (1, 1), layer.n_frequency)
    return replace(layer, entries_sha256=entries_sha256(entries))


def paired() -> Iterator[Row]:
    bundle, file = exported("roberta")
    base, inputs = session(file("merged")), feeds()
    ours = ff.AdapterSession(file("paired"), session_options=options())
    first, second, *more = others(7, bundle, [5, 6])
    ours.load("own", bundle)
    own = ours.run(inputs, "own")["last_hidden_state"]
    check_close("onnx-paired", own, base.run(None, inputs)[0], 1e-4)
    mine, other = in_turn(
        lambda: ours.run(inputs, "own"), lambda: base.run(None, inputs), seconds=15
    )
    yield within("onnx-paired", "steady state", mine, other, 1.10, "merged")
    loads = []
    for number, adapter in enumerate((first, second, *more)):
        name = f"adapter {number}"
        start = time.perf_counter()
        ours.load(name, adapter)
        ours.prepare(name)
        loads.append(time.perf_counter() - start)
    size = ours.resident["adapter 0"] / 1e6
    median = float(np.median(loads))
    what = f"1 s; {size:.1f} MB per resident adapter"
    yield within("onnx-paired", "first load of an adapter", median, 1.0, 0.040, what, "s")
    switches = in_turn(lambda: ours.prepare("adapter 0"), lambda: ours.prepare("adapter 1"))
    yield within("onnx-paired", "switch", max(switches), 1.0, 0.001, "1 s", "s")
    expand = session(file("paired").with_suffix(".expand.onnx"))
    (alone,) = in_turn(lambda: expand.run(None, {}))
    yield within("onnx-paired", "expander in ONNX Runtime", alone, 1.0, 0.040, "1 s", "s")


def swappable() -> Iterator[Row]:
    bundle, file = exported("roberta")
    base, inputs = session(file("merged")), feeds()
    ours = ff.AdapterSession(file("swappable"), session_options=options())
    ours.load("own", bundle)
    own = ours.run(inputs, "own")["last_hidden_state"]
    check_close("onnx-swappable", own, base.run(None, inputs)[0], 1e-4)
    mine, other = in_turn(
        lambda: ours.run(inputs, "own"), lambda: base.run(None, inputs), seconds=15
    )
    yield within("onnx-swappable", "roberta, 8 x 64", mine, other, 1.6, "merged")


def bank() -> Iterator[Row]:
    bundle, file = exported("roberta")
    base, inputs = session(file("merged")), feeds()
    for seeds, bar in (([5], 1.6), (list(range(8)), 2.5)):
        ours = ff.AdapterSession(file("bank"), session_options=options())
        names = [f"adapter {i}" for i in range(BATCH)]
        for name, adapter in zip(names, others(BATCH, bundle, seeds), strict=True):
            ours.load(name, adapter)
        ours.load("own", bundle)
        own = ours.run(inputs, "own")["last_hidden_state"]
        check_close("onnx-bank", own, base.run(None, inputs)[0], 1e-4)
        mine, other = in_turn(
            lambda ours=ours, names=names: ours.run(inputs, names),
            lambda: base.run(None, inputs),
            seconds=15,
        )
        case = f"8 adapters of {len(seeds)} seed" + "s" * (len(seeds) > 1)
        yield within("onnx-bank", case, mine, other, bar, "merged")


BARS = {
    "onnx-merged": merged,
    "onnx-unmerged": unmerged,
    "onnx-paired": paired,
    "onnx-swappable": swappable,
    "onnx-bank": bank,
}
