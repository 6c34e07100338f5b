"""Makes the inputs that every side is run on: the user's own, or sentences of the package."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import BadInputError, UsageError
from ..files.container import open_regular
from ..types import Array
from .report import first_line

SENTENCES = tuple(Path(__file__).with_name("sentences.txt").read_text("utf-8").splitlines())
"""Short and long, plain and odd, so that rows differ in length and vocabulary."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")
MAX_TOKENS = 48
ID_SEED = 20240503
MAX_BYTES = 2**33
AS_NPZ = "give inputs as an .npz file (--inputs)"


@dataclass(frozen=True)
class Inputs:
    """Named arrays, one row per example.

    Attributes:
        arrays: input name -> array; the first axis is the batch.
        description: where they come from, for the report.
    """

    arrays: Mapping[str, Array]
    description: str

    @property
    def mask(self) -> Array | None:
        """(batch, positions), true where a token is real; None without an attention mask."""
        mask = self.arrays.get("attention_mask")
        return mask.astype(bool) if mask is not None and mask.ndim == 2 else None


def given_inputs(source: str | os.PathLike[str] | Mapping[str, Array]) -> Inputs:
    """Takes inputs from an .npz file or a mapping."""
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


def _read_npz(path: Path) -> dict[str, Array]:
    """Reads an .npz file of plain arrays; no array is allocated that the file cannot hold."""
    with open(open_regular(path), "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                claimed = sum(info.file_size for info in archive.infolist())
                if claimed > MAX_BYTES:
                    raise ValueError(f"arrays of {claimed} bytes, above {MAX_BYTES}")
                for info in archive.infolist():
                    with archive.open(info) as member:
                        _check_array(member, info)
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except (EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            found = first_line(error)
            raise BadInputError(
                path, expected="an .npz file of plain arrays", found=found
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
        texts = [SENTENCES[i % len(SENTENCES)] for i in range(count)]
        rows, pad, extra = _tokenised(tokenizer_dir, texts, longest)
        description = f"{count} sentences, with the tokenizer in {tokenizer_dir}"
    elif vocab_size is not None and vocab_size >= 1:
        rows, pad, extra = _pseudo_random(vocab_size, count, longest), 0, False
        description = f"{count} rows of fixed pseudo-random token ids (there is no tokenizer)"
    else:
        raise UsageError(
            "validate",
            expected="inputs, a tokenizer, or a model config with vocab_size",
            found="none of them",
            remedy=AS_NPZ,
        )
    ids = np.full((count, length or max(map(len, rows))), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    arrays: dict[str, Array] = {"input_ids": ids, "attention_mask": mask}
    if extra or token_types:
        arrays["token_type_ids"] = np.zeros_like(ids)
    return Inputs(arrays, description)


def has_tokenizer(directory: Path) -> bool:
    """Whether the directory holds a tokenizer's files."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def _tokenised(
    directory: Path, texts: Sequence[str], longest: int
) -> tuple[list[list[int]], int, bool]:
    """Returns token ids per row, the padding id, and whether the tokenizer makes token types."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BadInputError(
            directory,
            expected="a tokenizer that transformers can load",
            found=first_line(error),
            remedy=AS_NPZ,
        ) from error
    encoded = tokenizer(list(texts), truncation=True, max_length=longest)
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    rows = [list(row) or [pad] for row in encoded["input_ids"]]
    return rows, int(pad), "token_type_ids" in encoded


def _pseudo_random(vocab_size: int, count: int, longest: int) -> list[list[int]]:
    """Draws rows of 1 to `longest` ids, the same in every version of numpy."""
    draw = np.random.RandomState(ID_SEED)
    lengths = draw.randint(1, longest + 1, size=count)
    return [draw.randint(0, vocab_size, size=length).tolist() for length in lengths]
