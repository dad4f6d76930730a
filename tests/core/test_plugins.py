"""Foreign code may fail in any way: the plugin is reported by name, and the others go on."""

from __future__ import annotations

import logging
import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import pytest

from cake_core import hookimpl
from cake_core.config import load_options
from cake_core.errors import CheckpointError, PluginError, TopologyError, UnsupportedModel
from cake_core.events import NodeEvent
from cake_core.placement import Placement, Span
from cake_core.plugins import Plugins
from cake_core.testing.memory import MemoryTransport
from cake_core.testing.toys import ToyTextBackend, toy_checkpoint, write_toy_checkpoint
from cake_core.topology import MASTER, Topology


def plugin(**hooks):
    """A plugin object with these hooks."""
    return types.SimpleNamespace(**{name: hookimpl(function) for name, function in hooks.items()})


@pytest.fixture(autouse=True)
def _warnings_are_logged():
    """The command line, which other tests run in this process, silences this logger."""
    logger = logging.getLogger("cake_core.plugins")
    level = logger.level
    logger.setLevel(logging.WARNING)
    yield
    logger.setLevel(level)


@pytest.fixture
def entry(monkeypatch):
    """Makes an entry point whose module has `source`."""
    numbers = iter(range(100))

    def make(name: str, source: str) -> EntryPoint:
        module = types.ModuleType(f"plugin_under_test_{next(numbers)}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec("from cake_core import hookimpl\n" + source, module.__dict__)  # noqa: S102 - our own text
        return EntryPoint(name, module.__name__, "cake")

    return make


MEMORY = """
@hookimpl
def cake_register_transports():
    from cake_core.testing.memory import MemoryTransport
    return [MemoryTransport()]
"""

BROKEN = {
    "does not import": (None, "ModuleNotFoundError"),
    "misspelt hook": ("@hookimpl\ndef cake_register_transport(): return []", "unknown hook"),
    "unknown argument": ("@hookimpl\ndef cake_on_event(event, colour): pass", "colour"),
    "raises": ("@hookimpl\ndef cake_register_transports(): 1 / 0", "ZeroDivisionError"),
    "gives nothing": ("@hookimpl\ndef cake_register_transports(): return None", "TypeError"),
    "gives what is no transport": ("@hookimpl\ndef cake_register_transports(): return [object()]", "AttributeError"),
    "old contract": (
        "from cake_core.testing.memory import MemoryTransport\n"
        "class Old(MemoryTransport):\n    api = 0\n    scheme = 'old'\n"
        "@hookimpl\ndef cake_register_transports(): return [Old()]",
        "written for contract 0",
    ),
    "exits": ("@hookimpl\ndef cake_register_transports(): raise RuntimeError('on purpose')", "on purpose"),
}


@pytest.mark.parametrize(("source", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_plugin_is_reported_and_the_others_go_on(entry, caplog, source, message):
    bad = EntryPoint("bad", "no_such_module_anywhere", "cake") if source is None else entry("bad", source)
    for entries in ([bad, entry("good", MEMORY)], [entry("a-good", MEMORY), bad]):
        plugins = Plugins(entries)
        assert list(plugins.transports) == ["memory"]
        assert message in plugins.reports["bad"].error
        assert "plugin bad is skipped" in caplog.text
        good = next(report for name, report in plugins.reports.items() if "good" in name)
        assert (good.error, good.provides) == (None, ["transport memory"])


def test_the_second_of_two_schemes_is_reported(entry, caplog):
    plugins = Plugins([entry("one", MEMORY), entry("two", MEMORY)])
    assert list(plugins.transports) == ["memory"]
    errors = [name for name, report in plugins.reports.items() if report.error]
    assert len(errors) == 1
    assert "registered by two plugins" in plugins.reports[errors[0]].error
    assert "is skipped" in caplog.text


def test_two_plugins_of_one_name_are_both_reported(entry):
    plugins = Plugins([entry("same", MEMORY), entry("same", MEMORY)])
    assert plugins.reports["same"].error is None
    (second,) = [report for name, report in plugins.reports.items() if name.startswith("same (")]
    assert "another plugin is named 'same'" in second.error


def test_a_broken_backend_hook_leaves_the_toys(caplog):
    plugins = Plugins(())
    plugins.register("bad", plugin(cake_register_backends=lambda: [ToyTextBackend()]))
    assert set(plugins.backends) == {"toy", "toy-image"}
    assert len([report for report in plugins.reports.values() if report.error]) == 1
    assert "registered by two plugins" in caplog.text


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({}, {"a", "b"}),
        ({"CAKE_PLUGINS": "a"}, {"a"}),
        ({"CAKE_PLUGINS": ""}, set()),
        ({"CAKE_PLUGINS_OFF": "a, x"}, {"b"}),
        ({"CAKE_PLUGINS": "a,b", "CAKE_PLUGINS_OFF": "b"}, {"a"}),
    ],
)
def test_the_environment_chooses_plugins(entry, monkeypatch, environment, names):
    for variable in ("CAKE_PLUGINS", "CAKE_PLUGINS_OFF"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert set(Plugins([entry("a", ""), entry("b", "")]).reports) - {"core"} == names


def test_registering_a_misspelt_hook_is_an_error():
    with pytest.raises(PluginError, match="cake_on_evnt"):
        Plugins(()).register("typo", plugin(cake_on_evnt=lambda event: None))


def test_a_scheme_nobody_serves_says_what_to_install():
    plugins = Plugins(())
    with pytest.raises(PluginError, match=r"no transport for carrier://; installed: none.*pip install cake-transport-carrier"):
        plugins.transport("carrier")
    memory = MemoryTransport()
    plugins = Plugins(())
    plugins.register("memory", plugin(cake_register_transports=lambda: [memory]))
    assert plugins.transport("memory") is memory


def test_a_model_nobody_serves_is_named(tmp_path):
    checkpoint = write_toy_checkpoint(tmp_path, model_type="mamba", architectures=["MambaForCausalLM"])
    with pytest.raises(UnsupportedModel, match=r"no installed backend serves architecture 'MambaForCausalLM'.*toy, toy-image"):
        Plugins(()).backend_for(checkpoint)
    assert Plugins(()).backend_for(toy_checkpoint(), "text").name == "toy"
    with pytest.raises(UnsupportedModel, match="image backends: toy-image"):
        Plugins(()).backend_for(toy_checkpoint(), "image")


def test_the_first_to_resolve_a_checkpoint_wins():
    plugins, checkpoint = Plugins(()), toy_checkpoint()
    plugins.register("mine", plugin(cake_resolve_checkpoint=lambda reference: checkpoint if reference == "mine" else None))
    assert plugins.resolve("mine") is checkpoint
    assert plugins.resolve(Path("mine")) is checkpoint, "hooks are given text"
    with pytest.raises(CheckpointError):
        plugins.resolve("/no/such/folder")


def test_a_planners_answer_is_checked():
    plugins = Plugins(())
    info = ToyTextBackend().describe(toy_checkpoint(), _options())
    assert plugins.plan(info, Topology()).nodes == (MASTER,)
    plugins.register("planner", plugin(cake_plan_placement=lambda model, topology: Placement((Span((MASTER,), ()),))))
    with pytest.raises(TopologyError, match="does not cover"):
        plugins.plan(info, Topology())


def _options():
    from cake_core.model import LoadOptions

    return LoadOptions()


def test_observers_never_disturb(caplog):
    seen, plugins, event = [], Plugins(()), NodeEvent("a", "up")
    plugins.register("bad", plugin(cake_on_event=lambda event: 1 / 0))
    plugins.register("good", plugin(cake_on_event=lambda event: seen.append(event)))
    plugins.emit(event)
    assert seen == [event]
    assert "plugin bad failed in cake_on_event" in caplog.text


def test_late_plugins_are_configured_too(monkeypatch, tmp_path):
    monkeypatch.setenv("CAKE_CONFIG_DIR", str(tmp_path))
    options, seen, plugins = load_options(2), [], Plugins(())
    plugins.register("early", plugin(cake_configure=lambda options: seen.append(options)))
    plugins.configure(options)
    plugins.register("late", plugin(cake_configure=lambda options: seen.append(options)))
    assert seen == [options, options]
    assert (options.config_dir, options.verbosity) == (Path(tmp_path), 2)


def test_commands_of_plugins_are_added(caplog):
    cli, plugins = click.Group("cake"), Plugins(())
    plugins.register("bad", plugin(cake_register_commands=lambda cli: 1 / 0))
    plugins.register("good", plugin(cake_register_commands=lambda cli: cli.add_command(click.Command("extra"))))
    plugins.add_commands(cli)
    assert "extra" in cli.commands
    assert "ZeroDivisionError" in plugins.reports["bad"].error
