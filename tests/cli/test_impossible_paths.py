"""Paths that no file can have, FIFOs and devices: one short line, wherever a path is given."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import fourierft_export as ff
from fourierft_export.cli.main import run
from fourierft_export.errors import FourierFTError
from tests.kill import files_in, make_inputs

BAD = {"empty": "", "NUL": "a\0b", "name": "y" * 245, "long": "y" * 5000, "deep": "d/" * 3000 + "x"}
# Each {} is given every bad path in turn; the other paths do not exist.
VERBS = """
pack {} -o out
pack a --base {} -o out
pack a -o {}
unpack {} -o out
unpack a -o {}
inspect {}
merge --base {} --bundle b -o out
merge --base a --bundle {} -o out
merge --base a --bundle b -o {}
verify {}
recover --base {} --merged b --like c -o out
recover --base a --merged {} --like c -o out
recover --base a --merged b --like {} -o out
recover --onnx {} -o out
recover --onnx a -o {}
export --base {} --bundle b --mode merged -o out
export --base a --bundle {} --mode merged -o out
export --base a --bundle b --mode merged -o {}
apply --onnx {} --bundle b --mode merged -o out
apply --onnx a --bundle {} --mode merged -o out
apply --onnx a --bundle b --base {} --mode merged -o out
apply --onnx a --bundle b --mode merged -o {}
validate --base {} --bundle b
validate --base a --bundle {}
validate --base a --peft {}
validate --base a --bundle b --merged {}
validate --base a --bundle b --onnx {}
validate --base a --bundle b --inputs {}
validate --base a --bundle b --report {}
train --model {} --data b -o out
train --model a --data {} -o out
train --config {} -o out
train --model a --data b -o {}
demo -o {}
""".strip().splitlines()


@pytest.mark.parametrize("line", VERBS)
def test_the_command_line_refuses_them(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in BAD.values():
        words = [path if word == "{}" else word for word in line.split(" ")]
        assert run(words) in (2, 6), words
        (text,) = capsys.readouterr().err.splitlines()
        assert len(text) <= 500
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "line",
    ["pack a -o {}", "recover --onnx a -o {}", "export --base a --bundle b --mode merged -o {}"],
)
def test_a_file_to_write_has_no_trailing_slash(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(line.format("out/").split()) == 2
    assert "found a path that ends in /" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["model", "data", "eval"])
def test_a_nul_in_a_file_of_settings(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fields = {"model": "a", "data": "b", "eval": "c"} | {place: "a\\u0000b"}
    Path("t.toml").write_text("".join(f'{key} = "{value}"\n' for key, value in fields.items()))
    assert run(["train", "--config", "t.toml", "--task", "text-generation", "-o", "out"]) == 2
    (text,) = capsys.readouterr().err.splitlines()
    assert "a NUL in the path" in text


CALLS: dict[str, Callable[[str, ff.Bundle, str], object]] = {
    "load": lambda path, bundle, base: ff.Bundle.load(path),
    "save": lambda path, bundle, base: bundle.save(path),
    "bind": lambda path, bundle, base: bundle.bind(path),
    "from_peft": lambda path, bundle, base: ff.from_peft(path),
    "to_peft": lambda path, bundle, base: ff.to_peft(bundle, path),
    "merge base": lambda path, bundle, base: ff.merge_checkpoint(path, bundle, "out"),
    "merge bundle": lambda path, bundle, base: ff.merge_checkpoint(base, path, "out"),
    "merge out": lambda path, bundle, base: ff.merge_checkpoint(base, bundle, path),
    "verify": lambda path, bundle, base: ff.verify_merged(path),
    "recover base": lambda path, bundle, base: ff.recover_bundle(path, base, like=bundle),
    "recover merged": lambda path, bundle, base: ff.recover_bundle(base, path, like=bundle),
    "recover_onnx": lambda path, bundle, base: ff.recover_onnx(path),
    "apply in": lambda path, bundle, base: ff.apply_onnx(path, bundle, "out.onnx"),
    "export base": lambda path, bundle, base: ff.export_pretrained(path, bundle, "out.onnx"),
    "session": lambda path, bundle, base: ff.AdapterSession(path),
    "validate base": lambda path, bundle, base: ff.validate(base=path, bundle=bundle),
    "validate onnx": lambda path, bundle, base: ff.validate(base=base, bundle=bundle, onnx=path),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_functions_refuse_them(
    name: str, stories260k: Path, stories_adapter: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    bundle = ff.from_peft(stories_adapter)
    for path in BAD.values():
        with pytest.raises(FourierFTError) as caught:
            CALLS[name](path, bundle, str(stories260k))
        assert caught.value.exit_code in (2, 6)
        assert len(str(caught.value)) <= 500
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    (folder / "rows.csv").write_text("text,label\na,0\n")
    (folder / "images" / "a").mkdir(parents=True)
    (folder / "strange").mkdir()
    os.mkfifo(folder / "strange" / "fifo")
    os.mkfifo(folder / "images" / "a" / "1.png")
    for name in ("config.json", "model.safetensors.index.json"):
        os.mkfifo(folder / "strange" / name)
    return folder


# Each {} is given a FIFO, and a device; the other paths are good.
SPECIAL = """
pack {} -o out
pack adapter --base {} -o out
unpack {} -o out
inspect {}
merge --base {} --bundle bundle -o out
merge --base base --bundle {} -o out
verify {}
recover --base {} --merged merged --like bundle -o out
recover --base base --merged {} --like bundle -o out
recover --base base --merged merged --like {} -o out
recover --onnx {} -o out
export --base {} --bundle bundle --mode merged -o out
export --base base --bundle {} --mode merged -o out
apply --onnx {} --bundle graph.bundle --mode merged -o out
apply --onnx graph.onnx --bundle {} --mode merged -o out
apply --onnx graph.onnx --bundle graph.bundle --base {} --mode merged -o out
validate --base {} --bundle bundle
validate --base base --bundle {}
validate --base base --peft {}
validate --base base --bundle bundle --merged {}
validate --base base --bundle bundle --onnx {}
validate --base base --bundle bundle --merged merged --inputs {}
train --model {} --task text-generation --data rows.jsonl -o out
train --model base --task text-generation --data {} -o out
train --model base --task text-classification --data {} -o out
train --config {} -o out
""".strip().splitlines()


@pytest.mark.parametrize("line", SPECIAL)
def test_fifos_and_devices_are_not_waited_for(
    line: str, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(inputs)
    for path in ("strange/fifo", "/dev/zero", "strange"):
        assert run(line.format(path).split()) in (2, 3, 6), path
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not Path("out").exists()


def test_images_that_are_fifos(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(inputs)
    words = "train --model base --task image-classification --data images -o out"
    assert run(words.split()) in (2, 3)
    assert len(capsys.readouterr().err.splitlines()) == 1


CONFIGS = [{"num_hidden_layers": 10**7}, {"num_labels": 10**9}, {"text_config": {"n_layer": 10**7}}]


@pytest.mark.parametrize("fields", CONFIGS)
def test_a_config_of_absurd_size(
    fields: dict[str, object], stories260k: Path, stories_adapter: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = json.loads((stories260k / "config.json").read_text()) | fields
    for name, data in files_in(stories260k).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for verb in ("pack {1} --base {0} -o {2}", "merge --base {0} --bundle {1} -o {2}",
                 "export --base {0} --bundle {1} --mode merged -o {2}",
                 "validate --base {0} --peft {1}"):  # fmt: skip
        words = verb.format(tmp_path, stories_adapter, f"{tmp_path}-out").split()
        assert run(words) == 3, verb
        (line,) = capsys.readouterr().err.splitlines()
        assert "of at most" in line


def test_an_index_of_very_many_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {f"l{i}": f"model-{i:06}.safetensors" for i in range(20_000)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    assert run(["inspect", str(tmp_path)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "at most 10,000 shards, found 20,000" in line


def test_bombs(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """128 MB of zeros in an npz file of 130 KB, 20 million rows in a parquet file of 230 KB."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(inputs)
    np.savez_compressed("bomb.npz", input_ids=np.zeros((2**21, 8), np.int64))
    text = pa.DictionaryArray.from_arrays(np.zeros(20_000_000, np.int8), ["a"])
    pq.write_table(pa.table({"text": text, "label": text}), "bomb.parquet")
    for words, says in (
        ("validate --base base --bundle bundle --merged merged --inputs bomb.npz", "above"),
        ("train --model base --task text-classification --data bomb.parquet -o out", "at most"),
    ):
        assert run(words.split()) == 3
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
