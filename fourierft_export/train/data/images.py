"""Images of folders, or of rows that name or hold image files, as tensors."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BadInputError, FourierFTError, missing_extra
from ...files.safetensors_reader import open_regular
from .models import load_processor
from .rows import BadRows, Rows

MAX_PIXELS = 1 << 26
IMAGES = (("image",), ("images",), ("path",), ("file_name",))
# What Pillow's decoders raise for damaged files.
_DAMAGED = (
    OSError, EOFError, ValueError, SyntaxError, TypeError, LookupError, AttributeError,
    ArithmeticError, RuntimeError, MemoryError, struct.error, zlib.error,
)  # fmt: skip
Image = str | bytes  # a file's path or its content


def read_images(rows: Rows, named: Sequence[str]) -> list[Image]:
    """The image of every row; pixels are not decoded yet."""
    (name,) = rows.find_columns(named, IMAGES, "images", "--text-column")
    bad = BadRows(rows.where, "an image file in every row")
    root = Path(rows.where) if os.path.isdir(rows.where) else Path(rows.where).parent
    found: list[Image] = []
    for place, value in zip(rows.places, rows.column(name), strict=True):
        # Data sets hold images as {"bytes": ..., "path": ...}.
        image = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
        if not isinstance(image, bytes | str) or not image:
            bad.add(place, f"image {value!r:.60}")
            continue
        found.append(image if isinstance(image, bytes) else os.fspath(root / image))
        try:
            with _open_image(found[-1]) as opened:
                opened.verify()
        except BadInputError as error:
            bad.add(error.where if isinstance(image, str) else place, error.found)
    bad.check()
    return found


@contextmanager
def _open_image(image: Image) -> Iterator[Any]:
    """Pillow's image; BadInputError if a file is none, or too large."""
    try:
        import PIL.Image
        from PIL.Image import DecompressionBombError
    except ImportError as error:
        raise missing_extra(str(error.name), "hf", "reading images") from None
    where, found = image if isinstance(image, str) else "an image in the data", ""
    try:
        if isinstance(image, str):
            os.close(open_regular(image))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, which no model sees
            with PIL.Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                width, height = opened.size
                if width * height <= MAX_PIXELS:
                    yield opened
                    return
                found = f"{width} x {height} pixels, more than {MAX_PIXELS}"
    except FourierFTError as error:
        found = error.found
    except (*_DAMAGED, DecompressionBombError) as error:
        found = f"not an image: {type(error).__name__}"
    raise BadInputError(where, expected="an image", found=found, remedy="remove or repair it")


class Collate:
    """Labelled images -> a batch, through the image processor of the model's directory."""

    def __init__(self, directory: str, model: nn.Module) -> None:
        from transformers import AutoImageProcessor

        what, remedy = "an image processor", "add or correct preprocessor_config.json"
        self.processor = load_processor(AutoImageProcessor, directory, what, remedy)
        self.dtype = next(model.parameters()).dtype
        self.mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"

    def __call__(self, rows: Sequence[tuple[Image, int]]) -> dict[str, Tensor]:
        """Tensors "pixel_values" (rows, channels, height, width) and "labels" (rows,) int64."""
        images = []
        for image, _ in rows:
            with _open_image(image) as opened:
                images.append(opened.convert(self.mode))
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        labels = torch.tensor([label for _, label in rows])
        return {"pixel_values": pixels.to(self.dtype), "labels": labels}
