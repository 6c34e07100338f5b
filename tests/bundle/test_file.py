"""The bundle: golden bytes, what build refuses, binding, entries, saving."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fourierft_export import Bundle
from fourierft_export.bundle.spec import AdapterSpec, Fingerprint, LayerSpec
from fourierft_export.errors import BadInputError, BaseMismatchError, FileAccessError, UsageError
from fourierft_export.models.base_tensors import open_base
from fourierft_export.spectral.entries import entries_sha256, spectral_entries

GOLDEN = Path(__file__).parent.parent / "golden"
EXPLICIT = np.array([[0, 0], [2, 3], [1, 1]])


def golden_bundle() -> Bundle:
    """A bundle with something of everything: three groups, all kinds of tensors, a PEFT config."""
    small = spectral_entries(777, (6, 4), 5, "small")
    layers = [
        *(
            LayerSpec(
                f"encoder.{i}.{name}",
                5,
                (6, 4),
                False,
                "small",
                entries_sha256(small),
                Fingerprint("BF16", bytes(range(i, i + 16)), bytes(range(100 + i, 116 + i))),
            )
            for i in (0, 1, 10)
            for name in ("q", "v")
        ),
        LayerSpec("head-1.{x}", 3, (4, 4), True, "explicit", entries_sha256(EXPLICIT)),
        LayerSpec("pooler", 2),
    ]
    spectra = {
        layer.name: np.arange(layer.n_frequency, dtype=np.float32) + 10 * i
        for i, layer in enumerate(layers)
    }
    spectra["pooler"] = np.array([0.5, -1.5], ml_dtypes.bfloat16)
    spectra["head-1.{x}"] = spectra["head-1.{x}"].astype(np.float16)
    config = {
        "peft_type": "FOURIERFT",
        "n_frequency": 5,
        "n_frequency_pattern": {"pooler": 2},
        "target_modules": ["q", "v"],
        "random_loc_seed": 777,
        "scaling": 150.0,
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": "ünïcode/base",
        "peft_version": "0.17.0",
    }
    spec = AdapterSpec(777, 150.0, tuple(layers), "SEQ_CLS", "ünïcode/base", config)
    saved = {
        "classifier.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "classifier.bias": np.array([1, 2], np.float16),
        "steps": np.array(7, np.int64),
        "mask": np.array([True, False, True]),
    }
    return Bundle.build(spec, spectra, saved, {"head-1.{x}": EXPLICIT})


def same(a: Bundle, b: Bundle) -> bool:
    """Equal specs, and arrays of equal dtype and bytes."""
    pairs = ((a.spectra, b.spectra), (a.saved, b.saved), (a.explicit_entries, b.explicit_entries))
    return a.spec == b.spec and all(
        list(x) == list(y)
        and all(
            x[k].dtype == y[k].dtype and x[k].shape == y[k].shape
            and x[k].tobytes() == y[k].tobytes()
            for k in x
        )
        for x, y in pairs
    )  # fmt: skip


# --- the bytes -----------------------------------------------------------------------------------


def test_golden_bytes() -> None:
    """A change of these bytes is a change of the format: it needs a new version."""
    path = GOLDEN / "everything.fourierft.safetensors"
    assert golden_bundle().to_bytes() == path.read_bytes()
    assert same(Bundle.load(path), golden_bundle())


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    path = golden_bundle().save(tmp_path / "a.safetensors")
    with safe_open(path, "np") as file:
        text, digest = file.metadata()["fourierft"], file.metadata()["sha256"]
    tensors = load_file(path)
    assert tensors["fourierft.spectrum.0"][2].tolist() == [20, 21, 22, 23, 24]  # encoder.1.q
    assert tensors["fourierft.entries.1"].tolist() == EXPLICIT.tolist()
    assert json.loads(text)["groups"][0]["layers"] == ["encoder.{0-1,10}.{q,v}"]
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    order = [(n, header[n]["dtype"], header[n]["shape"]) for n in header if n != "__metadata__"]
    table = json.dumps(order, separators=(",", ":"))
    assert hashlib.sha256(f"{text}\n{table}\n".encode() + data[start:]).hexdigest() == digest
    assert golden_bundle().sha256 == digest


def test_the_same_content_gives_the_same_bytes() -> None:
    """However it was put together, and after a trip through bytes."""
    bundle = golden_bundle()
    spec = replace(
        bundle.spec,
        layers=bundle.layers[::-1],
        peft_config=dict(reversed(bundle.spec.peft_config.items())),
    )
    other = Bundle.build(
        spec,
        {name: np.asfortranarray(a) for name, a in reversed(bundle.spectra.items())},
        {name: a.astype(a.dtype.newbyteorder(">")) for name, a in reversed(bundle.saved.items())},
        {name: a.astype(np.int32) for name, a in bundle.explicit_entries.items()},
    )
    assert other.to_bytes() == bundle.to_bytes()
    assert all(array.dtype.isnative for array in other.saved.values())  # torch takes no others
    assert Bundle.from_bytes(bundle.to_bytes()).to_bytes() == bundle.to_bytes()


LAYER_NAMES = st.lists(
    st.sampled_from(["a", "b", "0", "1", "2", "11", "q-x", "{", "é"]), min_size=1, max_size=3
).map(".".join)
DTYPES = st.sampled_from([np.float32, np.float16, np.float64, ml_dtypes.bfloat16])


@st.composite
def bundles(draw: st.DrawFn) -> Bundle:
    """Bundles of all kinds of layers."""
    seed = draw(st.integers(-(2**63), 2**64 - 1))
    layers, spectra, explicit = [], {}, {}
    for name in draw(st.sets(LAYER_NAMES, min_size=1, max_size=8)):
        n = draw(st.integers(1, 4))
        kind = draw(st.sampled_from(["unbound", "small", "r64", "explicit"]))
        layer = LayerSpec(name, n)
        if kind != "unbound":
            shape = (draw(st.integers(2, 5)), draw(st.integers(2, 5)))
            rule = "small" if kind == "explicit" else kind
            entries = spectral_entries(draw(st.integers(0, 2)), shape, n, rule)
            mark = draw(st.sampled_from([None, Fingerprint("F32", b"d" * 16, b"s" * 16)]))
            turned = draw(st.booleans())
            layer = LayerSpec(name, n, shape, turned, kind, entries_sha256(entries), mark)
            if kind == "explicit":
                explicit[name] = entries
        layers.append(layer)
        spectra[name] = np.arange(n).astype(draw(DTYPES))
    scaling = draw(st.one_of(st.integers(-1000, 1000), st.floats(-1e30, 1e30)))
    config = draw(st.dictionaries(st.sampled_from(["bias", "n_frequency", "zzz"]), st.integers()))
    task = draw(st.sampled_from([None, "CAUSAL_LM"]))
    spec = AdapterSpec(seed, scaling, tuple(layers), task, task, config)
    saved = {f"saved.{i}": np.zeros((i, 3)) for i in range(draw(st.integers(0, 2)))}
    return Bundle.build(spec, spectra, saved, explicit)


@given(bundles())
@settings(deadline=None)
def test_any_bundle_comes_back_as_it_was(bundle: Bundle) -> None:
    again = Bundle.from_bytes(bundle.to_bytes())
    assert same(again, bundle)
    assert type(again.spec.scaling) is type(bundle.spec.scaling)
    assert again.to_bytes() == bundle.to_bytes()


# --- what build refuses --------------------------------------------------------------------------

ONE = LayerSpec("a", 2)
GOOD_SPEC = AdapterSpec(0, 1.0, (ONE,))
PAIR = np.ones(2, np.float32)
SHA = entries_sha256(spectral_entries(0, (2, 2), 2, "small"))
BOUND = LayerSpec("a", 2, (2, 2), False, "small", SHA)

EXPLICIT_ONE = replace(BOUND, entry_rule="explicit")


def one(layer: LayerSpec, spectrum: Any = PAIR, entries: Any = None) -> dict[str, Any]:
    explicit = None if entries is None else {layer.name: np.array(entries)}
    spec = AdapterSpec(0, 1.0, (layer,))
    return {"spec": spec, "spectra": {layer.name: spectrum}, "explicit_entries": explicit}


# What a file can say, too, is in test_hostile.py.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "scaling NaN": ({"spec": replace(GOOD_SPEC, scaling=float("nan"))}, "scaling"),
    "a layer twice": ({"spec": AdapterSpec(0, 1.0, (ONE, ONE))}, "twice"),
    "no spectrum": ({"spectra": {}}, "spectrum"),
    "spectrum of two axes": ({"spectra": {"a": np.ones((2, 1))}}, "found shape \\[2, 1\\]"),
    "spectrum of complex128": ({"spectra": {"a": np.ones(2, np.complex128)}}, "complex128"),
    "spectrum of text": ({"spectra": {"a": np.array(["x", "y"])}}, "no float"),
    "shape just too large": (one(replace(BOUND, shape=(2**33 + 1, 1))), "outside 1 to 2\\^33"),
    "explicit entry outside": (one(EXPLICIT_ONE, entries=[[0, 0], [0, 2]]), "outside"),
    "explicit entry above 2^32": (
        one(replace(EXPLICIT_ONE, shape=(2**33, 1)), entries=[[2**32, 0], [0, 0]]),
        "outside",
    ),
    "explicit entry twice": (one(EXPLICIT_ONE, entries=[[1, 0], [1, 0]]), "twice"),
    "explicit entries of floats": (one(EXPLICIT_ONE, entries=np.ones((2, 2))), "explicit entries"),
    "the header's own name": ({"saved": {"__metadata__": PAIR}}, "reserved"),
    "saved tensor of objects": ({"saved": {"x": np.array([None])}}, "object"),
    "name with an empty segment": (one(LayerSpec("a..b", 2)), "empty segment"),
    "name of 1,001 characters": (one(LayerSpec("a" * 1001, 2)), "longer than 1000"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_build_refuses(change: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        Bundle.build(**{"spec": GOOD_SPEC, "spectra": {"a": PAIR}, **change})


def test_build_lists_every_offender() -> None:
    layers = (LayerSpec("a", 2), LayerSpec("b", 2), LayerSpec("c", 2), LayerSpec("d", 2))
    spectra = {"a": PAIR, "b": np.array([np.nan, 1]), "d": np.ones(5)}
    with pytest.raises(BadInputError) as caught:
        Bundle.build(AdapterSpec(2**80, 1.0, layers), spectra, {"fourierft.x": PAIR}, where="W")
    assert caught.value.where == "W"
    assert [line.split(":")[0].split()[-1] for line in caught.value.offenders] == [
        str(2**80), "b", "c", "d", "'fourierft.x'"
    ]  # fmt: skip


# --- immutability --------------------------------------------------------------------------------


def test_nothing_of_a_bundle_changes() -> None:
    spectrum, config = np.ones(2, np.float32), {"peft_type": "FOURIERFT"}
    bundle = Bundle.build(
        AdapterSpec(0, 1.0, (ONE,), peft_config=config), {"a": spectrum}, {"w": spectrum}
    )
    spectrum[0] = 5
    config["peft_type"] = "LORA"
    assert bundle.spec.peft_config["peft_type"] == "FOURIERFT"
    for array in (bundle.spectra["a"], bundle.saved["w"]):
        assert array.tolist() == [1, 1]
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 2
    with pytest.raises(FrozenInstanceError):
        bundle.spec.seed = 3  # type: ignore[misc]


# --- entries -------------------------------------------------------------------------------------


def test_entries_come_from_seed_rule_or_file() -> None:
    bundle = golden_bundle()
    assert bundle.entries("encoder.1.q").tolist() == (
        spectral_entries(777, (6, 4), 5, "small").tolist()
    )
    assert bundle.entries("head-1.{x}").tolist() == EXPLICIT.tolist()
    with pytest.raises(BadInputError, match="layer pooler: expected a bound bundle"):
        bundle.entries("pooler")
    with pytest.raises(KeyError):
        bundle.entries("unknown")


@pytest.mark.parametrize("rule", ["small", "r64"])
@pytest.mark.parametrize("seed", [0, 777, -1, 2**32 + 5, 2**64 - 1, -(2**63)])
def test_entries_take_the_seed_modulo_2_to_32(seed: int, rule: str) -> None:
    wanted = spectral_entries(seed % 2**32, (2, 2), 2, rule)
    layer = replace(BOUND, entry_rule=rule, entries_sha256=entries_sha256(wanted))
    bundle = Bundle.build(AdapterSpec(seed, 1.0, (layer,)), {"a": PAIR})
    assert bundle.entries("a").tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("seed", "layer", "explicit"),
    [
        (1, BOUND, {}),
        (0, replace(BOUND, entries_sha256="0" * 64), {}),
        (0, EXPLICIT_ONE, {"a": np.array([[0, 0], [1, 1]])}),
    ],
)
def test_entries_with_another_hash_are_refused_where_they_are_used(
    seed: int, layer: LayerSpec, explicit: dict[str, Any]
) -> None:
    """Opening derives no entries: for large layers that takes seconds."""
    built = Bundle.build(AdapterSpec(seed, 1.0, (layer,)), {"a": PAIR}, None, explicit)
    loaded = Bundle.from_bytes(built.to_bytes())
    with pytest.raises(BadInputError, match="layer a: expected entries with sha256"):
        loaded.entries("a")


# --- binding -------------------------------------------------------------------------------------

SHAPES = {"enc.0.q": (6, 4), "enc.0.v": (5, 4), "enc.1.q": (6, 4)}


@pytest.fixture
def base_file(tmp_path: Path) -> Callable[..., Path]:
    """`base_file(dtype=np.float32, **replaced)`: a checkpoint of one file with three layers."""

    def make(dtype: Any = np.float32, name: str = "base", **replaced: Any) -> Path:
        rng = np.random.default_rng(0)
        tensors = {
            f"{layer}.weight": (rng.standard_normal(shape) * 0.1).astype(np.float32).astype(dtype)
            for layer, shape in SHAPES.items()
        }
        tensors.update({key.replace("__", "."): value for key, value in replaced.items()})
        path = tmp_path / f"{name}.safetensors"
        save_file({key: value for key, value in tensors.items() if value is not None}, path)
        return path

    return make


@pytest.fixture
def unbound() -> Bundle:
    layers = tuple(LayerSpec(name, 3) for name in SHAPES)
    spectra = {name: np.arange(3, dtype=np.float32) for name in SHAPES}
    return Bundle.build(AdapterSpec(5, 2, layers), spectra)


def test_bind_fills_in_what_a_base_knows(unbound: Bundle, base_file: Callable[..., Path]) -> None:
    path = base_file()
    bound = unbound.bind(path)
    assert not unbound.is_bound  # a transform returns something new
    assert bound.is_bound
    assert {layer.name: layer.shape for layer in bound.layers} == SHAPES
    assert all(layer.entry_rule == "small" for layer in bound.layers)
    for name, shape in SHAPES.items():
        assert bound.entries(name).tolist() == spectral_entries(5, shape, 3, "small").tolist()
        stored = load_file(path)[f"{name}.weight"]
        mark = bound.layer(name).fingerprint
        assert mark is not None
        assert mark.digest == hashlib.sha256(stored.tobytes()).digest()[:16]
    assert bound.bind(open_base(path)).to_bytes() == bound.to_bytes()
    assert same(Bundle.from_bytes(bound.to_bytes()), bound)


def test_bind_by_the_rule_that_is_named(unbound: Bundle, base_file: Callable[..., Path]) -> None:
    bound = unbound.bind(base_file(), "r64")
    assert bound.entries("enc.0.q").tolist() == spectral_entries(5, (6, 4), 3, "r64").tolist()
    assert bound.bind(base_file(), "small").layers == bound.layers  # a bound rule stays


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_the_same_base_in_another_precision_binds(
    dtype: Any, unbound: Bundle, base_file: Callable[..., Path]
) -> None:
    bound = unbound.bind(base_file())
    assert bound.bind(base_file(dtype, "cast")).to_bytes() == bound.to_bytes()


def test_bind_lists_every_layer_that_does_not_fit(
    unbound: Bundle, base_file: Callable[..., Path]
) -> None:
    bound = unbound.bind(base_file())
    other = base_file(
        name="other",
        enc__0__q__weight=np.zeros((6, 4), np.float32),
        enc__0__v__weight=np.zeros((4, 5), np.float32),
        enc__1__q__weight=None,
    )
    with pytest.raises(BaseMismatchError) as caught:
        bound.bind(other)
    assert caught.value.offenders == (
        "enc.0.v: shape [5, 4] expected, found [4, 5]",
        "enc.1.q: no tensor enc.1.q.weight (near: enc.0.q.weight)",
        "enc.0.q: another weight than the adapter was trained on",
    )
    assert caught.value.found == "3 layers or tensors that do not fit"
    large = Bundle.build(AdapterSpec(5, 2, (LayerSpec("enc.0.q", 25),)), {"enc.0.q": np.ones(25)})
    with pytest.raises(BaseMismatchError) as caught:
        large.bind(base_file())
    assert caught.value.offenders == ("enc.0.q: n_frequency 25 above the size of [6, 4]",)


# --- saving --------------------------------------------------------------------------------------


def test_save_is_atomic_refuses_what_exists_and_keeps_the_umask(tmp_path: Path) -> None:
    path, bundle = tmp_path / "b.fourierft.safetensors", golden_bundle()
    old = os.umask(0o027)
    try:
        assert bundle.save(path) == path
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == [path.name]
    with pytest.raises(UsageError, match="does not exist yet"):
        bundle.save(path)
    path.write_bytes(b"old")
    bundle.save(path, force=True)
    assert path.read_bytes() == bundle.to_bytes()
    assert same(Bundle.load(str(path)), bundle)
    with pytest.raises(FileAccessError, match="a folder to write to"):
        bundle.save(tmp_path / "nowhere" / "b")
    assert os.listdir(tmp_path) == [path.name]
