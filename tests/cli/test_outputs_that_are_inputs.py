"""No verb replaces a file that it reads, or writes into a folder that it reads, even by force."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import fourierft_export as ff
from fourierft_export.cli.main import run
from fourierft_export.errors import UsageError

BASE, ADAPTER = "base/model.safetensors", "adapter/adapter_model.safetensors"
ROWS = {
    "pack": ["pack adapter --base base -o {}", [BASE, ADAPTER, "base/new", "adapter/new"]],
    "unpack": ["unpack adapter/adapter_model.safetensors -o {}", [ADAPTER, "adapter"]],
    "merge": ["merge --base base --bundle adapter -o {}", ["base", "base/new", "adapter/new"]],
    "recover": [
        "recover --base base --merged merged --like adapter -o {}",
        [BASE, "merged/model.safetensors", "base/new", "merged/new", ADAPTER],
    ],
    "recover --onnx": ["recover --onnx model.onnx -o {}", ["model.onnx"]],
    "export": [
        "export --base base --bundle adapter --mode merged -o {}", [BASE, "base/new", ADAPTER],
    ],
    "apply": [
        "apply --onnx model.onnx --base base --bundle adapter --mode merged -o {}",
        ["model.onnx", BASE, "base/new", ADAPTER],
    ],
    "validate": [
        "validate --base base --peft adapter --merged merged --onnx model.onnx --inputs x.npz "
        "--report {}",
        [BASE, ADAPTER, "merged/model.safetensors", "model.onnx", "x.npz", "merged/new"],
    ],
    "validate --junit": [
        "validate --base base --peft adapter --merged merged --junit {}",
        [BASE, ADAPTER, "merged/new"],
    ],
    "inspect --plot": ["inspect adapter --plot {}", [ADAPTER, "adapter/new"]],
    "pack --pool": ["pack --pool adapter --base base -o {}", [BASE, ADAPTER, "base/new"]],
    "unpack --to lora": ["unpack adapter --base base --to lora -o {}", ["base", "base/new"]],
    "train": [
        "train --model base --data rows.csv -o {}", [BASE, "base/new", "rows.csv"],
    ],
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_an_output_never_damages_an_input(
    row: str, stories260k: Path, stories_adapter: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words, outputs = ROWS[row]
    assert isinstance(words, str)
    monkeypatch.chdir(tmp_path)
    folders = {"base": stories260k, "merged": stories260k, "adapter": stories_adapter}
    for name, source in folders.items():
        shutil.copytree(source, name)
    for name in ("model.onnx", "x.npz", "rows.csv"):
        Path(name).write_bytes(b"not read")
    before = contents(tmp_path)
    for out in outputs:
        for force in ([], ["--force"]):
            assert run([*words.format(out).split(), *force]) == 2, out
            assert "the input" in capsys.readouterr().err or row == "unpack", out
            assert contents(tmp_path) == before, out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_external_data_of_a_graph_is_an_input(
    stories_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stories_adapter, "adapter")
    value = onnx.numpy_helper.from_array(np.zeros(300, np.float32), "w")
    graph = onnx.helper.make_graph([], "g", [], [], [value])
    onnx.save(
        onnx.helper.make_model(graph), "model.onnx", save_as_external_data=True, location="w.bin",
        size_threshold=0,
    )  # fmt: skip
    before = contents(tmp_path)
    for words in (
        "recover --onnx model.onnx", "pack adapter --to onnx-inputs --onnx model.onnx",
        "apply --onnx model.onnx --bundle adapter --mode merged",
        "export --base adapter --bundle model.onnx --mode merged",
        "validate --onnx model.onnx --peft adapter --base adapter --report",
    ):  # fmt: skip
        out = [] if words.endswith("--report") else ["-o"]
        assert run([*words.split(), *out, "w.bin", "--force"]) == 2, words
    assert contents(tmp_path) == before


def test_the_base_that_an_adapters_config_names_is_an_input(
    stories260k: Path, stories_adapter: Path, tmp_path: Path
) -> None:
    shutil.copytree(stories260k, tmp_path / "base")
    shutil.copytree(stories_adapter, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    config.write_text(json.dumps(fields))
    before = contents(tmp_path)
    words = ["pack", str(tmp_path / "adapter"), "--force", "-o"]
    assert run([*words, str(tmp_path / "base" / "model.safetensors")]) == 2
    assert contents(tmp_path) == before
    assert run([*words, str(tmp_path / "bundle")]) == 0


def test_pairs_pools_and_functions(
    stories260k: Path, stories_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stories260k, "base")
    shutil.copytree(stories_adapter, "adapter")
    bundle = ff.from_peft("adapter", base="base")
    bundle.save("out.expand.onnx")
    bundle.save("bundle")
    Path("folder").mkdir()
    bundle.save("folder/bundle")
    assert run(["pack", "adapter", "--pool", "--base", "base", "-o", "po#ol"]) == 0
    before = contents(tmp_path)
    for words in (
        "export --base base --bundle out.expand.onnx --mode paired -o out.onnx --force",
        "export --base base --bundle po#ol#adapter --mode merged -o po#ol --force",
    ):
        assert run(words.split()) == 2, words
    calls: list[Callable[[], object]] = [
        lambda: ff.export_pretrained("base", "bundle", "bundle", force=True),
        lambda: ff.export_pretrained("base", ["bundle"], "base/model.safetensors", force=True),
        lambda: ff.apply_onnx("model.onnx", {"a": "bundle"}, "bundle", force=True),
        lambda: ff.merge_checkpoint("base", "adapter", "adapter/new"),
        lambda: ff.to_peft("folder/bundle", "folder", force=True),
        lambda: ff.to_lora("folder/bundle", "folder", rank=1, force=True),
    ]
    for number, call in enumerate(calls):
        with pytest.raises(UsageError, match="the input"):
            call()
        assert contents(tmp_path) == before, number
