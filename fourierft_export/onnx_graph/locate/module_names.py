"""Module paths in the names of a graph's weights, biases and nodes; names of packed weights."""

from __future__ import annotations

import re

_WEIGHT = re.compile(
    r"(?:\.MatMul(?:NBits)?(?:\.DequantizeLinear)?)?\.q?(?:weight|kernel)"
    r"(?:_quantized|_q|(?:_DQ)?_Q\d\w*)?$"
)
_BIAS = re.compile(r"(?:\.Add)?\.bias(?:_quantized)?$")
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")
_MAPPED = re.compile(r"(?P<name>.*?)(?:\[(?P<start>\d+):(?P<stop>\d+)\])?", re.DOTALL)
_MAX_TEXT = 4096
# Weights that onnxruntime-genai and other tools pack: name of the whole -> its parts, in order.
_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def module_of_weight(name: str) -> str | None:
    """The module path in the name of a weight; None for a name that ends otherwise."""
    path, count = _WEIGHT.subn("", name)
    return path if count and path else None


def module_of_bias(name: str) -> str | None:
    """The module path in the name of a bias; None for a name that ends otherwise."""
    path, count = _BIAS.subn("", name)
    return path if count and path else None


def module_of_scopes(text: str) -> str | None:
    """The module path in the metadata that torch's exporter gives a node: a list of its scopes."""
    scopes = [a or b for a, b in _QUOTED.findall(text[:_MAX_TEXT])]
    return str(scopes[-2]) if len(scopes) > 1 and scopes[-2] else None


def module_of_node(name: str) -> str | None:
    """The module path in a node name such as `/encoder/layer.0/dense/MatMul`; None if none is.

    A container's child is named with its container: `/ff/ff.0/MatMul` is module `ff.0`.
    """
    segments = name[:_MAX_TEXT].split("/")
    if len(segments) < 3 or segments[0]:
        return None
    path: list[str] = []
    for segment in segments[1:-1]:
        if path and segment.startswith(f"{path[-1]}."):
            path[-1] = segment
        else:
            path.append(segment)
    return ".".join(path) or None


def same_path(path: str) -> str:
    """Spell a module path as onnxruntime-genai does."""
    return path.replace(".self_attn.", ".attn.")


def same_module(one: str, other: str) -> bool:
    """Whether two paths are equal apart from a prefix."""
    a, b = f".{same_path(one)}", f".{same_path(other)}"
    return a.endswith(b) or b.endswith(a)


def packed_modules(path: str) -> list[str]:
    """The modules that a module of this path packs together; usually none."""
    stem, dot, name = path.rpartition(".")
    return [stem + dot + part for part in _PARTS.get(name, ())]


def packed_in(path: str) -> tuple[str, int] | None:
    """The module that a layer may be packed in, and the number of parts from it to the end.

    That number is 0 for the first part, which begins at output 0 whatever the sizes.
    """
    stem, dot, name = path.rpartition(".")
    for whole, parts in _PARTS.items():
        if name in parts:
            index = parts.index(name)
            return stem + dot + whole, len(parts) - index if index else 0
    return None


def parse_mapped(text: str) -> tuple[str, tuple[int, int] | None]:
    """`initializer` or `initializer[start:stop]` as the name, and the range if there is one."""
    parsed = _MAPPED.fullmatch(text)
    if parsed is None or parsed["start"] is None:
        return text, None
    return parsed["name"], (int(parsed["start"]), int(parsed["stop"]))
