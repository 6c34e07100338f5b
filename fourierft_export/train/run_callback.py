"""What a run does besides learning: keep the best adapter, stop in time, report progress."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..errors import UsageError
from ..files.staging import staged_file
from ..types import Progress
from .callback import ADAPTER_FILE
from .settings import TrainSettings

log = logging.getLogger(__name__)

SAVE_SECONDS = 60.0  # between two checkpoints, if no evaluation comes first
_TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class RunCallback(TrainerCallback):  # type: ignore[misc]
    """Keeps the best adapter in the output, stops when it should, and reports progress.

    Args:
        out: the bundle to write.
        settings: with every default worked out.
        metric: the metric that says which adapter is best.
        higher: whether more of it is better.
        progress: called with (what, done, total).
        interrupted: whether Ctrl-C was pressed.
        clear: makes room for a new run, before its first step: a run that cannot begin leaves
            what it would replace.
    """

    def __init__(
        self,
        out: Path,
        settings: TrainSettings,
        metric: str,
        higher: bool,
        progress: Progress,
        interrupted: Callable[[], bool],
        clear: Callable[[], None],
    ) -> None:
        self.out, self.settings, self.clear = out, settings, clear
        self.metric, self.higher = metric, higher
        self.progress, self.interrupted = progress, interrupted
        self.kept_step = 0  # of the adapter in `out`
        self.best: float | None = None
        self.waited = 0  # evaluations since the best one
        self.stopped = "finished"
        self.saved_at = time.monotonic()
        self.began = self.seconds = 0.0

    def on_train_begin(self, _args: Any, state: Any, *_others: Any, **_more: Any) -> None:
        """Report where the run begins."""
        self.judge(state.log_history)
        self.report(state)

    def on_step_begin(self, _args: Any, state: Any, *_others: Any, **_more: Any) -> None:
        """Start the clock of a step."""
        if state.global_step == 0 and state.is_world_process_zero:
            self.clear()
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_others: Any) -> None:
        """Save in good time; stop after Ctrl-C, of which all processes hear."""
        self.seconds = time.perf_counter() - self.began
        due = time.monotonic() - self.saved_at > SAVE_SECONDS
        stop, due = _any_process(self.interrupted(), due)
        if stop and state.global_step < state.max_steps:
            self.stopped = "interrupted"
            control.should_training_stop = True
        if stop or due:
            control.should_save = True
        if args.eval_strategy != "no" and state.global_step >= state.max_steps:
            control.should_evaluate = True  # transformers before 5.23 leaves the last step out
        self.report(state)

    def on_log(self, _args: Any, state: Any, *_others: Any, logs: Any = None, **_more: Any) -> None:
        """Note the seconds of a step with its loss."""
        if logs and "loss" in logs:
            state.log_history[-1]["seconds"] = self.seconds

    def on_evaluate(
        self, _args: Any, state: Any, control: Any, metrics: dict[str, float], **_others: Any
    ) -> None:
        """Decide whether this adapter is kept, and whether there is hope for a better one."""
        found = scores(metrics)
        if self.metric not in found:
            raise UsageError("metric", expected="one of " + ", ".join(found), found=self.metric)
        kept = self.judge(state.log_history)[-1]["is_best"]
        if state.is_world_process_zero:
            text = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
            text += "; kept" if kept else ""
            log.info("step %d of %d: %s", state.global_step, state.max_steps, text)
        if self.is_hopeless and state.global_step < state.max_steps:
            self.stopped = "patience"
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, _control: Any, **_others: Any) -> None:
        """Write the output if the checkpoint's adapter is the one to keep."""
        self.saved_at = time.monotonic()
        if args.eval_strategy == "no":
            self.kept_step = state.global_step
        if self.kept_step == state.global_step and state.is_world_process_zero:
            publish(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.out)

    def judge(self, history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The evaluations in the Trainer's log, each with `is_best`: it was kept at that time."""
        found = evaluations(history)
        self.best, self.waited = None, 0
        for one in found:
            better = False
            if one["step"]:
                value = one["metrics"][self.metric]
                better = self.best is None or self.is_better(value, self.best)
                self.best = value if better else self.best
                self.waited = 0 if better else self.waited + 1
            one["is_best"] = one["step"] > 0 and (better or self.settings.keep == "last")
            self.kept_step = one["step"] if one["is_best"] else self.kept_step
        return found

    def is_better(self, value: float, best: float) -> bool:
        """Whether a value is better than the best so far; NaN is worse than any number."""
        if math.isnan(value) or math.isnan(best):
            return math.isnan(best) and not math.isnan(value)
        return value > best if self.higher else value < best

    @property
    def is_hopeless(self) -> bool:
        """Whether `patience` evaluations came after the best one."""
        return self.waited >= (self.settings.patience or math.inf)

    def report(self, state: Any) -> None:
        """Report where the run stands, for a progress bar."""
        words = [f"epoch {state.epoch or 0:.2f}"]
        losses = [entry["loss"] for entry in state.log_history[-3:] if "loss" in entry]
        words += [f"loss {losses[-1]:.4g}"] if losses else []
        words += [] if self.best is None else [f"best {self.metric} {self.best:.4g}"]
        self.progress(", ".join(words), state.global_step, state.max_steps)


def publish(checkpoint: Path, out: Path) -> None:
    """Copy a checkpoint's bundle to `out`, which is the old file or the new one at any moment."""
    content = (checkpoint / ADAPTER_FILE).read_bytes()
    with staged_file(out, force=True) as partial:
        partial.write_bytes(content)


def scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The scores among what the Trainer calls metrics, without its prefix and times."""
    names = {key: key.removeprefix("eval_") for key in metrics if key.startswith("eval_")}
    return {name: float(metrics[key]) for key, name in names.items() if name not in _TIMES}


def evaluations(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations among what the Trainer logged: step, epoch, metrics."""
    return [
        {"step": e["step"], "epoch": e.get("epoch") or 0.0, "metrics": scores(e)}
        for e in history
        if any(key.startswith("eval_") for key in e)
    ]


def _any_process(*flags: bool) -> tuple[bool, ...]:
    """Each flag: whether it is set in any process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flags
    device = "cuda" if "nccl" in torch.distributed.get_backend() else "cpu"
    totals = torch.tensor(flags, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(totals)
    return tuple(total > 0 for total in totals.tolist())


@contextmanager
def ctrl_c_noted() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns True after Ctrl-C; a second Ctrl-C stops at once."""
    pressed = False

    def note(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            signal.default_int_handler(number, frame)
        pressed = True

    in_main = threading.current_thread() is threading.main_thread()
    # Somebody else may decide what Ctrl-C does.
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
