"""Files of a base with fields that make no sense, and ONNX files: one printable line, exit 3."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import ViTImageProcessor

import fourierft_export as ff
from fourierft_export.cli.main import run
from fourierft_export.errors import BadInputError

ESC = "\x1b[31m"
Change = dict[str, Any]
EXPORT = "export --base base --bundle bundle --mode merged -o out.onnx"
PEFT = "validate --base base --peft adapter --samples 2"
TRAIN = "train --model base --task text-classification --data rows.tsv --steps 1 -o out"
IMAGES = "validate --base base --bundle bundle --inputs images"
VALIDATE = "validate --base base --bundle bundle --samples 2"
LEARN = "train --model base --task image-classification --data classes --steps 1 -o out"


@pytest.fixture(scope="module")
def text_model(minilm_dir: Path, tiny_base: Any, tiny_adapter: Any, tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("text")
    make(folder, tiny_base("bert-cls"), tiny_adapter("bert-cls", target_modules=["query"]))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(minilm_dir / name, folder / "base")
    (folder / "rows.tsv").write_text("text\tlabel\n" + "a film\t0\na plot\t1\n" * 3)
    return folder


@pytest.fixture(scope="module")
def image_model(tiny_base: Any, tiny_adapter: Any, tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("images")
    make(folder, tiny_base("vit"), tiny_adapter("vit", target_modules=["q_proj"]))
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "base")
    for name in ("images", "classes/a", "classes/b"):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((9, 7, 3), 60 * i + 60, np.uint8)).save(
                folder / name / f"{i}.png"
            )
    return folder


@pytest.fixture
def here(text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the text model's folder, which is the working folder."""
    shutil.copytree(text_model, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(folder: Path, base: Path, adapter: Path) -> None:
    shutil.copytree(base, folder / "base")
    shutil.copytree(adapter, folder / "adapter")
    ff.from_peft(adapter, base=base).save(folder / "bundle")


TEXT, TOKENS, PIXELS = "config.json", "tokenizer_config.json", "preprocessor_config.json"
# The file of the base; the fields that are changed in it; a piece of the line.
CASES: dict[str, tuple[str, Change, str]] = {
    "a size as text": (TEXT, {"hidden_size": "x"}, "hidden_size"),
    "a size below 0": (TEXT, {"hidden_size": -1}, ""),
    "a size of 400 digits": (TEXT, {"hidden_size": 10**400}, ""),
    "no heads": (TEXT, {"num_attention_heads": 0}, ""),
    "a share as text": (TEXT, {"hidden_dropout_prob": "x"}, "hidden_dropout_prob"),
    "half a layer": (TEXT, {"num_hidden_layers": 2.5}, "num_hidden_layers"),
    "9,999 layers": (TEXT, {"num_hidden_layers": 9999}, "num_hidden_layers of at most"),
    "5,000,000 labels": (TEXT, {"num_labels": 5_000_000}, "num_labels of at most"),
    "a part's part": (TEXT, {"a": {"b": [{"depths": [2, 10**6]}]}}, "depths of at most"),
    "a flag as text": (TEXT, {"output_hidden_states": "x"}, "output_hidden_states true or"),
    "labels as a number": (TEXT, {"id2label": 5}, ""),
    "a kind with an escape": (TEXT, {"model_type": ESC}, ""),
    "a kind that is a list": (TEXT, {"model_type": ["bert"]}, ""),
    "an activation with an escape": (TEXT, {"hidden_act": ESC}, ""),
    "a tokenizer's class as a number": (TOKENS, {"tokenizer_class": 5}, "tokenizer"),
    "a tokenizer that is a model": (TOKENS, {"tokenizer_class": "BertModel"}, "which is none"),
    "tokens as a number": (TOKENS, {"added_tokens_decoder": 5}, "tokenizer"),
    "another tokenizer.json": ("tokenizer.json", {"version": ESC}, "tokenizer"),
    "an unknown tokenizer": ("tokenizer.json", {"model": {"type": ESC}}, "tokenizer"),
    "a vocabulary of negative ids": ("tokenizer.json", {"model": {"vocab": {"a": -1}}}, ""),
    "images of size 0": (PIXELS, {"size": {"height": 0, "width": 0}}, "image processor"),
    "images of 10^18 pixels": (PIXELS, {"size": {"height": 10**9, "width": 10**9}}, "pixels"),
    "a crop of 10^16 pixels": (PIXELS, {"crop_size": 10**8, "do_center_crop": True}, "pixels"),
    "a mean of two": (PIXELS, {"image_mean": [0, 0]}, "mean"),
    "a deviation of 0": (PIXELS, {"image_std": [0, 0, 0]}, "NaN or infinity"),
    "a factor of 1e308": (PIXELS, {"rescale_factor": 1e308}, "NaN or infinity"),
    "a factor as text": (PIXELS, {"rescale_factor": "x"}, ""),
    "a processor's class as a number": (PIXELS, {"image_processor_type": 5}, ""),
    "a processor that is a model": (PIXELS, {"image_processor_type": "BertModel"}, "which is none"),
}
COMMANDS = {TEXT: (EXPORT, PEFT, TRAIN), PIXELS: (IMAGES, LEARN)}


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_the_base(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file, change, words = CASES[name]
    source = request.getfixturevalue("image_model" if file == PIXELS else "text_model")
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    path = Path("base", file)
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change))
    before = sorted(Path().rglob("*"))
    for command in COMMANDS.get(file, (PEFT, TRAIN)):
        capfd.readouterr()
        assert run(command.split()) == 3, command
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("error: base") and words in line, line
        assert len(line) <= 500 and line.isprintable()
    with pytest.raises(BadInputError, match=words):
        ff.validate(base="base", bundle="bundle", inputs="images" if file == PIXELS else None)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("verb", ["inspect", "recover", "apply", "validate"])
def test_an_empty_onnx_file_is_called_empty(
    verb: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("m.onnx").touch()
    words = {
        "inspect": "inspect m.onnx",
        "recover": "recover --onnx m.onnx -o out",
        "apply": "apply --onnx m.onnx --bundle bundle --mode merged -o out",
        "validate": f"{VALIDATE} --onnx m.onnx",
    }[verb]
    assert run(words.split()) == 3
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: m.onnx: ") and "an empty file" in line


def test_names_in_an_onnx_file_that_another_library_prints(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime repeats names of inputs and nodes: they are escaped, with --debug, too."""
    name = f"{ESC}{'x' * 10**6}"
    ends = [onnx.helper.make_tensor_value_info(n, 7, ["n", "m"]) for n in ("input_ids", "logits")]
    node = onnx.helper.make_node(f"{ESC}Op", ["input_ids"], ["logits"], name=name)
    graph = onnx.helper.make_graph([node], name, ends[:1], ends[1:])
    for domain in ("", f"x{ESC}"):
        node.domain = domain
        graph.node[0].CopyFrom(node)
        opsets = [onnx.helper.make_opsetid(d, 18) for d in {"", domain}]
        Path("m.onnx").write_bytes(
            onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
        )
        for more in ([], ["--debug"]):
            words = f"{VALIDATE} --onnx m.onnx".split()
            assert run([*words, *more]) in (3, 4)
            shown = capfd.readouterr().err
            assert shown.replace("\n", "").isprintable()
            *_, line = shown.splitlines()
            assert len(line) <= 500


def test_a_name_of_a_megabyte(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tensors = load_file("adapter/adapter_model.safetensors")
    tensors[ESC + "n" * 10**6] = np.ones(3, np.float32)
    save_file(tensors, "adapter/adapter_model.safetensors", metadata={"format": "pt"})
    for command in ("inspect adapter", "pack adapter -o out", "diff bundle adapter"):
        assert run(command.split()) == 3
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 2
        assert all(len(line) <= 500 and line.isprintable() for line in lines)
