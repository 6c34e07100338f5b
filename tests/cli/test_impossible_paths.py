"""Paths that no file can have: one short line and exit code 2 or 6, wherever a path is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import fourierft_export as ff
from fourierft_export.cli.main import run
from fourierft_export.errors import FourierFTError

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
