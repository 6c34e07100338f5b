"""PEFT adapter directories by hand: old, published, odd and hostile ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import fourierft_export as ff
from fourierft_export import Bundle, from_peft, to_peft
from fourierft_export.cli.main import run
from fourierft_export.errors import (
    BadInputError,
    BaseMismatchError,
    FileAccessError,
    FourierFTError,
    UsageError,
)

PREFIX = "base_model.model."
CONFIG: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": "someone/model",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "n_frequency": 3,
    "n_frequency_pattern": {},
    "peft_type": "FOURIERFT",
    "random_loc_seed": 777,
    "scaling": 150.0,
    "target_modules": ["q", "v"],
    "task_type": None,
}
MakeAdapter = Callable[..., Path]


@pytest.fixture
def adapter_dir(tmp_path: Path) -> MakeAdapter:
    """`make(name="adapter", tensors=None, drop=(), **fields)`: an adapter directory by hand."""

    def make(
        name: str = "adapter",
        tensors: Mapping[str, Any] | None = None,
        drop: tuple[str, ...] = (),
        **fields: Any,
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir(parents=True)
        config = {k: v for k, v in (CONFIG | fields).items() if k not in drop}
        (directory / "adapter_config.json").write_text(json.dumps(config), "utf-8")
        if tensors is None:
            tensors = {
                f"{PREFIX}l.{i}.{p}.fourierft_spectrum": np.arange(3, dtype=np.float32) + i
                for i in range(2)
                for p in "qv"
            }
        save_file(dict(tensors), directory / "adapter_model.safetensors")
        return directory

    return make


# --- configs of all ages -------------------------------------------------------------------------

PUBLISHED = ["flux2-klein", "llama-3.2-3B-default", "llama-3.2-3B-n_frequency-5000"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_come_back_as_they_were(
    name: str, published_dir: Path, adapter_dir: MakeAdapter, tmp_path: Path
) -> None:
    path = published_dir / f"{name}.adapter_config.json"
    config = json.loads(path.read_text("utf-8"))
    n = config["n_frequency"]
    spectrum = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    modules = config["target_modules"]
    tensors = {f"{PREFIX}layers.0.{name}.fourierft_spectrum": spectrum for name in modules}
    source = adapter_dir(tensors=tensors)
    (source / "adapter_config.json").write_bytes(path.read_bytes())
    bundle = from_peft(source)
    assert bundle.spec.scaling == config["scaling"]
    assert type(bundle.spec.scaling) is type(config["scaling"])
    assert {layer.n_frequency for layer in bundle.layers} == {n}
    assert config_after(bundle, tmp_path / "again") == config
    again = load_file(tmp_path / "again/adapter_model.safetensors")
    assert {k: v.tobytes() for k, v in again.items()} == {
        k: v.tobytes() for k, v in tensors.items()
    }


def config_after(bundle: Bundle, target: Path) -> Any:
    """The config of a bundle that went through its bytes and back to PEFT."""
    to_peft(Bundle.from_bytes(bundle.to_bytes()), target)
    return json.loads((target / "adapter_config.json").read_text("utf-8"))


FIELDS: dict[str, dict[str, Any]] = {
    "with unknown keys": {"later": {"a": [1, None, 2.5, "ü"]}, "zzz": True},
    "whole scaling": {"scaling": 300},
    "negative scaling": {"scaling": -0.1},
    "seed 0": {"random_loc_seed": 0},
    "highest seed": {"random_loc_seed": 2**64 - 1},
    "regex": {"target_modules": r".*\.(q|v)$"},
    "a single layer": {"layers_to_transform": 3, "n_frequency": 1000},
    "task and head": {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]},
    "mapping": {"auto_mapping": {"base_model_class": "M", "parent_library": "x.y"}},
    "floats that print long": {"scaling": 0.1 + 0.2},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_every_field_comes_back_as_it_was(
    fields: dict[str, Any], adapter_dir: MakeAdapter, tmp_path: Path
) -> None:
    found = config_after(from_peft(adapter_dir(**fields)), tmp_path / "again")
    assert json.dumps(found, sort_keys=True) == json.dumps(CONFIG | fields, sort_keys=True)


def test_absent_fields_stay_absent(adapter_dir: MakeAdapter, tmp_path: Path) -> None:
    for field in CONFIG.keys() - {"peft_type"}:
        bundle = from_peft(adapter_dir(field, drop=(field,)))
        assert (bundle.spec.seed, bundle.spec.scaling) == (777, 150)  # PEFT's defaults
        found = config_after(bundle, tmp_path / f"{field}-again")
        assert found == {k: v for k, v in CONFIG.items() if k != field}


# --- tensors -------------------------------------------------------------------------------------


def test_dense_tensors_lose_what_peft_adds_to_their_names(
    adapter_dir: MakeAdapter, tmp_path: Path
) -> None:
    tensors = {
        f"{PREFIX}bert.q.fourierft_spectrum": np.arange(3).astype(ml_dtypes.bfloat16),
        f"{PREFIX}bert.q.base_layer.bias": np.arange(4, dtype=np.float32),
        f"{PREFIX}bert.q.base_layer.weight": np.ones((4, 4), np.float32),
        f"{PREFIX}bert.other.bias": np.arange(2, dtype=np.float16),
        f"{PREFIX}bert.wrapped.base_layer.bias": np.arange(5, dtype=np.float64),
        f"{PREFIX}classifier.weight": np.ones((2, 4), np.float32),
    }
    bundle = from_peft(adapter_dir(tensors=tensors))
    assert {n: a.shape for n, a in bundle.saved.items()} == {
        "bert.other.bias": (2,),
        "bert.q.bias": (4,),
        "bert.wrapped.base_layer.bias": (5,),  # no layer of the adapter: PEFT did not name it so
        "classifier.weight": (2, 4),
    }
    to_peft(bundle, tmp_path / "again")
    again = load_file(tmp_path / "again/adapter_model.safetensors")
    del tensors[f"{PREFIX}bert.q.base_layer.weight"]
    assert {n: (a.dtype, a.tobytes()) for n, a in again.items()} == {
        n: (a.dtype, a.tobytes()) for n, a in tensors.items()
    }


SPECTRUM = np.ones(3, np.float32)
BAD_TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "found none"),
    "no prefix": ({"l.0.q.fourierft_spectrum": SPECTRUM}, "1 with other names"),
    "other names as well": (
        {f"{PREFIX}q.fourierft_spectrum": SPECTRUM, "w": SPECTRUM},
        "1 with other names",
    ),
    "an empty module": ({f"{PREFIX}.fourierft_spectrum": SPECTRUM}, "an empty segment"),
    "two axes": ({f"{PREFIX}q.fourierft_spectrum": np.ones((3, 1))}, "layer q: spectrum"),
    "no coefficients": ({f"{PREFIX}q.fourierft_spectrum": np.ones(0)}, "1 empty tensors"),
    "integers": ({f"{PREFIX}q.fourierft_spectrum": np.ones(3, np.int32)}, "no float"),
    "NaN": ({f"{PREFIX}q.fourierft_spectrum": np.array([np.nan])}, "layer q: NaN"),
    "reserved": (
        {f"{PREFIX}q.fourierft_spectrum": SPECTRUM, f"{PREFIX}fourierft.x": SPECTRUM},
        "reserved",
    ),
    "a bias twice": (
        {
            f"{PREFIX}q.fourierft_spectrum": SPECTRUM,
            f"{PREFIX}q.bias": SPECTRUM,
            f"{PREFIX}q.base_layer.bias": SPECTRUM,
        },
        "q.bias twice",
    ),
}


def check_pack_refuses(
    source: Path, error: type[FourierFTError], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The library refuses `source`, and `pack` does so in one line without an output."""
    with pytest.raises(error, match=words):
        from_peft(source)
    out = source.parent / "never.fourierft.safetensors"
    assert run(["pack", str(source), "-o", str(out)]) == error.exit_code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert len(shown.err.strip().split("\n")) <= 21
    assert shown.err.replace("\n", "").isprintable()
    assert not [p for p in os.listdir(source.parent) if p.startswith("never")]


@pytest.mark.parametrize(("tensors", "words"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_tensors_that_no_adapter_has(
    tensors: dict[str, Any], words: str, adapter_dir: MakeAdapter, capsys: Any
) -> None:
    check_pack_refuses(adapter_dir(tensors=tensors), BadInputError, words, capsys)


# --- configs that are refused --------------------------------------------------------------------

BAD_CONFIGS: dict[str, tuple[str, str]] = {
    "a list": ("[]", "type list"),
    "no type": ("{}", "type None"),
    "LoRA": ('{"peft_type": "LORA"}', "expected a PEFT adapter of type FOURIERFT, found type LORA"),
    "escape in the type": ('{"peft_type": "\\u001b[31mLORA"}', r"type \\x1b\[31mLORA"),
    "key twice": ('{"peft_type": "LORA", "peft_type": "FOURIERFT"}', "twice"),
    "nested": ("[" * 100_000 + "]" * 100_000, "nesting too deep"),
    "seed text": ('"random_loc_seed": "7"', "random_loc_seed 7"),
    "seed true": ('"random_loc_seed": true', "random_loc_seed True"),
    "seed null": ('"random_loc_seed": null', "random_loc_seed None"),
    "seed of 65 bits": ('"random_loc_seed": 18446744073709551616', "random_loc_seed 1844"),
    "scaling text": ('"scaling": "150"', "scaling 150"),
    "scaling NaN": ('"scaling": NaN', "the number NaN"),
    "scaling 1e39": ('"scaling": 1e39', "float32 number"),
    "base a list": ('"base_model_name_or_path": []', "text or null"),
    "task a number": ('"task_type": 5', "text or null"),
}


@pytest.mark.parametrize(("text", "words"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_configs_that_are_refused(
    text: str, words: str, adapter_dir: MakeAdapter, capsys: Any
) -> None:
    source = adapter_dir()
    if text.startswith('"'):
        text = '{"peft_type": "FOURIERFT", ' + text + "}"
    (source / "adapter_config.json").write_text(text, "utf-8")
    check_pack_refuses(source, BadInputError, words, capsys)


def test_a_pattern_that_explodes_is_never_run(
    adapter_dir: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    """`(\\w+\\.?)+!` would take longer than the test's time limit on names of this length."""
    evil = r"(\w+\.?)+!"
    name = "l." + "a" * 60
    source = adapter_dir(
        tensors={f"{PREFIX}{name}.fourierft_spectrum": SPECTRUM},
        target_modules=evil,
        exclude_modules=evil,
        layers_pattern=evil,
        n_frequency_pattern={evil: 5},
    )
    assert [layer.name for layer in from_peft(source).layers] == [name]
    assert run(["pack", str(source), "-o", f"{source}.safetensors"]) == 0
    assert run(["inspect", str(source)]) == 0
    assert evil in capsys.readouterr().out


def test_pickled_and_damaged_weights_are_refused(
    adapter_dir: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    source = adapter_dir()
    weights, pickled = source / "adapter_model.safetensors", source / "adapter_model.bin"
    weights.write_bytes(weights.read_bytes()[:-1])
    check_pack_refuses(source, BadInputError, "truncated", capsys)
    weights.unlink()
    check_pack_refuses(source, FileAccessError, "nothing there", capsys)
    pickled.write_bytes(b"\x80\x04.")
    check_pack_refuses(source, BadInputError, "found a pickle, which can run code", capsys)
    pickled.rename(weights)
    check_pack_refuses(source, BadInputError, "found a pickle", capsys)


# --- which directory -----------------------------------------------------------------------------


def test_paths_that_hold_no_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_pack_refuses(tmp_path / "missing", FileAccessError, "nothing there", capsys)
    file = tmp_path / "file"
    file.write_text("x")
    check_pack_refuses(file, BadInputError, "found a file", capsys)
    empty = tmp_path / "empty"
    empty.mkdir()
    check_pack_refuses(empty, BadInputError, "with adapter_config.json, found no such", capsys)


def test_adapters_in_subfolders(
    adapter_dir: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = adapter_dir("many/one", random_loc_seed=1)
    many = one.parent
    assert from_peft(many).spec.seed == 1  # the only one needs no name
    adapter_dir("many/two", random_loc_seed=2)
    check_pack_refuses(many, UsageError, "found several: one, two; name one with --adapter", capsys)
    assert from_peft(many, adapter="two").spec.seed == 2
    with pytest.raises(UsageError, match="in the subfolder 'three', found one, two"):
        from_peft(many, adapter="three")
    for hostile in ("../many/one", "/", "..", ".", "", "one/../one"):
        with pytest.raises(UsageError, match="in the subfolder"):
            from_peft(many, adapter=hostile)
    out = tmp_path / "two.safetensors"
    assert run(["pack", str(many), "--adapter", "two", "-o", str(out)]) == 0
    assert Bundle.load(out).spec.seed == 2
    capsys.readouterr()


# --- the base that the config names --------------------------------------------------------------


@pytest.fixture
def base_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "toy"}', "utf-8")
    rng = np.random.default_rng(0)
    tensors = {
        f"l.{i}.{p}.weight": rng.standard_normal((4, 4)).astype(np.float32)
        for i in range(2)
        for p in "qv"
    }
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_a_local_base_is_taken_by_itself_if_it_fits(
    adapter_dir: MakeAdapter, base_dir: Path, stories260k: Path
) -> None:
    """Nobody named it: a folder may just happen to have the name; named, it is an error."""
    assert not from_peft(adapter_dir("a")).is_bound
    taken = adapter_dir("b", base_model_name_or_path=str(base_dir))
    assert from_peft(taken).is_bound
    assert from_peft(taken).to_bytes() == from_peft(taken, base_dir).to_bytes()
    for name, path in (("c", f"{base_dir}-gone"), ("d", stories260k)):
        assert not from_peft(adapter_dir(name, base_model_name_or_path=str(path))).is_bound
    with pytest.raises(BaseMismatchError, match="4 layers") as caught:
        from_peft(taken, stories260k)
    assert len(caught.value.offenders) == 4
    (base_dir / "model.safetensors").rename(base_dir / "pytorch_model.bin")
    assert not from_peft(taken).is_bound
    with pytest.raises(BadInputError, match="pickled"):
        from_peft(taken, base_dir)


def test_to_peft_refuses_what_exists(adapter_dir: MakeAdapter, tmp_path: Path) -> None:
    source = adapter_dir()
    bundle = from_peft(source)
    with pytest.raises(UsageError, match="does not exist yet"):
        to_peft(bundle, source)
    (source / "stray").write_text("x")
    to_peft(bundle, source, force=True)
    assert sorted(os.listdir(source)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert from_peft(source).to_bytes() == bundle.to_bytes()
    assert sorted(os.listdir(tmp_path)) == ["adapter"]


def test_entries_that_follow_from_no_seed_are_refused(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    for seed in (5, 6):
        config = ff.FourierFTConfig(n_frequency=7, target_modules=["0"], random_loc_seed=seed)
        ff.inject(model, config, str(seed))
    ff.combine(model, {"5": 0.5, "6": 0.5}, "mix")
    with pytest.raises(UsageError, match="entries that follow from the seed"):
        ff.to_peft(ff.capture(model, "mix"), tmp_path / "mix")
    assert not (tmp_path / "mix").exists()


def test_an_entry_rule_without_a_base_is_refused(adapter_dir: MakeAdapter, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="entry rule: expected a base"):
        ff.from_peft(adapter_dir(), entry_rule="small")
