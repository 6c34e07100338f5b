"""pack: writes a PEFT adapter as a bundle, or an adapter as inputs of an ONNX file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from . import options
from .console import Outcome, size_text, verb
from .pack_pool import write_pool

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle


@verb(
    examples=(
        "pack adapter --base base -o a.fourierft.safetensors",
        "pack a.fourierft.safetensors --to onnx-adapter --onnx swappable.onnx -o a.onnx_adapter",
        "pack adapter b.fourierft.safetensors --base base --pool -o tenants.fourierft.pool",
    )
)
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=False, type=options.PATH)
@options.base_option
@options.input_option(
    "--adapter", metavar="NAME", help="Subfolder of the adapter, if SOURCE holds several."
)
@options.entry_rule_option
@options.input_option(
    "--paper-scaling",
    metavar="S",
    type=float,
    help="SOURCE is a state dict (safetensors) of the paper's own code, trained with --scale S.",
)
@options.input_option(
    "--paper-seed",
    metavar="N",
    type=int,
    help="The --entry_seed of that training.  [default: 2024]",
)
@options.input_path(
    "--onnx",
    metavar="FILE.onnx",
    help="For onnx-adapter and onnx-inputs: a swappable or paired graph, or FILE.expand.onnx.",
)
@options.output_option("BUNDLE", "The bundle to write, by custom *.fourierft.safetensors.")
@options.output_section(
    "--to",
    "target",
    type=click.Choice(["bundle", "onnx-adapter", "onnx-inputs"]),
    default="bundle",
    show_default=True,
    help="onnx-adapter: inputs of the graph --onnx, for ONNX Runtime's adapter API. onnx-inputs: "
    "the same as safetensors, for languages without that API. For both, SOURCE may be a bundle.",
)
@options.output_section(
    "--pool", is_flag=True, help="Write the SOURCEs, each a path or NAME=PATH, into one pool."
)
@options.output_section("--append", is_flag=True, help="With --pool: add to a pool that exists.")
@options.output_section(
    "--remove", metavar="NAME", multiple=True, help="With --pool: remove an adapter; repeatable."
)
@options.links_option
def pack(
    sources: tuple[str, ...],
    output: str,
    base: str | None,
    adapter: str | None,
    entry_rule: str | None,
    paper_scaling: float | None,
    paper_seed: int | None,
    target: str,
    onnx: str | None,
    allow_links: bool,
    force: bool,
    pool: bool,
    append: bool,
    remove: tuple[str, ...],
) -> Outcome:
    """Pack one PEFT adapter or many into one small, checked file.

    SOURCE is PEFT's directory. With --base the bundle is bound to its base: it then holds layer
    shapes and hashes of weights, and other bases are refused.
    """
    from ..bundle.describe import describe_bundle
    from ..bundle.paper import from_paper
    from ..bundle.peft import DEFAULT_ADAPTER, find_adapter, from_peft, left_out, open_bundle
    from ..errors import UsageError
    from ..files.staging import check_output

    if pool:
        single = (adapter, entry_rule, onnx, paper_scaling, paper_seed)
        if any(x is not None for x in single) or allow_links or target != "bundle":
            found = "an option for a single adapter"
            raise UsageError("pack --pool", expected="--base and --force at most", found=found)
        return write_pool(sources, output, base, append=append, remove=remove, force=force)
    if len(sources) != 1 or append or remove:
        found = f"{len(sources)}" if len(sources) != 1 else "--append or --remove"
        expected, remedy = "one SOURCE", "for several adapters in one file, give --pool"
        raise UsageError("pack", expected=expected, found=found, remedy=remedy)
    (source,) = sources
    check_output(output, force=force, inputs=tuple(p for p in (source, base, onnx) if p))
    if (onnx is None) != (target == "bundle"):
        raise UsageError(
            "pack",
            expected="--onnx FILE.onnx together with --to onnx-adapter or --to onnx-inputs",
            found="one of them",
            remedy="such a file holds the inputs of one graph: name it with --onnx",
        )
    if onnx is None and allow_links:
        found, expected = "no --onnx", "--onnx FILE.onnx, whose links it concerns"
        raise UsageError("--allow-links", expected=expected, found=found)
    if paper_seed is not None and paper_scaling is None:
        found, expected = "no --paper-scaling", "--paper-scaling S together with --paper-seed"
        raise UsageError("--paper-seed", expected=expected, found=found)
    if paper_scaling is not None:
        if base is None or entry_rule is not None:
            found = "no --base" if base is None else "--entry-rule"
            expected = "--base DIR, and no --entry-rule"
            raise UsageError("--paper-scaling", expected=expected, found=found)
        bundle = from_paper(
            source,
            base,
            scaling=paper_scaling,
            seed=2024 if paper_seed is None else paper_seed,
            adapter=adapter or DEFAULT_ADAPTER,
        )
    elif onnx is not None and os.path.isfile(source):
        if adapter is not None or (entry_rule is not None and base is None):
            name = "--entry-rule" if adapter is None else "--adapter"
            needs = "--base DIR with it" if adapter is None else "a folder of adapters as SOURCE"
            raise UsageError(name, expected=needs, found=f"the bundle {source} alone")
        bundle = open_bundle(source)
        bundle = bundle if base is None else bundle.bind(base, entry_rule)
    else:
        bundle = from_peft(source, base, adapter=adapter, entry_rule=entry_rule)
    if onnx is not None:
        return _write_inputs(bundle, output, target, onnx, allow_links=allow_links, force=force)
    if bundle.is_bound and base is None:  # to the folder that the adapter's config names
        check_output(output, force=force, inputs=(str(bundle.spec.base_model),))
    bundle.save(output, force=force)
    facts = describe_bundle(bundle, output)
    if paper_scaling is not None:
        note = "the paper's code transposes the change: stored as entries of its own"
        return _packed(facts, source, os.stat(source).st_size, [note])
    folder = find_adapter(source, adapter)
    before = sum(e.stat().st_size for e in os.scandir(folder) if e.name.startswith("adapter_"))
    notes = []
    for name in left_out(source, adapter):
        kind = "the base's own weight" if name.endswith(".weight") else "a second copy"
        notes.append(f"{name} is {kind} and was left out")
    if bundle.is_bound and base is None:
        notes.append(f"bound to {bundle.spec.base_model}, the base that the adapter's config names")
    if not bundle.is_bound:
        notes.append(
            "the bundle is unbound: it holds no layer shapes and cannot refuse a wrong base; pack "
            "it with --base to bind it"
        )
    return _packed(facts, str(folder), before, notes)


def _packed(facts: dict[str, Any], source: str, before: int, notes: list[str]) -> Outcome:
    """What `pack` reports of a bundle that it wrote from files of `before` bytes."""
    return Outcome(
        {"bundle": facts, "source": {"path": source, "bytes": before}},
        [
            f"{facts['path']}: {facts['layers']} layers, {facts['coefficients']:,} coefficients, "
            f"{size_text(facts['bytes'])} (the source's files: {size_text(before)})"
        ],
        notes,
    )


def _write_inputs(
    bundle: Bundle, output: str, target: str, onnx: str, *, allow_links: bool, force: bool
) -> Outcome:
    """Writes the bundle as inputs of the graph `onnx`."""
    from ..onnx_graph.feeds import has_fingerprints
    from ..onnx_graph.runtime.adapter_file import write_adapter, write_inputs
    from ..onnx_graph.runtime.exported_file import parameters_for

    plain = target == "onnx-inputs"
    parameters = parameters_for(onnx, bundle, both_graphs=plain, allow_links=allow_links)
    (write_inputs if plain else write_adapter)(output, parameters, force=force)
    size = os.stat(output).st_size
    facts = {"path": output, "to": target, "bytes": size, "inputs": sorted(parameters)}
    lines = [f"{output}: {len(parameters)} inputs of {onnx}, {size_text(size)}"]
    note = (
        "the adapter was checked against the graph's base; this file is not checked again"
        if has_fingerprints(bundle)
        else "the bundle is unbound, so it was not checked against the graph's base; pack it with "
        "--base to have it checked"
    )
    return Outcome({"onnx": facts}, lines, [note])
