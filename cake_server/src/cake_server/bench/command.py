"""What `cake bench serve` does: run the load, print a table or JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import click

from cake_core.cli.console import note, show_table
from cake_core.errors import CakeError, ConfigError
from cake_server.bench.client import Target, first_model
from cake_server.bench.load import Load, run_load
from cake_server.bench.report import summary

_ROWS = {
    "time_to_first_token_ms": "time to first token",
    "time_per_token_ms": "time per token",
    "inter_token_ms": "between tokens",
    "request_ms": "whole request",
}
_COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")


def run(options: Mapping[str, Any]) -> None:
    """Raises CakeError when no request at all was answered."""
    target = Target.parse(options["url"], options["api_key"])
    load = Load(**{field.name: options[field.name] for field in fields(Load)})
    result = asyncio.run(_run(target, load, options["model"]))
    text = json.dumps(result, indent=2)
    if options["output"] is not None:
        try:
            options["output"].write_text(text + "\n", "utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {options['output']}: {error.strerror}") from error
    if options["as_json"]:
        click.echo(text)
    else:
        _show(result)
    if not result["completed"]:
        raise CakeError(f"no request was answered: {result['errors']}")


async def _run(target: Target, load: Load, model: str | None) -> dict[str, Any]:
    name = model or await first_model(target)
    note(f"sending {load.requests} requests to {target.host}:{target.port}, model {name}")
    samples = await run_load(target, name, load)
    return {"target": f"{target.host}:{target.port}", "model": name, "load": asdict(load), **summary(samples)}


def _show(result: Mapping[str, Any]) -> None:
    click.echo(
        f"{result['completed']} of {result['requests']} requests in {result['seconds']} s: "
        f"{result['requests_per_second']} requests/s, {result['output_tokens_per_second']} tokens/s"
    )
    for error, count in result["errors"].items():
        click.echo(f"  {count} failed: {error}")
    rows = [
        (name, *(f"{result[key][column]:.1f}" for column in _COLUMNS)) for key, name in _ROWS.items() if result[key] is not None
    ]
    if rows:
        show_table(("ms", *_COLUMNS), rows, right=range(1, len(_COLUMNS) + 1))
