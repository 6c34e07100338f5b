"""A base model on disk: which stored tensor is the weight of which module.

Module paths are an adapter's language, tensor names a checkpoint's. They differ by a prefix when
the adapter was trained on a task model (`bert.encoder...`) and the checkpoint is the bare encoder
(`encoder...`), or the other way round; a tied output embedding has no tensor of its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MAX_OFFENDERS_SHOWN, BadInputError, BaseMismatchError
from ..files import strict_json
from ..files.checkpoint import Checkpoint
from ..files.container import FLOAT_DTYPES, TensorInfo, read_file
from .renaming import renamed_modules

# transformers' Conv1D stores (in_features, out_features); these are the modules that use it.
_GPT_CONV1D = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
CONV1D_MODULES = {
    "gpt2": _GPT_CONV1D,
    "openai-gpt": _GPT_CONV1D,
    "imagegpt": _GPT_CONV1D,
    "decision_transformer": _GPT_CONV1D,
}
_INPUT_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
)
_OUTPUT_EMBEDDINGS = ("lm_head", "embed_out", "output_projection")
_QUANTISED_SUFFIXES = (".qweight", ".weight_packed", ".weight_scale", ".SCB")


@dataclass(frozen=True)
class BaseLayer:
    """One linear layer of a base.

    Attributes:
        module: its path in the adapter's language.
        tensor: name of the stored weight.
        shape: (out_features, in_features).
        transposed: the tensor is stored as (in_features, out_features).
        dtype: safetensors dtype name.
        tied: the weight is the input embedding's; changing it for this layer needs a tensor of
            its own (`own_tensor`).
        own_tensor: the name the layer's weight has when it is not shared.
    """

    module: str
    tensor: str
    shape: tuple[int, int]
    transposed: bool
    dtype: str
    tied: bool
    own_tensor: str


@dataclass(frozen=True)
class Bridge:
    """The one prefix by which an adapter's paths and a checkpoint's names differ.

    Attributes:
        strip: prefix that the adapter has and the checkpoint lacks ("bert"), or "".
        add: prefix that the checkpoint has and the adapter lacks, or "".
        renamed: module paths that the checkpoint calls otherwise (see `renaming`), after that.
    """

    strip: str = ""
    add: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict, compare=False)

    def to_base(self, name: str) -> str:
        """An adapter's module path or tensor name as the checkpoint has it."""
        if self.strip and name.startswith(f"{self.strip}."):
            name = name[len(self.strip) + 1 :]
        elif self.add:
            name = f"{self.add}.{name}"
        path, dot, leaf = name.rpartition(".")
        return self.renamed.get(name) or self.renamed.get(path, path) + dot + leaf


def _kind(name: str) -> str:
    return re.sub(r"[0-9]+", "#", name)


def find_bridge(names: Iterable[str], roots: Iterable[str], has: Callable[[str], bool]) -> Bridge:
    """The prefix difference under which most names are there; none if that does as well.

    Args:
        names: module paths in an adapter's language.
        roots: first segments of what the base has.
        has: whether the base has a module of this path.
    """
    paths = list(names)
    plain = {path: has(path) for path in paths}
    scores = {Bridge(): sum(plain.values())}
    under: dict[str, list[str]] = {}
    for path in paths:
        if "." in path:
            under.setdefault(path.split(".")[0], []).append(path)
    for root in sorted(under):  # only the names under it change
        bridge = Bridge(strip=root)
        gain = sum(has(bridge.to_base(path)) - plain[path] for path in under[root])
        scores[bridge] = scores[Bridge()] + gain
    for root in sorted(set(roots) - {""}):
        bridge = Bridge(add=root)
        scores[bridge] = sum(has(bridge.to_base(path)) for path in paths)
    return max(scores, key=lambda bridge: scores[bridge])


class Base:
    """An open base checkpoint.

    Attributes:
        directory: what was opened (a directory, or one safetensors file).
        config: its config.json, {} when there is none.
        checkpoint: its tensors.
    """

    def __init__(self, checkpoint: Checkpoint, directory: Path, config: Mapping[str, Any]) -> None:
        self.checkpoint = checkpoint
        self.directory = directory
        self.config = config

    @property
    def model_type(self) -> str | None:
        """The config's model_type ("bert", "llama", ...)."""
        value = self.config.get("model_type")
        return value if isinstance(value, str) else None

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Stored tensors by name."""
        return self.checkpoint.tensors

    @cached_property
    def _input_embedding(self) -> str | None:
        for ending in _INPUT_EMBEDDINGS:
            for name in self.tensors:
                if name == ending or name.endswith(f".{ending}"):
                    return name
        return None

    def bridge(self, modules: Iterable[str]) -> Bridge:
        """The prefix difference under which most of `modules` have a weight here.

        Names that transformers changes while loading are looked up only where others are not
        found.
        """
        paths = list(modules)
        roots = {tensor.split(".")[0] for tensor in self.tensors}
        bridge = find_bridge(paths, roots, lambda path: f"{path}.weight" in self.tensors)
        lost = (p for p in paths if f"{bridge.to_base(p)}.weight" not in self.tensors)
        if all(path.split(".")[-1] in _OUTPUT_EMBEDDINGS for path in lost) or not self._renamed:
            return bridge
        roots |= {path.split(".")[0] for path in self._renamed}
        has = {f"{path}.weight" for path in self._renamed} | set(self.tensors)
        bridge = find_bridge(paths, roots, lambda path: f"{path}.weight" in has)
        return replace(bridge, renamed=self._renamed)

    @cached_property
    def _renamed(self) -> dict[str, str]:
        """Module paths that differ from the stored ones; takes transformers, and a moment."""
        if not self.directory.is_dir():
            return {}
        return renamed_modules(self.directory, self.config, self.tensors)

    def find(self, modules: Iterable[str]) -> dict[str, BaseLayer | str]:
        """The linear layers at these module paths, or why there is none (with the nearest name)."""
        paths = list(modules)
        bridge = self.bridge(paths)
        found: dict[str, BaseLayer | str] = {}
        missing = 0
        for path in paths:
            # A person reads the first few offenders; near names for all of them may take minutes.
            found[path] = self._layer(path, bridge, near=missing < MAX_OFFENDERS_SHOWN)
            missing += isinstance(found[path], str)
        return found

    def layers(self, modules: Iterable[str]) -> dict[str, BaseLayer]:
        """The linear layers at these module paths.

        Raises:
            BaseMismatchError: listing every path that has no float matrix as its weight.
        """
        found = self.find(modules)
        layers = {path: layer for path, layer in found.items() if isinstance(layer, BaseLayer)}
        if len(layers) < len(found):
            raise BaseMismatchError(
                self.directory,
                expected="a base with every layer of the adapter",
                found=f"{len(found) - len(layers)} of {len(found)} layers missing or not float "
                "matrices",
                remedy="give the base model that the adapter belongs to",
                offenders=[f"{path}: {why}" for path, why in found.items() if path not in layers],
            )
        return layers

    def layer(self, module: str) -> BaseLayer:
        """The linear layer at one module path (see `layers`)."""
        return self.layers([module])[module]

    def weight(self, module: str) -> np.ndarray[Any, Any]:
        """The weight of a module as stored: (out, in), or (in, out) if transposed."""
        return self.checkpoint.read(self.layer(module).tensor)

    @cached_property
    def _kinds(self) -> dict[str, str]:
        """Tensor names with `#` for every number -> the first such name: dozens, not thousands."""
        kinds: dict[str, str] = {}
        for name in self.tensors:
            kinds.setdefault(_kind(name), name)
        return kinds

    def _layer(self, path: str, bridge: Bridge, *, near: bool) -> BaseLayer | str:
        """The layer, or why there is none (with the nearest name that there is)."""
        own = f"{bridge.to_base(path)}.weight"
        is_output = path.split(".")[-1] in _OUTPUT_EMBEDDINGS
        tensor = own
        if own not in self.tensors and is_output and self._input_embedding:
            tensor = self._input_embedding
        if tensor not in self.tensors:
            stem = own.removesuffix(".weight")
            if any(stem + suffix in self.tensors for suffix in _QUANTISED_SUFFIXES):
                return "quantised"
            found = get_close_matches(_kind(own), self._kinds, n=1) if near else []
            return f"no tensor {own}" + (f" (near: {self._kinds[found[0]]})" if found else "")
        info = self.tensors[tensor]
        if info.dtype not in FLOAT_DTYPES:
            return f"quantised: its weight {tensor} is {info.dtype}"
        if len(info.shape) != 2:
            return f"its weight {tensor} has shape {list(info.shape)}"
        if self.model_type is None and path.split(".")[-1] in _GPT_CONV1D:
            # Half of the families with such names store (in, out); a wrong guess is a wrong model.
            return "no config.json tells whether its weight is stored transposed, as GPT-2's is"
        conv1d = path.split(".")[-1] in CONV1D_MODULES.get(self.model_type or "", ())
        out, into = reversed(info.shape) if conv1d else info.shape
        tied = is_output and (tensor != own or self.config.get("tie_word_embeddings") is True)
        return BaseLayer(path, tensor, (out, into), conv1d, info.dtype, tied, own)


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The config.json of a model directory; {} when there is none.

    Raises:
        BadInputError: it is not a JSON object.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        return {}
    config = strict_json.loads(read_file(path), os.fspath(path))
    if not isinstance(config, dict):
        raise BadInputError(path, expected="a JSON object", found=type(config).__name__)
    return config


def open_base(path: str | os.PathLike[str], *, allow_links: bool = False) -> Base:
    """Open a model directory or a single safetensors file; no tensor is read yet.

    Args:
        path: the directory or the file.
        allow_links: follow links between files of the directory.

    Raises:
        FileAccessError: missing or unreadable.
        BadInputError: not a safetensors checkpoint.
    """
    directory = Path(path)
    config = read_config(directory) if directory.is_dir() else {}
    return Base(Checkpoint.open(directory, allow_links=allow_links), directory, config)
