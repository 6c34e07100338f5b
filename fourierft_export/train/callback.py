"""Training with transformers' own Trainer, or accelerate alone: checkpoints of kilobytes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedModel
from transformers.trainer_callback import ExportableState, TrainerCallback

from ..adapt.active import refuse_saving
from ..adapt.modules import adapter_names
from ..bundle.bundle import SUFFIX, Bundle
from ..errors import BaseMismatchError, UsageError
from ..files.staging import staged_file
from .checkpoint import ADAPTER
from .live_adapter import (
    NAME,
    Identity,
    LiveAdapter,
    adapter_tensors,
    check_only_learns,
    check_same_adapter,
    identity,
)

WEIGHTS_FILE = "model.safetensors"
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_DIVERTED = "_fourierft_diverted"
_FIRST: WeakKeyDictionary[nn.Module, Bundle] = WeakKeyDictionary()


class BundleCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Lets a stock `Trainer` save an adapter instead of the whole model.

        model = ff.inject(model, config)
        trainer = Trainer(model, args, ..., callbacks=[ff.BundleCallback()])
        trainer.train()

    Every `checkpoint-N` then holds the bundle, `adapter.fourierft.safetensors`; the same numbers
    under the live model's names, `model.safetensors`, from which the Trainer resumes and takes the
    best; the optimizer's state, of the adapter alone; and what the Trainer writes besides. After
    training `trainer.save_model(folder)` writes the bundle alone, and so does `save_pretrained` of
    this model object until `release(model)` or `ff.detach`. Of a model that is not transformers'
    only the checkpoints are small.

    Args:
        name: the adapter that is trained. Only it may learn: parameters outside it would be lost.

    Raises:
        UsageError: at the start of training: no such adapter, one that does not learn, other
            parameters that learn, or FSDP or DeepSpeed, which break tensors into pieces.
        BaseMismatchError: there: the checkpoint resumed from is of another adapter or base.
    """

    def __init__(self, name: str = NAME) -> None:
        self.name = name
        self.identity: Identity | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint's trainer_state.json keeps of this callback."""
        return {"args": {"name": self.name}, "attributes": {"identity": self.identity}}

    def on_init_end(self, *_given: Any, model: nn.Module | None = None, **_others: Any) -> None:
        """Divert `save_pretrained` before a checkpoint is loaded, which training does first."""
        if model is not None and self.name in adapter_names(model):
            divert(model, self.name)

    def on_train_begin(
        self, args: Any, state: Any, _control: Any, model: nn.Module, **_others: Any
    ) -> None:
        """Check that a bundle will hold all that is learnt, and what a resumed run began with."""
        pieces = [name for name in ("fsdp", "deepspeed") if getattr(args, name, None)]
        if pieces:
            raise UsageError(
                "BundleCallback",
                expected="one process, or several with the whole model each",
                found=" and ".join(pieces),
                remedy="train with the verb `train` under `accelerate launch` with FSDP",
            )
        adapter = LiveAdapter.of(model, self.name)
        check_only_learns(adapter)
        divert(model, self.name, adapter.first)
        self.identity = identity(adapter.first)
        if state.global_step > 0:
            _check_resumed(state, self.name, self.identity)
        _require_input_gradients(model, args)

    def on_save(
        self, args: Any, state: Any, _control: Any, model: nn.Module, **_others: Any
    ) -> None:
        """Make small what the Trainer saves whole: checkpoints of a model not of transformers."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        whole = not isinstance(model, PreTrainedModel) and folder.is_dir()
        if whole and state.is_world_process_zero:
            write_adapter(_adapter_of(model, self.name), folder)
            (folder / "pytorch_model.bin").unlink(missing_ok=True)

    def release(self, model: nn.Module) -> None:
        """Give `model` its class's `save_pretrained` back."""
        diverted = model.__dict__.pop(_DIVERTED, None)
        _FIRST.pop(model, None)
        if diverted is not None:
            diverted[1].remove()
            model.__dict__.pop("save_pretrained", None)
            if adapter_names(model):
                refuse_saving(model)


def write_adapter(
    adapter: LiveAdapter, folder: str | os.PathLike[str], file: str = ADAPTER
) -> None:
    """Write an adapter as `file`, and to a checkpoint of the Trainer its model.safetensors."""
    os.makedirs(folder, exist_ok=True)
    adapter.bundle().save(Path(folder) / file, force=True)
    if _CHECKPOINT.fullmatch(Path(folder).name):
        own = adapter_tensors(adapter.model)
        tensors = {k: t.detach().cpu().clone() for k, t in own.items()}
        with staged_file(Path(folder) / WEIGHTS_FILE, force=True) as partial:
            save_file(tensors, partial, metadata={"format": "pt"})


def divert(model: nn.Module, name: str, first: Bundle | None = None) -> None:
    """Let `model.save_pretrained` write adapter `name` only, until `release` or `detach`."""
    BundleCallback(name).release(model)
    if hasattr(model, "save_pretrained"):
        # A bound method, so that a deep copy of the model saves itself and not this one.
        vars(model)["save_pretrained"] = MethodType(save_pretrained, model)
    handle = model.register_load_state_dict_post_hook(_accept_adapters_alone)
    setattr(model, _DIVERTED, (name, handle))
    if first is not None:
        _FIRST[model] = first


def save_pretrained(
    self: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    **settings: Any,
) -> None:
    """Write the adapter of a diverted model; a model without it is saved as its class does."""
    diverted = self.__dict__.get(_DIVERTED)
    if diverted is None or diverted[0] not in adapter_names(self):
        whole: Any = type(self)
        whole.save_pretrained(self, save_directory, is_main_process=is_main_process, **settings)
        return
    if settings.get("push_to_hub"):
        remedy = "call the model's own push_to_hub, or upload the folder"
        raise UsageError("save_pretrained", found="push_to_hub=True", remedy=remedy)
    if is_main_process:
        write_adapter(_adapter_of(self, diverted[0]), save_directory)


def _adapter_of(model: nn.Module, name: str) -> LiveAdapter:
    """The adapter; the base is hashed only where training has not done it yet."""
    first = _FIRST.get(model)
    return LiveAdapter.of(model, name) if first is None else LiveAdapter(model, name, first)


def _accept_adapters_alone(model: nn.Module, found: _IncompatibleKeys) -> None:
    """Keep the Trainer from warning, for every tensor of the base, that it is not in the file."""
    base = set(model.state_dict()) - set(adapter_tensors(model))
    if not found.unexpected_keys and set(found.missing_keys) == base:
        found.missing_keys.clear()


def _check_resumed(state: Any, name: str, now: Identity) -> None:
    """Compare with what trainer_state.json says, if a run with this callback wrote it."""
    found = (state.stateful_callbacks or {}).get(BundleCallback.__name__, ())
    states = found if isinstance(found, list) else [found]
    recorded = {one["args"]["name"]: one["attributes"]["identity"] for one in states if one}
    if recorded.get(name):
        check_same_adapter(recorded[name], now, "checkpoint to resume from")
    elif any(recorded.values()):
        raise BaseMismatchError(
            "checkpoint to resume from",
            expected=f"an adapter {name!r}",
            found=", ".join(map(repr, recorded)),
            remedy="inject the adapter under that name",
        )


def _require_input_gradients(model: nn.Module, args: Any) -> None:
    """Reentrant checkpointing gives blocks no gradient whose inputs do not ask for one."""
    # transformers 5 has them by new names; the old ones are aliases there.
    names = ("activation_checkpointing", "gradient_checkpointing")
    if not any(getattr(args, name, False) for name in names):
        return
    given = [getattr(args, f"{name}_kwargs", None) or {} for name in names]
    reentrant = all(settings.get("use_reentrant", True) for settings in given)
    enable: Any = getattr(model, "enable_input_require_grads", None)
    if reentrant and enable is not None and getattr(model, "_require_grads_hook", None) is None:
        enable()


class BundleState(NamedTuple):
    """What `save_bundles` has registered: the hooks of saving and of loading."""

    saving: Any
    loading: Any

    def remove(self) -> None:
        """Let the accelerator save whole models again."""
        self.saving.remove()
        self.loading.remove()


def save_bundles(accelerator: Any, name: str = NAME) -> BundleState:
    """Makes accelerate's `save_state` and `load_state` write and read an adapter, not its model.

    Call it once, before the first of them. A folder of `save_state` then holds
    `NAME.fourierft.safetensors` beside the optimizer's and the generators' states. Models without
    such an adapter are saved whole.

    Args:
        accelerator: accelerate's; with models prepared before or after.
        name: the adapter that is trained.

    Returns:
        A handle; its `remove` lets the accelerator save whole models again.

    Raises:
        UsageError: in `save_state`: other parameters than the adapter's learn, two models have an
            adapter of that name, or accelerate splits tensors (FSDP, DeepSpeed).
        BaseMismatchError: in `load_state`: the bundle is of another adapter or base.
    """
    file = f"{name}{SUFFIX}"

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        for _, adapter in adapted(models):
            check_only_learns(adapter)
            # By its names: hooks of other adapters may have taken their models' weights already.
            own = [f".{name}" for name in adapter_tensors(adapter.model)]
            place = next((i for i, found in enumerate(weights) if _has_all(found, own)), None)
            if place is None:
                raise UsageError(
                    "accelerator.save_state",
                    expected="models that every process holds whole",
                    found=f"distributed type {accelerator.distributed_type}",
                    remedy="remove the hooks, and save the model in accelerate's own way",
                )
            del weights[place]
            if accelerator.is_main_process:
                write_adapter(adapter, folder, file)

    def load(models: list[nn.Module], folder: str) -> None:
        for index, adapter in adapted(models):
            adapter.load(Bundle.load(Path(folder) / file))
            del models[index]

    def adapted(models: list[nn.Module]) -> Iterator[tuple[int, LiveAdapter]]:
        plain = [accelerator.unwrap_model(model) for model in models]
        found = [i for i, model in enumerate(plain) if name in adapter_names(model)]
        if len(found) > 1:
            raise UsageError(
                "save_bundles",
                expected=f"one model with an adapter {name!r}",
                found=f"{len(found)} of them",
                remedy="give the adapters names of their own, and register each",
            )
        yield from ((i, LiveAdapter.of(plain[i], name)) for i in found)

    saving = accelerator.register_save_state_pre_hook(save)
    return BundleState(saving, accelerator.register_load_state_pre_hook(load))


def _has_all(weights: Any, ends: list[str]) -> bool:
    """Whether a state dict has these names, under whatever prefix a wrapper gave them."""
    return all(any(f".{key}".endswith(end) for key in weights) for end in ends)
