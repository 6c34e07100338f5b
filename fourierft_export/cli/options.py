"""Options that several verbs have, and how their values are read."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ..bundle.file import Bundle

F = TypeVar("F", bound=Callable[..., Any])

# Paths are not checked by click: its exit code for a missing one is 2, ours is 6.
PATH = click.Path(path_type=str)

base_option = click.option("--base", type=PATH, metavar="DIR", help="Base model directory.")
force_option = click.option("--force", is_flag=True, help="Replace an output that exists.")


def output_option(metavar: str, help_text: str) -> Callable[[F], F]:
    """The required -o / --output."""
    return click.option(
        "-o", "--output", "output", required=True, type=PATH, metavar=metavar, help=help_text
    )


bundles_option = click.option(
    "--bundle",
    "bundles",
    type=PATH,
    multiple=True,
    required=True,
    metavar="BUNDLE",
    help="A bundle, or a PEFT adapter directory; may be repeated.",
)
weights_option = click.option(
    "--weight",
    "weights",
    type=float,
    multiple=True,
    metavar="W",
    help="Factor on the delta of each --bundle, in the same order.  [default: 1 each]",
)
task_option = click.option(
    "--task",
    metavar="TASK",
    help="feature-extraction, text-classification, token-classification, question-answering, "
    "text-generation, image-classification or seq2seq-encoder.  [default: from the adapter and the "
    "base]",
)
allow_mismatch_option = click.option(
    "--allow-base-mismatch",
    is_flag=True,
    help="Go on although the base's weights are not those the adapter was trained on.",
)
links_option = click.option(
    "--allow-links",
    is_flag=True,
    help="Follow links between files of a model's directory.",
)


def read_bundle(path: str) -> Bundle:
    """A bundle file, or a PEFT adapter directory taken as one."""
    from ..bundle.file import Bundle
    from ..bundle.peft import find_adapter, read_adapter

    # Unbound, so that the verb's own base binds it, not one that the adapter's config names.
    return read_adapter(find_adapter(path)) if os.path.isdir(path) else Bundle.load(path)
