"""Images of folders, or of rows that name or hold image files, as tensors."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import FourierFTError
from ...files.safetensors_reader import open_regular
from ...models.processor import MAX_PIXELS, load_processor, prepare_images
from .rows import Rows, read_each

CORRECT = "add or correct preprocessor_config.json"
Image = str | bytes  # a file's path or its content


def read_images(rows: Rows, column: str) -> list[Image]:
    """The image of every row; pixels are not decoded yet."""
    root = Path(rows.where) if os.path.isdir(rows.where) else Path(rows.where).parent

    def read(cells: tuple[Any, ...]) -> Image:
        # Data sets hold images as {"bytes": ..., "path": ...}.
        (value,) = cells
        image = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
        if not isinstance(image, bytes | str) or not image:
            raise ValueError(f"image {value!r:.60}")
        image = image if isinstance(image, bytes) else os.fspath(root / image)
        open_image(image, lambda opened: opened.verify())
        return image

    return rows.read([column], read, "an image file in every row")


def open_image(image: Image, use: Callable[[Any], Any]) -> Any:
    """`use` of Pillow's image; ValueError if a file is none, is damaged or too large."""
    import PIL.Image

    name = f"{image}: " if isinstance(image, str) else ""
    try:
        if isinstance(image, str):
            os.close(open_regular(image))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, which no model sees
            with PIL.Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                width, height = opened.size
                if width * height <= MAX_PIXELS:
                    return use(opened)
    except FourierFTError as error:
        raise ValueError(f"{name}{error.found}") from error
    except Exception as error:  # Pillow's decoders raise errors of all kinds for damaged files
        raise ValueError(f"{name}not an image: {type(error).__name__}") from error
    raise ValueError(f"{name}{width} x {height} pixels, more than {MAX_PIXELS}")


class Collate:
    """Labelled images -> a batch, through the image processor of the model's directory."""

    def __init__(self, directory: str, model: nn.Module) -> None:
        self.directory = directory
        self.processor = load_processor("image processor", directory, CORRECT)
        self.dtype = next(model.parameters()).dtype
        config: Any = model.config
        self.mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"

    def __call__(self, rows: Sequence[tuple[Image, int]]) -> dict[str, Tensor]:
        """Tensors "pixel_values" (rows, channels, height, width) and "labels" (rows,) int64."""
        images, labels = zip(*rows, strict=True)
        places = [f"image {i + 1}" for i in range(len(rows))]
        decoded = read_each("a batch", places, images, self.decode, "images")
        pixels = torch.from_numpy(prepare_images(self.processor, decoded, self.directory, CORRECT))
        return {"pixel_values": pixels.to(self.dtype), "labels": torch.tensor(labels)}

    def decode(self, image: Image) -> Any:
        """Pillow's image with the channels that the model takes."""
        return open_image(image, lambda opened: opened.convert(self.mode))
