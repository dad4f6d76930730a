"""What every command shares: plugins and options of the process, logging, and the one mapping from errors to exit codes."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from cake_core.errors import CakeError, Cancelled, CapacityError

if TYPE_CHECKING:
    from cake_core.config import Options
    from cake_core.plugins import Plugins

OURS = ("cake_core", "cake_llama", "cake_sd", "cake_server", "cake_transport_tcp", "cake_transport_quic", "cake_emoji")
"""Loggers that -v opens; other people's libraries only speak when something is wrong."""


class App:
    """The process's options and its plugins, which are found when first asked for."""

    def __init__(self, options: Options, plugins: Plugins | None = None) -> None:
        self.options = options
        self._plugins = plugins

    @property
    def plugins(self) -> Plugins:
        if self._plugins is None:
            from cake_core.plugins import Plugins

            self._plugins = Plugins()
            self._plugins.configure(self.options)
        return self._plugins

    def inspected_plugins(self) -> Plugins:
        """The plugins, every one asked for what it offers; what fails is in the reports, and not logged as well."""
        logging.getLogger("cake_core.plugins").setLevel(logging.ERROR)
        found = self.plugins
        _ = found.backends, found.transports
        return found


def app_of(context: click.Context) -> App:
    """The application of a running command, also one that a plugin added; made, with logging, on first use."""
    root = context.find_root()
    if not isinstance(root.obj, App):
        from cake_core.config import load_options

        verbosity = root.params.get("verbose") or 0
        set_up_logging(verbosity)
        root.obj = App(load_options(verbosity), getattr(root.command, "given_plugins", None))
    return root.obj


def current_app() -> App:
    return app_of(click.get_current_context())


class CliError(click.ClickException):
    """A CakeError on its way out of the command line."""

    def __init__(self, error: CakeError) -> None:
        super().__init__(str(error))
        self.__dict__["exit_code"] = error.exit_code

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", file=file or sys.stderr)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turns expected errors into what click shows and exits with; a bug keeps its traceback."""
    try:
        yield
    except Cancelled as error:
        raise click.Abort from error
    except CakeError as error:
        raise CliError(error) from error
    except MemoryError as error:
        raise CliError(CapacityError("out of memory; take a smaller model or --context, or add workers")) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CliError(CakeError(f"the disk is full ({error.filename or 'while writing'}); free some space")) from error
        raise


class _Handler(logging.Handler):
    """Writes to whatever stderr is now: `warning: text`, and with -v also when and where it comes from."""

    def __init__(self, verbosity: int) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s" if verbosity else "%(message)s"))
        self._prefix = not verbosity

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        # Nothing may be raised into the code that logs, least of all because stderr is gone.
        with contextlib.suppress(OSError, ValueError):
            click.echo(f"{record.levelname.lower()}: {text}" if self._prefix else text, err=True)


def set_up_logging(verbosity: int) -> None:
    """Logs to stderr: warnings, with -v what happens, with -vv everything of ours."""
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(old)
    root.addHandler(_Handler(verbosity))
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)]
    for name in OURS:
        logging.getLogger(name).setLevel(level)


def run_command(command: click.Command, prog_name: str) -> None:
    """Runs a command as the process and exits: the error tree's codes, 130 for Ctrl-C, quiet for a reader that left."""
    # Read when a library brings OpenMP in. Threads that spin at barriers waste whole time slices as soon as anything else
    # wants the CPU: with two other processes about, a picture of the small model took 45 s instead of 1.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            # A console of another encoding (Windows) shows a substitute for what it cannot, instead of failing.
            reconfigure(errors="replace")
    code: Any = 0
    try:
        code = command.main(prog_name=prog_name, standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more at exit; that must not meet the closed pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except click.Abort:
        click.echo("interrupted", err=True)
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    sys.exit(code if isinstance(code, int) else 0)
