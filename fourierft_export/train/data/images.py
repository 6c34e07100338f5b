"""Images of folders, or of rows that name or hold image files, as tensors."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import BadInputError, FourierFTError, UsageError, missing_extra
from ...files.container import open_regular
from . import models
from .rows import BadRows, Rows

MAX_PIXELS = 1 << 26
IMAGES = (("image",), ("images",), ("path",), ("file_name",))
# What Pillow's decoders raise for damaged files.
_DAMAGED = (
    OSError, EOFError, ValueError, SyntaxError, TypeError, LookupError, AttributeError,
    ArithmeticError, RuntimeError, MemoryError, struct.error, zlib.error,
)  # fmt: skip
Image = str | bytes  # a file's path or its content
Transform = Callable[[Sequence[Image]], Tensor]


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


def load_image(image: Image, mode: str) -> Any:
    """One image in Pillow's `mode` ("RGB", "L")."""
    with _open_image(image) as opened:
        return opened.convert(mode)


@dataclass(frozen=True)
class Collate:
    """Labelled images -> a batch.

    Attributes:
        transform: images -> (rows, channels, height, width) float32.
        dtype: of the model's pixels.
    """

    transform: Transform
    dtype: torch.dtype

    def __call__(self, rows: Sequence[tuple[Image, int]]) -> dict[str, Tensor]:
        """Tensors "pixel_values" (rows, channels, height, width) and "labels" (rows,) int64."""
        pixels = self.transform([image for image, _ in rows]).to(self.dtype)
        return {"pixel_values": pixels, "labels": torch.tensor([label for _, label in rows])}


def make_transform(directory: str, model: nn.Module) -> tuple[Transform, str]:
    """How a model's images are made, and a line that says so."""
    config: Any = model.config
    channels = getattr(config, "num_channels", 3)
    if (Path(directory) / "preprocessor_config.json").is_file() and channels == 3:
        from transformers import AutoImageProcessor

        remedy = "correct or remove preprocessor_config.json"
        processor = models.load_processor(
            AutoImageProcessor, directory, "an image processor", remedy
        )

        def processed(images: Sequence[Image]) -> Tensor:
            loaded = [load_image(image, "RGB") for image in images]
            pixels: Tensor = processor(images=loaded, return_tensors="pt")["pixel_values"]
            return pixels

        return processed, f"images go through the directory's {type(processor).__name__}"
    size = getattr(config, "image_size", None)
    if not size or channels not in (1, 3):
        raise UsageError(
            directory,
            expected="a config with image_size, and num_channels 1 or 3",
            found=f"image_size {size}, num_channels {channels}",
            remedy="add a preprocessor_config.json, or use --module",
        )
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def scaled(images: Sequence[Image]) -> Tensor:
        mode = "RGB" if channels == 3 else "L"
        resized = [load_image(one, mode).resize((width, height), resample=2) for one in images]
        pixels = torch.from_numpy(np.stack([np.asarray(one) for one in resized]))
        pixels = pixels.reshape(len(images), height, width, channels).permute(0, 3, 1, 2)
        return (pixels.float() / 255 - 0.5) / 0.5

    return scaled, (
        f"no image processor for this model: images are resized to {height} x {width} and scaled "
        "to -1..1 (mean and standard deviation 0.5)"
    )
