"""Text -> token ids by the tokenizer of a model's directory, many rows at a time."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BadInputError, UsageError, missing_extra
from ...models.examples import input_names
from ...models.load import quiet_transformers
from . import pieces
from .scores import IGNORED

Row = dict[str, Any]

# Positions that these families count from their padding id on.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "longformer")
_UNLIMITED = 10**9  # transformers writes 1e30 for "no limit known"
_AT_ONCE = 1024


class TextEncoder:
    """A directory's tokenizer, or its pieces (see `pieces`).

    Args:
        directory: a model's directory.
        model: the model that the ids are for.
        words: texts come as lists of words.

    Attributes:
        tokenizer: transformers' tokenizer; None where there are only pieces.
        pad_id: fills rows up; masked out.
        limit: tokens that the model can take, or None.

    Raises:
        BadInputError: no tokenizer that transformers loads.
        MissingExtraError: transformers is not installed.
    """

    def __init__(
        self, directory: str | os.PathLike[str], model: nn.Module, *, words: bool = False
    ) -> None:
        self.directory = directory
        self.model = model
        self.inputs = text_inputs(model)
        self.tokenizer: Any = None
        self._pieces: pieces.PieceEncoder | None = None
        if not _has_tokenizer(directory) and (Path(directory) / pieces.FILE).is_file():
            self._pieces = pieces.PieceEncoder(directory)
            usual = pieces.UNKNOWN
        else:
            self.tokenizer = load_tokenizer(directory, words=words)
            ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
            usual = next((i for i in ids if i is not None), 0)
        # The model's own comes first: by it a decoder's head finds the end of a row, and RoBERTa
        # counts positions.
        own = getattr(getattr(model, "config", None), "pad_token_id", None)
        size = vocabulary(model) or 1 << 31
        self.pad_id: int = own if isinstance(own, int) and 0 <= own < size else usual
        self.limit = _limit(model, self.tokenizer, self.pad_id)

    def length(self, asked: int | None, usual: int) -> int:
        """The longest row: what was asked for, else the usual as far as the model can take it.

        Raises:
            UsageError: more than the model can take, or too short for a token of text.
        """
        return row_length(asked, usual, self.limit)

    def encode(self, texts: Sequence[tuple[str, ...]], length: int | None) -> list[Row]:
        """Rows of ids, cut to `length`.

        Args:
            texts: one or two texts per row.
            length: the longest row in tokens; None to cut nothing.

        Returns:
            Per row "input_ids", and "token_type_ids" where the model reads them.

        Raises:
            BadInputError: an id that the model has no embedding for.
            UsageError: pairs, where there are only pieces.
        """
        rows: list[Row] = []
        for start in range(0, len(texts), _AT_ONCE):
            rows += self._some(texts[start : start + _AT_ONCE], length)
        check_ids(self.directory, rows, vocabulary(self.model))
        return rows

    def _some(self, texts: Sequence[tuple[str, ...]], length: int | None) -> list[Row]:
        if self._pieces is not None:
            if any(len(text) > 1 for text in texts):
                raise UsageError(
                    self.directory, expected="a tokenizer, for pairs of texts", found=pieces.FILE
                )
            return [{"input_ids": self._pieces(text[0])[:length]} for text in texts]
        columns = [list(column) for column in zip(*texts, strict=True)]
        cut: Any = {} if length is None else {"truncation": True, "max_length": length}
        encoded = self.tokenizer(*columns, return_attention_mask=False, verbose=False, **cut)
        return self._rows(encoded, len(texts))

    def _rows(self, encoded: Any, count: int) -> list[Row]:
        names = [name for name in self.inputs if name in encoded]
        return [{name: encoded[name][i] for name in names} for i in range(count)]

    def encode_words(
        self, sentences: Sequence[list[str]], length: int
    ) -> tuple[list[Row], list[list[int | None]]]:
        """Rows of ids of texts that come as lists of words, cut to `length`.

        Returns:
            Rows as `encode` gives them, and for every token the word that it belongs to, or None.

        Raises:
            BadInputError: the tokenizer cannot tell which word a token is of; an id that the model
                has no embedding for.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            raise BadInputError(
                self.directory,
                expected="a fast tokenizer, which tells what word a token is of",
                found=type(self.tokenizer).__name__ if self.tokenizer else pieces.FILE,
                remedy="add tokenizer.json to the model's directory",
            )
        rows: list[Row] = []
        words: list[list[int | None]] = []
        for start in range(0, len(sentences), _AT_ONCE):
            some = list(sentences[start : start + _AT_ONCE])
            encoded = self.tokenizer(
                some,
                is_split_into_words=True,
                truncation=True,
                max_length=length,
                return_attention_mask=False,
            )
            rows += self._rows(encoded, len(some))
            words += [encoded.word_ids(i) for i in range(len(some))]
        check_ids(self.directory, rows, vocabulary(self.model))
        return rows, words

    def pad(self) -> Pad:
        """What makes batches of the rows."""
        return Pad(self.pad_id, mask="attention_mask" in self.inputs)


def text_inputs(model: nn.Module) -> list[str]:
    """What a model reads of text, by name.

    Raises:
        UsageError: its forward takes no input_ids.
    """
    names = input_names(model)
    if "input_ids" not in names:
        raise UsageError(
            type(model).__name__,
            expected="a forward that takes input_ids",
            found=", ".join(inspect.signature(model.forward).parameters) or "no arguments",
            remedy="give a model of text, or another --task",
        )
    return names


def row_length(asked: int | None, usual: int, limit: int | None) -> int:
    """See `TextEncoder.length`."""
    if asked is None:
        return min(usual, limit or usual)
    if asked < 4 or (limit is not None and asked > limit):
        raise UsageError(
            "max_length",
            expected=f"4 to {limit} tokens" if limit else "at least 4 tokens",
            found=str(asked),
        )
    return asked


def vocabulary(model: nn.Module) -> int | None:
    """How many ids a model has embeddings for, if it tells."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    return getattr(embedding, "num_embeddings", None)


def check_ids(where: str | os.PathLike[str], rows: Sequence[Row], size: int | None) -> None:
    """Refuse ids that a model has no embedding for.

    Raises:
        BadInputError: with the largest one.
    """
    largest = max((max(row["input_ids"], default=0) for row in rows), default=0)
    if size is not None and largest >= size:
        raise BadInputError(
            where,
            expected=f"token ids below {size}",
            found=f"id {largest}",
            remedy="use the tokenizer of this model",
        )


def load_tokenizer(directory: str | os.PathLike[str], *, words: bool = False) -> Any:
    """The directory's tokenizer, without touching the network.

    Raises:
        BadInputError: transformers cannot load one.
        MissingExtraError: transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise missing_extra(str(error.name), "hf", "reading text") from None
    # Byte-level tokenizers take words only if told that a space stands before each.
    options = {"add_prefix_space": True} if words else {}
    with quiet_transformers():
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(
                os.fspath(directory), local_files_only=True, trust_remote_code=False, **options
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            text = str(error).strip() or repr(error)
            raise BadInputError(
                directory,
                expected="a tokenizer that transformers loads",
                found=text.splitlines()[0],
                remedy="add the tokenizer's files, or for causal-lm give rows of input_ids",
            ) from error
    # Without its vocabulary's files, transformers makes an empty tokenizer and says nothing.
    ids = tokenizer("a 1 . the", add_special_tokens=False)["input_ids"]
    if set(ids) <= {tokenizer.unk_token_id}:
        raise BadInputError(
            directory,
            expected="a tokenizer with a vocabulary",
            found=f"one of {len(tokenizer)} entries that knows no English",
            remedy="add the tokenizer's files, or for causal-lm give rows of input_ids",
        )
    return tokenizer


def _has_tokenizer(directory: str | os.PathLike[str]) -> bool:
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt")
    return any((Path(directory) / name).is_file() for name in names)


def _limit(model: nn.Module, tokenizer: Any, pad_id: int) -> int | None:
    config: Any = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and getattr(config, "model_type", "") in _OFFSET_POSITIONS:
        positions -= pad_id + 1
    limits = [positions, getattr(tokenizer, "model_max_length", None)]
    known = [int(n) for n in limits if isinstance(n, int | float) and 0 < n < _UNLIMITED]
    return min(known, default=None)


class Pad:
    """Rows of ids -> a batch as long as its longest row.

    Args:
        pad_id: fills input_ids.
        mask: whether the model takes an attention_mask.
    """

    def __init__(self, pad_id: int, *, mask: bool = True) -> None:
        self.fill = {"input_ids": pad_id, "labels": IGNORED}
        self.mask = mask

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Int64 tensors: lists as (rows, length), numbers as (rows,); and "attention_mask"."""
        batch = {name: self._stack(name, [row[name] for row in rows]) for name in rows[0]}
        if not self.mask:
            return batch
        sizes = torch.tensor([len(row["input_ids"]) for row in rows])
        inside = torch.arange(int(sizes.max())) < sizes[:, None]
        return batch | {"attention_mask": inside.long()}

    def _stack(self, name: str, values: list[Any]) -> Tensor:
        if not isinstance(values[0], list):
            return torch.tensor(values)
        longest = max(map(len, values))
        fill = self.fill.get(name, 0)
        return torch.tensor([value + [fill] * (longest - len(value)) for value in values])
