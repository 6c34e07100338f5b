"""One image, from a file, from bytes or from an array, through Pillow."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import BadInputError, missing_extra

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 1 << 26
# What Pillow's decoders raise for damaged files.
_DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)

# A file's path or its content; or uint8 pixels (height, width), with channels last or first if any.
Source = str | bytes | np.ndarray[Any, Any]


def check_pixels(where: str, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """`images`, which must be pixels as a `Source` holds them, image by image.

    Raises:
        BadInputError: another dtype or shape; `where` names the array.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
        raise BadInputError(
            where,
            expected="uint8 of shape (n, height, width), with channels first or last if any",
            found=f"{images.dtype} of shape {list(images.shape)}",
            remedy="store pixels from 0 to 255",
        )
    if images.ndim == 4 and not {images.shape[1], images.shape[3]} & {1, 3}:
        raise BadInputError(
            where, expected="one or three channels", found=f"shape {list(images.shape)}"
        )
    return images


def check_file(source: str | bytes) -> str | None:
    """Why a file is no image, if so; pixels are not decoded yet."""
    image = _pillow()
    try:
        with _quietly(), image.open(_file(source)) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                return f"{width} x {height} pixels, more than {MAX_PIXELS}"
            opened.verify()
    except FileNotFoundError:
        return "no such file"
    except (*_DAMAGED, image.DecompressionBombError) as error:
        return f"not an image: {type(error).__name__}"
    return None


@contextmanager
def _quietly() -> Iterator[None]:
    """Without Pillow's warnings about metadata, which no model sees."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _file(source: str | bytes) -> str | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _pillow() -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        raise missing_extra(str(error.name), "hf", "reading images") from None
    return PIL.Image


def load_image(source: Source, mode: str) -> Image:
    """One image in Pillow's `mode` ("RGB", "L").

    Raises:
        BadInputError: its pixels cannot be decoded.
    """
    pillow = _pillow()
    image: Image
    if isinstance(source, np.ndarray):
        pixels = source
        if pixels.ndim == 3 and pixels.shape[2] not in (1, 3):
            pixels = pixels.transpose(1, 2, 0)
        squeezed = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
        image = pillow.fromarray(np.ascontiguousarray(squeezed)).convert(mode)
        return image
    try:
        with _quietly(), pillow.open(_file(source)) as opened:
            image = opened.convert(mode)
    except (*_DAMAGED, pillow.DecompressionBombError) as error:
        raise BadInputError(
            source if isinstance(source, str) else "an image in the data",
            expected="an image",
            found=str(error).splitlines()[0] if str(error) else "",
            remedy="remove or repair it",
        ) from error
    return image
