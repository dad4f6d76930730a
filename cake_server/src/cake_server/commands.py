"""`cake serve` and `cake bench serve`. Imported when the command line starts, so everything heavy waits for the call."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cake_core.cli.bench import bench_group
from cake_core.cli.options import model_options
from cake_core.cli.sections import SectionedCommand, option

if TYPE_CHECKING:
    from cake_core.cli.options import ModelFlags
    from cake_core.links.connect import Connector
    from cake_core.plugins import Plugins
    from cake_server.service import Runtime, Service

Option = Callable[[Any], Any]

TEXT, API = "Text", "API"
_SAMPLING: tuple[Option, ...] = (
    option(TEXT, "--max-tokens", type=int, metavar="N", help="Most tokens of an answer that does not say."),
    option(TEXT, "--temperature", type=float, metavar="X", help="Default temperature, over the model's own."),
    option(TEXT, "--top-k", type=int, metavar="N", help="Default top_k."),
    option(TEXT, "--top-p", type=float, metavar="P", help="Default top_p."),
    option(TEXT, "--min-p", type=float, metavar="P", help="Default min_p."),
    option(TEXT, "--repeat-penalty", type=float, metavar="X", help="Default repeat penalty."),
    option(TEXT, "--repeat-last-n", type=int, metavar="N", help="Its window."),
    option(TEXT, "--seed", type=int, metavar="N", help="Default seed; without one each request draws its own."),
)
_API: tuple[Option, ...] = (
    option(API, "--api", default="127.0.0.1:8080", show_default=True, metavar="H:P", help="Address of the API."),
    option(API, "--name", default="", metavar="M", help="Name of the model in the API; default: the model's own."),
    option(API, "--alias", "aliases", multiple=True, metavar="M", help="Another name for it, as gpt-4o-mini."),
    option(API, "--api-key", "api_keys", multiple=True, metavar="KEY", help="Require this key (or $CAKE_API_KEY)."),
    option(API, "--api-key-file", type=click.Path(path_type=Path), metavar="FILE", help="Keys to accept, one a line."),
    option(API, "--allowed-host", "allowed_hosts", multiple=True, metavar="NAME", help="Accept this Host without a key."),
    option(API, "--cors-origin", "cors_origins", multiple=True, metavar="URL", help="Let pages of this origin call."),
    option(API, "--log-json", is_flag=True, help="Log requests as JSON objects instead of key=value."),
)


def add_commands(cli: click.Group) -> None:
    cli.add_command(serve)
    cli.add_command(status)
    bench_group(cli).add_command(bench_serve)


def _with(*groups: tuple[Option, ...]) -> Option:
    def decorate(function: Any) -> Any:
        for add in reversed([add for group in groups for add in group]):
            function = add(function)
        return function

    return decorate


@click.command(cls=SectionedCommand)
@model_options()
@_with(_API, _SAMPLING)
def serve(flags: ModelFlags, api: str, name: str, **given: Any) -> None:
    """Serve a model over an OpenAI-compatible REST API, with a web page at /."""
    from cake_core.cli.app import current_app
    from cake_core.cli.opening import take_short_turns
    from cake_core.transport import Address
    from cake_server.serve import Process, bind
    from cake_server.service import Service

    take_short_turns()
    logging.getLogger("cake_server.access").setLevel(logging.INFO)
    service = Service(make_settings(given), name)
    plugins, started = current_app().plugins, time.monotonic()
    listener = bind(Address.parse(api, default_port=8080))
    _say_where(listener.getsockname(), bool(service.settings.api_keys))
    connectors: list[Connector] = []
    Process(
        service, lambda: open_runtime(plugins, flags, service, connectors), lambda runtime: _say_ready(runtime, started)
    ).run(listener)


def make_settings(given: Mapping[str, Any]) -> Any:
    """Settings from the options of `serve`. Raises ConfigError, naming the option."""
    from cake_core.requests import SamplingDefaults, SamplingParams
    from cake_server.keys import collect_keys
    from cake_server.settings import Settings

    names = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty")
    defaults = SamplingDefaults(**{name: given[name] for name in names})
    SamplingParams(**defaults.fill())  # refuses a bad value now, not at the first request
    return Settings(
        api_keys=collect_keys(given["api_keys"], given["api_key_file"]),
        allowed_hosts=given["allowed_hosts"],
        cors_origins=given["cors_origins"],
        aliases=given["aliases"],
        sampling=defaults,
        repeat_last_n=given["repeat_last_n"],
        max_tokens=given["max_tokens"],
        seed=given["seed"],
        log_json=given["log_json"],
    )


def open_runtime(plugins: Plugins, flags: ModelFlags, service: Service, connectors: list[Connector]) -> Runtime:
    """Finds the model and opens it, with a short wait: the server asks again while a worker is missing, and meanwhile its
    clients are told which. `connectors` keeps the one there is: workers that joined must not be lost between two attempts."""
    from dataclasses import replace

    from cake_core.runtime import open_image, open_text

    service.loading("looking for the model")
    checkpoint = flags.checkpoint(plugins)
    service.loading(f"{checkpoint.name} is being loaded")
    if not connectors:
        connectors.append(flags.connector(plugins, flags.load_topology()))
    spec = replace(flags.run_spec(plugins, checkpoint, service.loaded, connectors[0]), wait=1.0)
    backend = plugins.backend_for(checkpoint, flags.kind)
    return open_text(plugins, spec) if backend.model_type == "text" else open_image(plugins, spec)


def _say_where(address: Sequence[Any], has_key: bool) -> None:
    from ipaddress import ip_address

    from cake_core.cli.console import note

    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    where = f"{host}:{address[1]}"
    note(f"listening on http://{where} (the model is being loaded)")
    if not has_key and not ip_address(address[0]).is_loopback:
        note(
            f"warning: anyone who reaches port {address[1]} may use this API; add a key with "
            f'`cake serve --api {where} --api-key "$(openssl rand -hex 24)"`'
        )


def _say_ready(runtime: Runtime, started: float) -> None:
    from cake_core.cli.opening import announce

    announce(runtime.info, runtime.placement, time.monotonic() - started)


@click.command()
@click.argument("url", default="http://127.0.0.1:8080")
@click.option("--follow", is_flag=True, help="Go on, and print it again whenever something changes.")
@click.option("--api-key", envvar="CAKE_API_KEY", metavar="KEY", help="Key to send.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(url: str, follow: bool, api_key: str | None, as_json: bool) -> None:
    """Show the cluster of a running `cake serve`: nodes, layers, memory, traffic, who is missing since when."""
    from cake_server.status import show

    show(url, api_key, follow, as_json)


@click.command("serve")
@click.argument("url", default="http://127.0.0.1:8080")
@click.option("--model", metavar="M", help="Model name to send; default: the first the server lists.")
@click.option("--requests", type=click.IntRange(1), default=64, show_default=True, metavar="N", help="Requests to send.")
@click.option("--concurrency", type=click.IntRange(1), default=8, show_default=True, metavar="N", help="Clients at a time.")
@click.option("--rate", type=click.FloatRange(0.001), metavar="R", help="Open loop: requests a second.")
@click.option(
    "--input-tokens", type=click.IntRange(1), default=128, show_default=True, metavar="N", help="Of the prompt, about."
)
@click.option("--output-tokens", type=click.IntRange(1), default=128, show_default=True, metavar="N", help="Answer length.")
@click.option("--warmup", type=click.IntRange(0), default=2, show_default=True, metavar="N", help="Requests not counted.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of prompts and arrivals.")
@click.option("--timeout", type=float, default=600.0, show_default=True, metavar="S", help="For each request.")
@click.option("--api-key", envvar="CAKE_API_KEY", metavar="KEY", help="Key to send.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the JSON there too.")
def bench_serve(**options: Any) -> None:
    """Load any OpenAI-compatible server: time to first token, time per token, throughput, percentiles, errors."""
    from cake_server.bench.command import run

    run(options)
