"""pack: PEFT adapter directory -> bundle; adapter -> ONNX Runtime's adapter file."""

from __future__ import annotations

import os

import click

from .console import Outcome, size_text, verb
from .options import PATH, base_option, force_option, links_option, output_option, read_bundle


@verb
@click.argument("source", type=PATH)
@output_option("BUNDLE", "The bundle to write, *.fourierft.safetensors by custom.")
@base_option
@click.option("--adapter", metavar="NAME", help="Which of several adapters, by its subfolder.")
@click.option(
    "--entry-rule",
    type=click.Choice(["small", "r64"]),
    help="How the seed gave the entries; 'small' for layers above 214 million weights that were "
    "trained before torch 2.6.  [default: what torch does today]",
)
@click.option(
    "--to",
    "target",
    type=click.Choice(["bundle", "onnx-adapter", "onnx-inputs"]),
    default="bundle",
    show_default=True,
    help="onnx-adapter: the inputs of the graph --onnx, for ONNX Runtime's adapter API. "
    "onnx-inputs: the same as plain safetensors, for languages that lack it. SOURCE may then be a "
    "bundle, too.",
)
@click.option(
    "--onnx",
    type=PATH,
    metavar="FILE.onnx",
    help="For onnx-adapter and onnx-inputs: the swappable graph, the paired graph or its expander.",
)
@links_option
@force_option
def pack(
    source: str,
    output: str,
    base: str | None,
    adapter: str | None,
    entry_rule: str | None,
    target: str,
    onnx: str | None,
    allow_links: bool,
    force: bool,
) -> Outcome:
    """Pack the PEFT FourierFT adapter in SOURCE into one small, checked file.

    With --base the bundle is bound to its base: it then knows layer shapes and refuses other bases.
    """
    from ..bundle.describe import describe_bundle
    from ..bundle.peft import find_adapter, from_peft, left_out
    from ..errors import UsageError
    from ..files.staging import check_output

    check_output(output, force=force, inputs=tuple(p for p in (source, base, onnx) if p))
    if allow_links and onnx is None:
        raise UsageError(
            "--allow-links", expected="--onnx FILE.onnx beside it", found="a bundle to write"
        )
    if target != "bundle" or onnx is not None:
        return _for_onnx(
            source, output, base, adapter, entry_rule, target, onnx, allow_links, force
        )
    bundle = from_peft(source, base, adapter=adapter, entry_rule=entry_rule)
    if bundle.is_bound and base is None:  # to the folder that the adapter's config names
        check_output(output, force=force, inputs=(str(bundle.spec.base_model),))
    bundle.save(output, force=force)
    facts = describe_bundle(bundle, output)
    folder = find_adapter(source, adapter)
    before = sum(e.stat().st_size for e in os.scandir(folder) if e.name.startswith("adapter_"))
    notes = [
        f"{name} is the base's own weight and was left out" for name in left_out(source, adapter)
    ]
    if bundle.is_bound and base is None:
        notes.append(f"bound to {bundle.spec.base_model}, the base that the adapter's config names")
    if not bundle.is_bound:
        notes.append(
            "the bundle is unbound: without --base it holds no layer shapes, and nothing can check "
            "that a base is the right one"
        )
    return Outcome(
        {"bundle": facts, "source": {"path": str(folder), "bytes": before}},
        [
            f"{output}: {facts['layers']} layers, {facts['coefficients']:,} coefficients, "
            f"{size_text(facts['bytes'])} (PEFT's files: {size_text(before)})"
        ],
        notes,
    )


def _for_onnx(
    source: str,
    output: str,
    base: str | None,
    adapter: str | None,
    entry_rule: str | None,
    target: str,
    onnx: str | None,
    allow_links: bool,
    force: bool,
) -> Outcome:
    from ..bundle.peft import from_peft
    from ..errors import UsageError
    from ..onnx_graph.fit import knows_base
    from ..onnx_graph.runtime.adapter_file import write_adapter, write_inputs
    from ..onnx_graph.runtime.exported import parameters_for

    if onnx is None or target == "bundle":
        raise UsageError(
            "pack",
            expected="--onnx FILE.onnx together with --to onnx-adapter or --to onnx-inputs",
            found="one of them",
            remedy="such a file holds the inputs of one graph: name it with --onnx",
        )
    if os.path.isdir(source):
        bundle = from_peft(source, base, adapter=adapter, entry_rule=entry_rule)
    else:
        bundle = read_bundle(source)
        bundle = bundle.bind(base, entry_rule) if base else bundle
    plain = target == "onnx-inputs"
    parameters = parameters_for(onnx, bundle, both_graphs=plain, allow_links=allow_links)
    (write_inputs if plain else write_adapter)(output, parameters, force=force)
    size = os.stat(output).st_size
    facts = {"path": output, "to": target, "bytes": size, "inputs": sorted(parameters)}
    lines = [f"{output}: {len(parameters)} inputs of {onnx}, {size_text(size)}"]
    note = (
        "nothing checks such a file against the base later: it was done here"
        if knows_base(bundle)
        else "the bundle is unbound: no check was possible that it belongs to the graph's base, "
        "nor does anything check such a file later; pack with --base to have it checked"
    )
    return Outcome({"onnx": facts}, lines, [note])
