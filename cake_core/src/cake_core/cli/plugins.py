"""`cake plugins`: what is installed, what each provides, what failed to load and why."""

from __future__ import annotations

import click

from cake_core.cli.app import current_app
from cake_core.cli.console import note, plural, show_json, show_table


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plugins(as_json: bool) -> None:
    """Show the installed plugins, what they provide, and what failed to load."""
    found = current_app().inspected_plugins()
    reports = sorted(found.reports.items(), key=lambda item: item[0])
    if as_json:
        show_json(
            [
                {
                    "name": report.name,
                    "distribution": report.distribution,
                    "version": report.version,
                    "provides": report.provides,
                    "error": report.error,
                }
                for _, report in reports
            ]
        )
        return
    rows = [
        (
            name,
            f"{r.distribution} {r.version}".strip() or "built in",
            ", ".join(r.provides) or "-",
            "FAILED" if r.error else "ok",
        )
        for name, r in reports
    ]
    show_table(("plugin", "distribution", "provides", "state"), rows)
    failed = [(name, r.error) for name, r in reports if r.error]
    for name, error in failed:
        click.echo(f"\n{name} failed to load: {error}")
    if failed:
        note(f"\n{plural(len(failed), 'plugin')} failed; reinstall or upgrade the distribution named above")
