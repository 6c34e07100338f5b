"""Given inputs are checked; default ones are real sentences with real padding."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fourierft_export.errors import BadInputError, FileAccessError, UsageError
from fourierft_export.proof.inputs import SENTENCES, default_inputs, given_inputs, has_tokenizer


def test_there_are_enough_different_sentences() -> None:
    assert len(set(SENTENCES)) == len(SENTENCES) >= 64
    lengths = [len(text.split()) for text in SENTENCES]
    assert min(lengths) == 1 and max(lengths) >= 25


def test_sentences_are_tokenised_by_the_models_own_tokenizer(minilm_dir: Path) -> None:
    from transformers import AutoTokenizer

    assert has_tokenizer(minilm_dir)
    inputs = default_inputs(tokenizer_dir=minilm_dir, vocab_size=None)
    expected = AutoTokenizer.from_pretrained(minilm_dir)(
        list(SENTENCES[:64]), padding=True, truncation=True, max_length=48, return_tensors="np"
    )
    assert set(inputs.arrays) == set(expected)
    for name, array in inputs.arrays.items():
        np.testing.assert_array_equal(array, expected[name])
    assert inputs.mask is not None and not inputs.mask.all()


def test_without_a_tokenizer_ids_are_fixed_and_within_the_vocabulary() -> None:
    first = default_inputs(tokenizer_dir=None, vocab_size=50, count=20, positions=30)
    again = default_inputs(tokenizer_dir=None, vocab_size=50, count=20, positions=30)
    ids, mask = first.arrays["input_ids"], first.arrays["attention_mask"]
    np.testing.assert_array_equal(ids, again.arrays["input_ids"])
    assert ids.shape[0] == 20 and ids.shape[1] <= 30
    assert ids.min() >= 0 and ids.max() < 50
    assert len(np.unique(ids)) > 40
    assert (ids[mask == 0] == 0).all() and not mask.all() and mask[:, 0].all()
    assert set(first.arrays) == {"input_ids", "attention_mask"}
    wide = default_inputs(tokenizer_dir=None, vocab_size=50, count=2, length=40, token_types=True)
    assert wide.arrays["token_type_ids"].shape == (2, 40)
    with pytest.raises(UsageError):
        default_inputs(tokenizer_dir=None, vocab_size=None)
    with pytest.raises(UsageError):
        default_inputs(tokenizer_dir=None, vocab_size=50, count=0)


def test_given_arrays_are_taken_as_they_are(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"pixels": np.ones((3, 4), np.float32), "flag": np.zeros(3, bool)}
    np.savez(tmp_path / "in.npz", **arrays)
    for source in (arrays, tmp_path / "in.npz", str(tmp_path / "in.npz")):
        inputs = given_inputs(source)
        assert inputs.mask is None
        for name, array in arrays.items():
            np.testing.assert_array_equal(inputs.arrays[name], array)


@pytest.mark.parametrize(
    "arrays",
    [{}, {"x": np.float32(1)}, {"x": np.ones(2), "y": np.ones(3)}, {"x": np.ones((0, 2))}],
)
def test_arrays_that_are_no_batch_are_refused(arrays: dict[str, np.ndarray]) -> None:
    with pytest.raises(BadInputError):
        given_inputs(arrays)


def test_files_that_are_no_npz_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 and nothing more")
    np.save(tmp_path / "single.npy", np.ones(3))
    np.savez(tmp_path / "pickled.npz", x=np.array([{"a": 1}], dtype=object))
    os.mkfifo(tmp_path / "fifo.npz")
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,), }\n"
    with zipfile.ZipFile(tmp_path / "petabytes.npz", "w") as archive:
        size = len(header).to_bytes(2, "little")
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + size + header)
    header = header.replace(b"(1000000000000000,)", b"(True,)            ")
    with zipfile.ZipFile(tmp_path / "bool.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + size + header + bytes(4))
    np.savez(tmp_path / "many.npz", **{f"x{i}": np.ones(1) for i in range(1001)})
    np.savez(tmp_path / "encrypted.npz", x=np.ones(3))
    np.savez(tmp_path / "method.npz", x=np.ones(3))
    for name, place, value in (("encrypted", 6, 1), ("method", 8, 99)):  # flags, compression
        data = bytearray((tmp_path / f"{name}.npz").read_bytes())
        data[place] = data[data.index(b"PK\x01\x02") + place + 2] = value
        (tmp_path / f"{name}.npz").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(10**7))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(BadInputError) as caught:
            given_inputs(path)
        assert path.name in caught.value.where
    with pytest.raises(BadInputError):
        given_inputs(tmp_path)
    with pytest.raises(FileAccessError):
        given_inputs(tmp_path / "absent.npz")


def test_texts_of_ones_own(minilm_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    lines = ["A short one.", "Another text, which is longer than the first.", "The third."]
    pairs = list(zip(lines, reversed(lines), strict=True))
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "b.tsv").write_text("\n".join(["a\tlabel\tb", *(f"{x}\t1\t{y}" for x, y in pairs)]))
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": x, "label": 0}) for x in lines))
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"a": x, "b": y}) for x, y in pairs))
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    for name, columns in (
        ("a.txt", [lines]), ("c.jsonl", [lines]),
        ("b.tsv", [lines, lines[::-1]]), ("d.jsonl", [lines, lines[::-1]]),
    ):  # fmt: skip
        inputs = given_inputs(tmp_path / name, minilm_dir)
        assert inputs.description.endswith("3 texts")
        expected = tokenizer(*columns, padding=True, return_tensors="np")
        for key, array in expected.items():
            np.testing.assert_array_equal(inputs.arrays[key], array)
    with pytest.raises(UsageError, match="--tokenizer"):
        given_inputs(tmp_path / "a.txt")
    for name, text in (
        ("empty.txt", ""), ("uneven.jsonl", '{"a": "x"}\n{"a": "x", "b": "y"}'), ("no.jsonl", "{"),
        ("numbers.jsonl", "1\n2"), ("only.tsv", "text\tlabel"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(BadInputError):
            given_inputs(tmp_path / name, minilm_dir)


def test_a_table_without_a_heading_keeps_its_first_row(minilm_dir: Path, tmp_path: Path) -> None:
    rows = "The first one.\tAnother.\t1\nA second\tone.\t0\n"
    named = given_inputs(write(tmp_path / "a.tsv", f"premise\tother\tlabel\n{rows}"), minilm_dir)
    plain = given_inputs(write(tmp_path / "b.tsv", rows), minilm_dir)
    np.testing.assert_array_equal(plain.arrays["input_ids"], named.arrays["input_ids"])
    assert plain.description.endswith("b.tsv: 2 texts, no heading")
    single = given_inputs(write(tmp_path / "c.tsv", "1\tgood\n0\tbad\n"), minilm_dir)
    lines = given_inputs(write(tmp_path / "d.txt", "good\nbad\n"), minilm_dir)
    np.testing.assert_array_equal(single.arrays["input_ids"], lines.arrays["input_ids"])


def test_marks_and_line_ends_of_text_files(
    minilm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = given_inputs(
        write(tmp_path / "a.tsv", "label\tsentence\n1\tgood\n0\tbad\n"), minilm_dir
    )
    text = "\ufefflabel\tsentence\r\n1\tgood\r\n0\tbad\r\n"
    marked = given_inputs(write(tmp_path / "b.tsv", text), minilm_dir)
    np.testing.assert_array_equal(plain.arrays["input_ids"], marked.arrays["input_ids"])
    one = given_inputs(write(tmp_path / "c.jsonl", '{"text": "two\u2028lines"}\n'), minilm_dir)
    assert one.description.endswith("c.jsonl: 1 texts")
    monkeypatch.setattr("fourierft_export.proof.inputs.MAX_TEXTS", 1)
    assert given_inputs(tmp_path / "a.tsv", minilm_dir).description.endswith("the first 1 texts")


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_a_folder_of_images(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 256, (9, 7, 3), np.uint8)) for _ in range(3)]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    inputs = given_inputs(tmp_path / "images", tmp_path / "model")
    assert inputs.arrays["pixel_values"].shape == (3, 3, 8, 8)
    expected = processor(pictures, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(inputs.arrays["pixel_values"], expected, atol=1e-6)
    with pytest.raises(BadInputError, match=r"preprocessor_config\.json"):
        given_inputs(tmp_path / "images", tmp_path)
    (tmp_path / "images" / "0.png").write_bytes(b"torn")
    with pytest.raises(BadInputError, match="expected an image"):
        given_inputs(tmp_path / "images", tmp_path / "model")
