"""Help of a verb with many options, in sections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class SectionedOption(click.Option):
    """An option that the help lists under a title."""

    def __init__(self, *words: Any, title: str = "", **settings: Any) -> None:
        super().__init__(*words, **settings)
        self.title = title


class Sectioned(click.Command):
    """A command whose help lists its options by section, the others last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a list of options for each title."""
        sections: dict[str, list[tuple[str, str]]] = {}
        others: list[tuple[str, str]] = []
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is not None:
                title = getattr(option, "title", "")
                (sections.setdefault(title, []) if title else others).append(record)
        for title, records in (*sections.items(), ("Others", others)):
            with formatter.section(title):
                formatter.write_dl(records)


def section(title: str) -> Callable[..., Callable[[F], F]]:
    """`click.option` for the options of a section."""

    def option(*words: Any, **settings: Any) -> Callable[[F], F]:
        return click.option(*words, cls=SectionedOption, title=title, **settings)

    return option
