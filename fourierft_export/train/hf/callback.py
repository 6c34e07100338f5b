"""Training with transformers' own Trainer: one callback, and checkpoints of kilobytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_callback import ExportableState, TrainerCallback

from ...adapt.attach import capture
from ...adapt.modules import adapter_names
from ...errors import BaseMismatchError, UsageError
from ..live import Identity, check_only_learns, check_same_run, identity
from .saving import divert, release, write_adapter


class BundleCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Lets a stock `Trainer` save an adapter instead of the whole model.

        model = ff.inject(model, config)
        trainer = Trainer(model, args, ..., callbacks=[ff.BundleCallback()])
        trainer.train()

    Every `checkpoint-N` then holds the bundle, `adapter.fourierft.safetensors`; the same numbers
    under the live model's names, `model.safetensors`, from which the Trainer resumes and takes the
    best; the optimizer's state, of the adapter alone; and what the Trainer writes besides. After
    training `trainer.save_model(folder)` writes the bundle alone. Resuming, the best model,
    save_total_limit, early stopping, logging and progress stay the Trainer's own.

    From the Trainer's start on, `save_pretrained` of this model object writes the adapter; it is
    the class's own again after `release(model)`, and once the adapter is detached. A model that is
    not transformers' is saved whole by the Trainer; each checkpoint is made small once it is
    written, and `trainer.save_model` stays whole.

    Args:
        name: the adapter that is trained. Only it may learn: parameters outside it would be lost.

    Raises:
        UsageError: at the start of training: no such adapter, one that does not learn, other
            parameters that learn, or FSDP or DeepSpeed, which break tensors into pieces.
        BaseMismatchError: at the start of training: the checkpoint resumed from is of another
            adapter or base.
    """

    def __init__(self, name: str = "default") -> None:
        self.name = name
        self.identity: Identity | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint's trainer_state.json keeps of this callback."""
        return {"args": {"name": self.name}, "attributes": {"identity": self.identity}}

    def on_init_end(
        self, _args: Any, _state: Any, _control: Any, model: nn.Module | None = None, **_others: Any
    ) -> None:
        """Before a checkpoint is loaded, which happens before training begins."""
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
                remedy="train with the verb `train` and --shard-base under torchrun",
            )
        check_only_learns(model, self.name)
        divert(model, self.name)
        self.identity = identity(capture(model, self.name))
        if state.global_step > 0:
            _check_resumed(state, self.name, self.identity)
        _let_inputs_ask_for_gradients(model, args)

    def on_save(
        self, args: Any, state: Any, _control: Any, model: nn.Module, **_others: Any
    ) -> None:
        """Make small what the Trainer saves whole: checkpoints of a model not of transformers."""
        if isinstance(model, PreTrainedModel) or not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            write_adapter(model, self.name, folder)
            (folder / "pytorch_model.bin").unlink(missing_ok=True)

    def release(self, model: nn.Module) -> None:
        """Give `model` its class's `save_pretrained` back."""
        release(model)


def _check_resumed(state: Any, name: str, now: Identity) -> None:
    """Compare with what trainer_state.json says, if a run with this callback wrote it."""
    found = (state.stateful_callbacks or {}).get(BundleCallback.__name__, ())
    states = found if isinstance(found, list) else [found]
    recorded: dict[str, Identity] = {
        one["args"]["name"]: one["attributes"]["identity"]
        for one in states
        if one and one["attributes"].get("identity")
    }
    if name in recorded:
        check_same_run(recorded[name], now)
    elif recorded:
        raise BaseMismatchError(
            "checkpoint to resume from",
            expected=f"an adapter {name!r}",
            found=", ".join(map(repr, recorded)),
            remedy="inject the adapter under that name",
        )


def _let_inputs_ask_for_gradients(model: nn.Module, args: Any) -> None:
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
