"""Packed weights: which layers are in one by its name, and where; and how a person says so."""

from __future__ import annotations

import re

# What onnxruntime-genai and others pack: the name of the whole -> its parts, in their order.
_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_MAPPED = re.compile(r"(?P<name>.*?)(?:\[(?P<start>\d+):(?P<stop>\d+)\])?", re.DOTALL)


def packed_paths(path: str) -> list[str]:
    """The modules that are packed in the one of this path; none by most names."""
    stem, _, name = path.rpartition(".")
    return [_joined(stem, part) for part in _PARTS.get(name, ())]


def packed_in(path: str) -> tuple[str, int] | None:
    """The module that a layer may be packed in, and how many parts there are from its own on.

    The first of several counts as 0, as it begins at the beginning.
    """
    stem, _, name = path.rpartition(".")
    for whole, parts in _PARTS.items():
        if name in parts:
            index = parts.index(name)
            return _joined(stem, whole), len(parts) - index if index else 0
    return None


def start_in(from_end: int, size: int, total: int) -> int | None:
    """Where a part begins: parts but the first are of one size (keys and values, gate and up).

    Args:
        from_end: as `packed_in` gives it.
        size: number of its outputs.
        total: that of the whole.

    Returns:
        None if it does not fit.
    """
    start = total - from_end * size if from_end else 0
    return start if 0 <= start <= total - size else None


def parse_mapped(text: str) -> tuple[str, tuple[int, int] | None]:
    """`initializer` or `initializer[start:stop]` as the name, and the range if there is one."""
    parsed = _MAPPED.fullmatch(text)
    if parsed is None or parsed["start"] is None:
        return text, None
    return parsed["name"], (int(parsed["start"]), int(parsed["stop"]))


def unknown_size(layer: str, name: str, whole: str) -> str:
    """Why a layer of unknown size cannot be told in the weight that it is packed in."""
    return (
        f"packed in {whole}, and nothing tells how many of its outputs are this layer's: give "
        f"--base, or --map {layer}={name}[START:STOP]"
    )


def _joined(stem: str, name: str) -> str:
    return f"{stem}.{name}" if stem else name
