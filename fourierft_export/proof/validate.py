"""`validate`: run every artifact on the same inputs and compare all pairs that must agree."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..bundle.file import Bundle
from ..errors import UsageError
from ..types import Progress
from .artifacts import Artifacts
from .compare import Array, Outputs
from .graphs import Graph
from .inputs import MAX_TOKENS, Inputs, default_inputs, given_inputs, has_tokenizer
from .judge import Run, judge
from .model_sides import run_models
from .report import Comparison, Report, Side
from .tolerances import Tolerance, resolve_tolerances

PathLike = str | os.PathLike[str]
SideFunction = Callable[[Mapping[str, Array]], Outputs]

USEFUL_RESOLUTION = 0.01
"""A validation is expected to see an error of the adapter of one percent."""

LOGITS_PER_SIDE = 2**26
"""Every side's outputs are kept until the end: 256 MiB each in float32."""


def validate(
    *,
    base: PathLike | None = None,
    bundle: PathLike | Bundle | None = None,
    peft: PathLike | None = None,
    merged: PathLike | None = None,
    onnx: PathLike | Sequence[PathLike] = (),
    sides: Mapping[str, SideFunction] | None = None,
    inputs: PathLike | Mapping[str, Array] | None = None,
    task: str | None = None,
    tolerances: Mapping[str, Tolerance | float] | None = None,
    tokenizer: PathLike | None = None,
    samples: int = 64,
    batch_size: int = 16,
    threads: int | None = None,
    allow_base_mismatch: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compare artifacts of one adapter that must agree, and demand that the adapter does something.

    Args:
        base: Hugging Face directory of the base model.
        bundle: an adapter bundle; the adapted model is rebuilt from it and `base`.
        peft: PEFT adapter directory, run on `base` by PEFT itself.
        merged: Hugging Face directory with the adapter merged in.
        onnx: ONNX files of the adapted model.
        sides: other sides by name, as functions from inputs to outputs (name -> array). One named
            "base" is what the adapter must change; all others must agree.
        inputs: an .npz file or a mapping, input name -> array with the batch as first axis.
            Default: sentences shipped with the package, as the model's tokenizer reads them.
        task: one of `models.task.TASKS`; default as the adapter or the config says.
        tolerances: precision ("float32", ...) -> a `Tolerance`, or a number for its `scale`.
        tokenizer: directory of the tokenizer, if neither base nor merged has one.
        samples: rows of the default inputs; fewer, down to four, where a causal model's
            vocabulary makes its outputs large.
        batch_size: rows per call of a model or graph (`sides` get all rows at once).
        threads: for ONNX Runtime; default its own choice.
        allow_base_mismatch: accept base weights other than those the adapter was trained on.
        progress: called as progress(what, done, total).

    Returns:
        A report; look at `.ok`, or call `.raise_for_failure()`.

    Raises:
        UsageError: nothing to compare, a side without the base it needs, an unknown task or
            precision, inputs that a graph lacks.
        MissingExtraError: a package that a side needs is not installed.
        BadInputError, FileAccessError: an artifact that cannot be loaded or run.
        BaseMismatchError: the adapter does not belong to the base.
    """
    limits = resolve_tolerances(tolerances)
    files = [onnx] if isinstance(onnx, (str, os.PathLike)) else list(onnx)
    functions = dict(sides or {})
    artifacts = Artifacts.open(base=base, bundle=bundle, peft=peft, merged=merged, task=task)
    _check_sides(artifacts, files, functions)
    if not allow_base_mismatch:
        artifacts.check_base()
    steps = _Steps(progress, len(artifacts.names) + len(files) + len(functions))
    graphs = dict(zip(_graph_names(files), (Graph(path, threads) for path in files), strict=True))
    ready = _ready_inputs(artifacts, list(graphs.values()), inputs, tokenizer, samples)

    precisions = {g.precision for g in graphs.values()} & {"float16", "bfloat16"}
    models = run_models(
        artifacts, ready, batch_size=batch_size, precisions=precisions, tell=steps.next
    )
    called = [_run_function(name, call, ready, steps) for name, call in functions.items()]
    run = [_run_graph(name, g, ready, batch_size, steps) for name, g in graphs.items()]
    others = [_without(r, models.random_outputs) for r in (*called, *run)]
    references = [*models.references, *(r for r in others if r.side.role == "base")]
    adapted = [*models.adapted, *(r for r in others if r.side.role != "base")]
    comparisons = judge(
        references,
        adapted,
        primary=artifacts.task.outputs[0] if artifacts.task else None,
        mask=ready.mask,
        tolerances=limits,
        noise=models.noise,
    )
    steps.next("comparing")
    notes = [*models.notes, *_limits_of(references, comparisons)]
    return Report(
        task=artifacts.task.name if artifacts.task else None,
        inputs=ready.description,
        input_shapes=tuple((name, a.shape) for name, a in ready.arrays.items()),
        sides=tuple(r.side for r in (*references, *adapted)),
        comparisons=comparisons,
        problems=tuple(models.problems),
        notes=tuple(notes),
    )


@dataclass
class _Steps:
    """Counts sides for `progress`; the rebuilt models for coarse precisions come on top."""

    progress: Progress | None
    total: int
    started: int = 0

    def next(self, what: str) -> None:
        if self.progress is not None:
            self.progress(what, min(self.started, self.total), self.total)
        self.started += 1


def _check_sides(
    artifacts: Artifacts, files: Sequence[PathLike], functions: Mapping[str, SideFunction]
) -> None:
    if artifacts.base is None and (artifacts.bundle is not None or artifacts.peft is not None):
        raise UsageError(
            "validate",
            expected="the base model that the adapter belongs to",
            found="none",
            remedy="name its directory with --base (base=...)",
        )
    twice = sorted(set(artifacts.names) & set(functions))
    if twice:
        raise UsageError(
            "sides", expected="names of their own", found=f"{', '.join(twice)}, given twice"
        )
    names = [*artifacts.names, *functions, *files]
    if len(names) < 2:
        raise UsageError(
            "validate",
            expected="at least two artifacts to compare",
            found=", ".join(str(name) for name in names) or "none",
            remedy="give a base with a bundle, merged checkpoint or ONNX files",
        )


def _ready_inputs(
    artifacts: Artifacts,
    graphs: Sequence[Graph],
    given: PathLike | Mapping[str, Array] | None,
    tokenizer: PathLike | None,
    samples: int,
) -> Inputs:
    if given is not None:
        return given_inputs(given)
    if tokenizer is not None and not has_tokenizer(Path(tokenizer)):
        raise UsageError(tokenizer, expected="a directory with a tokenizer", found="none in it")
    if artifacts.task is not None and artifacts.task.name == "image-classification":
        raise UsageError(
            "validate",
            expected="images to run the models on",
            found="no inputs",
            remedy="give pixel_values (images, channels, height, width) as an .npz file (--inputs)",
        )
    vocabulary = artifacts.config_number("vocab_size")
    if artifacts.task is not None and artifacts.task.name == "text-generation" and vocabulary:
        samples = min(samples, max(4, LOGITS_PER_SIDE // (MAX_TOKENS * vocabulary)))
    return default_inputs(
        tokenizer_dir=artifacts.tokenizer if tokenizer is None else Path(tokenizer),
        vocab_size=vocabulary,
        count=samples,
        length=next((g.fixed_length for g in graphs if g.fixed_length), None),
        positions=artifacts.config_number("max_position_embeddings", "n_positions"),
        token_types=any("token_type_ids" in graph.inputs for graph in graphs),
    )


def _graph_names(files: Sequence[PathLike]) -> Iterator[str]:
    """The file's name after "onnx:", or its whole path where two files share their name."""
    times = Counter(Path(path).name for path in files)
    for path in files:
        yield f"onnx:{Path(path).name if times[Path(path).name] == 1 else os.fspath(path)}"


def _run_function(name: str, call: SideFunction, inputs: Inputs, steps: _Steps) -> Run:
    steps.next(name)
    started = time.monotonic()
    outputs = {key: np.asarray(value) for key, value in call(dict(inputs.arrays)).items()}
    role = "base" if name == "base" else "adapted"
    return Run(_side(name, role, "", "float32", outputs, started), outputs)


def _run_graph(name: str, graph: Graph, inputs: Inputs, batch_size: int, steps: _Steps) -> Run:
    steps.next(name)
    started = time.monotonic()
    # Without a mask nothing says that the rows are independent examples: one call.
    outputs = graph.run(inputs.arrays, batch_size=batch_size if inputs.mask is not None else None)
    side = _side(name, "adapted", os.fspath(graph.path), graph.precision, outputs, started)
    return Run(side, outputs, computes=graph.precision)


def _without(run: Run, names: Set[str]) -> Run:
    """The run without outputs that rest on random parameters: no two exports share those."""
    return replace(run, outputs={n: a for n, a in run.outputs.items() if n not in names})


def _side(
    name: str, role: str, source: str, precision: str, outputs: Outputs, started: float
) -> Side:
    shapes = tuple((key, tuple(value.shape)) for key, value in outputs.items())
    return Side(name, role, source, precision, shapes, round(time.monotonic() - started, 3))


def _limits_of(references: Sequence[Run], comparisons: Sequence[Comparison]) -> Iterator[str]:
    """What the validation could not see."""
    if not references:
        yield "no base to compare with: whether the adapter changes anything was not checked"
    seen = _resolutions(comparisons)
    for name, resolution in seen.items():
        if resolution > USEFUL_RESOLUTION:
            yield (
                f"{name}: an error of the adapter below {resolution:.1%} of its effect would not "
                "be seen, since the effect is small beside rounding"
            )


def _resolutions(comparisons: Sequence[Comparison]) -> dict[str, float]:
    """Side -> the finest resolution that any comparison had on it, over its worst output."""
    best: dict[str, float] = {}
    for pair in comparisons:
        known = [o.resolution for o in pair.outputs if o.resolution is not None]
        for name in (pair.left, pair.right) if known else ():
            best[name] = min(max(known), best.get(name, max(known)))
    return best
