"""`cake run`: one generation. Stdout holds the answer alone."""

from __future__ import annotations

import sys

import click

from cake_core.cli.app import current_app
from cake_core.cli.image_options import ImageFlags, image_options
from cake_core.cli.options import ModelFlags, model_options
from cake_core.cli.sections import SectionedCommand, option
from cake_core.cli.text_options import TEXT, TextFlags, text_options
from cake_core.errors import RequestError


@click.command(cls=SectionedCommand)
@click.argument("prompt", required=False)
@option(TEXT, "--seed", "--sd-seed", "seed", type=int, metavar="N", help="Seed of every draw.  [default: a random one]")
@text_options
@image_options
@model_options("model", "topology", "load", "key", "cluster", "guessing", "image")
def run(prompt: str | None, seed: int | None, flags: ModelFlags, text: TextFlags, painting: ImageFlags) -> None:
    """Generate once: text to stdout, or images to a file.

    PROMPT is the request, or - to read it from stdin. Without --model a small default model answers.
    """
    from cake_core.cli import paint, talk
    from cake_core.cli.opening import model_type_of

    asked = read_prompt(prompt)
    plugins = current_app().plugins
    checkpoint = flags.checkpoint(plugins)
    if model_type_of(plugins, checkpoint, flags) == "image":
        paint.paint(plugins, flags, checkpoint, painting, paint.Job(asked, seed))
    elif painting != ImageFlags():
        raise RequestError(f"{checkpoint.name} is a text model; -o and the other image options need --model-type image")
    else:
        talk.answer(plugins, flags, checkpoint, text, talk.Question(asked, seed))


def read_prompt(prompt: str | None) -> str:
    """The prompt given, or stdin's text where it is `-` or missing and stdin is no terminal."""
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError('Give a prompt, e.g. cake run "Why is the sky blue?", or use `cake chat`.')
    if prompt in (None, "-"):
        prompt = sys.stdin.read().rstrip("\n")
    if not prompt:
        raise RequestError("the prompt is empty; write something", "prompt")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestError("the prompt is not valid UTF-8 text", "prompt") from error
    return prompt
