"""One training of one method: what a process of the comparison does."""

from __future__ import annotations

import math
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from data import Rows
from methods import METHODS, N_FREQUENCY, TARGETS

EPOCHS, BATCH_SIZE, MAX_LENGTH = 3, 32, 64


@dataclass(frozen=True)
class Cell:
    """A training: its results are kept under these five values.

    Attributes:
        part: "search" (split of the training rows) or "final" (all of them, test rows scored).
        rate: peak learning rate; None for the toolkit's default.
    """

    task: str
    method: str
    part: str
    seed: int
    rate: float | None

    @property
    def key(self) -> str:
        return f"{self.task}/{self.method}/{self.part}/{self.seed}/{self.rate}"


def train_cell(cell: Cell, rows: Rows, model: str, dtype: str) -> dict[str, Any]:
    """Train and score; the last adapter counts, so that nothing is chosen on the rows scored."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    from fourierft_export.train.data.make_task import prepare
    from fourierft_export.train.settings import DataSettings

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    search = cell.part == "search"
    settings = _settings(cell, dtype)
    data = DataSettings(
        task="text-classification",
        model=model,
        data=str(rows.search_train if search else rows.train),
        eval=str(rows.search_score if search else rows.test),
    )
    task = prepare(data, settings)
    steps = math.ceil(len(task.train_dataset) / BATCH_SIZE) * EPOCHS
    settings = replace(settings, eval_every=steps)
    train = _ours if METHODS[cell.method].put is None else _peer
    return asdict(cell) | train(task, cell, settings) | {"key": cell.key}


def _settings(cell: Cell, dtype: str) -> Any:
    import fourierft_export as ff

    return ff.TrainSettings(
        n_frequency=N_FREQUENCY,
        target_modules=TARGETS,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        max_length=MAX_LENGTH,
        seed=cell.seed,
        learning_rate=cell.rate,
        dtype=dtype,
        device="cpu",
        keep="last",
    )


def _ours(task: Any, cell: Cell, settings: Any) -> dict[str, Any]:
    import fourierft_export as ff

    del cell
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "adapter.fourierft.safetensors"
        report = ff.train_adapter(task, out, settings, picture=False)
    return {
        "score": report.best["accuracy"],
        "loss": report.best["loss"],
        "parameters": report.parameters["spectra"],
        "head_parameters": report.parameters["heads"],
        "bytes": report.bundle_bytes,
        "seconds_per_step": report.seconds_per_step,
    }


def _peer(task: Any, cell: Cell, settings: Any) -> dict[str, Any]:
    """The same Trainer, batches and schedule around a model that PEFT prepared."""
    import torch
    from transformers import TrainerCallback

    from fourierft_export.train import defaults
    from fourierft_export.train.train import make_arguments, resolved
    from fourierft_export.train.trainer import AdapterTrainer
    from fourierft_export.train.training_run import evaluations, plan

    class Clock(TrainerCallback):
        """Keeps the seconds of every step."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_args: Any, **_others: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_args: Any, **_others: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    method = METHODS[cell.method]
    torch.manual_seed(cell.seed)
    heads = task.modules_to_save
    model = method.put(task)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in learning.items() if any(part in name for part in heads)]
    body = [p for name, p in learning.items() if not any(part in name for part in heads)]
    head_rate = cell.rate if method.is_head_rate else defaults.HEAD_LEARNING_RATE
    groups = [{"params": head, "lr": head_rate}]
    groups += [{"params": body, "lr": cell.rate}] if body else []
    settings, clock = resolved(settings), Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = make_arguments(settings, Path(folder))
        arguments.save_strategy = "no"
        task = replace(task, model=model)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        batches = plan(task, settings, arguments)
        trainer = AdapterTrainer(task, settings, batches, arguments, [clock], optimizer=optimizer)
        trainer.train()
    scores = evaluations(trainer.state.log_history)[-1]["metrics"]
    return {
        "score": scores["accuracy"],
        "loss": scores["loss"],
        "parameters": sum(p.numel() for p in body),
        "head_parameters": sum(p.numel() for p in head),
        "bytes": _file_bytes(model, learning),
        "seconds_per_step": median(clock.seconds[3:]),
    }


def _file_bytes(model: Any, learning: dict[str, Any]) -> int:
    """What the method's own files take: PEFT's folder without its README, or the head alone."""
    if not hasattr(model, "peft_config"):
        return sum(p.numel() * p.element_size() for p in learning.values())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        kept = ("adapter_model.safetensors", "adapter_config.json")
        return sum((Path(folder) / name).stat().st_size for name in kept)
