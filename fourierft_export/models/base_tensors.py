"""A base model on disk: finds the stored tensor that is the weight of a module."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from ..errors import MAX_OFFENDERS_SHOWN, BaseMismatchError, UsageError
from ..files.checkpoint import Checkpoint
from ..files.dtypes import FLOAT_DTYPES
from ..files.hub import local_model
from ..files.safe_paths import check_path
from ..files.safetensors_reader import TensorInfo
from ..types import Array
from .adapter_names_in_base import Bridge, find_bridge, input_embedding_of, renamed_modules
from .task import read_config

# transformers' Conv1D stores (in_features, out_features); these are the modules that use it.
_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
_CONV1D_FAMILIES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_NUMBER = re.compile("[0-9]+")
_INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "shared")
_OUTPUT_EMBEDDINGS = ("lm_head", "embed_out", "output_projection")
# transformers ties their embeddings whatever the config says; there `tie_word_embeddings` decides
# whether the decoder's outputs are scaled.
T5_FAMILIES = ("t5", "mt5", "umt5", "longt5", "udop", "pop2piano", "switch_transformers")
# What checkpoints of BERT's time call the parameters of a norm; transformers renames them.
_OLD_NORM_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
_QUANTISED_SUFFIXES = (".qweight", ".weight_packed", ".weight_scale", ".SCB")


@dataclass(frozen=True)
class BaseLayer:
    """One linear layer of a base.

    Attributes:
        module: its path as the adapter names it.
        tensor: name of the stored weight.
        shape: (out_features, in_features).
        transposed: the tensor is stored as (in_features, out_features).
        dtype: safetensors dtype name.
        tied: the weight is also the input embedding's: a change is stored as `own_tensor`.
        own_tensor: name of the layer's weight if it is not tied.
    """

    module: str
    tensor: str
    shape: tuple[int, int]
    transposed: bool
    dtype: str
    tied: bool
    own_tensor: str


@dataclass(eq=False)
class Base:
    """An open base checkpoint: its tensors, its path, and its config.json ({} without one)."""

    checkpoint: Checkpoint
    directory: Path
    config: Mapping[str, Any]

    @property
    def model_type(self) -> str | None:
        """The config's model_type ("bert", "llama", ...)."""
        value = self.config.get("model_type")
        return value if isinstance(value, str) else None

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Stored tensors by name."""
        return self.checkpoint.tensors

    @property
    def ties(self) -> bool | None:
        """Whether input and output embeddings are one weight; None where the config is silent."""
        value = self.config.get("tie_word_embeddings")
        forced = value is False and self.model_type in T5_FAMILIES
        return value if isinstance(value, bool) and not forced else None

    @cached_property
    def input_embedding(self) -> str | None:
        """Name of the input embedding's tensor, if it is stored."""
        return next((name for name in self.tensors if is_input_embedding(name)), None)

    def name_of_input_embedding(self) -> str:
        """Name of the input embedding's tensor, also where only the tied output's is stored.

        Raises:
            UsageError: it is not stored and transformers, which knows the name, is not installed
                or does not know the model.
        """
        name = self.input_embedding or input_embedding_of(self.directory, self.config, self.tensors)
        if name is None:
            raise UsageError(
                self.directory,
                expected="the input embedding, since its tied output embedding is changed",
                found="the output embedding alone",
                remedy="load the base with transformers and save it with save_pretrained",
            )
        return name

    def stored_name(self, name: str) -> str:
        """Name under which the base stores a tensor; `name` itself if it has neither.

        Args:
            name: as transformers has it today, with the base's prefix (`Bridge.to_base`).
        """
        if name in self.tensors:
            return name
        for now, then in _OLD_NORM_NAMES.items():
            old = name.removesuffix(now) + then
            if name.endswith(now) and old in self.tensors:
                return old
        path, _, leaf = name.rpartition(".")
        parent, dot, module = path.rpartition(".")
        if module in _OUTPUT_EMBEDDINGS:
            others = (f"{parent}{dot}{other}.{leaf}" for other in _OUTPUT_EMBEDDINGS)
            return next((other for other in others if other in self.tensors), name)
        return name

    def bridge(self, modules: Iterable[str]) -> Bridge:
        """Finds the prefix difference under which most of `modules` have a weight here."""
        paths = list(modules)
        roots = {tensor.split(".")[0] for tensor in self.tensors}
        bridge = find_bridge(paths, roots, lambda path: f"{path}.weight" in self.tensors)
        lost = (p for p in paths if f"{bridge.to_base(p)}.weight" not in self.tensors)
        # Modules that transformers renames are looked up only if some are not found without that.
        if all(path.split(".")[-1] in _OUTPUT_EMBEDDINGS for path in lost) or not self._renamed:
            return bridge
        roots |= {path.split(".")[0] for path in self._renamed}
        has = {f"{path}.weight" for path in self._renamed} | set(self.tensors)
        bridge = find_bridge(paths, roots, lambda path: f"{path}.weight" in has)
        return replace(bridge, renamed=self._renamed)

    @cached_property
    def _renamed(self) -> dict[str, str]:
        """Module paths that differ from the stored ones; imports transformers, which is slow."""
        if not self.directory.is_dir():
            return {}
        return renamed_modules(self.directory, self.config, self.tensors)

    def find(self, modules: Iterable[str]) -> dict[str, BaseLayer | str]:
        """Finds the linear layers at these module paths, or says why there is none."""
        paths = list(modules)
        bridge = self.bridge(paths)
        found: dict[str, BaseLayer | str] = {}
        missing = 0
        for path in paths:
            # Only the first are printed; near names for thousands would take minutes.
            found[path] = self._layer(path, bridge, near=missing < MAX_OFFENDERS_SHOWN)
            missing += isinstance(found[path], str)
        return found

    def layers(self, modules: Iterable[str]) -> dict[str, BaseLayer]:
        """Finds the linear layers at these module paths; an error lists those without any."""
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
        """The linear layer at one module path, with its shape and the name of its tensor."""
        return self.layers([module])[module]

    def weight(self, module: str) -> Array:
        """The weight of a module as stored: (out, in), or (in, out) if transposed."""
        return self.checkpoint.read(self.layer(module).tensor)

    @cached_property
    def _kinds(self) -> dict[str, str]:
        """Tensor names with `#` for numbers -> the first such name, to search few names."""
        return {_NUMBER.sub("#", name): name for name in reversed(list(self.tensors))}

    def _layer(self, path: str, bridge: Bridge, *, near: bool) -> BaseLayer | str:
        """Finds one layer, or says why there is none; with `near`, names the nearest tensor."""
        own = self.stored_name(f"{bridge.to_base(path)}.weight")
        is_output = path.split(".")[-1] in _OUTPUT_EMBEDDINGS
        tensor = own
        if own not in self.tensors and is_output and self.ties is not False:
            tensor = self.input_embedding or own
        if tensor not in self.tensors:
            stem = own.removesuffix(".weight")
            if any(stem + suffix in self.tensors for suffix in _QUANTISED_SUFFIXES):
                return "quantised"
            found = get_close_matches(_NUMBER.sub("#", own), self._kinds, n=1) if near else []
            return f"no tensor {own}" + (f" (near: {self._kinds[found[0]]})" if found else "")
        info = self.tensors[tensor]
        if info.dtype not in FLOAT_DTYPES:
            return f"quantised: its weight {tensor} is {info.dtype}"
        if len(info.shape) != 2:
            return f"its weight {tensor} has shape {list(info.shape)}"
        gpt = path.split(".")[-1] in _CONV1D
        if self.model_type is None and gpt:
            # Half of the families with such names store (in, out); a wrong guess is a wrong model.
            return "without a config.json it is unknown whether its weight is stored transposed"
        transposed = gpt and self.model_type in _CONV1D_FAMILIES
        out, into = reversed(info.shape) if transposed else info.shape
        tied = is_output and (tensor != own or self.ties is True)
        return BaseLayer(path, tensor, (out, into), transposed, info.dtype, tied, own)


def is_input_embedding(tensor: str) -> bool:
    """Whether a tensor has the name of an input embedding."""
    return tensor.endswith(".weight") and tensor.split(".")[-2] in _INPUT_EMBEDDINGS


def is_embedding(tensor: str) -> bool:
    """Whether a tensor has the name of an input or output embedding."""
    return is_input_embedding(tensor) or (
        tensor.endswith(".weight") and tensor.split(".")[-2] in _OUTPUT_EMBEDDINGS
    )


def open_base(path: str | os.PathLike[str], *, allow_links: bool = False) -> Base:
    """Opens a model directory or a single safetensors file; no tensor is read yet."""
    check_path(path)
    directory = Path(local_model(path))
    config = read_config(directory) if directory.is_dir() else {}
    return Base(Checkpoint.open(directory, allow_links=allow_links), directory, config)


def describe_base(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describes a model directory or safetensors file as JSON values; no tensor is read."""
    base = open_base(path)
    tensors, architectures = base.tensors.values(), base.config.get("architectures")
    return {
        "kind": "checkpoint",
        "path": os.fspath(path),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "shards": len(base.checkpoint.shards),
        "tensors": len(tensors),
        "parameters": sum(prod(tensor.shape) for tensor in tensors),
        "dtypes": dict(Counter(tensor.dtype for tensor in tensors).most_common()),
        "model_type": base.model_type,
        "architectures": architectures if isinstance(architectures, list) else [],
    }
