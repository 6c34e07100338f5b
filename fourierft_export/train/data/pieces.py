"""Text -> tokens for models that come with a list of pieces instead of a tokenizer.

`pieces.json` is a sentencepiece vocabulary in the order of its ids, as small Llamas trained with
llama2.c have it: three control pieces, 256 bytes, then pieces by falling score. Bytes beyond ASCII
stand there as Latin-1 characters.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

from ...errors import BadInputError
from ...files import strict_json
from ...files.container import read_file

FILE = "pieces.json"
UNKNOWN, BEGIN = 0, 1
FIRST_BYTE, FIRST_PIECE = 3, 259


class PieceEncoder:
    """Sentencepiece's byte pair encoding: of neighbours, the best pair that is a piece merges.

    Args:
        directory: holds `pieces.json`.

    Raises:
        FileAccessError: no such file.
        BadInputError: not a list of at least 259 strings.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        path = Path(directory) / FILE
        pieces = strict_json.loads(read_file(path), os.fspath(path))
        if not isinstance(pieces, list) or len(pieces) < FIRST_PIECE:
            raise BadInputError(path, expected=f"a list of {FIRST_PIECE} pieces or more")
        if not all(isinstance(piece, str) for piece in pieces):
            raise BadInputError(path, expected="a list of strings", found="other values")
        self.ids = {p: i for i, p in reversed(list(enumerate(pieces))) if i >= FIRST_PIECE}
        # Where no piece spans a space that is not its first character, words encode on their own.
        self._by_word = not any(" " in piece[1:] for piece in self.ids)
        self._words: dict[str, tuple[int, ...]] = {}

    def __call__(self, text: str) -> list[int]:
        """`text` as ids: the begin piece, then a space and the text."""
        words = [f" {word}" for word in text.split(" ")] if self._by_word else [f" {text}"]
        return [BEGIN, *(i for word in words for i in self._word(word))]

    def _word(self, word: str) -> tuple[int, ...]:
        if word not in self._words:
            self._words[word] = tuple(self._merged(word))
        return self._words[word]

    def _merged(self, word: str) -> list[int]:
        parts = [character.encode().decode("latin-1") for character in word]
        while len(parts) > 1:
            joined = [self.ids.get(a + b) for a, b in pairwise(parts)]
            known = [piece for piece in joined if piece is not None]
            if not known:
                break
            at = joined.index(min(known))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids: list[int] = []
        for part in parts:
            if part in self.ids:
                ids.append(self.ids[part])
            else:  # a character without a piece goes byte by byte
                ids += [FIRST_BYTE + byte for byte in part.encode("latin-1")]
        return ids
