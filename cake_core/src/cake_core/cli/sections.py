"""Commands whose help groups its options under headings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class SectionedOption(click.Option):
    """An option that knows the heading it is listed under."""

    def __init__(self, *args: Any, section: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


ORDER = ("", "Worker", "Model", "Text", "Images", "Loading", "Cluster", "Image models")
"""Headings in the order of help; others follow as they appear."""


class SectionedCommand(click.Command):
    """Lists its options in a block for each section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        blocks: dict[str, list[tuple[str, str]]] = {section: [] for section in ORDER}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                blocks.setdefault(getattr(parameter, "section", ""), []).append(record)
        for section, records in blocks.items():
            if records:
                with formatter.section(section or "Options"):
                    formatter.write_dl(records)


def option(section: str, *names: str, **settings: Any) -> Callable[[F], F]:
    """`click.option` under a heading."""
    return click.option(*names, cls=SectionedOption, section=section, **settings)
