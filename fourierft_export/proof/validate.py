"""Runs every artifact on the same inputs and compares all pairs that must agree."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..bundle.peft import BundleSource
from ..errors import BadInputError, FourierFTError, UsageError, first_line
from ..files.safe_paths import check_path
from ..types import Array, Progress
from .artifacts import Artifacts, PathLike
from .causes import find_causes
from .compare import Outputs, compare_outputs
from .graphs import LEAVE_OUT, Graph
from .inputs import MAX_TOKENS, Inputs, default_inputs, given_inputs, has_tokenizer
from .model_sides import ModelSides
from .models import DECODER_TOKENS
from .pairs import Run, compare_pairs
from .report import Cause, Comparison, Report, Side
from .tolerances import Tolerance, resolve_tolerances

SideFunction = Callable[[Mapping[str, Array]], Outputs]

USEFUL_RESOLUTION = 0.01
"""A validation is expected to see an error of the adapter of one percent."""

LOGITS_PER_SIDE = 2**26
"""Every side's outputs are kept until the end: 256 MiB each in float32."""


def validate(
    *,
    base: PathLike | None = None,
    bundle: BundleSource | None = None,
    peft: PathLike | None = None,
    merged: PathLike | None = None,
    onnx: PathLike | Sequence[PathLike] = (),
    sides: Mapping[str, SideFunction] | None = None,
    inputs: PathLike | Mapping[str, Array] | None = None,
    task: str | None = None,
    tolerances: Mapping[str, Tolerance | float] | None = None,
    tokenizer: PathLike | None = None,
    samples: int | None = None,
    batch_size: int = 16,
    threads: int | None = None,
    allow_base_mismatch: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compares artifacts of one adapter: they must agree, and must differ from the base.

    Args:
        base: Hugging Face directory of the base model.
        bundle: a `Bundle`, or the path of a bundle file or of a PEFT adapter directory; the adapted
            model is rebuilt from it and `base`.
        peft: PEFT adapter directory, run on `base` by PEFT itself.
        merged: Hugging Face directory with the adapter merged in.
        onnx: ONNX files of the adapted model.
        sides: other sides by name, as functions from inputs to outputs (name -> array). One named
            "base" is what the adapter must change; all others must agree.
        inputs: a mapping or an .npz file, input name -> array with the batch as first axis; a
            file of texts (.txt, .tsv, .jsonl; two columns make pairs; a .tsv has a heading if its
            first row has a usual name of a column, such as "text"); a folder of images.
            Default: sentences shipped with the package, as the model's tokenizer reads them.
        task: one of `models.task.TASKS`; default as the adapter or the config says.
        tolerances: precision ("float32", ...) -> a `Tolerance`, or a number for its `scale`.
        tokenizer: directory of the tokenizer, if neither base nor merged has one.
        samples: rows of the default inputs, 64 if None; not with `inputs`. Fewer, down to four,
            where a causal model's vocabulary makes its outputs large.
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

    Example:
        >>> import fourierft_export as ff, numpy, tempfile, torch
        >>> config = ff.FourierFTConfig(n_frequency=5, target_modules=["0"])
        >>> model = ff.inject(torch.nn.Sequential(torch.nn.Linear(8, 4)).eval(), config)
        >>> path = tempfile.mkdtemp() + "/model.onnx"
        >>> _ = ff.export_onnx(model, torch.ones(2, 8), path)
        >>> def run_model(inputs):
        ...     with torch.no_grad():
        ...         return {"output": model(torch.from_numpy(inputs["input"])).numpy()}
        >>> inputs = {"input": numpy.ones((2, 8), numpy.float32)}
        >>> ff.validate(onnx=path, sides={"mine": run_model}, inputs=inputs).ok
        True
    """
    limits = resolve_tolerances(tolerances)
    if inputs is not None and samples is not None:
        raise UsageError(
            "samples (--samples)",
            expected="a number of the package's own sentences",
            found="inputs of your own (--inputs), which are all used",
            remedy="leave one of the two out",
        )
    files = [onnx] if isinstance(onnx, (str, os.PathLike)) else list(onnx)
    functions = dict(sides or {})
    for given in (base, bundle, peft, merged, inputs, *files):
        if isinstance(given, (str, os.PathLike)):
            check_path(given)
    artifacts = Artifacts.open(base=base, bundle=bundle, peft=peft, merged=merged, task=task)
    _check_sides(artifacts, files, functions)
    adapter = artifacts.bundle
    if artifacts.base and adapter and adapter.is_bound and not allow_base_mismatch:
        adapter.bind(artifacts.base)  # raises where shapes or weights differ
    total = len(artifacts.names) + len(files) + len(functions)
    started: list[str] = []

    def step(name: str) -> None:
        # The total leaves out models that are rebuilt for coarse precisions.
        if progress is not None:
            label = name if name == "comparing" else f"running {name}"
            progress(label, min(len(started), total), total)
        started.append(name)

    graphs = [Graph(path, threads) for path in files]
    ready = _ready_inputs(artifacts, graphs, inputs, tokenizer, samples)
    models = ModelSides(artifacts, ready, batch_size, step)
    models.run({graph.precision for graph in graphs} & {"float16", "bfloat16"})
    references, adapted = models.references, models.adapted

    def run_side(side: Side, compute: Callable[[], Outputs]) -> None:
        step(side.name)
        began = time.monotonic()
        outputs = {name: np.asarray(value) for name, value in compute().items()}
        side = side.measured(outputs, began)
        # Random parameters differ between exports.
        same = {name: a for name, a in outputs.items() if name not in models.random_outputs}
        computes = side.precision if side.source else "float32"
        (references if side.role == "base" else adapted).append(Run(side, same, computes))

    for name, call in functions.items():
        role = "base" if name == "base" else "adapted"
        run_side(Side(name, role, "", "float32"), lambda call=call: call(dict(ready.arrays)))  # type: ignore[misc]
    # Rows are run in batches where they are independent examples for certain.
    usual = artifacts.task.outputs if artifacts.task else ()
    related = any(not set(run.outputs) & set(usual) for run in references + adapted if usual)
    rows = batch_size if ready.mask is not None and not related else None
    named = dict(zip(_graph_names(files), graphs, strict=True))
    for name, graph in named.items():
        if graph.quantised:
            models.problems.append(f"{name}: {graph.quantised[0]}: {LEAVE_OUT}")
        side = Side(name, "adapted", os.fspath(graph.path), graph.precision)
        run_side(side, lambda graph=graph: graph.run(ready.arrays, batch_size=rows))  # type: ignore[misc]
        if rows is not None:
            try:
                models.problems += _check_alone(graph, ready, adapted[-1], limits[graph.precision])
            except BadInputError as error:
                models.notes.append(f"{name} does not run on its shortest row alone: {error.found}")
    ids, mask = ready.arrays.get("input_ids"), ready.mask
    causal = artifacts.task is not None and artifacts.task.name == "text-generation"
    comparisons = compare_pairs(
        references,
        adapted,
        primary=usual[0] if usual and not related else None,
        mask=mask,
        tolerances=limits,
        noise=models.noise,
        tokens=np.where(mask, ids, -1) if causal and ids is not None and mask is not None else None,
    )
    step("comparing")
    if any("logits" in run.outputs for run in adapted) and "last_hidden_state" in usual:
        models.notes += [
            f"{run.side.name}: its decoder was not run, only its encoder: it has no output logits"
            for run in adapted
            if "logits" not in run.outputs
        ]
    causes: tuple[Cause, ...] = ()
    try:
        causes = tuple(find_causes(artifacts, ready, named, comparisons, models.roundings))
    except (FourierFTError, MemoryError, RuntimeError, ValueError, ArithmeticError) as error:
        models.notes.append(f"the cause was not searched for: {first_line(error)}")
    if not comparisons:
        models.problems.append("no two sides were left to compare")
    return Report(
        task=artifacts.task.name if artifacts.task else None,
        inputs=ready.description,
        input_shapes=tuple((name, a.shape) for name, a in ready.arrays.items()),
        sides=tuple(run.side for run in (*references, *adapted)),
        comparisons=comparisons,
        problems=tuple(models.problems),
        notes=(*models.notes, *_limits_of(references, comparisons)),
        causes=causes,
    )


def _check_sides(
    artifacts: Artifacts, files: Sequence[PathLike], functions: Mapping[str, SideFunction]
) -> None:
    """Raises unless there are two sides with names of their own, and the base that they need."""
    if artifacts.base is None and (artifacts.bundle is not None or artifacts.peft is not None):
        raise UsageError(
            "validate",
            expected="the base model that the adapter belongs to",
            found="none",
            remedy="name its directory with --base (base=...)",
        )
    twice = sorted(set(artifacts.names) & set(functions))
    if twice:
        expected = "names other than those of the artifacts"
        raise UsageError("sides", expected=expected, found=", ".join(twice))
    names = [*artifacts.names, *functions, *map(str, files)]
    if len(names) < 2:
        raise UsageError(
            "validate",
            expected="at least two artifacts to compare",
            found=", ".join(names) or "none",
            remedy="give a base with a bundle, merged checkpoint or ONNX files",
        )


def _ready_inputs(
    artifacts: Artifacts,
    graphs: Sequence[Graph],
    given: PathLike | Mapping[str, Array] | None,
    tokenizer: PathLike | None,
    samples: int | None,
) -> Inputs:
    """Takes the given inputs, or makes some that all sides can run on."""
    if tokenizer is not None and not has_tokenizer(Path(tokenizer)):
        raise UsageError(tokenizer, expected="a directory with a tokenizer", found="none in it")
    tokenizer_dir = artifacts.tokenizer if tokenizer is None else Path(tokenizer)
    positions = artifacts.config_number("max_position_embeddings", "n_positions")
    token_types = any("token_type_ids" in graph.inputs for graph in graphs)
    if given is not None:
        model_dir = tokenizer_dir or artifacts.base or artifacts.merged
        return given_inputs(given, model_dir, positions, token_types)
    task = artifacts.task.name if artifacts.task else None
    if task == "image-classification":
        raise UsageError(
            "validate",
            expected="images to run the models on",
            found="no inputs",
            remedy="give a folder of images, or pixel_values as an .npz file (--inputs)",
        )
    vocabulary = artifacts.config_number("vocab_size")
    samples = 64 if samples is None else samples
    tokens = {"text-generation": MAX_TOKENS, "seq2seq-encoder": DECODER_TOKENS}.get(task or "")
    if tokens and vocabulary:
        samples = min(samples, max(4, LOGITS_PER_SIDE // (tokens * vocabulary)))
    return default_inputs(
        tokenizer_dir=tokenizer_dir,
        vocab_size=vocabulary,
        count=samples,
        length=next((g.fixed_length for g in graphs if g.fixed_length), None),
        positions=positions,
        token_types=token_types,
    )


def _check_alone(graph: Graph, inputs: Inputs, run: Run, limit: Tolerance) -> list[str]:
    """Runs the shortest row alone, without padding: other sizes of all dynamic axes."""
    mask = inputs.mask
    if mask is None or graph.fixed_batch or graph.fixed_length or not mask[:, 0].all():
        return []
    row, tokens = int(mask.sum(axis=1).argmin()), int(mask.sum(axis=1).min())

    few = {name: array[row : row + 1] for name, array in inputs.arrays.items()}
    wide = {name for name, array in few.items() if array.shape == (1, mask.shape[1])}
    alone = graph.run({n: a[:, :tokens] if n in wide else a for n, a in few.items()})
    together = {
        name: run.outputs[name][row : row + 1][tuple(map(slice, array.shape))]
        for name, array in alone.items()
        if name in run.outputs and run.outputs[name].shape[:1] == mask.shape[:1] and array.ndim
    }
    found = compare_outputs(together, alone, tolerance=limit) if together else ()
    what = f"{run.side.name}: row {row} alone differs from itself in the batch"
    return [f"{what}: {one.reason}" for one in found if not one.ok]


def _graph_names(files: Sequence[PathLike]) -> Iterator[str]:
    """Names each graph "onnx:" and its file's name, or its path where two files share a name."""
    times = Counter(Path(path).name for path in files)
    for path in files:
        yield f"onnx:{Path(path).name if times[Path(path).name] == 1 else os.fspath(path)}"


def _limits_of(references: Sequence[Run], comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Says which errors the validation could not have found."""
    if not references:
        yield "no base to compare with: whether the adapter changes anything was not checked"
    # Side -> the smallest error of the adapter that any comparison would have caught in it.
    seen: dict[str, float] = {}
    for pair in comparisons:
        known = [o.resolution for o in pair.outputs if o.resolution is not None]
        for name in (pair.left, pair.right) if known else ():
            seen[name] = min(max(known), seen.get(name, max(known)))
    for name, resolution in seen.items():
        if resolution > USEFUL_RESOLUTION:
            yield (
                f"{name}: an error below {resolution:.1%} of the adapter's effect would not be "
                "seen, because the effect is small compared with rounding"
            )
