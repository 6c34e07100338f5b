"""Where a run stands, in one small file: a resumed run equals one that was never stopped.

A safetensors file with JSON in its metadata, written beside and renamed; nothing in it runs code.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn, optim

from ..errors import BadInputError, FileAccessError, UsageError
from ..files import strict_json
from ..files.staging import staged_file

KEY = "fourierft_train"
VERSION = 1
FOLDER_SUFFIX = ".train"
FILE = "state.safetensors"
# Settings that may differ when a run goes on: they change how, not what, is computed.
FREE = frozenset(
    {"accumulate", "device", "eval_every", "gradient_checkpointing", "patience", "threads"}
)


@dataclass
class History:
    """What happened so far.

    Attributes:
        losses: mean training loss of each step.
        norms: length of each step's gradient, before it was shortened.
        seconds: of each step.
        evaluations: by time: `step`, `epoch`, `metrics`, and `is_best`.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation of the adapter that is kept."""
        return next((e for e in reversed(self.evaluations) if e["is_best"]), None)


@dataclass
class State:
    """Where a run stands.

    Attributes:
        tensors: the adapter's, by name.
        moments: AdamW's, by parameter name and key.
        history: of the run; its length is the number of steps done.
        facts: what must be the same when it goes on (`check_same`).
        scaler: of float16's GradScaler.
    """

    tensors: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    history: History
    facts: dict[str, Any]
    scaler: dict[str, Any] = field(default_factory=dict)


def folder_of(out: str | os.PathLike[str]) -> Path:
    """Where the state, metrics and picture of a run lie: beside its bundle."""
    path = Path(out)
    return path.with_name(path.name + FOLDER_SUFFIX)


def moments_of(
    optimizer: optim.Optimizer, learning: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, Tensor]]:
    """The optimizer's memory by parameter name."""
    return {
        name: {k: v for k, v in optimizer.state[parameter].items() if isinstance(v, Tensor)}
        for name, parameter in learning.items()
        if parameter in optimizer.state
    }


def set_moments(
    optimizer: optim.Optimizer,
    learning: Mapping[str, nn.Parameter],
    moments: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Give an optimizer the memory that `moments_of` read."""
    for name, values in moments.items():
        parameter = learning[name]
        optimizer.state[parameter] = {
            # The count of steps lives where the optimizer itself would have put it.
            key: value.clone() if key == "step" and not _fused(optimizer)
            else value.to(parameter.device, copy=True)
            for key, value in values.items()
        }  # fmt: skip


def _fused(optimizer: optim.Optimizer) -> bool:
    return bool(optimizer.param_groups[0].get("fused"))


def save_state(path: Path, state: State) -> None:
    """Write a state; the file is the old one or the new one, whenever the process dies.

    Raises:
        FileAccessError: it cannot be written.
    """
    history = state.history
    tensors = {f"adapter:{name}": value for name, value in state.tensors.items()}
    for name, values in state.moments.items():
        tensors |= {f"{key}:{name}": value for key, value in values.items()}
    for name in ("losses", "norms", "seconds"):
        tensors[f"history:{name}"] = torch.tensor(getattr(history, name), dtype=torch.float64)
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # JSON has no word for an infinite or undefined score.
    evaluations = [
        e | {"metrics": {k: v if math.isfinite(v) else str(v) for k, v in e["metrics"].items()}}
        for e in history.evaluations
    ]
    text = strict_json.canonical(
        {
            "version": VERSION,
            "evaluations": evaluations,
            "facts": state.facts,
            "scaler": state.scaler,
        }
    )
    with staged_file(path, force=True) as partial:
        partial.write_bytes(save(tensors, {KEY: text}))


def load_state(path: Path) -> State:
    """Read a state.

    Raises:
        FileAccessError: there is none.
        BadInputError: it is damaged, or of another version.
    """
    if not path.is_file():
        raise FileAccessError(
            path,
            expected="the state of a run that was stopped",
            found="none",
            remedy="leave --resume out to begin one",
        )
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadInputError(path, expected="the state of a run", found=str(error)) from error
    told = strict_json.loads(text, str(path)) if text else None
    if not isinstance(told, dict) or told.get("version") != VERSION:
        version = told.get("version") if isinstance(told, dict) else None
        raise BadInputError(
            path,
            expected=f"the state of a run, version {VERSION}",
            found=f"version {version}" if version else "another safetensors file",
            remedy="begin again with --force",
        )
    try:
        return _state(told, found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInputError(
            path,
            expected="the whole state of a run",
            found=f"one that lacks something: {error!r}",
            remedy="begin again with --force",
        ) from error


def _state(told: dict[str, Any], found: dict[str, Tensor]) -> State:
    """The state that a file's text and tensors tell."""
    losses, norms, seconds = (
        found.pop(f"history:{name}").tolist() for name in ("losses", "norms", "seconds")
    )
    evaluations = [
        e | {"metrics": {k: float(v) for k, v in e["metrics"].items()}} for e in told["evaluations"]
    ]
    history = History(losses, norms, seconds, evaluations)
    state = State({}, {}, history, told["facts"], told["scaler"])
    for name, value in found.items():
        kind, _, rest = name.partition(":")
        if kind == "adapter":
            state.tensors[rest] = value
        else:
            state.moments.setdefault(rest, {})[kind] = value
    return state


def check_same(state: State, facts: Mapping[str, Any], where: Path) -> None:
    """Refuse to go on with another model, data or settings than the run began with.

    Raises:
        UsageError: all that differs.
    """
    old, new = state.facts, dict(facts)
    wrong = [
        f"{key}: {old['settings'].get(key)!r} then, {new['settings'].get(key)!r} now"
        for key in sorted({*old["settings"], *new["settings"]} - FREE)
        if old["settings"].get(key) != new["settings"].get(key)
    ]
    wrong += [
        f"{key}: another than then"
        for key in sorted({*old, *new} - {"settings"})
        if old.get(key) != new.get(key)
    ]
    if wrong:
        raise UsageError(
            where,
            expected="the settings, model and data that the run began with",
            found=f"{len(wrong)} that differ",
            remedy="give the same ones, or begin again with --force in place of --resume",
            offenders=wrong,
        )
