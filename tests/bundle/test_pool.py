"""Pools: many adapters in one file, each read alone; changes are all or nothing."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest

import fourierft_export as ff
from fourierft_export.bundle.spec import AdapterSpec, Fingerprint, LayerSpec
from fourierft_export.errors import BadInputError, BaseMismatchError, UsageError
from fourierft_export.spectral.entries import entries_sha256, spectral_entries

LAYERS = {f"encoder.{i}.{name}": (6, 4 + i) for i in range(3) for name in "qv"}


def make(seed: int = 1, *, base: int = 0, dtype: Any = np.float32, **fields: Any) -> ff.Bundle:
    """A bundle of six layers, two for each shape, with a head; numbers differ with the seed."""
    rng = np.random.default_rng(seed % 2**32)
    layers = []
    for i, (name, shape) in enumerate(LAYERS.items()):
        digest = entries_sha256(spectral_entries(seed % 2**32, shape, 5, "small"))
        mark = Fingerprint("F32", bytes([base, i] * 8), b"s" * 16)
        layers.append(LayerSpec(name, 5, shape, False, "small", digest, mark))
    spec = replace(AdapterSpec(seed, 2.5, tuple(layers), "SEQ_CLS", "base"), **fields)
    spectra = {name: rng.standard_normal(5).astype(dtype) for name in LAYERS}
    return ff.Bundle.build(spec, spectra, {"classifier.weight": rng.standard_normal((2, 4))})


def contents(pool: Mapping[str, ff.Bundle]) -> dict[str, bytes]:
    return {name: bundle.to_bytes() for name, bundle in pool.items()}


def test_every_adapter_comes_back_bit_for_bit(tmp_path: Path) -> None:
    explicit = ff.Bundle.build(
        AdapterSpec(3, 1, (LayerSpec("x", 2, (2, 2), False, "explicit", entries_sha256(E)),)),
        {"x": np.ones(2, np.float16)},
        None,
        {"x": E},
    )
    config = {"peft_type": "FOURIERFT", "random_loc_seed": 9, "scaling": 2.5, "later": [1, None]}
    adapters = {
        "a": make(),
        "größer ±1": make(2**64 - 1, scaling=3),
        "negative": make(-5, scaling=-0.1),
        "bfloat16": make(7, dtype=ml_dtypes.bfloat16),
        "from PEFT": make(9, peft_config=config),
        "explicit": explicit,
    }
    path = tmp_path / "tenants.fourierft.pool"
    with ff.Pool.create(path, adapters) as pool:
        assert contents(pool) == contents(adapters)
        assert pool["negative"].entries("encoder.0.q").tolist() == (
            adapters["negative"].entries("encoder.0.q").tolist()
        )
        with pytest.raises(KeyError):
            pool["b"]
    assert [len(ff.Pool(path)), sorted(ff.Pool(path))] == [6, sorted(adapters)]
    with pytest.raises(UsageError, match="does not exist yet"):
        ff.Pool.create(path, {})
    assert not len(ff.Pool.create(path, {}, force=True))
    assert os.listdir(tmp_path) == [path.name]


E = np.array([[0, 0], [1, 1]])


def test_adding_and_removing(tmp_path: Path) -> None:
    path = tmp_path / "p"
    pool, reader = ff.Pool.create(path, {"a": make(1), "b": make(2)}), ff.Pool(path)
    pool.update({"c": make(3), "b": make(4)}, removed=["a"])
    wanted = contents({"b": make(4), "c": make(3)})
    assert contents(pool) == contents(reader) == wanted
    before = path.stat().st_size
    secret = make(1).spectra["encoder.0.q"].tobytes()
    assert secret not in path.read_bytes()  # what was removed is gone
    for change, error in (
        (({"d": make(5)}, ["a"]), UsageError),  # nothing of that name
        (({"d": make(5), "e": make(6, base=1)}, []), BaseMismatchError),
        (({"d": make(5), "": make(6)}, []), UsageError),
    ):
        with pytest.raises(error):
            pool.update(*change)
        assert contents(ff.Pool(path)) == wanted  # all or nothing
    pool.remove(["c"])
    pool.add({"d": make(5)})
    assert path.stat().st_size == before


def test_unbound_and_contradictory_bundles_are_refused(tmp_path: Path) -> None:
    layers = tuple(
        replace(x, shape=None, entry_rule=None, entries_sha256=None) for x in make().layers
    )
    unbound = replace(make(), spec=replace(make().spec, layers=layers))
    odd = make(peft_config={"peft_type": "FOURIERFT", "random_loc_seed": 2})
    for bundle, words in ((unbound, "bound bundles"), (odd, "follow from the adapter's seed")):
        with pytest.raises(UsageError, match=words):
            ff.Pool.create(tmp_path / "p", {"a": bundle})
    assert os.listdir(tmp_path) == []


def test_a_killed_writer_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "p"
    ff.Pool.create(path, {"a": make(1)}).close()
    before = contents(ff.Pool(path))
    program = f"""
import os, sqlite3, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import fourierft_export as ff
from fourierft_export.bundle import pool
from test_pool import make
connect = pool._connect
def small_cache(path, mode):
    database = connect(path, mode)
    database.execute("PRAGMA cache_size = 1")  # so that pages reach the file before the commit
    return database
pool._connect = small_cache
insert = pool._insert
def die(*arguments):
    insert(*arguments)
    os._exit(9)
pool._insert = die
ff.Pool({str(path)!r}).update({{f"t{{i}}": make(i) for i in range(50)}}, ["a"])
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    assert len(os.listdir(tmp_path)) == 2  # SQLite's journal, from which the next one restores
    assert contents(ff.Pool(path)) == before
    assert os.listdir(tmp_path) == ["p"]


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """No file may grow beyond 2 KB, as where no more space is left."""
    make().save(tmp_path / "a.fourierft.safetensors")
    script = """
import resource, sys
from fourierft_export.cli.main import run
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
sys.exit(run(["pack", "a=a.fourierft.safetensors", "--pool", "-o", "p.fourierft.pool"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 6, done.stderr
    assert os.listdir(tmp_path) == ["a.fourierft.safetensors"]


def test_threads_share_a_pool(tmp_path: Path) -> None:
    adapters = {str(i): make(i) for i in range(8)}
    pool, wanted, found = ff.Pool.create(tmp_path / "p", adapters), contents(adapters), []
    threads = [threading.Thread(target=lambda: found.append(contents(pool))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wanted] * 4


def damaged(path: Path, statement: str, *values: Any) -> Path:
    with sqlite3.connect(path) as database:
        database.execute(statement, values)
    database.close()
    return path


DAMAGE = {
    "payload": ("UPDATE adapter SET payload = zeroblob(length(payload))", "another hash"),
    "payload too long": ("UPDATE adapter SET payload = payload || x'00'", "hash|decode"),
    "payload is text": ("UPDATE adapter SET payload = 'x'", "another hash"),
    "own": ("""UPDATE adapter SET own = '[1,2.5,["a"]]'""", "another hash"),
    "no template": ("DELETE FROM template", "a template"),
    "template": ("UPDATE template SET file = zeroblob(1000)", "header"),
    "another table": ("CREATE TABLE more (x)", "another database"),
    "a trigger": (
        "CREATE TRIGGER t AFTER INSERT ON adapter BEGIN DELETE FROM adapter; END",
        "another database",
    ),
    "version 2": ("PRAGMA user_version = 2", "another database"),
}


@pytest.mark.parametrize(("statement", "words"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_refused(
    statement: str, words: str, tmp_path: Path, run_verb: Callable[..., Any]
) -> None:
    path = tmp_path / "p"
    ff.Pool.create(path, {"a": make()}).close()
    damaged(path, statement)
    with pytest.raises(BadInputError, match=words):
        ff.Pool(path)["a"]
    assert run_verb("inspect", path).code == 3
    assert run_verb("unpack", path, "-o", tmp_path / "out").code == 3
    assert os.listdir(tmp_path) == ["p"]


RENAMED = {
    "exchanged": "UPDATE adapter SET name = CASE name WHEN 'a' THEN 'c' ELSE 'a' END",
    "no text": "UPDATE adapter SET name = x'61' WHERE name = 'a'",
    "no UTF-8": "UPDATE adapter SET name = CAST(x'ff' AS TEXT) WHERE name = 'a'",
}


@pytest.mark.parametrize("statement", RENAMED.values(), ids=RENAMED.keys())
def test_damaged_names_are_refused(
    statement: str, tmp_path: Path, run_verb: Callable[..., Any]
) -> None:
    path = tmp_path / "p"
    ff.Pool.create(path, {"a": make(1), "b": make(2)}).close()
    with pytest.raises(BadInputError):
        dict(ff.Pool(damaged(path, statement)))
    assert run_verb("inspect", path).code == 3


def test_damaged_tables_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p"
    ff.Pool.create(path, {"a": make()}).close()
    path.write_bytes(path.read_bytes().replace(b"TEXT PRIMARY", b"TEXT PRIM\xffRY"))
    with pytest.raises(BadInputError):
        ff.Pool(path)  # SQLite's message holds the bytes
    with pytest.raises(UsageError, match="1 to 200"):
        ff.Pool.create(tmp_path / "q", {"a\udcff": make()})


def test_other_files_are_no_pools(tmp_path: Path, stories_bundle: Path) -> None:
    cut = tmp_path / "cut"
    ff.Pool.create(cut, {str(i): make(i) for i in range(20)}).close()
    cut.write_bytes(cut.read_bytes()[:5000])
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (stories_bundle, cut, fifo):
        with pytest.raises(BadInputError):
            dict(ff.Pool(path))


def test_sizes(tmp_path: Path) -> None:
    """2 % above the coefficients of MiniLM's adapters, each with a seed of its own."""
    names = [f"encoder.layer.{i}.attention.self.{p}" for i in range(6) for p in ("query", "value")]
    mark = Fingerprint("F32", b"d" * 16, b"s" * 16)

    def adapter(seed: int) -> ff.Bundle:
        digest = entries_sha256(spectral_entries(seed, (384, 384), 1000, "small"))
        layers = tuple(
            LayerSpec(name, 1000, (384, 384), False, "small", digest, mark) for name in names
        )
        spectra = {name: np.full(1000, seed, np.float32) for name in names}
        return ff.Bundle.build(AdapterSpec(seed, 150.0, layers, "SEQ_CLS", "base"), spectra)

    path = tmp_path / "p"
    ff.Pool.create(path, {f"tenant-{i:04}": adapter(i) for i in range(300)}).close()
    assert path.stat().st_size <= 300 * 48_000 * 1.02


# --- through the command line --------------------------------------------------------------------


def test_the_command_line(
    tiny_base: Any,
    tiny_adapter: Any,
    tiny_bundle: Any,
    tmp_path: Path,
    run_verb: Callable[..., Any],
) -> None:
    path = tmp_path / "tenants.fourierft.pool"
    query = {"target_modules": ["query"]}
    first, second = tiny_adapter("bert-cls", 1, **query), tiny_adapter("bert-cls", 2, **query)
    words = ["pack", "--pool", "-o", path, "--base", tiny_base("bert-cls")]
    made = run_verb(*words, f"one={first}", f"two={second}")
    assert made.code == 0, made.err
    assert (made.json["pool"]["adapters"], made.json["pool"]["added"]) == (2, ["one", "two"])
    assert run_verb(*words, first).code == 2  # it exists
    third = tiny_bundle("bert-cls", 3, **query)
    changed = run_verb("pack", "--pool", "-o", path, "--append", third, "--remove", "one")
    assert changed.json["pool"]["removed"] == ["one"]
    assert sorted(ff.Pool(path)) == ["tiny", "two"]
    assert ff.Pool(path)["tiny"].to_bytes() == third.read_bytes()
    facts = run_verb("inspect", path).json["inspect"]
    assert (facts["kind"], facts["names"]) == ("pool", ["tiny", "two"])
    assert facts["groups"][0]["n_frequency"] == 24
    # One adapter of a pool, wherever a bundle is named.
    assert run_verb("unpack", f"{path}#two", "-o", tmp_path / "peft").code == 0
    (spectrum, *_) = ff.from_peft(tmp_path / "peft").spectra.values()
    assert spectrum.tobytes() == next(iter(ff.from_peft(second).spectra.values())).tobytes()
    merged = ["merge", "--base", tiny_base("bert-cls"), "-o", tmp_path / "merged", "--bundle"]
    assert run_verb(*merged, path).code == 2  # which of the two?
    assert run_verb(*merged, f"{path}#three").code == 2
    assert run_verb(*merged, f"{path}#tiny").code == 0
    for bad in (
        ["--pool", third, "--paper-scaling", 3],
        ["--pool", third, "--paper-seed", 0],
        ["--pool", first, first],
        ["--pool"],
        [first, second],
        [first, "--append"],
    ):
        assert run_verb("pack", *bad, "-o", tmp_path / "x").code == 2
    assert run_verb("pack", "--pool", "--append", first, "-o", tmp_path / "none").code == 6


def test_onnx_takes_a_pool(tmp_path: Path) -> None:
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()).eval()
    x = torch.randn(2, 8)
    named = model.named_parameters()
    weights = [onnx.numpy_helper.from_array(p.detach().numpy(), name) for name, p in named]
    adapters, wanted = {}, {}
    for seed in (1, 2):
        config = ff.FourierFTConfig(n_frequency=9, target_modules=["0"], random_loc_seed=seed)
        ff.inject(model, config, str(seed))
        adapters[f"t{seed}"] = ff.capture(model, str(seed))
        ff.activate(model, str(seed))
        wanted[f"t{seed}"] = model(x).detach().numpy()
    ff.detach(model)
    path = tmp_path / "p"
    ff.Pool.create(path, adapters).close()
    ff.attach(model, f"{path}#t1", "first")
    np.testing.assert_array_equal(model(x).detach().numpy(), wanted["t1"])
    ff.export_onnx(model, x, tmp_path / "swap.onnx", mode="swappable")
    session = ff.AdapterSession(tmp_path / "swap.onnx")
    session.load_pool(path)
    assert session.adapters == ()  # each is read when a run names it
    with pytest.raises(UsageError):
        session.run({"input": x.numpy()}, "t3")
    for name, want in wanted.items():
        found = session.run({"input": x.numpy()}, name)["output"]
        np.testing.assert_allclose(found, want, atol=1e-5)
    # Every adapter of a pool, in one bank made of another tool's file.
    node = onnx.helper.make_node("Gemm", ["x", "0.weight", "0.bias"], ["h"], transB=1)
    relu = onnx.helper.make_node("Relu", ["h"], ["y"])
    info = [onnx.helper.make_tensor_value_info(name, 1, ["batch", 8]) for name in "xy"]
    graph = onnx.helper.make_graph([node, relu], "g", info[:1], info[1:], weights)
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "plain.onnx"
    )
    ff.apply_onnx(tmp_path / "plain.onnx", path, tmp_path / "bank.onnx", mode="bank")
    bank = ort.InferenceSession(tmp_path / "bank.onnx", providers=["CPUExecutionProvider"])
    (found,) = bank.run(None, {"x": x.numpy(), "adapter_id": np.array([1, 2])})
    for row, want in enumerate(wanted.values()):
        np.testing.assert_allclose(found[row], want[row], atol=1e-5)
