"""image-classification: folders of images, arrays, or lists of files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import BadInputError, UsageError, missing_extra
from ...models.load import quiet_transformers
from ..task import TrainingTask
from .labels import label_ids, make_labels, read_labels
from .loading import known_classes, load_classifier, trained_heads, usual_targets
from .losses import classify, score_classes
from .pictures import Source, check_file, check_pixels, load_image
from .rows import read_table
from .split import SplitSettings, split
from .table import Complaints, Table, brief, first_present, not_empty
from .text import TextSettings, head_notes, label_column

KIND = "image-classification"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGES = (("image",), ("images",), ("path",), ("file_name",))
Images = Sequence[Source] | np.ndarray[Any, Any]
Row = tuple[Source, int]


def image_classification(
    directory: str | os.PathLike[str],
    data: str | os.PathLike[str],
    eval_data: str | os.PathLike[str] | None,
    *,
    settings: TextSettings,
    rows: SplitSettings,
    dtype: str | None = "float32",
) -> TrainingTask:
    """A model of one label per image.

    Args:
        directory: the model's directory; its image processor is used, if it has one.
        data, eval_data: a folder LABEL/IMAGE, an npz file of `images` (uint8) and `labels`, or a
            file of rows whose column `image` names files, from its own folder on, or in parquet
            holds them.
        settings: columns; text_columns names the one of the images.
        rows: which rows are used and held out.
        dtype: name of a torch dtype to load in; None keeps the checkpoint's.

    Raises:
        BadInputError: bad rows or images, all listed; a directory that cannot be loaded.
        BaseMismatchError: the model lacks more than a head.
        UsageError: columns that are not there; a model that does not tell the size of its images.
        MissingExtraError: pillow is not installed.
    """
    table, images = read_images(data, settings)
    found = _labels(table, settings)
    labels = make_labels(table, found, known_classes(directory, KIND))
    scored: list[Row] | None = None
    if eval_data is not None:
        other, other_images = read_images(eval_data, settings)
        ids = label_ids(other, _labels(other, settings), other.places, labels)
        scored = list(zip(other_images, ids, strict=True))
    ids = label_ids(table, found, table.places, labels)
    learnt, scored, notes = split(list(zip(images, ids, strict=True)), scored, rows)
    model, new = load_classifier(directory, KIND, labels.names, dtype=dtype, seed=rows.seed)
    transform, how = _transform(directory, model)
    return TrainingTask(
        model=model,
        train=learnt,
        eval=scored,
        collate=Collate(transform, next(model.parameters()).dtype),
        step=classify,
        metrics=score_classes,
        metric="accuracy",
        higher_is_better=True,
        modules_to_save=new or trained_heads(model),
        target_modules=usual_targets(model),
        notes=(*notes, *head_notes(new, labels), how),
        labels=labels.names,
    )


def read_images(path: str | os.PathLike[str], settings: TextSettings) -> tuple[Table, Images]:
    """A table of labelled images, and the images themselves.

    Raises:
        BadInputError: files that are not images, arrays that are not pixels; all are listed.
    """
    if os.path.isdir(path):
        table = _read_folder(Path(path))
        name = "image"
    else:
        table = read_table(path)
        asked = settings.text_columns
        name = first_present(table, [asked] if asked else IMAGES, "images", "--text-column")[0]
    column: Any = table.columns[name]
    if isinstance(column, np.ndarray):
        return table, check_pixels(f"{table.path}, array {name}", column)
    complaints = Complaints(table.path, "an image file in every row")
    root = Path(table.path) if os.path.isdir(path) else Path(table.path).parent
    sources: list[Source] = []
    for place, value in zip(table.places, column, strict=True):
        # Parquet files of data sets hold images as {"bytes": ..., "path": ...}.
        told = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
        if not isinstance(told, bytes | str) or not told:
            complaints.add(place, f"image {brief(value)}")
            continue
        source = told if isinstance(told, bytes) else os.fspath(root / told)
        sources.append(source)
        wrong = check_file(source)
        if wrong:
            # In a folder, the place is the file.
            complaints.add(place, wrong if told in (place, source) else f"{told!s}: {wrong}")
    complaints.check()
    return table, sources


def _labels(table: Table, settings: TextSettings) -> list[str | int]:
    name = label_column(table, settings.label_column)
    return read_labels(table, table.column(name, "--label-column"))


def _read_folder(root: Path) -> Table:
    """The images in the folders of a folder, whose names are the labels."""
    paths = sorted(
        path
        for folder in root.iterdir()
        if folder.is_dir() and not folder.name.startswith(".")
        for path in folder.rglob("*")
        if path.suffix.lower() in ENDINGS and not path.name.startswith(".")
    )
    places = [path.relative_to(root).as_posix() for path in paths]
    labels = [place.split("/")[0] for place in places]
    return not_empty(Table(os.fspath(root), {"image": places, "label": labels}, places))


@dataclass(frozen=True)
class Collate:
    """Labelled images -> a batch.

    Attributes:
        transform: images -> (rows, channels, height, width) float32.
        dtype: of the model's pixels.
    """

    transform: Callable[[Sequence[Source]], Tensor]
    dtype: torch.dtype

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Tensors "pixel_values" (rows, channels, height, width) and "labels" (rows,) int64."""
        pixels = self.transform([source for source, _ in rows]).to(self.dtype)
        return {"pixel_values": pixels, "labels": torch.tensor([label for _, label in rows])}


def _transform(
    directory: str | os.PathLike[str], model: nn.Module
) -> tuple[Callable[[Sequence[Source]], Tensor], str]:
    """How a model's images are made, and a line that says so."""
    config: Any = model.config
    channels = getattr(config, "num_channels", 3)
    if (Path(directory) / "preprocessor_config.json").is_file() and channels == 3:
        processor = _load_processor(directory)

        def processed(sources: Sequence[Source]) -> Tensor:
            images = [load_image(source, "RGB") for source in sources]
            pixels: Tensor = processor(images=images, return_tensors="pt")["pixel_values"]
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

    def scaled(sources: Sequence[Source]) -> Tensor:
        mode = "RGB" if channels == 3 else "L"
        images = [
            load_image(source, mode).resize((width, height), resample=2) for source in sources
        ]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        pixels = pixels.reshape(len(sources), height, width, channels).permute(0, 3, 1, 2)
        return (pixels.float() / 255 - 0.5) / 0.5

    return scaled, (
        f"no image processor for this model: images are resized to {height} x {width} and scaled "
        "to -1..1 (mean and standard deviation 0.5)"
    )


def _load_processor(directory: str | os.PathLike[str]) -> Any:
    try:
        from transformers import AutoImageProcessor
    except ImportError as error:
        raise missing_extra(str(error.name), "hf", "reading images") from None
    with quiet_transformers():
        try:
            return AutoImageProcessor.from_pretrained(
                os.fspath(directory), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            text = str(error).strip() or repr(error)
            raise BadInputError(
                directory,
                expected="an image processor that transformers loads",
                found=text.splitlines()[0],
                remedy="correct or remove preprocessor_config.json",
            ) from error
