"""image-classification: folders of images, or rows that name or hold image files."""

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

from ...errors import BadInputError, UsageError, missing_extra
from ..task import TrainingTask
from . import models, scores
from .rows import BadRows, Rows, regular_file_problem
from .split import split
from .text import LABELS, SINGLE, Source, head_notes, read_targets

MAX_PIXELS = 1 << 26
IMAGES = (("image",), ("images",), ("path",), ("file_name",))
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
Image = str | bytes  # a file's path or its content


def image_classification(source: Source) -> TrainingTask:
    """A model of one label per image; the directory's image processor is used, if it has one."""
    label = source.label_column(LABELS)
    known = source.known_classes(label, "image-classification")
    images = [_read_images(rows, source.data.text_column or ()) for rows in source.both()]
    targets, labels = read_targets(source, label, SINGLE, known)
    parts = [list(zip(x, y, strict=True)) for x, y in zip(images, targets, strict=True)]
    learnt, scored, notes = split(parts, source.settings)
    model, new = source.load_classifier("image-classification", labels.names)
    transform, how = _transform(source.directory, model)
    return TrainingTask(
        model=model,
        train_dataset=learnt,
        eval_dataset=scored,
        data_collator=Collate(transform, next(model.parameters()).dtype),
        compute_loss_func=scores.class_loss,
        compute_metrics=scores.score_classes,
        preprocess_logits_for_metrics=scores.keep_logits,
        metric_for_best_model="accuracy",
        modules_to_save=new or models.trained_heads(model),
        target_modules=models.usual_targets(model),
        notes=(*notes, *head_notes(new, labels.names), how),
        labels=labels.names,
    )


def _read_images(rows: Rows, named: Sequence[str]) -> list[Image]:
    """The image of every row."""
    (name,) = rows.find_columns(named, IMAGES, "images", "--text-column")
    bad = BadRows(rows.where, "an image file in every row")
    root = Path(rows.where) if os.path.isdir(rows.where) else Path(rows.where).parent
    found: list[Image] = []
    for i, value in enumerate(rows.undecoded(name)):
        # Data sets hold images as {"bytes": ..., "path": ...}.
        image = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
        if not isinstance(image, bytes | str) or not image:
            bad.add(rows.place(i), f"image {value!r:.60}")
            continue
        image = image if isinstance(image, bytes) else os.fspath(root / image)
        found.append(image)
        wrong = _image_problem(image)
        if wrong:
            bad.add(image if isinstance(image, str) else rows.place(i), wrong)
    bad.check()
    return found


def _image_problem(image: Image) -> str | None:
    """Why a file is no image that can be learnt from, if so; pixels are not decoded yet."""
    wrong = regular_file_problem(image) if isinstance(image, str) else None
    if wrong:
        return wrong
    try:
        with _open_image(image) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                return f"{width} x {height} pixels, more than {MAX_PIXELS}"
            opened.verify()
    except (*_DAMAGED, _pillow().DecompressionBombError) as error:
        return f"not an image: {type(error).__name__}"
    return None


def _pillow() -> Any:
    try:
        import PIL.Image
    except ImportError as error:
        raise missing_extra(str(error.name), "hf", "reading images") from None
    return PIL.Image


@contextmanager
def _open_image(image: Image) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata, which no model sees
        with _pillow().open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            yield opened


def load_image(image: Image, mode: str) -> Any:
    """One image in Pillow's `mode` ("RGB", "L")."""
    try:
        with _open_image(image) as opened:
            return opened.convert(mode)
    except (*_DAMAGED, _pillow().DecompressionBombError) as error:
        raise BadInputError(
            image if isinstance(image, str) else "an image in the data",
            expected="an image",
            found=str(error).splitlines()[0] if str(error) else "",
            remedy="remove or repair it",
        ) from error


@dataclass(frozen=True)
class Collate:
    """Labelled images -> a batch.

    Attributes:
        transform: images -> (rows, channels, height, width) float32.
        dtype: of the model's pixels.
    """

    transform: Callable[[Sequence[Image]], Tensor]
    dtype: torch.dtype

    def __call__(self, rows: Sequence[tuple[Image, int]]) -> dict[str, Tensor]:
        """Tensors "pixel_values" (rows, channels, height, width) and "labels" (rows,) int64."""
        pixels = self.transform([image for image, _ in rows]).to(self.dtype)
        return {"pixel_values": pixels, "labels": torch.tensor([label for _, label in rows])}


def _transform(directory: str, model: nn.Module) -> tuple[Callable[[Sequence[Image]], Tensor], str]:
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
