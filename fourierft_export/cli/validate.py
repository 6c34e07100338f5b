"""validate: checks that artifacts of one adapter agree."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..types import Progress
from . import options
from .console import Outcome, failure_of, verb


@verb(
    examples=(
        "validate --base base --bundle a.fourierft.safetensors --peft adapter --merged merged",
        "validate --base base --bundle a.fourierft.safetensors --onnx unmerged.onnx "
        "--report report.html",
        "validate merged",
    )
)
@click.argument("folder", type=options.PATH, required=False)
@options.base_option
@options.input_path("--bundle", metavar="BUNDLE", help="The adapter as a bundle.")
@options.input_path("--peft", metavar="DIR", help="The adapter as PEFT saved it.")
@options.input_path("--merged", metavar="DIR", help="A merged checkpoint.")
@options.input_path("--onnx", multiple=True, metavar="FILE", help="ONNX file; may be repeated.")
@options.input_path(
    "--inputs",
    metavar="PATH",
    help="What to run on: texts (.txt, .tsv, .jsonl), a folder of images, or arrays by input name "
    "(.npz). The first row of a .tsv is a heading if it has a usual name of a column, such as "
    "text, sentence1, question or label; its first two columns of text are read.  "
    "[default: sentences]",
)
@options.input_path(
    "--tokenizer",
    metavar="DIR",
    help="Folder of the tokenizer, if neither the base nor the merged checkpoint has one.",
)
@options.task_option
@options.setting_option(
    "--tolerance",
    "tolerances",
    multiple=True,
    metavar="[PRECISION=]X",
    help="Allowed difference, as a fraction of the output's largest value, such as 1e-3 (for "
    "float32) or bfloat16=0.1; may be repeated.  [default: 1e-4 for float32]",
)
@options.setting_option(
    "--samples",
    type=click.IntRange(1),
    metavar="N",
    help="Number of sentences; not with --inputs.  [default: 64]",
)
@options.setting_option(
    "--threads", type=click.IntRange(1), metavar="N", help="Threads of ONNX Runtime."
)
@options.output_section(
    "--report", type=options.PATH, metavar="FILE.html", help="Write the report as a web page."
)
@options.output_section(
    "--junit", type=options.PATH, metavar="FILE.xml", help="Write the report as JUnit XML, for CI."
)
@options.force_option
@options.allow_mismatch_option
def validate(
    progress: Progress,
    folder: str | None,
    tolerances: tuple[str, ...],
    report: str | None,
    junit: str | None,
    force: bool,
    **settings: Any,
) -> Outcome:
    """Check that artifacts of one adapter agree.

    Every artifact is run on the same inputs. All adapted ones must agree with each other and must
    differ from the base; if not, the exit code is 5. FOLDER is one that merge wrote: its manifest
    says which base and bundle belong to it, which are looked for in and beside it, with ONNX files
    of the same bundle.
    """
    from ..bundle.peft import open_bundle
    from ..errors import UsageError
    from ..files.staging import check_output, staged_file
    from ..proof.render import render_html, render_text
    from ..proof.validate import validate as run

    if folder is not None:
        settings |= find_artifacts(folder, settings)
    paths = [settings[name] for name in ("base", "bundle", "peft", "merged", "inputs", "tokenizer")]
    inputs = tuple(path for path in (*paths, *settings["onnx"]) if path)
    for output in filter(None, (report, junit)):
        check_output(output, force=force, inputs=inputs)
    if report and junit and Path(report).absolute() == Path(junit).absolute():
        raise UsageError("--junit", expected="another file than --report", found=junit)
    found = run(tolerances=_tolerances(tolerances), progress=progress, **settings)
    lines, survival = [], read_survival(settings["merged"])
    for output in filter(None, (report, junit)):
        bundle = open_bundle(settings["bundle"]) if settings["bundle"] else None
        text = found.to_junit() if output == junit else render_html(found, bundle, survival)
        with staged_file(output, force=force) as partial:
            partial.write_text(text, encoding="utf-8")
        lines.append(f"report: {Path(output)}")
    shown = [render_text(found), *lines]
    return Outcome({"validate": found.to_dict()}, shown, found.notes, failure_of(found))


def find_artifacts(folder: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Finds what belongs to a merged folder by its manifest, in it and in the folder around it.

    Args:
        folder: the merged folder.
        given: what options name, by the names of `proof.validate`; it is not looked for.

    Returns:
        Base, bundle, merged and onnx.
    """
    from ..bundle.bundle import SUFFIX, Bundle
    from ..errors import FileAccessError, FourierFTError, UsageError
    from ..files import strict_json
    from ..files.safetensors_reader import read_file
    from ..onnx_graph.describe import describe_onnx

    path = Path(folder) / "manifest.json"
    if given["merged"]:
        raise UsageError("--merged", expected="either --merged or FOLDER", found="both")
    by_options = "name what belongs together with options: --base, --bundle, --merged, --onnx"
    if not path.is_file():
        expected, found = "a folder that merge wrote", "no manifest.json in it"
        raise FileAccessError(folder, expected=expected, found=found, remedy=by_options)
    manifest = strict_json.loads(read_file(path), str(path))
    try:
        hashes = [one["sha256"] for one in manifest["bundles"] if float(one["weight"]) == 1]
        hashes = hashes if len(manifest["bundles"]) == 1 else []
        name = Path(manifest["base"]["name"]).name
    except (KeyError, TypeError, ValueError):
        hashes, name = [], ""
    if len(hashes) != 1:
        expected = "a folder that merge wrote of one bundle with weight 1"
        found = "a manifest of another merge"
        raise UsageError(folder, expected=expected, found=found, remedy=by_options)
    places = [Path(folder), Path(folder).absolute().parent]
    base = given["base"] or os.fspath(places[1] / name)
    if not given["base"] and not os.path.isfile(os.path.join(base, "config.json")):
        expected, found = "its base next to it", f"no model at {base}"
        raise UsageError(folder, expected=expected, found=found, remedy="name it with --base")
    files = [file for place in places for file in sorted(place.iterdir()) if file.is_file()]
    bundle, graphs = given["bundle"], list(given["onnx"])
    for file in files:
        try:
            if not given["bundle"] and file.name.endswith(SUFFIX):
                bundle = os.fspath(file) if Bundle.load(file).sha256 == hashes[0] else bundle
            if not given["onnx"] and file.suffix == ".onnx":
                adapter = describe_onnx(file)["adapter"] or {}
                held = {one["bundle_sha256"] for one in adapter.get("adapters", ())}
                graphs += [os.fspath(file)] if held == set(hashes) else []
        except FourierFTError:
            continue  # a file of another kind, which is none of this validation's business
    if not (bundle or graphs or given["peft"]):
        raise UsageError(
            folder,
            expected="its bundle, or ONNX files of it, in the folder or next to it",
            found=f"none with the hash {str(hashes[0])[:12]} of its manifest",
            remedy="name the bundle with --bundle",
        )
    return {"base": base, "bundle": bundle, "merged": folder, "onnx": tuple(graphs)}


def read_survival(merged: str | None) -> dict[str, float]:
    """Reads the share of each layer's weights that a merge changed; empty without its manifest."""
    from ..errors import FourierFTError
    from ..files import strict_json
    from ..files.safetensors_reader import read_file

    path = Path(merged or "", "manifest.json")
    try:
        manifest = strict_json.loads(read_file(path), str(path)) if merged else {}
        tensors = [*manifest.get("tensors", {}).values()]
        return {one["layer"]: float(one["survival"]) for one in tensors if one.get("survival")}
    except (FourierFTError, AttributeError, KeyError, TypeError, ValueError):
        return {}


def _tolerances(words: tuple[str, ...]) -> dict[str, float]:
    """Reads `1e-3` (for float32) and `bfloat16=0.1` as precision -> number."""
    values = {}
    for word in words:
        precision, _, value = word.rpartition("=")
        try:
            values[precision or "float32"] = float(value)
        except ValueError:
            raise click.BadParameter(
                f"{word!r} is not a number or PRECISION=NUMBER", param_hint="--tolerance"
            ) from None
    return values
