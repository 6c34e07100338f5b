"""Options that several verbs have, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from .sections import section

if TYPE_CHECKING:
    pass

# Paths are not checked by click: its exit code for a missing one is 2, ours is 6.
PATH = click.Path(path_type=str)

input_option = section("Input")
setting_option = section("Settings")
output_section = section("Output")
check_option = section("Checks")

base_option = input_option("--base", type=PATH, metavar="DIR", help="Base model directory.")
required_base_option = input_option(
    "--base", type=PATH, metavar="DIR", required=True, help="Base model directory."
)
bundles_option = input_option(
    "--bundle",
    "bundles",
    type=PATH,
    multiple=True,
    required=True,
    metavar="BUNDLE",
    help="A bundle, or a PEFT adapter directory; may be repeated.",
)
weights_option = input_option(
    "--weight",
    "weights",
    type=float,
    multiple=True,
    metavar="W",
    help="Factor on the delta of each --bundle, in the same order.  [default: 1 each]",
)
task_option = setting_option(
    "--task",
    metavar="TASK",
    help="feature-extraction, text-classification, token-classification, question-answering, "
    "text-generation, image-classification or seq2seq-encoder.  [default: from the adapter and "
    "the base]",
)
mode_option = setting_option(
    "--mode",
    type=click.Choice(["merged", "unmerged", "swappable", "paired", "bank"]),
    required=True,
    help="merged: the weights with the adapter in them. unmerged: base weights and spectra, which "
    "ONNX Runtime merges once when it loads the file. swappable: the adapter is an input of a few "
    "KB. paired: the adapted weights are inputs, and FILE.expand.onnx makes them of an adapter. "
    "bank: a table of adapters, and an input adapter_id per row of the batch, 0 being the base.",
)
entry_rule_option = setting_option(
    "--entry-rule",
    type=click.Choice(["small", "r64"]),
    help="How the seed gave the entries; 'small' for layers above 214 million weights that were "
    "trained before torch 2.6.  [default: what torch does today]",
)
allow_mismatch_option = check_option(
    "--allow-base-mismatch",
    is_flag=True,
    help="Go on although the base's weights are not those the adapter was trained on.",
)
links_option = check_option(
    "--allow-links", is_flag=True, help="Follow links between files of a model's folder."
)
force_option = output_section("--force", is_flag=True, help="Replace an output that exists.")


def output_option(metavar: str, what: str) -> Callable[[Any], Any]:
    """The required -o / --output; `what` is what it names."""
    return output_section(
        "-o",
        "--output",
        "output",
        required=True,
        type=PATH,
        metavar=metavar,
        help=f"{what} to write.",
    )
