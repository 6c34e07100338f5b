"""Help of the verbs: options in sections, then examples."""

from __future__ import annotations

import re
from collections.abc import Callable
from textwrap import wrap
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class SectionedOption(click.Option):
    """An option with the title of its section of the help."""

    def __init__(self, *words: Any, title: str = "", **settings: Any) -> None:
        super().__init__(*words, **settings)
        self.title = title


class Sectioned(click.Command):
    """A command whose help lists its options by section, General last, and then examples."""

    examples: tuple[str, ...] = ()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes a list of options for each title, in the order in which the titles come."""
        sections: dict[str, list[tuple[str, str]]] = {}
        general: list[tuple[str, str]] = []
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is not None:
                title = getattr(option, "title", "")
                (sections.setdefault(title, []) if title else general).append(record)
        for title, records in (*sections.items(), ("General", general)):
            with formatter.section(title):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the examples, each as one line to copy."""
        del ctx
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    # A line ends before an option, never between an option and its value.
                    text = re.sub(" (?!-)", "\0", f"fourierft-export {example}")
                    lines = wrap(text, formatter.width - 8, break_on_hyphens=False)
                    formatter.write("  " + " \\\n      ".join(lines).replace("\0", " ") + "\n")


def section(title: str) -> Callable[..., Callable[[F], F]]:
    """Returns `click.option` for the options of a section."""

    def option(*words: Any, **settings: Any) -> Callable[[F], F]:
        return click.option(*words, cls=SectionedOption, title=title, **settings)

    return option
