"""Which layers an adapter changes: PEFT's selection rules, on the paths of a live model.

Sources: PEFT's tuners/tuners_utils.py (`check_target_module_exists`, "all-linear"),
tuners/fourierft/model.py (n_frequency_pattern) and utils/constants.py (usual targets by
architecture). Unlike there, the error for a selection that matches nothing, or something that is
not a linear layer, lists all offenders and the names that look alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from ..errors import UsageError
from .base_linear import is_linear, layer_shape
from .config import ALL_LINEAR, FourierFTConfig
from .modules import base_modules, did_you_mean, original

SEQUENCE_HEADS = ("classifier", "score")
TASK_HEADS = {
    "SEQ_CLS": SEQUENCE_HEADS,
    "TOKEN_CLS": SEQUENCE_HEADS,
    "QUESTION_ANS": ("qa_outputs",),
}

_USUAL_TARGETS: dict[tuple[str, ...], str] = {
    ("q_proj", "v_proj"): "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2"
    " gemma3_text qwen2 qwen3",
    ("query", "value"): "bert roberta xlm-roberta electra layoutlm",
    ("q", "v"): "t5 mt5",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("query_key_value",): "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
    ("mlp.c_proj",): "gpt2 gpt_bigcode",
    ("Wqkv",): "mpt",
    ("c_proj", "c_attn"): "btlm",
    ("qkv_proj",): "codegen",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
}
USUAL_TARGETS: Mapping[str, str | tuple[str, ...]] = {
    model_type: names for names, types in _USUAL_TARGETS.items() for model_type in types.split()
} | {"gemma4": r".*language_model\..*\.(q_proj|v_proj)"}


class Selection(NamedTuple):
    """The layers to adapt and the modules to save.

    Attributes:
        targets: path of each layer -> its n_frequency, in the model's order.
        saved: paths of the modules to train and save whole; none lies within another.
    """

    targets: dict[str, int]
    saved: tuple[str, ...]


def select(model: nn.Module, config: FourierFTConfig) -> Selection:
    """Choose the layers of `model` that `config` asks for.

    A module that stands at several paths is adapted at the first of them only, as in PEFT.
    """
    modules = {path: original(module) for path, module in base_modules(model) if path}
    saved = _saved_paths(modules, config)
    wanted = _target_names(model, modules, config)
    chosen = [
        path
        for path in modules
        if not _is_left_out(path, config, saved)
        and _is_wanted(path, wanted)
        # PEFT filters by block number only what a name's end matched, not a full path.
        and (isinstance(wanted, str) or path in wanted or _in_layer_range(path, config))
    ]
    if not chosen:
        raise _nothing_matched(modules, wanted)
    odd = [f"{p}: {type(modules[p]).__name__}" for p in chosen if not is_linear(modules[p])]
    if odd:
        raise UsageError(
            "target_modules",
            expected="linear layers only (nn.Linear, Conv1D, in_features to out_features)",
            found=f"{len(odd)} of {len(chosen)} matched modules of other types",
            remedy="narrow target_modules, or name these in exclude_modules",
            offenders=odd,
        )
    targets = {path: _frequency(path, config) for path in chosen}
    too_small = []
    for path, n in targets.items():
        rows, columns = layer_shape(modules[path])
        if n > rows * columns:
            too_small.append(f"{path}: {rows} x {columns} has {rows * columns} weights, found {n}")
    if too_small:
        raise UsageError(
            "n_frequency",
            expected="at most the number of weights of each layer",
            found=f"{len(too_small)} layers that are smaller",
            remedy="lower n_frequency, or give these layers their own in n_frequency_pattern",
            offenders=too_small,
        )
    return Selection(targets, saved)


def names_to_save(config: FourierFTConfig) -> tuple[str, ...]:
    """modules_to_save with the heads that the task adds."""
    heads = TASK_HEADS.get(config.task_type or "", ())
    return (*(config.modules_to_save or ()), *heads)


def _saved_paths(modules: Mapping[str, nn.Module], config: FourierFTConfig) -> tuple[str, ...]:
    """Paths that end in one of the names, as PEFT's `_set_trainable` takes them."""
    names = names_to_save(config)
    found: list[str] = []
    for path in modules:
        inside = any(path.startswith(f"{root}.") for root in found)
        if not inside and any(path.endswith(name) for name in names):
            found.append(path)
    if config.modules_to_save and not found:
        raise UsageError(
            "modules_to_save",
            expected="ends of module paths",
            found=f"no module for {', '.join(config.modules_to_save)}",
            remedy=did_you_mean(config.modules_to_save[0], _last_segments(modules)),
        )
    return tuple(found)


def _target_names(
    model: nn.Module, modules: Mapping[str, nn.Module], config: FourierFTConfig
) -> str | frozenset[str] | tuple[str, ...]:
    """A regular expression, a tuple of path ends, or for "all-linear" a set of full paths."""
    wanted = config.target_modules
    if wanted is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        usual = USUAL_TARGETS.get(str(model_type))
        if usual is None:
            linear = [p for p, m in modules.items() if is_linear(m)]
            raise UsageError(
                "target_modules",
                expected="names of layers, since this architecture has no usual ones",
                found=f"None for model type {model_type!r}",
                remedy=f"choose among {', '.join(_last_segments(linear))}, or use {ALL_LINEAR!r}",
            )
        return usual
    if not isinstance(wanted, str):
        return tuple(wanted)
    if wanted.lower() != ALL_LINEAR:
        return wanted
    head = _output_head(model, config)

    def holds_linears(module: nn.Module) -> bool:  # a block with sizes: the layers in it are taken
        return any(is_linear(inner) for inner in module.modules() if inner is not module)

    return frozenset(
        p for p, m in modules.items() if is_linear(m) and m is not head and not holds_linears(m)
    )


def _output_head(model: nn.Module, config: FourierFTConfig) -> nn.Module | None:
    """The layer that "all-linear" leaves out: the output embedding, else the classifier."""
    output = getattr(model, "get_output_embeddings", None)
    if output is None:
        return None
    heads = [output()]
    if config.task_type == "SEQ_CLS":
        heads += [getattr(model, "score", None), getattr(model, "classifier", None)]
    return next((original(head) for head in heads if isinstance(head, nn.Module)), None)


def _is_left_out(path: str, config: FourierFTConfig, saved: Iterable[str]) -> bool:
    exclude = config.exclude_modules
    if isinstance(exclude, str):
        if re.fullmatch(exclude, path):
            return True
    elif exclude and _ends_in(path, exclude):
        return True
    if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in names_to_save(config)):
        return True
    return any(path == root or path.startswith(f"{root}.") for root in saved)


def _is_wanted(path: str, wanted: str | frozenset[str] | tuple[str, ...]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return path in wanted if isinstance(wanted, frozenset) else _ends_in(path, wanted)


def _ends_in(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _in_layer_range(path: str, config: FourierFTConfig) -> bool:
    """Whether layers_to_transform has the first number in `path` that layers_pattern precedes."""
    layers = config.layers_to_transform
    if layers is None or layers == ():
        return True
    patterns = config.layers_pattern or ()
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    rules = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    match = next((m for m in (re.match(rule, path) for rule in rules) if m), None)
    if match is None:
        return False
    return int(match[1]) in ((layers,) if isinstance(layers, int) else layers)


def _frequency(path: str, config: FourierFTConfig) -> int:
    """n_frequency of a layer: the first pattern that matches after a dot, else the exact path."""
    pattern = config.n_frequency_pattern
    key = next((k for k in pattern if re.match(rf".*\.{k}$", path)), path)
    return pattern.get(key, config.n_frequency)


def _last_segments(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))


def _nothing_matched(
    modules: Mapping[str, nn.Module],
    wanted: str | frozenset[str] | tuple[str, ...],
) -> UsageError:
    linear = [path for path, module in modules.items() if is_linear(module)]
    if isinstance(wanted, frozenset):
        found, offenders = f"no linear layer is left for {ALL_LINEAR!r}", []
    else:
        names = (wanted,) if isinstance(wanted, str) else wanted
        found = f"none for {', '.join(names)}"
        known = [*_last_segments(linear), *linear]
        offenders = [f"{name}: {did_you_mean(name, known) or 'no similar name'}" for name in names]
    if not isinstance(wanted, frozenset) and any(_is_wanted(p, wanted) for p in modules):
        found += " once exclude_modules, modules_to_save and layers_to_transform are applied"
        offenders = []
    shown = ", ".join(_last_segments(linear)[:12]) or "none at all"
    return UsageError(
        "target_modules",
        expected="at least one linear layer",
        found=found,
        remedy=f"the linear layers of this model are called: {shown}",
        offenders=offenders,
    )
