"""Classification heads that exist only in an adapter: how many labels they decide between."""

from __future__ import annotations

from collections.abc import Mapping

# The last projection of the heads that transformers builds, most specific first.
_HEAD_WEIGHTS = (
    "classifier.out_proj.weight",
    "classification_head.out_proj.weight",
    "classifier.dense2.weight",
    "classifier.weight",
    "score.weight",
)


def head_labels(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The number of labels of the head among an adapter's dense tensors.

    Args:
        shapes: tensor name -> shape.

    Returns:
        Rows of the head's last weight, or None when there is no head.
    """
    for ending in _HEAD_WEIGHTS:
        for name, shape in shapes.items():
            if (name == ending or name.endswith(f".{ending}")) and len(shape) == 2:
                return shape[0]
    return None
