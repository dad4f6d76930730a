"""`cake split-model`: one folder a worker, with only what that worker needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from cake_core.cli.app import current_app
from cake_core.cli.console import Bars, human_bytes, plural
from cake_core.cli.option_groups import MODEL_TYPES
from cake_core.cli.options import ModelFlags


@click.command("split-model")
@click.option("--model-path", "--model", "model", required=True, metavar="M", help="The model to split: as --model elsewhere.")
@click.option("--model-type", type=click.Choice(list(MODEL_TYPES)), metavar="text|image", help="Which kind of model.")
@click.option("--topology", type=click.Path(path_type=Path), required=True, metavar="T", help="Which worker gets which layers.")
@click.option("--worker", "workers", multiple=True, metavar="N", help="Only this one, or master; may be repeated.")
@click.option("--sd-config", metavar="M", help="Model whose configuration a single file of an image model lacks.")
@click.option("--quantize", metavar="Q", help="Write the bundles in int8 or int4, to be loaded as they are.")
@click.option("--output", type=click.Path(path_type=Path), required=True, metavar="O", help="Folder for the bundles.")
def split_model(topology: Path, workers: tuple[str, ...], output: Path, quantize: str | None, **given: str | None) -> None:
    """Write a folder for each worker with its layers, configuration, tokenizer and topology.

    A worker starts on its folder as it is: `cake worker --model OUTPUT/NAME-node`. The master gets OUTPUT/master-node, without
    any weights, when the workers have all layers between them.
    """
    from cake_core.split import narrowed, split

    plugins, sd_config = current_app().plugins, given["sd_config"]
    flags = ModelFlags(
        model=given["model"], model_type=given["model_type"], topology=topology, quantize=quantize,
        sd={"config": sd_config} if sd_config else {},
    )  # fmt: skip
    checkpoint, nodes, options = flags.checkpoint(plugins), flags.load_topology(), flags.load_options()
    backend = plugins.backend_for(checkpoint, flags.kind)
    with Bars("splitting") as bars, narrowed(backend, checkpoint, options.quantize, output) as source:
        info = backend.describe(source, replace(options, quantize=None))
        bundles = split(source, info, nodes, output, workers, lambda done, total: bars.update("", done, total))
    for bundle in bundles:
        parts = f"{plural(len(bundle.layers), 'layer')}, {plural(bundle.tensors, 'tensor')}, {human_bytes(bundle.nbytes)}"
        click.echo(f"{bundle.folder}: {parts}")
