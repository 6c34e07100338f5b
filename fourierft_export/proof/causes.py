"""Finds the first layer in which a side differs from the rebuilt model, and the likely cause.

Both run on a few rows. The rebuilt model gives every layer's input and output; the other side gives
all its intermediate values, by hooks in PyTorch and by added outputs in ONNX. The first layer whose
output is nowhere among them is at fault, and its output shows how: of each known fault it is
computed what the layer would give, and the one that the side agrees with is the cause.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..bundle.bundle import Bundle
from ..bundle.spec import EXPLICIT_RULE
from ..models.task import Task
from ..spectral.delta import reference_delta
from ..spectral.entries import ENTRY_RULES, current_rule, spectral_entries
from ..types import Array
from .artifacts import Artifacts
from .graphs import Graph
from .inputs import Inputs
from .models import load_model, load_peft_model, run_model
from .reference_model import (
    Rounding,
    Target,
    delta_of,
    find_targets,
    put_saved,
    round_all,
    set_weights,
)
from .report import Cause, Comparison

if TYPE_CHECKING:
    import torch

Values = npt.NDArray[np.float64]

ROWS = 4
AGREES, AGREES_ROUNDED = 2e-4, 0.002
"""Layers agree that differ by less than this share of their effect: float32, coarser weights."""
NOISE = {"float16": 2.0**-9, "bfloat16": 2.0**-6}
FLOAT32_NOISE = 2.0**-17
QUANTISED = (
    "its weights are quantised; elsewhere int8 sums also saturate on x86-64 CPUs without VNNI, "
    'unless the session option session.x64quantprecision is "1", as it is here'
)
SEEDS = (777, 0, 1, 42, 123, 1234)


@dataclass(frozen=True)
class Call:
    """One call of a module: its path, and its input and output as (rows, features)."""

    path: str
    input: Values | None
    output: Values


def trace_model(model: torch.nn.Module, task: Task, inputs: dict[str, Array]) -> list[Call]:
    """Runs a model and records the calls of its modules, in the order in which they end."""
    import torch

    calls: list[Call] = []

    def record(path: str) -> Any:
        def hook(_: Any, arguments: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point() and output.ndim:
                given = [a for a in arguments[:1] if isinstance(a, torch.Tensor)]
                first = next((_flat(a.detach()) for a in given if a.is_floating_point()), None)
                calls.append(Call(path, first, _flat(output.detach())))

        return hook

    modules = [(p, m) for p, m in model.named_modules() if not p.endswith(".base_layer")]
    hooks = [module.register_forward_hook(record(path)) for path, module in modules]
    try:
        run_model(model, task, inputs, batch_size=ROWS)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def find_causes(
    artifacts: Artifacts,
    inputs: Inputs,
    graphs: Mapping[str, Graph],
    comparisons: Sequence[Comparison],
    roundings: Mapping[str, Rounding],
) -> Iterator[Cause]:
    """Explains each side that differs from the model that was rebuilt for its precision.

    Args:
        artifacts, inputs, graphs: what was validated; the graphs by the names of their sides.
        comparisons: all pairs.
        roundings: precision -> how the weights of sides of this precision are rounded.
    """
    base, bundle, task = artifacts.base, artifacts.bundle, artifacts.task
    models = {"merged": artifacts.merged, "peft": artifacts.peft}
    done: set[str] = set()
    for pair in comparisons:
        side, known = pair.right, {**graphs, **models}
        if pair.ok or pair.expect != "equal" or side in done or known.get(side) is None:
            continue
        rebuilt = [p.left for p in comparisons if p.right == side and p.left.startswith("torch")]
        precision = max(rebuilt, default="").partition(":")[2] or "float32"
        if base is None or bundle is None or task is None:
            return
        done.add(side)
        graph = graphs.get(side)
        if graph is not None and graph.precision == "int8":
            yield Cause(side, "every quantised layer", "precision", QUANTISED, None)
            continue
        rows = (graph and graph.fixed_batch) or ROWS
        few = {name: array[:rows] for name, array in inputs.arrays.items()}

        def load(directory: Path, task: Task = task) -> torch.nn.Module:
            return load_model(directory, task, artifacts.num_labels)[0]

        if graph is not None:
            values = [_flat(value) for value in graph.trace(few)]
        else:
            model = load(artifacts.merged if side == "merged" and artifacts.merged else base)
            if side == "peft" and artifacts.peft is not None:
                model = load_peft_model(model, artifacts.peft)[0]
            calls = trace_model(model, task, few)
            values = [v for c in calls for v in (c.output, c.input) if v is not None]
            del model, calls
        rounding = roundings.get(precision, {})
        noise = NOISE.get(graph.precision if graph else "float32", FLOAT32_NOISE)
        cause = _find_cause(
            side, values, load(base), bundle, task, few, rounding, noise, complete=graph is None
        )
        if cause is not None:
            yield cause


def _find_cause(
    side: str,
    values: Sequence[Values],
    model: torch.nn.Module,
    bundle: Bundle,
    task: Task,
    inputs: dict[str, Array],
    rounding: Rounding,
    noise: float,
    *,
    complete: bool,
) -> Cause | None:
    """Finds the first layer of a side that differs, and why; None if every layer is found.

    Args:
        side: its name.
        values: all its intermediate values, each (rows, features).
        model: the base, freshly loaded; it is changed.
        bundle, task, inputs: what the side was run with.
        rounding: how the side's weights are rounded.
        noise: of the side's arithmetic, as a fraction of a value's root mean square.
        complete: the side has every module's output (a model, not a graph that may fuse some).
    """
    targets = find_targets(model, bundle)
    heads = {name.rpartition(".")[0] for name in put_saved(model, bundle)}
    round_all(model, rounding)
    set_weights(targets, bundle, rounding)
    by_path = {target.path: target for target in targets}
    modules = dict(model.named_modules())
    for call in trace_model(model, task, inputs):
        special = call.path in by_path or call.path in heads
        solvable = call.input is not None and len(call.input) >= call.input.shape[1]
        leaf = not any(modules[call.path].children())
        if not special and not (leaf and (complete or solvable)):
            continue
        target = by_path.get(call.path)
        effect = call.output
        if target is not None and call.input is not None:
            effect = call.input @ delta_of(bundle, target).T
        share = special * (AGREES_ROUNDED if rounding else AGREES)
        limit = share * _rms(effect) + noise * _rms(call.output)
        alike = [v for v in values if v.shape == call.output.shape]
        nearest = min(alike, key=lambda v: _rms(v - call.output), default=None)
        if nearest is not None and _rms(nearest - call.output) <= limit:
            continue
        size = _rms(call.output) or 1.0
        added = not special and nearest is not None and _is_added(call, nearest, bundle)
        if not (special or complete or added):
            continue
        found = None if nearest is None else _rms(nearest - call.output) / size
        known = call.input is None or any(
            v.shape == call.input.shape and _rms(v - call.input) <= noise * 4 * _rms(v)
            for v in values
        )
        if special and not known:
            what = "what comes before it differs: another base, or a layer added to the adapter's"
            return Cause(side, call.path, "base", what, found)
        if target is not None and call.input is not None:
            kind, text = _explain(call.input, call.output, target, bundle, alike, limit)
        elif call.path in heads:
            kind, text = _explain_head(call.output, nearest)
        else:
            kind, text = "base", "the adapter does not change this layer: another base"
            if added or side == "peft":
                kind, text = "added", "the adapter does not change this layer: a layer added"
            embeds = getattr(model, "get_input_embeddings", lambda: None)()
            head = getattr(model, "get_output_embeddings", lambda: None)()
            if modules[call.path] is embeds and any(t.module is head for t in targets):
                kind, text = "tied", "the input embedding was changed together with the tied head"
        return Cause(side, call.path, kind, text, found)
    return None


def _explain(
    inputs: Values,
    output: Values,
    target: Target,
    bundle: Bundle,
    alike: Sequence[Values],
    limit: float,
) -> tuple[str, str]:
    """Names the fault of an adapted layer that agrees best with one of the side's values."""
    delta = delta_of(bundle, target)
    effect = inputs @ delta.T
    changed = target.module.weight.detach().double().numpy()
    rounding = inputs @ ((changed.T if target.transposed else changed) - target.matrix - delta).T
    base = output - effect - rounding
    limit += 3 * _rms(rounding)
    best, cause = limit, ("base", "no known fault explains it: another base, or other weights")
    for kind, text, other in _faults(inputs, target, bundle, delta):
        left = min((_rms(value - base - other) for value in alike), default=np.inf)
        if left < best:
            best, cause = left, (kind, text)
    left_out = False
    spectrum = np.abs(np.fft.fft2(delta))
    places = spectrum > 1e-9 * spectrum.max()
    few = places.mean() < 0.5
    wanted = np.sort(spectrum.ravel())
    for value in alike:
        change = value - base
        factor = float(np.vdot(change, effect)) / (float(np.vdot(effect, effect)) or 1.0)
        left = _rms(change - factor * effect)
        if abs(factor) < 0.005:  # a graph may add the change to this value later
            left_out |= left < limit
        elif left < best:
            best, cause = left, _name_factor(factor)
        elif cause[0] == "base" and (found := _solve(inputs, change)) is not None:
            # The same coefficients give the same magnitudes wherever they lie, but for a few that
            # fall on each other's mirror images; a change that is no spectrum is far off.
            seen = np.abs(np.fft.fft2(found))
            if few and _rms(seen * ~places) < 0.02 * _rms(seen):
                cause = "adapter", "other coefficients at the same entries: another adapter"
            elif _rms(wanted - np.sort(seen.ravel())) < 0.4 * _rms(wanted):
                cause = "seed", "the same coefficients at other entries: another seed or entry rule"
    return ("left out", "delta_W was left out") if cause[0] == "base" and left_out else cause


def _name_factor(factor: float) -> tuple[str, str]:
    """Names the fault of a layer that has `factor` times its delta_W."""
    if abs(factor - 2) < 0.005:
        return "twice", "delta_W was added twice"
    return "scaling", f"delta_W is {factor:.4g} times what it should be: another scaling or weight"


def _faults(
    inputs: Values, target: Target, bundle: Bundle, delta: Values
) -> Iterator[tuple[str, str, Values]]:
    """Yields known faults of a layer, each with what the layer would add to the base's output."""
    import torch

    if delta.shape[0] == delta.shape[1]:
        yield "transposed", "delta_W is transposed", inputs @ delta
    spec, scaling = target.spec, float(bundle.spec.scaling)
    if spec.entry_rule != EXPLICIT_RULE:
        seed, spectrum = bundle.spec.entry_seed, bundle.spectra[spec.name]
        drawn = [("entry rule", seed, rule) for rule in ENTRY_RULES]
        drawn += [
            ("seed", other, current_rule(target.shape)) for other in (seed - 1, seed + 1, *SEEDS)
        ]
        for kind, other, rule in drawn:
            if other < 0 or (other == seed and kind == "seed"):
                continue
            entries = spectral_entries(other, target.shape, spec.n_frequency, rule)
            wrong = reference_delta(spectrum, entries, target.shape, scaling)
            if not np.array_equal(wrong, delta):
                what = f"seed {other} instead of {seed}" if kind == "seed" else f"rule {rule!r}"
                yield kind, f"the entries are those of {what}", inputs @ wrong.T
    for dtype in (torch.bfloat16, torch.float16):

        def rounded(values: Values, dtype: torch.dtype = dtype) -> Values:
            return torch.from_numpy(values).to(dtype).double().numpy()

        coefficients = rounded(bundle.spectra[spec.name].astype(np.float64))
        for what, changed in (
            ("W + delta_W is rounded to {}", rounded(target.matrix + delta)),
            ("W is rounded to {} before delta_W is added", rounded(target.matrix) + delta),
            (
                "the coefficients are rounded to {}",
                target.matrix + delta_of(bundle, target, coefficients),
            ),
        ):
            text = what.format(str(dtype).removeprefix("torch."))
            yield "precision", text, inputs @ (changed - target.matrix).T


def _explain_head(expected: Values, found: Values | None) -> tuple[str, str]:
    """Names the fault of a head or of another module that the adapter saved."""
    if found is not None:
        factor = float(np.vdot(found, expected)) / (float(np.vdot(expected, expected)) or 1.0)
        if _rms(found - factor * expected) < 1e-4 * _rms(expected):
            return "head", f"the adapter's head times {factor:.4g}"
    return "head", "it is not the adapter's: its head is missing, or another one is there"


def _solve(inputs: Values, change: Values) -> Values | None:
    """Finds the change of a weight, (out, in), from that of the output; None with too few rows."""
    if len(inputs) < inputs.shape[1]:
        return None
    return np.asarray(np.linalg.lstsq(inputs, change, rcond=1e-4)[0].T, np.float64)


def _is_added(call: Call, found: Values, bundle: Bundle) -> bool:
    """Whether a layer's output is off by what an adapter with as many coefficients would add."""
    most = 2 * max(spec.n_frequency for spec in bundle.layers)
    change = None if call.input is None else _solve(call.input, found - call.output)
    if change is None or change.size <= 2 * most:
        return False
    seen = np.sort(np.abs(np.fft.fft2(change)).ravel())
    return _rms(seen[:-most]) < 0.02 * _rms(seen)


def _flat(values: Any) -> Values:
    array: Values = np.asarray(values, dtype=np.float64)
    return array.reshape(-1, array.shape[-1])


def _rms(values: Values) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
