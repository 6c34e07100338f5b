"""Loads tokenizers and image processors with transformers, and prepares images with them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BadInputError, FourierFTError, first_line, missing_extra
from .load import quiet_transformers

if TYPE_CHECKING:
    from ..types import Array

MAX_PIXELS, MAX_PIXELS_IN_ALL = 1 << 26, 1 << 30
_CLASSES = {
    "tokenizer": ("AutoTokenizer", "PreTrainedTokenizerBase"),
    "image processor": ("AutoImageProcessor", "ImageProcessingMixin"),
}


def load_processor(
    kind: str, directory: str | os.PathLike[str], remedy: str, **options: Any
) -> Any:
    """Loads the "tokenizer" or "image processor" of a directory, without the network."""
    try:
        import transformers
    except ImportError as error:
        raise missing_extra("transformers", "hf", kind) from error
    auto, family = (getattr(transformers, name) for name in _CLASSES[kind])
    with usable(f"{kind} that transformers loads", directory, remedy):
        made = auto.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, **options
        )
        if not isinstance(made, family):
            raise TypeError(f"{type(made).__name__}, which is none")
    return made


@contextmanager
def usable(what: str, directory: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    """Calls errors within the block a damaged `what` of the directory; nothing else is printed."""
    with quiet_transformers():
        try:
            yield
        except (FourierFTError, MemoryError):
            raise
        # The code of each family, and tokenizers' own in Rust, raise errors of all kinds.
        except Exception as error:
            raise BadInputError(
                directory, expected=f"a working {what}", found=first_line(error), remedy=remedy
            ) from error


def prepare_images(
    processor: Any, images: Sequence[Any], directory: str | os.PathLike[str], remedy: str
) -> Array:
    """Makes one array of Pillow's images with the model's own processor: finite, not empty."""
    ratio = max(max(image.size) / max(1, min(image.size)) for image in images)
    with usable("image processor", directory, remedy):
        for size in (getattr(processor, n, None) for n in ("size", "crop_size", "pad_size")):
            sides = dict(size or {}) if not isinstance(size, int) else {"shortest_edge": size}
            for name, value in sides.items():
                pixels = value if name.endswith("pixels") else value**2
                pixels *= ratio if name == "shortest_edge" else 1
                most = min(MAX_PIXELS, MAX_PIXELS_IN_ALL // len(images))
                if name != "max_pixels" and pixels > most:
                    raise ValueError(f"{name} {value}, which gives more than {most} pixels")
        pixels = np.asarray(processor(images=images, return_tensors="np")["pixel_values"])
        if not pixels.size or not np.isfinite(pixels).all():
            raise ValueError("no pixels" if not pixels.size else "NaN or infinity in pixel_values")
    return pixels
