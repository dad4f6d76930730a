"""`cake chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from cake_core.cli.app import current_app
from cake_core.cli.console import note
from cake_core.cli.options import ModelFlags, model_options
from cake_core.cli.sections import SectionedCommand, option
from cake_core.cli.talk import Meter, Question, pieces
from cake_core.cli.text_options import TEXT, TextFlags, text_options
from cake_core.errors import CakeError, ContextLengthError, NodeError, RequestError

if TYPE_CHECKING:
    from cake_core.requests import Message
    from cake_core.runtime import TextRuntime

HELP = """\
/clear          forget the conversation
/retry          answer the last question again
/system TEXT    tell the model its role, and start over
/set NAME VALUE temperature, top-k, top-p, min-p, repeat-penalty, max-tokens
/exit           leave (also Ctrl-D)
Ctrl-C stops an answer. A line that ends with \\ goes on in the next."""

SETTABLE = {"temperature": float, "top_k": int, "top_p": float, "min_p": float, "repeat_penalty": float, "max_tokens": int}


@click.command(cls=SectionedCommand)
@option(TEXT, "--seed", type=int, metavar="N", help="Seed of every draw.  [default: a random one]")
@text_options
@model_options("model", "topology", "load", "key", "cluster", "guessing")
def chat(seed: int | None, flags: ModelFlags, text: TextFlags) -> None:
    """Talk with a model; it remembers the conversation."""
    from cake_core.cli.opening import model_type_of, opened_text

    plugins = current_app().plugins
    checkpoint = flags.checkpoint(plugins)
    if model_type_of(plugins, checkpoint, flags) != "text":
        raise RequestError(f"{checkpoint.name} paints images; use `cake run --model-type image`")
    if text.raw:
        raise RequestError("a conversation needs the model's chat template; use `cake run --raw`", "raw")
    chosen_seed = Question("", seed).chosen_seed()
    text.check(chosen_seed)
    with opened_text(plugins, flags, checkpoint) as runtime:
        if not runtime.tokenizer.has_chat_template:
            raise RequestError(f"{checkpoint.name} has no chat template; use `cake run --raw`")
        Conversation(runtime, text, chosen_seed).talk()


class Conversation:
    """The history of one chat, and what the user types into it."""

    def __init__(self, runtime: TextRuntime, text: TextFlags, seed: int) -> None:
        self._runtime = runtime
        self._text = text
        self._seed = seed
        self._history: list[Message] = []
        self._typed = sys.stdin.isatty()

    def talk(self) -> None:
        """Reads and answers until the input ends."""
        if self._typed:
            # Line editing and history, where Python was built with it.
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - importing it is what installs it
            note("type a message, /help for commands, Ctrl-D to leave\n")
        while (line := self._read()) is not None:
            if line.startswith("/"):
                if not self._command(line):
                    return
            elif line:
                self._ask(line)

    def _read(self) -> str | None:
        """The next message, None at the end. A line that ends with a backslash goes on in the next."""
        lines: list[str] = []
        while True:
            try:
                line = input((". " if lines else "> ") if self._typed else "")
            except EOFError:
                note()
                return "\n".join(lines) or None
            except KeyboardInterrupt:
                note("\n(Ctrl-D or /exit to leave)")
                lines = []
                continue
            if not line.endswith("\\"):
                return "\n".join([*lines, line]).strip()
            lines.append(line[:-1])

    def _command(self, line: str) -> bool:
        """Whether to go on after a command."""
        name, _, rest = line.partition(" ")
        if name in ("/exit", "/quit", "/bye"):
            return False
        if name == "/clear":
            self._history = []
            note("forgotten")
        elif name == "/system":
            self._text, self._history = replace(self._text, system_prompt=rest.strip() or None), []
            note("a new conversation")
        elif name == "/retry":
            self._retry()
        elif name == "/set":
            self._set(rest)
        else:
            note(HELP if name == "/help" else f"no command {name}\n{HELP}")
        return True

    def _set(self, rest: str) -> None:
        name, _, value = rest.replace("=", " ").strip().partition(" ")
        convert = SETTABLE.get(name.replace("-", "_"))
        if convert is None:
            note(f"cannot set {name!r}; there are {', '.join(SETTABLE)}")
            return
        try:
            self._text = replace(self._text, **{name.replace("-", "_"): convert(value)})
        except ValueError:
            note(f"{name} takes a number, not {value.strip()!r}")

    def _retry(self) -> None:
        if len(self._history) < 2:
            note("nothing to answer again")
            return
        question = self._history[-2]["content"]
        del self._history[-2:]
        self._seed += 1
        self._ask(question)

    def _ask(self, question: str) -> None:
        """Answers one message; what was said stays in the history, also when the answer was stopped."""
        self._history.append({"role": "user", "content": question})
        said: list[str] = []
        meter = Meter()
        try:
            self._answer(said, meter)
        except KeyboardInterrupt:
            meter.reason = "stopped"
        except (NodeError, RequestError, CakeError) as error:
            note(f"\nerror: {error}")
        click.echo()
        if said:
            self._history.append({"role": "assistant", "content": "".join(said)})
            if self._typed:
                note(click.style(f"({meter.summary()})\n", dim=True))
        else:
            self._history.pop()

    def _answer(self, said: list[str], meter: Meter) -> None:
        system = [] if self._text.system_prompt is None else [{"role": "system", "content": self._text.system_prompt}]
        while True:
            try:
                request = self._text.chat_request(self._runtime.tokenizer, [*system, *self._history], self._seed)
                for piece in pieces(self._runtime.engine, request, meter):
                    said.append(piece)
                    click.echo(piece, nl=False)
                return
            except ContextLengthError:
                if len(self._history) < 3:
                    raise
                # The oldest question and its answer make room for the newest.
                del self._history[:2]
                note("(the conversation is longer than the context; its oldest part is forgotten)")
