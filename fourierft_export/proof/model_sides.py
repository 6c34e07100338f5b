"""Runs the sides that are models, one in memory at a time, and measures what rounding changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.bundle import Bundle
from ..errors import BadInputError, UsageError
from ..models.task import Task
from ..types import Array
from . import reference_model
from .artifacts import Artifacts, tensor_shapes
from .compare import rms_difference
from .inputs import Inputs
from .models import find_module, load_model, load_peft_model, run_model
from .pairs import Noise, Run
from .report import Side

if TYPE_CHECKING:
    import torch


class ModelSides:
    """The sides that are models."""

    def __init__(
        self, artifacts: Artifacts, inputs: Inputs, batch_size: int, started: Callable[[str], None]
    ) -> None:
        """Prepares to run; `started` is called with the name of each side that begins."""
        self.artifacts = artifacts
        self.inputs = inputs
        self.batch_size = batch_size
        self.started = started
        # Runs without the weight changes, the closest to the adapted ones last.
        self.references: list[Run] = []
        self.adapted: list[Run] = []  # runs that must agree, the most trustworthy first
        self.noise = Noise()
        self.problems: list[str] = []  # findings that fail the validation by themselves
        self.notes: list[str] = []  # limits of the result, for the report
        # Precision -> how the weights of the model rebuilt for it are rounded.
        self.roundings: dict[str, reference_model.Rounding] = {}
        self.random_outputs: set[str] = set()  # of parameters in no file: not compared

    def run(self, precisions: Set[str]) -> None:
        """Runs every model side.

        Args:
            precisions: coarse precisions ("float16", "bfloat16") of sides that are not models, for
                which the adapted model is rebuilt as well.
        """
        given = self.artifacts
        if given.task is None or not given.names:
            return
        self.task: Task = given.task
        roundings: dict[str, reference_model.Rounding | None] = dict.fromkeys(sorted(precisions))
        merged = None
        if given.merged is not None:
            merged, rounding = self._run_merged(given.merged)
            if merged.side.precision != "float32":
                roundings[merged.side.precision] = rounding
        if given.base is not None and given.bundle is None:
            self._run_base(given.base)
        if given.base is not None and given.bundle is not None:
            exact = self._run_rebuilt(given.base, given.bundle, "float32", {})
            for precision, found in roundings.items():
                rounded = self._run_rebuilt(given.base, given.bundle, precision, found)
                changed = rms_difference(exact.outputs, rounded.outputs, self.inputs.mask)
                self.noise.rounding[precision] = changed
        if given.base is not None and given.peft is not None:
            self._run_peft(given.base, given.peft)
        if merged is not None:
            self.adapted.append(merged)

    def _run_merged(self, directory: Path) -> tuple[Run, reference_model.Rounding]:
        """Runs the merged checkpoint as transformers loads it; also returns how it is rounded."""
        began = self._begin("merged")
        model, unset = load_model(directory, self.task)
        random = self._ignorable(unset)
        lacking = [name for name in unset if name not in random]
        if lacking:
            self.problems.append(
                f"merged: {directory} lacks {', '.join(lacking)}, which {self.task.name} needs"
            )
        layers = self.artifacts.bundle.layers if self.artifacts.bundle else ()
        paths = [find_module(model, layer.name)[0] for layer in layers]
        rounding = reference_model.find_rounding(model)
        precision = reference_model.weights_precision(
            model, rounding, [path for path in paths if path]
        )
        side = Side("merged", "adapted", str(directory), precision)
        return self._run(side, model, began, random), rounding

    def _run_base(self, directory: Path) -> None:
        """Runs the base alone, where there is no bundle to rebuild the adapted model from."""
        began = self._begin("base")
        model, unset = load_model(directory, self.task, self.artifacts.num_labels)
        random = self._ignorable(unset)
        if set(unset) - set(random):
            self.notes.append(f"base: left out: neither it nor a bundle has {', '.join(unset)}")
            return
        side = Side("base", "base", str(directory), "float32")
        self.references.append(self._run(side, model, began, random))

    def _run_rebuilt(
        self,
        directory: Path,
        bundle: Bundle,
        precision: str,
        rounding: reference_model.Rounding | None,
    ) -> Run:
        """Runs the base and the adapted model that is rebuilt from base and bundle.

        Args:
            directory, bundle: what to rebuild it from.
            precision: of the weights that another side has; "float32" leaves them as they are.
            rounding: how that side's weights are rounded; None rounds all to `precision`.
        """
        exact = precision == "float32"
        suffix = "" if exact else f":{precision}"
        began = self._begin("base" if exact else f"torch{suffix}")
        model, unset = load_model(directory, self.task, self.artifacts.num_labels)
        targets = reference_model.find_targets(model, bundle)
        filled = reference_model.put_saved(model, bundle, only=frozenset(unset))
        random = self._check_unset(directory, unset, filled)
        if exact:
            notes = (f"has the adapter's {', '.join(filled)}, which it lacks",) if filled else ()
            side = Side("base", "base", str(directory), precision, notes=notes)
            self.references.append(self._run(side, model, began, random))
            began = self._begin("torch")
        more = set(reference_model.put_saved(model, bundle)) - set(filled)
        if rounding is None:
            rounding = reference_model.uniform_rounding(model, precision)
        self.roundings[precision] = rounding
        reference_model.round_all(model, rounding)
        side = Side(f"plain{suffix}", "base", self.artifacts.source, precision)
        rounded = () if exact else (f"weights rounded to {precision}, computed in float32",)
        if more or not exact:
            notes = rounded or ("base with the adapter's heads and biases, without its deltas",)
            plain = replace(side, notes=notes)
            self.references.append(self._run(plain, model, began, random))
            began = time.monotonic()
        reference_model.set_weights(targets, bundle, rounding)
        side = replace(side, name=f"torch{suffix}", role="adapted", notes=rounded)
        run = replace(self._run(side, model, began, random), rebuilt=True)
        self.adapted.append(run)
        # Sums in float32 round a few weights the other way: no fault of the side compared.
        reference_model.set_weights(targets, bundle, rounding, in_float32=True)
        self.noise.arithmetic[precision] = self._arithmetic_noise(model, run)
        return run

    def _run_peft(self, directory: Path, adapter: Path) -> None:
        """Runs PEFT's own model, unmerged."""
        began = self._begin("peft")
        base, unset = load_model(directory, self.task, self.artifacts.num_labels)
        prefix = f"{getattr(base, 'base_model_prefix', '')}."
        names = tensor_shapes(adapter)
        filled = [n for name in names for n in (name, name.removeprefix(prefix), prefix + name)]
        random = self._check_unset(directory, unset, filled)
        model, lacking = load_peft_model(base, adapter)
        self.problems += [f"peft: {adapter}: {line}" for line in lacking]
        side = Side("peft", "adapted", str(adapter), "float32")
        self.adapted.append(self._run(side, model, began, random))

    def _begin(self, name: str) -> float:
        """Reports that a side begins; returns the time."""
        self.started(name)
        return time.monotonic()

    def _outputs(self, model: torch.nn.Module) -> dict[str, Array]:
        """Computes the task's outputs on the inputs."""
        return run_model(model, self.task, self.inputs.arrays, batch_size=self.batch_size)

    def _run(
        self, side: Side, model: torch.nn.Module, began: float, random: Collection[str]
    ) -> Run:
        """Computes a side's outputs, without those that depend on the parameters `random`."""
        outputs = self._outputs(model)
        notes = []
        if random:
            extra = {name for name in outputs if name != self.task.outputs[0]}
            self.random_outputs |= extra
            outputs = {name: array for name, array in outputs.items() if name not in extra}
            notes.append(f"random, so not compared: what {', '.join(random)} gives")
        return Run(side.measured(outputs, began, *notes), outputs)

    def _arithmetic_noise(self, model: torch.nn.Module, run: Run) -> dict[str, float]:
        """Measures how far `run` is from the same model in float64, in which the model stays.

        A model that cannot compute in float64 leaves the noise unmeasured.
        """
        try:
            outputs = self._outputs(model.double())
        except BadInputError as error:
            self.notes.append(
                f"{run.side.name}: noise assumed, not measured: the model does not run in float64 "
                f"({error.found})"
            )
            return {}
        return rms_difference(run.outputs, outputs, self.inputs.mask)

    def _ignorable(self, unset: Collection[str]) -> tuple[str, ...]:
        """Selects the random parameters that do not affect the task's main output."""
        if self.task.name != "feature-extraction":
            return ()
        return tuple(name for name in unset if name.startswith("pooler."))

    def _check_unset(
        self, directory: Path, unset: Collection[str], filled: Collection[str]
    ) -> tuple[str, ...]:
        """Raises if the main output depends on random parameters; returns the harmless ones."""
        left = [name for name in unset if name not in filled]
        ignorable = self._ignorable(left)
        random = [name for name in left if name not in ignorable]
        if random:
            raise UsageError(
                directory,
                expected=f"every parameter that {self.task.name} needs, here or in the adapter",
                found=f"neither has {', '.join(random)}",
                remedy="name the task that the adapter was trained for (task=..., --task)",
            )
        return ignorable
