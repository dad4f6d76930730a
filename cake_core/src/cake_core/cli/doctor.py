"""`cake doctor`: this machine as Cake sees it, and what to do about what is wrong."""

from __future__ import annotations

from typing import Any

import click

from cake_core.cli.app import current_app
from cake_core.cli.console import human_bytes, show_json, show_table


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Show versions, devices, dtypes and free memory, and how to mend a GPU that torch cannot use."""
    from cake_core.cli import gpu, machine

    plugins = current_app().inspected_plugins()
    torch = machine.probe_torch()
    gpus = gpu.find_gpus()
    problems = gpu.diagnose(gpus, torch)
    problems += [f"plugin {name} failed to load: {r.error}" for name, r in sorted(plugins.reports.items()) if r.error]
    if not plugins.transports:
        problems.append("no transport is installed, so no other machine can be reached: `pip install cake-transport-tcp`")
    report: dict[str, Any] = {
        **machine.describe(),
        "torch": torch,
        "gpus": [g.as_json() for g in gpus],
        "devices": machine.devices(torch),
        "problems": problems,
    }
    if as_json:
        show_json(report)
    else:
        _show(report)


def _show(report: dict[str, Any]) -> None:
    torch = report["torch"]
    click.echo(f"python    {report['python']} on {report['system']} ({report['machine']}), {report['cpus']} CPUs")
    click.echo(f"memory    {_free(report['memory_free'], report['memory_total'])}")
    if torch.get("version"):
        cuda = f", CUDA {torch['cuda']}" if torch.get("cuda") else ", no CUDA in this build"
        click.echo(f"torch     {torch['version']}{cuda if report['gpus'] or torch.get('cuda') else ''}")
    else:
        click.echo(f"torch     {torch['error']}")
    for gpu in report["gpus"]:
        detail = ", ".join(
            str(v) for v in (gpu["driver"] and f"driver {gpu['driver']}", gpu["capability"] and f"sm {gpu['capability']}") if v
        )
        click.echo(f"gpu       {gpu['name']}{f' ({detail})' if detail else ''}")
    click.echo()
    rows = [(d["device"], d["name"], _free(d["free"], d["total"]), ", ".join(d["dtypes"])) for d in report["devices"]]
    show_table(("device", "name", "memory", "dtypes"), rows)
    click.echo()
    show_table(("distribution", "version"), [(d["name"], d["version"]) for d in report["distributions"]])
    click.echo()
    for problem in report["problems"]:
        click.echo(f"problem: {problem}")
    if not report["problems"]:
        click.echo("no problems found")


def _free(free: int | None, total: int | None) -> str:
    if total is None:
        return "unknown"
    return f"{human_bytes(free)} free of {human_bytes(total)}" if free is not None else human_bytes(total)
