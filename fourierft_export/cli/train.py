"""train: rows and a model -> a bundle."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from ..types import Progress
from .console import Outcome, size_text, verb
from .options import PATH, allow_mismatch_option, force_option, read_bundle
from .sections import Sectioned, section

if TYPE_CHECKING:
    from ..train.report import TrainReport

TASKS = ("text-classification", "token-classification", "image-classification", "causal-lm")
# Keys of a settings file besides those of TrainSettings, and what they hold.
RUN_KEYS: dict[str, type] = {
    "model": str,
    "module": str,
    "task": str,
    "data": str,
    "eval": str,
    "output": str,
    "bundle": str,
    "text_column": list,
    "label_column": str,
    "pack": bool,
    "shard_base": bool,
    "metrics_file": str,
}

_PLAIN = re.compile(r"(?!all-linear$)[\w.-]+")  # the end of a path, rather than an expression

_WHAT = section("What is trained on what")
_ADAPTER = section("The adapter")
_RUN = section("How it learns")
_MACHINE = section("On what machine")
_SCORES = section("Scores and outputs")


@partial(verb, cls=Sectioned)
@_WHAT("--model", type=PATH, metavar="DIR", help="A Hugging Face model directory.")
@_WHAT(
    "--module",
    metavar="PKG.MOD:FACTORY",
    help="A callable that makes a torch model, or a whole TrainingTask, in place of --model.",
)
@_WHAT("--task", metavar="TASK", help=", ".join(TASKS) + ".")
@_WHAT(
    "--data",
    type=PATH,
    metavar="FILE",
    help="Rows to learn from: tsv, csv, jsonl, parquet, or a folder of images.",
)
@_WHAT(
    "--eval",
    "eval",
    type=PATH,
    metavar="FILE",
    help="Rows to score.  [default: a share of --data is held out]",
)
@_WHAT("--text-column", multiple=True, metavar="NAME", help="May be given twice, for pairs.")
@_WHAT("--label-column", metavar="NAME")
@_WHAT("--max-length", type=int, metavar="N", help="Cut longer rows to so many tokens.")
@_WHAT("--max-train-rows", type=int, metavar="N", help="Use at most so many rows.")
@_WHAT("--eval-share", type=float, metavar="X", help="Held out without --eval.  [default: 0.1]")
@_WHAT("--pack", is_flag=True, default=None, help="causal-lm: several texts in a row.")
@_WHAT(
    "--config",
    type=PATH,
    metavar="FILE.toml",
    help="These options but --resume and the Others, with _ for -; the command line's win.",
)
@_ADAPTER("--bundle", type=PATH, metavar="BUNDLE", help="Train this adapter further.")
@_ADAPTER(
    "--n-frequency",
    type=int,
    metavar="N",
    help="Coefficients per layer.  [default: 1000, at most a quarter of the smallest layer]",
)
@_ADAPTER(
    "--scaling", type=float, metavar="X", help="Of delta W.  [default: by the layers' shapes]"
)
@_ADAPTER("--entry-seed", type=int, metavar="N", help="Places the coefficients.  [default: 2024]")
@_ADAPTER(
    "--target-modules",
    multiple=True,
    metavar="NAME",
    help="Layers to adapt, by the end of their path; or all-linear; or one regular expression.  "
    "[default: the architecture's usual ones]",
)
@_ADAPTER("--exclude-modules", multiple=True, metavar="NAME", help="Layers to leave out.")
@_ADAPTER("--modules-to-save", multiple=True, metavar="NAME", help="Trained whole: heads.")
@_ADAPTER("--bias", type=click.Choice(["none", "all", "fourier_only"]), help="Biases that learn.")
@_ADAPTER(
    "--init-weights/--init-normal",
    default=None,
    help="Spectra start at zero, or at standard normal numbers.",
)
@_RUN("--epochs", type=float, metavar="X", help="Passes over the rows.")
@_RUN("--steps", type=int, metavar="N", help="Instead of --epochs.")
@_RUN("--batch-size", type=int, metavar="N", help="Rows per step, over all processes.")
@_RUN("--learning-rate", type=float, metavar="X", help="Of the spectra.  [default: by shapes]")
@_RUN(
    "--layer-rates",
    type=click.Choice(["shape", "same"]),
    help="Whether layers of other shapes get the rate at which they move alike.  [default: shape]",
)
@_RUN("--head-learning-rate", type=float, metavar="X", help="Of heads and biases.")
@_RUN("--weight-decay", type=float, metavar="X", help="Of heads.  [default: 0]")
@_RUN("--spectrum-weight-decay", type=float, metavar="X", help="[default: 0]")
@_RUN("--warmup", type=float, metavar="X", help="Share of the steps.")
@_RUN("--schedule", type=click.Choice(["linear", "cosine", "constant"]))
@_RUN("--max-grad-norm", type=float, metavar="X", help="0 leaves gradients as they are.")
@_RUN("--seed", type=int, metavar="N", help="[default: 0]")
@_RUN("--dropout/--no-dropout", default=None, help="The base's own.  [default: no]")
@_RUN(
    "--group-lengths/--no-group-lengths",
    default=None,
    help="Rows of like length meet in a batch.  [default: yes]",
)
@_MACHINE("--device", metavar="NAME", help="cpu, cuda, mps.  [default: a GPU if there is one]")
@_MACHINE(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="What the model computes in; what learns is float32.  [default: float32]",
)
@_MACHINE("--threads", type=int, metavar="N", help="Of the CPU.")
@_MACHINE("--accumulate", type=int, metavar="N", help="Parts of a batch, to save memory.")
@_MACHINE(
    "--gradient-checkpointing",
    is_flag=True,
    default=None,
    help="Compute activations twice, to save memory.",
)
@_MACHINE(
    "--shard-base",
    is_flag=True,
    default=None,
    help="Spread the base over the processes that torchrun started.",
)
@_SCORES("-o", "--output", type=PATH, metavar="BUNDLE", help="The bundle to write.  [required]")
@_SCORES("--eval-every", type=int, metavar="N", help="Steps.  [default: an epoch]")
@_SCORES("--metric", metavar="NAME", help="Which score says what is best.")
@_SCORES("--keep", type=click.Choice(["best", "last"]), help="[default: best]")
@_SCORES("--patience", type=int, metavar="N", help="Stop after N scores without a better one.")
@_SCORES("--metrics-file", type=PATH, metavar="FILE", help="[default: OUT.train/metrics.json]")
@_SCORES("--resume", is_flag=True, help="Go on with a run that was stopped.")
@force_option
@allow_mismatch_option
def train(
    progress: Progress,
    config: str | None,
    resume: bool,
    force: bool,
    allow_base_mismatch: bool,
    **given: Any,
) -> Outcome:
    """Train an adapter from a data file; the bundle is always the best so far.

    Ctrl-C or a kill leaves that bundle and a state, with which --resume goes on as if nothing had
    happened. BUNDLE.train/ holds the state, metrics.json and curve.png. For many processes:
    torchrun --nproc-per-node 2 -m fourierft_export train ...
    """
    run, settings = _read(config, given)
    from ..train.settings import TrainSettings

    checked = TrainSettings(**settings)
    output = run.get("output")
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    from ..train.data.prepare import prepare
    from ..train.processes import join
    from ..train.train import check_outputs, train_adapter

    metrics = run.get("metrics_file")
    inputs = [run[key] for key in ("model", "data", "eval", "bundle") if run.get(key)]
    inputs += [config] if config else []
    check_outputs(output, metrics, resume=resume, force=force, inputs=tuple(inputs))
    bundle = read_bundle(run["bundle"]) if run.get("bundle") else None
    processes = join(checked.device)
    try:
        if processes.is_writer:
            progress("reading", 0, 1)
        task = prepare(
            run.get("task"),
            model=run.get("model"),
            module=run.get("module"),
            data=run.get("data"),
            eval_data=run.get("eval"),
            text_columns=tuple(run.get("text_column") or ()),
            label_column=run.get("label_column"),
            max_length=checked.max_length,
            pack=bool(run.get("pack")),
            max_rows=checked.max_train_rows,
            eval_share=checked.eval_share,
            seed=checked.seed,
            # Autocast works on any dtype, and a large base is better not widened.
            dtype="float32" if checked.dtype == "float32" else None,
        )
        with _scores_on_stderr():
            report = train_adapter(
                task,
                output,
                checked,
                bundle=bundle,
                resume=resume,
                force=force,
                shard_base=bool(run.get("shard_base")),
                allow_base_mismatch=allow_base_mismatch,
                metrics=metrics,
                processes=processes,
                progress=progress if processes.is_writer else None,
            )
    finally:
        processes.close()
    if not processes.is_writer:
        return Outcome({}, silent=True)
    data = report.to_dict(curves=False)
    notes = data.pop("notes")
    return Outcome(
        {"train": data},
        _lines(report, run.get("model"), "at the start" if bundle else "untrained"),
        notes,
    )


def _read(config: str | None, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys of the run, and settings: the command line's over the file's."""
    from ..train.settings import SETTING_NAMES
    from ..train.toml_file import read_settings

    known = (*SETTING_NAMES, *RUN_KEYS)
    found = {} if config is None else read_settings(config, known, RUN_KEYS)
    for name in ("target_modules", "exclude_modules"):
        words = given[name]
        if len(words) == 1 and not _PLAIN.fullmatch(words[0]):
            given[name] = words[0]
    for name, other in (("epochs", "steps"), ("steps", "epochs")):
        if given[name] is not None:
            found.pop(other, None)  # they are one setting in two units
    found |= {name: value for name, value in given.items() if value is not None and value != ()}
    run = {name: found.pop(name) for name in RUN_KEYS if name in found}
    if isinstance(run.get("text_column"), str):
        run["text_column"] = [run["text_column"]]
    return run, found


@contextmanager
def _scores_on_stderr() -> Iterator[None]:
    """A line per evaluation, where no bar shows: a run of hours should not be silent in a log."""
    if sys.stderr.isatty():
        yield
        return
    log = logging.getLogger("fourierft_export.train.run")
    before, handler = log.level, logging.StreamHandler(sys.stderr)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def _lines(report: TrainReport, model: str | None, start: str) -> list[str]:
    """What was trained, how well (from which `start`), where things lie, and what to try next."""
    spectra, heads = report.parameters["spectra"], report.parameters["heads"]
    adapter = report.adapter
    first = (
        f"{report.bundle}: {size_text(report.bundle_bytes)}, {adapter['layers']} layers adapted, "
        f"{spectra:,} coefficients" + (f" and {heads:,} numbers of heads" if heads else "")
    )
    lines = [first if report.bundle else "no bundle was written"]
    if report.best:
        name = report.metric
        before = f"{report.before[name]:.4g} {start}, " if name in report.before else ""
        lines.append(
            f"{name}: {before}{report.best[name]:.4g} at its best, after step {report.best_step} "
            f"of {report.steps} (scored on {report.eval_rows:,} rows)"
        )
    epochs = report.steps / report.steps_per_epoch
    lines.append(
        f"{report.rows:,} rows, {epochs:.3g} epochs, {report.seconds_per_step:.3g} s per step on "
        f"{report.device}" + (f", {report.processes} processes" if report.processes > 1 else "")
    )
    if report.stopped == "patience":
        lines.append(f"stopped early: no better {report.metric} for {report.settings['patience']}")
    seen = [p for p in (report.metrics_file, report.picture) if p]
    lines.append(f"more: {', '.join(seen)}")
    if report.bundle is None:
        return lines
    if model is None:
        return [*lines, f"next: fourierft-export inspect {report.bundle}"]
    what = f"--base {quote(model)} --bundle {quote(report.bundle)}"
    named = [label for label in report.labels if not label.isdecimal()]
    labels = "".join(f" --label {quote(label)}" for label in named) if len(named) < 10 else ""
    return [
        *lines,
        f"next: fourierft-export validate {what}",
        f"      fourierft-export merge {what}{labels} -o MERGED",
        f"      fourierft-export export {what} --mode merged -o MODEL.onnx",
    ]
