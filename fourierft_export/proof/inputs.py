"""Makes the inputs that every side runs on: the user's own, or sentences of the package."""

from __future__ import annotations

import os
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import BadInputError, UsageError, first_line, missing_extra
from ..files import strict_json
from ..files.safetensors_reader import open_regular, read_file
from ..models.processor import load_processor, prepare_images, usable
from ..types import Array

SENTENCES = tuple(Path(__file__).with_name("sentences.txt").read_text("utf-8").splitlines())
"""Short and long, plain and odd, so that rows differ in length and vocabulary."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")
MAX_TOKENS = 48
ID_SEED = 20240503
MAX_BYTES, MAX_ARRAYS = 2**33, 1_000
TEXT_FILES = frozenset({".txt", ".tsv", ".jsonl"})
IMAGE_FILES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
LABEL_COLUMNS = frozenset({"label", "labels", "id", "idx", "index"})
TEXT_COLUMNS = frozenset({
    "text", "text_a", "text_b", "text1", "text2", "sentence", "sentence1", "sentence2", "premise",
    "hypothesis", "question", "question1", "question2", "context", "query", "answer", "title",
})  # fmt: skip
MAX_TEXTS, MAX_TEXT_BYTES, MAX_IMAGES, MAX_GIVEN_TOKENS = 10_000, 2**26, 1_000, 512
AS_NPZ = "give inputs as an .npz file (--inputs)"


@dataclass(frozen=True)
class Inputs:
    """Named arrays, one row per example: the first axis is the batch."""

    arrays: Mapping[str, Array]
    description: str  # where they come from, for the report

    @property
    def mask(self) -> Array | None:
        """(batch, positions), true where a token is real; None without an attention mask."""
        mask = self.arrays.get("attention_mask")
        return mask.astype(bool) if mask is not None and mask.ndim == 2 else None


def given_inputs(
    source: str | os.PathLike[str] | Mapping[str, Array],
    model_dir: Path | None = None,
    positions: int | None = None,
    token_types: bool = False,
) -> Inputs:
    """Takes inputs from a mapping, a file (.npz, .txt, .tsv, .jsonl) or a folder of images.

    Args:
        source: arrays by name; a file of them or of texts; or a folder with image files.
        model_dir: has the tokenizer or image processor for texts and images.
        positions: the most tokens the model takes.
        token_types: a graph wants token_type_ids, even if the tokenizer makes none (all zero).
    """
    if not isinstance(source, Mapping):
        path = Path(source)
        if path.is_dir():
            images, more = _read_images(path, model_dir)
            first = "the first " if more else ""
            return Inputs({"pixel_values": images}, f"{path}: {first}{len(images)} images")
        if path.suffix in TEXT_FILES:
            texts, heading = _read_texts(path)
            first = "the first " if len(texts) > MAX_TEXTS else ""
            texts = texts[:MAX_TEXTS]
            if model_dir is None or not has_tokenizer(model_dir):
                expected = "a tokenizer for texts in the base's folder, or --tokenizer DIR"
                raise UsageError(path, expected=expected, found="none", remedy=AS_NPZ)
            longest = min(positions or MAX_GIVEN_TOKENS, MAX_GIVEN_TOKENS)
            arrays = _pad(*_tokenised(model_dir, texts, longest), token_types=token_types)
            return Inputs(arrays, f"{path}: {first}{len(texts)} texts{heading}")
    if isinstance(source, Mapping):
        where, arrays = "inputs", {name: np.asarray(value) for name, value in source.items()}
    else:
        where, arrays = os.fspath(source), _read_npz(Path(source))
    rows = {name: value.shape[0] if value.ndim else None for name, value in arrays.items()}
    if not arrays or None in rows.values() or len(set(rows.values())) > 1 or 0 in rows.values():
        raise BadInputError(
            where,
            expected="arrays that all have the same number of rows, at least one",
            found=", ".join(f"{n} {list(v.shape)}" for n, v in arrays.items()) or "no arrays",
            remedy="name each array as the model's input, with the batch as its first axis",
        )
    return Inputs(arrays, f"{where}: {next(iter(rows.values()))} rows")


def _read_texts(path: Path) -> tuple[list[tuple[str, ...]], str]:
    """Reads texts or pairs of texts (lines, columns, JSON objects); says if a heading is missing.

    The first row of a table is a heading if one of its cells is a usual name of a column.
    """
    # Not splitlines: JSON strings may hold U+2028 and other line ends of Unicode.
    lines = read_file(path, MAX_TEXT_BYTES).decode("utf-8-sig", "replace").split("\n")
    kept_lines = (line.rstrip("\r") for line in lines[: MAX_TEXTS + 2])
    rows: list[tuple[str, ...]] = [(line,) for line in kept_lines if line.strip()]
    heading = ""
    if path.suffix == ".tsv" and rows:
        cells = [[cell.strip() for cell in row[0].split("\t")] for row in rows]
        names = [name.lower() for name in cells[0]]
        kept = [i for i, name in enumerate(names) if name not in LABEL_COLUMNS]
        if {*names} & (LABEL_COLUMNS | TEXT_COLUMNS):
            del cells[0]
        else:
            heading = ", no heading"
            kept = [i for i in kept if not all(_is_number(row[i : i + 1]) for row in cells)]
        rows = [tuple(row[i] if i < len(row) else "" for i in kept[:2]) for row in cells]
    if path.suffix == ".jsonl":
        records = [strict_json.loads(row[0].encode(), os.fspath(path)) for row in rows]
        fields = [list(r.values()) if isinstance(r, dict) else [r] for r in records]
        rows = [tuple(v for v in values if isinstance(v, str))[:2] for values in fields]
    if not rows or len({len(row) for row in rows}) != 1 or not rows[0]:
        expected = "lines of text; .tsv: columns of text; .jsonl: objects with one or two texts"
        raise BadInputError(path, expected=expected, found="none, or rows of unequal length")
    return rows, heading


def _is_number(cells: Sequence[str]) -> bool:
    """Whether a row's cell (if the row is long enough to have it) is a number, as labels are."""
    try:
        return not cells or float(cells[0]) is not None
    except ValueError:
        return False


def _read_images(folder: Path, model_dir: Path | None) -> tuple[Array, bool]:
    """Reads a folder's images through the model's own processor; true if there are too many."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise missing_extra("pillow", "hf", "images as inputs") from error
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_FILES)
    if not files:
        expected = f"image files ({', '.join(sorted(IMAGE_FILES))})"
        raise BadInputError(folder, expected=expected, found="none of them in it")
    images = []
    for path in files[:MAX_IMAGES]:
        try:
            with warnings.catch_warnings(), open(open_regular(path), "rb") as file:
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                images.append(Image.open(file).convert("RGB"))
        except (UnidentifiedImageError, OSError, Warning, Image.DecompressionBombError) as error:
            raise BadInputError(path, expected="an image", found=first_line(error)) from error
    if model_dir is None:
        expected = "a model's directory, for its preprocessor_config.json"
        raise BadInputError(folder, expected=expected, found="none", remedy=AS_NPZ)
    remedy = f"correct its preprocessor_config.json, or {AS_NPZ}"
    processor = load_processor("image processor", model_dir, remedy)
    pixels = prepare_images(processor, images, model_dir, remedy)
    return pixels, len(files) > MAX_IMAGES


def _read_npz(path: Path) -> dict[str, Array]:
    """Reads an .npz file of plain arrays; no array is allocated that the file cannot hold."""
    with open(open_regular(path), "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                claimed = sum(info.file_size for info in archive.infolist())
                if len(archive.infolist()) > MAX_ARRAYS:
                    raise ValueError(f"{len(archive.infolist())} arrays, above {MAX_ARRAYS}")
                most = max(2**26, 200 * os.fstat(file.fileno()).st_size)
                if claimed > min(most, MAX_BYTES):
                    raise ValueError(f"arrays of {claimed} bytes, above {min(most, MAX_BYTES)}")
                for info in archive.infolist():
                    with archive.open(info) as member:
                        _check_array(member, info)
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        # zipfile has a RuntimeError for encryption and a NotImplementedError for other methods.
        except (
            EOFError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile, zlib.error
        ) as error:  # fmt: skip
            found = first_line(error)
            raise BadInputError(
                path,
                expected="an .npz file of plain arrays (or texts in .txt, .tsv or .jsonl)",
                found=found,
            ) from error


def _check_array(member: IO[bytes], info: zipfile.ZipInfo) -> None:
    """Raises a ValueError unless an .npy file's shape and dtype give the bytes that it has."""
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(member)
    else:
        raise ValueError(f"{info.filename}: version {version} of the format")
    if dtype.hasobject:
        raise ValueError(f"{info.filename}: pickled objects")
    size = prod(shape) * dtype.itemsize + member.tell()
    if size != info.file_size:
        raise ValueError(f"{info.filename}: {info.file_size} bytes where {size} belong")


def default_inputs(
    *,
    tokenizer_dir: Path | None,
    vocab_size: int | None,
    count: int = 64,
    length: int | None = None,
    positions: int | None = None,
    token_types: bool = False,
) -> Inputs:
    """Makes token ids of the package's sentences, or fixed pseudo-random ids without a tokenizer.

    Rows have different lengths and are padded on the right, with an `attention_mask`.

    Args:
        tokenizer_dir: a directory with a tokenizer that transformers can load, or None.
        vocab_size: number of token ids of the model, for ids without a tokenizer.
        count: number of rows.
        length: pad to exactly this many tokens (a graph may fix it); default the longest row.
        positions: the most tokens the model takes.
        token_types: a graph wants token_type_ids, even if the tokenizer makes none (all zero).
    """
    if count < 1:
        raise UsageError("samples", expected="at least 1", found=str(count))
    longest = min(n for n in (MAX_TOKENS, length, positions) if n is not None)
    if tokenizer_dir is not None:
        texts = [(SENTENCES[i % len(SENTENCES)],) for i in range(count)]
        columns, pad = _tokenised(tokenizer_dir, texts, longest)
        description = f"{count} sentences, with the tokenizer in {tokenizer_dir}"
    elif vocab_size is not None and vocab_size >= 1:
        columns, pad = {"input_ids": _pseudo_random(vocab_size, count, longest)}, 0
        description = f"{count} rows of fixed pseudo-random token ids (there is no tokenizer)"
    else:
        raise UsageError(
            "validate",
            expected="inputs, a tokenizer, or a model config with vocab_size",
            found="none of them",
            remedy=AS_NPZ,
        )
    return Inputs(_pad(columns, pad, length, token_types=token_types), description)


def _pad(
    columns: Mapping[str, list[list[int]]],
    pad: int,
    length: int | None = None,
    *,
    token_types: bool,
) -> dict[str, Array]:
    """Makes arrays of rows of unequal length, with a mask; `pad` fills input_ids, 0 the others."""
    lengths = [len(row) for row in columns["input_ids"]]
    shape = len(lengths), length or max(lengths)
    mask = np.arange(shape[1]) < np.array(lengths)[:, None]
    arrays: dict[str, Array] = {}
    for name, rows in columns.items():
        arrays[name] = np.full(shape, pad if name == "input_ids" else 0, dtype=np.int64)
        arrays[name][mask] = np.concatenate([*map(np.array, rows)])
    arrays["attention_mask"] = mask.astype(np.int64)
    if token_types:
        arrays.setdefault("token_type_ids", np.zeros(shape, np.int64))
    return arrays


def has_tokenizer(directory: Path) -> bool:
    """Whether the directory holds a tokenizer's files."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def _tokenised(
    directory: Path, texts: Sequence[tuple[str, ...]], longest: int
) -> tuple[dict[str, list[list[int]]], int]:
    """Returns token ids, and token types if the tokenizer makes them, per row; the padding id."""
    tokenizer = load_processor("tokenizer", directory, AS_NPZ)
    with usable("tokenizer", directory, AS_NPZ):
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        pad = next((token for token in pads if token is not None), 0)
        columns = [list(column) for column in zip(*texts, strict=True)]
        encoded = tokenizer(*columns, truncation=True, max_length=longest)
        names = ("input_ids", "token_type_ids")
        found = {n: [[*row] or [pad] for row in encoded[n]] for n in names if n in encoded}
        return found, int(pad)


def _pseudo_random(vocab_size: int, count: int, longest: int) -> list[list[int]]:
    """Draws rows of 1 to `longest` ids, the same in every version of numpy."""
    draw = np.random.RandomState(ID_SEED)
    lengths = draw.randint(1, longest + 1, size=count)
    return [draw.randint(0, vocab_size, size=length).tolist() for length in lengths]
