"""Options that several verbs have, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import click

from ..errors import UsageError
from .option_sections import F, section


class _PossiblePath(click.Path):
    """A path that a file can have; click does not look for it: its exit code is 2, ours is 6."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        from ..files.safe_paths import check_path

        check_path(value)
        return super().convert(value, param, ctx)


class _FilePath(_PossiblePath):
    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if value.endswith("/"):
            raise UsageError(value, expected="the path of a file", found="a path that ends in /")
        return super().convert(value, param, ctx)


PATH = _PossiblePath(path_type=str)

input_option = section("Input")
input_path = partial(input_option, type=PATH)
setting_option = section("Settings")
output_section = section("Output")
check_option = section("Checks")

_base = partial(input_path, "--base", metavar="DIR", help="Directory of the base model.")
base_option, required_base_option = _base(), _base(required=True)


def bundles_option(function: F) -> F:
    """Adds --bundle and --weight, which may both be repeated."""
    bundles = input_path(
        "--bundle",
        "bundles",
        multiple=True,
        required=True,
        metavar="BUNDLE",
        help="A bundle, or a PEFT adapter directory; may be repeated.",
    )
    weights = input_option(
        "--weight",
        "weights",
        type=float,
        multiple=True,
        metavar="W",
        help="Factor of each --bundle's weight change, in the same order.  [default: 1 each]",
    )
    return bundles(weights(function))


task_option = setting_option(
    "--task",
    metavar="TASK",
    help="What the model is for: feature-extraction, text-classification, token-classification, "
    "question-answering, text-generation, image-classification or seq2seq-encoder.  [default: as "
    "the adapter and the base say]",
)
mode_option = setting_option(
    "--mode",
    type=click.Choice(["merged", "unmerged", "swappable", "paired", "bank"]),
    required=True,
    help="merged: the file holds adapted weights. unmerged: it holds base weights and the "
    "adapter, which ONNX Runtime merges when it loads the file. swappable: the adapter is an input "
    "of a few KB. paired: the adapted weights are inputs, computed from an adapter by "
    "FILE.expand.onnx. bank: the file holds several adapters, and the input adapter_id chooses one "
    "for each row of the batch (0: none).",
)
defaults_option = setting_option(
    "--defaults",
    type=click.Choice(["bundle", "base", "required"]),
    default="bundle",
    show_default=True,
    help="What swappable, paired and bank compute when no adapter is fed. With required, one must "
    "be fed; onnxruntime-node needs that, since it ignores values fed to inputs with a default.",
)
inline_option = setting_option(
    "--inline",
    is_flag=True,
    help="Write standard operators only, for tools that cannot read model-local functions.",
)
entry_rule_option = setting_option(
    "--entry-rule",
    type=click.Choice(["small", "r64"]),
    help="How torch drew the entries from the seed: 'small' for layers of more than 214 million "
    "weights that were trained before torch 2.6.  [default: as torch does today]",
)
allow_mismatch_option = check_option(
    "--allow-base-mismatch",
    is_flag=True,
    help="Accept a base with other weights than those the adapter was trained on.",
)
links_option = check_option(
    "--allow-links", is_flag=True, help="Follow links between the files of a model's folder."
)
force_option = output_section("--force", is_flag=True, help="Replace an output that exists.")


def output_option(metavar: str, text: str) -> Callable[[F], F]:
    """Returns the options -o / --output, with this help text, and --force."""
    kind = PATH if metavar == "DIR" else _FilePath(path_type=str)
    settings = {"required": True, "type": kind, "metavar": metavar, "help": text}
    output = output_section("-o", "--output", **settings)
    return lambda function: output(force_option(function))
