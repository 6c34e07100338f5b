"""train: rows and a model -> a bundle."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from ..train.settings import DataSettings, TrainSettings, kinds, options, read_settings
from ..types import Progress
from .console import Outcome, size_text, verb
from .option_sections import section
from .options import PATH, allow_mismatch_option, force_option

if TYPE_CHECKING:
    from ..train.report import TrainReport

_PLAIN = re.compile(r"(?!all-linear$)[\w.-]+")  # the end of a path, rather than an expression
_WORDS = {"output": ("-o", "--output"), "init_weights": ("--init-weights/--init-normal",)}


def _with_settings(function: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Add an option for every setting, in sections."""
    for option in reversed(list(options())):
        name, kind = option.name, option.kind
        dashed = "--" + name.replace("_", "-")
        plain: tuple[str, ...] = (dashed,)
        values: dict[str, Any] = {"type": option.kind.type, "metavar": option.metavar or None}
        if kind.choices:
            values = {"type": click.Choice(kind.choices)}
        elif kind.type is bool:
            values = {"default": None}
            if name in ("dropout", "group_lengths"):
                plain = (f"{dashed}/--no-{dashed[2:]}",)
            elif name != "init_weights":
                values["is_flag"] = True
        elif kind.type is list:
            values |= {"type": str, "multiple": True}
        elif kind.type is str and option.metavar not in ("NAME", "TASK", "PKG.MOD:FACTORY"):
            values["type"] = PATH
        words = _WORDS.get(name, plain)
        function = section(option.section)(*words, name, help=option.help, **values)(function)
    return section("What is trained on what")(
        "--config",
        type=PATH,
        metavar="FILE.toml",
        help="A file of these options, with _ for -; those of the command line win.  "
        "[default: no file]",
    )(function)


@verb(
    examples=(
        "train --model base --task text-classification --data train.tsv --eval dev.tsv "
        "-o a.fourierft.safetensors",
        "train --module package.module:factory --epochs 5 -o a.fourierft.safetensors",
        "train --config run.toml --resume -o a.fourierft.safetensors",
    )
)
@_with_settings
@section("Scores and outputs")(
    "--resume", is_flag=True, help="Continue a run that was stopped.  [default: begin a new run]"
)
@section("Scores and outputs")(
    "--print-settings",
    is_flag=True,
    help="Print the values that the rules choose, as lines of a settings file, and train nothing.  "
    "[default: train]",
)
@force_option
@allow_mismatch_option
def train(
    progress: Progress,
    config: str | None,
    resume: bool,
    print_settings: bool,
    force: bool,
    allow_base_mismatch: bool,
    **given: Any,
) -> Outcome:
    """Train an adapter from a data file.

    The bundle that is written is always the best so far. Ctrl-C or a kill leaves it and a
    checkpoint, from which --resume continues bit for bit. BUNDLE.train/ holds the checkpoint,
    metrics.json and curve.png. For many processes: torchrun --nproc-per-node 2 -m fourierft_export
    train ..., or accelerate launch.
    """
    run, settings = _read(config, given)
    if print_settings and run.bundle:
        raise click.UsageError("--print-settings is for a new adapter: leave --bundle out.")
    if print_settings:
        return _chosen(run, settings)
    if run.output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    from ..bundle.peft import open_bundle
    from ..train.data.make_task import prepare
    from ..train.train import check_outputs, train_adapter

    inputs = [path for path in (run.model, run.data, run.eval, run.bundle, config) if path]
    check_outputs(run.output, resume=resume, force=force, inputs=tuple(inputs))
    bundle = open_bundle(run.bundle) if run.bundle else None
    writes = os.environ.get("RANK", "0") == "0"  # one of the processes that train together
    if writes:
        progress("reading", 0, 1)
    task = prepare(run, settings)
    with _scores_on_stderr():
        report = train_adapter(
            task,
            run.output,
            settings,
            bundle=bundle,
            resume=resume,
            force=force,
            allow_base_mismatch=allow_base_mismatch,
            progress=progress,
        )
    if not writes:
        return Outcome({}, silent=True)
    data = report.to_dict(curves=False)
    notes = data.pop("notes")
    return Outcome(
        {"train": data}, _lines(report, run.model, "at the start" if bundle else "untrained"), notes
    )


def _chosen(run: DataSettings, settings: TrainSettings) -> Outcome:
    """The values that the rules choose, in PEFT's terms, and those that its rate goes with."""
    from ..train.data.make_task import prepare
    from ..train.suggest import choose_values
    from ..train.train import resolved, with_rows_to_score
    from ..train.training_run import count_steps

    settings = resolved(settings)
    task, _ = with_rows_to_score(prepare(run, settings), settings)
    steps = count_steps(len(task.train_dataset), settings)
    settings = replace(settings, steps=steps, epochs=None)
    values = choose_values(task, settings)
    falling = choose_values(task, replace(settings, schedule="linear"))["learning_rate"]
    names = ("head_learning_rate", "schedule", "average", "steps")
    values |= {name: getattr(settings, name) for name in names}
    lines = [f"{k} = {_toml(v)}" for k, v in values.items()]
    if falling != values["learning_rate"]:
        lines.append(
            f"# for a rate that falls to zero, as Trainer's does: learning_rate = {falling}"
        )
    return Outcome({"settings": values}, lines)


def _toml(value: Any) -> str:
    """A number, a truth value or a table of numbers in TOML."""
    if isinstance(value, dict):
        inner = ", ".join(f"{json.dumps(k)} = {v}" for k, v in value.items())
        return f"{{ {inner} }}"
    return json.dumps(value)


def _read(config: str | None, given: dict[str, Any]) -> tuple[DataSettings, TrainSettings]:
    """The settings: the command line's over the file's."""
    found = {} if config is None else read_settings(config)
    for name in ("target_modules", "exclude_modules"):
        words = given[name]
        if len(words) == 1 and not _PLAIN.fullmatch(words[0]):
            given[name] = words[0]
    for name, other in (("epochs", "steps"), ("steps", "epochs")):
        if given[name] is not None:
            found.pop(other, None)  # they are one setting in two units
    found |= {name: value for name, value in given.items() if value is not None and value != ()}
    run = {name: found.pop(name) for name in kinds(DataSettings) if name in found}
    return DataSettings(**run), TrainSettings(**found)


@contextmanager
def _scores_on_stderr() -> Iterator[None]:
    """A line per evaluation, where no bar shows: a run of hours should not be silent in a log."""
    if sys.stderr.isatty():
        yield
        return
    log = logging.getLogger("fourierft_export.train.training_run")
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
