"""Runs the models, one in memory at a time, and measures what arithmetic alone changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BadInputError, UsageError
from ..models.task import Task
from . import loading, peft_side, rebuild
from .artifacts import Artifacts
from .compare import Array, rms_difference
from .inputs import Inputs
from .judge import Noise, Run
from .report import Side

if TYPE_CHECKING:
    import torch

    from ..bundle.file import Bundle

Tell = Callable[[str], None]


@dataclass
class ModelRuns:
    """What running the models gave.

    Attributes:
        references: sides without the deltas; the last is the closest to the adapted ones.
        adapted: sides that must agree, the most trustworthy first.
        noise: what was measured on the way.
        problems: findings that fail the validation by themselves.
        notes: what a reader of the report should know.
        random_outputs: outputs that rest on parameters no file holds, so that no side's count.
    """

    references: list[Run] = field(default_factory=list)
    adapted: list[Run] = field(default_factory=list)
    noise: Noise = field(default_factory=Noise)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    random_outputs: set[str] = field(default_factory=set)


def run_models(
    artifacts: Artifacts, inputs: Inputs, *, batch_size: int, precisions: Set[str], tell: Tell
) -> ModelRuns:
    """Run every model side.

    Args:
        artifacts: what was given.
        inputs: for every side.
        batch_size: rows per call.
        precisions: coarse precisions ("float16", "bfloat16") of sides that are not models, for
            which the adapted model is rebuilt as well.
        tell: called with what comes next.

    Raises:
        UsageError: a model that would have random parameters, since neither its directory nor the
            adapter holds them.
        BaseMismatchError: the adapter does not fit the base.
        BadInputError: transformers cannot load a directory.
    """
    if artifacts.task is None or not artifacts.names:
        return ModelRuns()
    runner = _Runner(artifacts, artifacts.task, inputs, batch_size, tell)
    merged = runner.merged(artifacts.merged) if artifacts.merged else None
    if artifacts.base is not None:
        if artifacts.bundle is None:
            runner.base_alone(artifacts.base)
        else:
            runner.rebuilt(artifacts.base, artifacts.bundle)
            roundings: dict[str, rebuild.Rounding | None] = dict.fromkeys(sorted(precisions))
            if merged is not None and merged.side.precision != "float32":
                roundings[merged.side.precision] = runner.merged_rounding
            for precision, rounding in roundings.items():
                runner.rounded(artifacts.base, artifacts.bundle, precision, rounding)
        if artifacts.peft is not None:
            runner.peft(artifacts.base, artifacts.peft)
    if merged is not None:
        runner.found.adapted.append(merged)
    return runner.found


class _Runner:
    def __init__(
        self, artifacts: Artifacts, task: Task, inputs: Inputs, batch_size: int, tell: Tell
    ) -> None:
        self.task = task
        self.inputs = inputs
        self.batch_size = batch_size
        self.tell = tell
        self.num_labels = artifacts.num_labels
        self.bundle = artifacts.bundle
        self.bundle_source = artifacts.bundle_source
        self.merged_rounding: rebuild.Rounding = {}
        self.found = ModelRuns()

    def merged(self, directory: Path) -> Run:
        """The merged checkpoint as anybody would load it."""
        self.tell("merged")
        started = time.monotonic()
        loaded = loading.load(directory, self.task)
        dropped = self._ignorable(loaded.unset)
        lacking = [name for name in loaded.unset if name not in dropped]
        if lacking:
            self.found.problems.append(
                f"merged: {directory} lacks {', '.join(lacking)}, which {self.task.name} needs"
            )
        paths = None
        if self.bundle is not None:
            modules = [loading.find_module(loaded.model, m.name) for m in self.bundle.layers]
            paths = [found[0] for found in modules if found is not None] or None
        rounding = rebuild.precisions_of(loaded.model)
        precision = rebuild.weights_precision(loaded.model, rounding, paths)
        self.merged_rounding = rounding
        return self._run(
            "merged", "adapted", str(directory), loaded.model, started, precision, dropped
        )

    def base_alone(self, directory: Path) -> None:
        """The base, when there is no bundle to rebuild the adapted model from."""
        self.tell("base")
        started = time.monotonic()
        loaded = loading.load(directory, self.task, self.num_labels)
        dropped = self._ignorable(loaded.unset)
        if set(loaded.unset) - set(dropped):
            self.found.notes.append(
                f"base: left out: neither it nor a bundle has {', '.join(loaded.unset)}"
            )
            return
        self.found.references.append(
            self._run("base", "base", str(directory), loaded.model, started, "float32", dropped)
        )

    def rebuilt(self, directory: Path, bundle: Bundle) -> None:
        """Base, base with the adapter's heads and biases, and with its deltas as well."""
        self.tell("base")
        started = time.monotonic()
        loaded = loading.load(directory, self.task, self.num_labels)
        model = loaded.model
        targets = rebuild.find_targets(model, bundle)
        filled = rebuild.put_saved(model, bundle, only=frozenset(loaded.unset))
        dropped = self._check_unset(directory, loaded, filled)
        notes = (f"has the adapter's {', '.join(filled)}, which it lacks",) if filled else ()
        base = self._run("base", "base", str(directory), model, started, "float32", dropped, notes)
        self.found.references.append(base)

        self.tell("torch")
        started = time.monotonic()
        source = f"{directory} + {self.bundle_source or 'bundle'}"
        if set(rebuild.put_saved(model, bundle)) - set(filled):
            note = ("base with the adapter's heads and biases, without its deltas",)
            self.found.references.append(
                self._run("plain", "base", source, model, started, "float32", dropped, note)
            )
        started = time.monotonic()
        rebuild.set_weights(targets, bundle, {})
        run = self._run("torch", "adapted", source, model, started, "float32", dropped)
        self.found.adapted.append(run)
        self.found.noise.arithmetic["float32"] = self._arithmetic_noise(model, run)

    def rounded(
        self, directory: Path, bundle: Bundle, precision: str, rounding: rebuild.Rounding | None
    ) -> None:
        """The adapted model with its weights rounded as another side's are."""
        name = f"torch:{precision}"
        self.tell(name)
        started = time.monotonic()
        loaded = loading.load(directory, self.task, self.num_labels)
        model = loaded.model
        targets = rebuild.find_targets(model, bundle)
        filled = rebuild.put_saved(model, bundle)
        dropped = self._check_unset(directory, loaded, filled)
        if rounding is None:
            rounding = rebuild.uniform_rounding(model, precision)
        rebuild.round_all(model, rounding)
        source = f"{directory} + {self.bundle_source or 'bundle'}"
        note = (f"weights rounded to {precision}, computed in float32",)
        plain = f"plain:{precision}"
        self.found.references.append(
            self._run(plain, "base", source, model, started, precision, dropped, note)
        )
        started = time.monotonic()
        rebuild.set_weights(targets, bundle, rounding)
        run = self._run(name, "adapted", source, model, started, precision, dropped, note)
        exact = next(r for r in self.found.adapted if r.side.name == "torch")
        mask = self.inputs.mask
        moved = rms_difference(exact.outputs, run.outputs, mask)
        self.found.noise.rounding[precision] = moved
        # Sums in float32 turn a few roundings the other way, which is nobody's fault.
        rebuild.set_weights(targets, bundle, rounding, in_float32=True)
        self.found.noise.arithmetic[precision] = self._arithmetic_noise(model, run)
        self.found.adapted.append(run)

    def peft(self, directory: Path, adapter: Path) -> None:
        """PEFT's own model, unmerged."""
        self.tell("peft")
        started = time.monotonic()
        loaded = loading.load(directory, self.task, self.num_labels)
        names = peft_side.saved_shapes(adapter)
        prefix = f"{getattr(loaded.model, 'base_model_prefix', '')}."
        filled = {n for name in names for n in (name, name.removeprefix(prefix), prefix + name)}
        dropped = self._check_unset(directory, loaded, tuple(filled))
        forward = loaded.model
        model, lacking = peft_side.peft_model(loaded.model, adapter)
        self.found.problems += [f"peft: {adapter}: {line}" for line in lacking]
        outputs = loading.run_model(
            model, self.task, self.inputs.arrays, batch_size=self.batch_size, forward=forward
        )
        self.found.adapted.append(
            self._side("peft", "adapted", str(adapter), outputs, started, "float32", dropped)
        )

    def _arithmetic_noise(self, model: torch.nn.Module, run: Run) -> dict[str, float]:
        """What float32 arithmetic changed in `run`: its difference from the same model in float64.

        The model stays in float64. One that cannot compute in float64 leaves the noise unmeasured.
        """
        try:
            outputs = loading.run_model(
                model.double(), self.task, self.inputs.arrays, batch_size=self.batch_size
            )
        except BadInputError as error:
            self.found.notes.append(
                f"{run.side.name}: noise assumed, not measured: the model does not run in float64 "
                f"({error.found})"
            )
            return {}
        return rms_difference(run.outputs, outputs, self.inputs.mask)

    def _ignorable(self, unset: tuple[str, ...]) -> tuple[str, ...]:
        """Random parameters that only reach an output beside the main one."""
        extra = self.task.name == "feature-extraction"
        return tuple(name for name in unset if extra and name.startswith("pooler."))

    def _check_unset(
        self, directory: Path, loaded: loading.Loaded, filled: tuple[str, ...]
    ) -> tuple[str, ...]:
        """Raise if the model would keep random parameters that matter; return those that do not."""
        dropped = self._ignorable(tuple(name for name in loaded.unset if name not in filled))
        random = [n for n in loaded.unset if n not in filled and n not in dropped]
        if random:
            raise UsageError(
                directory,
                expected=f"every parameter that {self.task.name} needs, here or in the adapter",
                found=f"neither has {', '.join(random)}",
                remedy="name the task that the adapter was trained for (task=..., --task)",
            )
        return dropped

    def _run(
        self,
        name: str,
        role: str,
        source: str,
        model: torch.nn.Module,
        started: float,
        precision: str,
        dropped: tuple[str, ...],
        notes: tuple[str, ...] = (),
    ) -> Run:
        outputs = loading.run_model(
            model, self.task, self.inputs.arrays, batch_size=self.batch_size
        )
        return self._side(name, role, source, outputs, started, precision, dropped, notes)

    def _side(
        self,
        name: str,
        role: str,
        source: str,
        outputs: dict[str, Array],
        started: float,
        precision: str,
        dropped: tuple[str, ...],
        notes: tuple[str, ...] = (),
    ) -> Run:
        if dropped:
            extra = {name for name in outputs if name != self.task.outputs[0]}
            self.found.random_outputs |= extra
            outputs = {name: array for name, array in outputs.items() if name not in extra}
            notes = (*notes, f"random, so not compared: what {', '.join(dropped)} gives")
        shapes = tuple((n, a.shape) for n, a in outputs.items())
        seconds = time.monotonic() - started
        side = Side(name, role, source, precision, shapes, round(seconds, 3), notes)
        return Run(side, outputs, rebuilt=name.startswith("torch"))
