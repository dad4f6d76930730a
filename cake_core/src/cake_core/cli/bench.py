"""`cake bench`: the group that plugins add to, and `cake bench text`."""

from __future__ import annotations

import json
from typing import Any

import click

from cake_core.cli.app import current_app
from cake_core.cli.options import ModelFlags, model_options
from cake_core.cli.sections import SectionedCommand, option

LOAD = "Load"


def bench_group(cli: click.Group) -> click.Group:
    """The `bench` group of a command line, made by whoever comes first; the others add their commands to it."""
    found = cli.commands.get("bench")
    if isinstance(found, click.Group):
        return found
    group = click.Group("bench", help="Measure a model, a cluster or a server.")
    cli.add_command(group)
    return group


@click.command("text", cls=SectionedCommand)
@option(LOAD, "--prompt-tokens", type=click.IntRange(1), default=512, show_default=True, metavar="N", help="Prompt length.")
@option(LOAD, "--tokens", type=click.IntRange(2), default=128, show_default=True, metavar="N", help="Tokens to generate.")
@option(LOAD, "--concurrency", type=click.IntRange(1), default=1, show_default=True, metavar="C", help="Requests at once.")
@option(LOAD, "--runs", type=click.IntRange(1), default=5, show_default=True, metavar="N", help="Measured runs.")
@option(LOAD, "--temperature", type=float, default=0.0, show_default=True, metavar="T", help="0 takes the best token.")
@option(LOAD, "--random-weights", metavar="SHAPE", help="Random weights in the shape of llama-3-8b, llama-3-70b, ...")
@option(LOAD, "--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@model_options("model", "topology", "load", "key", "cluster", "guessing")
def bench_text(flags: ModelFlags, random_weights: str | None, as_json: bool, **load: Any) -> None:
    """Measure text generation: time to first token, time per token, tokens a second.

    Prompts are random ids of exactly the asked length and answers have exactly the asked length. The floor is what reading
    the weights and the KV cache of this node once a token takes at the memory bandwidth measured in the same run.
    """
    from dataclasses import replace

    from cake_core.bench import Load, with_floor
    from cake_core.bench import bench_text as measure
    from cake_core.cli.opening import opened_text
    from cake_core.stages.devices import devices_of

    if random_weights is not None:
        flags = replace(flags, model=f"random:{random_weights}")
    plugins = current_app().plugins
    checkpoint = flags.checkpoint(plugins)
    backend = plugins.backend_for(checkpoint, "text")
    with opened_text(plugins, flags, checkpoint) as runtime:
        report = measure(runtime, Load(**load))
        probe = getattr(backend, "probe", None)
        if probe is not None:
            # Of several devices the first is the fastest, so that the floor stays one.
            options = flags.load_options()
            report = with_floor(report, runtime, probe(replace(options, device=devices_of(options)[0])))
    click.echo(json.dumps(report, indent=2) if as_json else _table(report))


def _table(report: dict[str, Any]) -> str:
    first, each, rate = report["time_to_first_token"], report["time_per_token"], report["tokens_per_second"]
    size = f"{report['concurrency']} x {report['prompt_tokens']} + {report['tokens']} tokens"
    lines = [
        f"{report['model']} ({report['dtype']}): {size}, {report['runs']} runs",
        f"time to first token  {first['median'] * 1e3:9.2f} ms  (p90 {first['p90'] * 1e3:.2f}, p99 {first['p99'] * 1e3:.2f})",
        f"time per token       {each['median'] * 1e3:9.3f} ms  (p90 {each['p90'] * 1e3:.3f}, p99 {each['p99'] * 1e3:.3f})",
        f"tokens per second    {rate['median']:9.1f}     ({rate['min']:.1f} to {rate['max']:.1f})",
        f"prompt tokens/second {report['prompt_tokens_per_second']:9.1f}",
    ]
    if report.get("floor_seconds"):
        bandwidth, floor = report["memory_bandwidth"], report["floor_seconds"]
        lines.append(f"memory bandwidth     {bandwidth / 1e9:9.1f} GB/s, so a token takes {floor * 1e3:.3f} ms at least")
        if report["floor_reached"] is not None:
            lines.append(f"reached              {report['floor_reached'] * 100:9.1f} % of that")
    lines += [_stage_line(stage) for stage in report["stages"]]
    lines += [_leg_line(leg) for leg in report["legs"]]
    if report["guesses"]["proposed"]:
        lines.append(f"guesses              {report['guesses']['accepted']:9} right of {report['guesses']['proposed']}")
    lines += [f"wire, {node:<14} {count:9.0f} bytes a token" for node, count in report["wire_bytes_per_token"].items()]
    return "\n".join(lines)


def _leg_line(leg: dict[str, Any]) -> str:
    away, wire = leg["seconds_per_token"] * 1e3, leg["wire_seconds_per_token"] * 1e3
    return f"to {leg['way']:<17} {away:9.3f} ms a token and back, {wire:.3f} of them wires and waiting"


def _stage_line(stage: dict[str, Any]) -> str:
    times = f"{stage['seconds_per_batch'] * 1e3:9.3f} ms a batch, {stage['seconds_per_token'] * 1e3:.3f} ms a token"
    return f"{stage['node']:<20} {times}, idle {stage['idle'] * 100:.0f} %   ({stage['layers']})"
