"""`cake split-model`: one folder a worker, with only what that worker needs."""

from __future__ import annotations

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
@click.option("--output", type=click.Path(path_type=Path), required=True, metavar="O", help="Folder for the bundles.")
def split_model(
    model: str, model_type: str | None, topology: Path, workers: tuple[str, ...], sd_config: str | None, output: Path
) -> None:
    """Write a folder for each worker with its layers, configuration, tokenizer and topology.

    A worker starts on its folder as it is: `cake worker --model OUTPUT/NAME-node`. The master gets OUTPUT/master-node, without
    any weights, when the workers have all layers between them.
    """
    from cake_core.split import split

    plugins = current_app().plugins
    flags = ModelFlags(model=model, model_type=model_type, topology=topology, sd={"config": sd_config} if sd_config else {})
    checkpoint, nodes = flags.checkpoint(plugins), flags.load_topology()
    info = plugins.backend_for(checkpoint, flags.kind).describe(checkpoint, flags.load_options())
    with Bars("splitting") as bars:
        bundles = split(checkpoint, info, nodes, output, workers, lambda done, total: bars.update("", done, total))
    for bundle in bundles:
        parts = f"{plural(len(bundle.layers), 'layer')}, {plural(bundle.tensors, 'tensor')}, {human_bytes(bundle.nbytes)}"
        click.echo(f"{bundle.folder}: {parts}")
