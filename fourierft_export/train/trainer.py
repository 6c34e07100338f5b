"""transformers' Trainer with what an adapter needs: its own rates, batches and checkpoints."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..adapt.modules import base_modules, original
from ..bundle.bundle import Bundle
from ..errors import FileAccessError, UsageError, first_line
from .average import Average
from .checkpoint import ADAPTER, LAST_STEP
from .data.losses_and_scores import logits_of
from .epoch_batches import EpochBatches, rate_factor
from .live_adapter import LiveAdapter
from .parameter_groups import parameter_groups
from .settings import TrainSettings
from .task import TrainingTask

OPTIMIZER_FILE = "adapter_optimizer.pt"  # with FSDP: gathered, of the adapter alone
TASK_ARGUMENTS = (
    *("train_dataset", "eval_dataset", "data_collator", "compute_loss_func"),
    *("compute_metrics", "preprocess_logits_for_metrics"),
)
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """A Trainer with this package's batches, schedule and mode, and checkpoints of kilobytes.

    `adapter` is what learns; without one something else does, with an `optimizer` of its own.
    """

    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        task: TrainingTask,
        settings: TrainSettings,
        batches: EpochBatches,
        arguments: TrainingArguments,
        callbacks: Sequence[TrainerCallback] = (),
        adapter: LiveAdapter | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.settings, self.batches = settings, batches
        self.average = None if adapter is None else Average(adapter, settings.average)
        given = {name: getattr(task, name) for name in TASK_ARGUMENTS}
        optimizers, own = (optimizer, None), [self.average] if self.average else []
        super().__init__(
            task.model, arguments, callbacks=[*own, *callbacks], optimizers=optimizers, **given
        )
        self.remove_callback(PrinterCallback)
        if task.compute_loss_func is not None:
            self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches by seed and epoch, shared out already."""
        loader = DataLoader(
            self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator
        )
        # The Trainer calls it before each epoch, or on the batch sampler when it resumes.
        vars(loader)["set_epoch"] = self.batches.set_epoch
        return loader

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """AdamW with the rates of `parameter_groups`."""
        if self.optimizer is None:
            groups = parameter_groups(
                self.model if model is None else model,
                learning_rate=self.settings.learning_rate,
                head_learning_rate=self.settings.head_learning_rate,
                weight_decay=self.settings.weight_decay,
                spectrum_weight_decay=self.settings.spectrum_weight_decay,
                same_rate=self.settings.layer_rates == "same",
                steps=self.args.max_steps,
                schedule=self.settings.schedule,
            )
            devices = {p.device.type for group in groups for p in group["params"]}
            # One kernel per group instead of a dozen per tensor, where there is such a kernel.
            self.optimizer = torch.optim.AdamW(groups, fused=devices <= {"cpu", "cuda"})
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """`rate_factor` on every group's rate."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer,
                lambda step: rate_factor(step, num_training_steps, self.settings),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The Trainer's, with dropout off where it learns."""
        if model.training:
            set_training(self.accelerator.unwrap_model(model), dropout=self.settings.dropout)
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs and self.compute_loss_func is not None:
            loss, outputs = found
            if not isinstance(outputs, Mapping):  # the Trainer would take a tensor's first row off
                return loss, {"logits": logits_of(outputs)}
        return found

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """The Trainer's; a loss that is not finite ends the run before anything is updated."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._check_finite(loss, "a loss of")
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # float16's scale is found by trial: an infinite gradient there only skips this update.
        if self.accelerator.scaler is None:
            self._check_finite(norm, "a gradient of length")
        return norm

    def _check_finite(self, value: Any, what: str) -> None:
        if not math.isfinite(float(value)):
            raise UsageError(
                f"step {self.state.global_step + 1}",
                expected="a finite loss and gradient",
                found=f"{what} {float(value)}",
                remedy="the bundle and the checkpoint are those before; try lower --learning-rate "
                "and --head-learning-rate, a longer --warmup, or --dtype float32, and look at the "
                "rows for values that are not finite",
            )

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        try:
            super()._save_checkpoint(*arguments, **options)
        except RuntimeError as error:
            if "inline_container" not in str(error):  # where torch.save writes its file
                raise
            raise FileAccessError(
                self.args.output_dir,
                expected="to be able to write a checkpoint",
                found=first_line(error),
                remedy="check the free space of the disk, then use --resume",
            ) from error

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """The Trainer's, of the mean where there is one."""
        with self.average.in_use() if self.average else nullcontext():
            try:
                found: dict[str, float] = super().evaluate(*arguments, **options)
            finally:
                for module in self.model.modules():
                    if isinstance(module, FSDPModule):
                        module.reshard()  # the outermost one stays whole otherwise
        return found

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter; with FSDP every process takes part."""
        writes = self.is_fsdp_enabled or self.args.should_save
        if self.average is None or not writes:
            return
        folder = Path(output_dir or self.args.output_dir)
        with self.average.in_use():
            self._save_adapter(self.average.adapter, folder / ADAPTER)
        if self.average.means:
            self._save_adapter(self.average.adapter, folder / LAST_STEP)

    def _save_adapter(self, adapter: LiveAdapter, path: Path) -> None:
        bundle = adapter.bundle()
        if self.args.should_save:
            path.parent.mkdir(parents=True, exist_ok=True)
            bundle.save(path, force=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, _model: Any = None) -> None:
        if self.average is None:
            return
        folder, adapter = Path(resume_from_checkpoint), self.average.adapter
        adapter.load(Bundle.load(folder / ADAPTER))
        if self.average.count(self.state) > 0:
            self.average.begin()
            adapter.load(Bundle.load(folder / LAST_STEP))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer = self.optimizer.optimizer
        state = get_optimizer_state_dict(self.model, optimizer, options=GATHERED)
        if self.args.should_save:
            both = {"optimizer": state, "scheduler": self.lr_scheduler.state_dict()}
            torch.save(both, Path(output_dir) / OPTIMIZER_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        both = torch.load(Path(checkpoint) / OPTIMIZER_FILE, weights_only=True)
        optimizer = self.optimizer.optimizer
        set_optimizer_state_dict(self.model, optimizer, both["optimizer"], options=GATHERED)
        self.lr_scheduler.load_state_dict(both["scheduler"])


def set_training(model: nn.Module, *, dropout: bool) -> None:
    """Put a model into the mode to learn in."""
    model.train(dropout)
    for _, module in base_modules(model):
        inner = original(module)
        if isinstance(inner, nn.modules.batchnorm._BatchNorm):
            inner.eval()
        elif isinstance(inner, nn.RNNBase) or getattr(inner, "gradient_checkpointing", False):
            inner.training = True


def cast_frozen_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast float32 weights of frozen linear layers once, as autocast would on every call."""
    modules = [original(module) for _, module in base_modules(model)]
    holders = Counter(id(p) for module in modules for p in module._parameters.values())
    for module in modules:
        weight = module._parameters.get("weight")
        if type(module) is not nn.Linear or weight is None or holders[id(weight)] > 1:
            continue
        if weight.dtype == torch.float32 and not weight.requires_grad:
            for parameter in module._parameters.values():
                if parameter is not None and not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
