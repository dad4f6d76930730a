"""Who may import whom: the rules of docs/architecture.md, checked on the source."""

from __future__ import annotations

import sys

import pytest
from tests.meta.source import EVERY_MODULE, Module

GROUPS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "errors filenames pending caches",
        "model requests events checkpoint transport topology png formats config",
        "placement spreading profiles planners sampling detokenize framing wire security warming",
        "hookspecs builtin plugins resolve models hub bundle split",
        "links stages",
        "weights assignment worker",
        "cluster engine runtime",
        "bench",
        "cli __main__",
        "testing",
    )
)
"""Modules of core from the bottom up: each may import from its own group and from those before it."""

UPWARD = {("cake_core.builtin", "testing"), ("cake_core.resolve", "testing"), ("cake_core.builtin", "cli")}
"""The toys and core's own commands are registered and resolved like a plugin's."""

THIRD_PARTY = {
    "cbor2": ("wire", "security", "assignment"),
    "click": ("cli",),
    "cryptography": ("security",),
    "filelock": ("hub",),
    "huggingface_hub": ("hub",),
    "pluggy": ("hookspecs", "plugins"),
    "pytest": ("testing",),
    "ifaddr": ("cluster",),
    "segno": ("cli",),
    "yaml": ("topology", "split", "cli"),
    "zeroconf": ("cluster",),
}
NETWORK = {"asyncio", "http", "select", "selectors", "socket", "socketserver", "ssl", "urllib.request"}
NETWORK_IN = {"cake_core.hub": {"urllib.request"}}

COMMANDS = ("cake_server", "cake_sd")
"""Plugins that add commands with core's own options (`cake serve`, `cake bench image`)."""
LIBRARIES = {"cake_llama": {"cake_kernels"}}
"""Distributions of the project that a plugin may use as any other library: they know nothing of Cake."""
CORE = [module for module in EVERY_MODULE if module.name.partition(".")[0] == "cake_core"]
OTHERS = [module for module in EVERY_MODULE if module.name.partition(".")[0] != "cake_core"]


def part(name: str) -> str:
    """`engine` for `cake_core.engine.text`, "" for the package itself."""
    return [*name.split("."), ""][1]


def rank(name: str) -> int | None:
    return next((index for index, group in enumerate(GROUPS) if part(name) in group), None)


def named(modules: list[Module]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("module", modules, ids=[module.name for module in modules])


@named([module for module in CORE if part(module.name)])
def test_core_imports_only_from_the_groups_before(module):
    own = rank(module.name)
    assert own is not None, f"{module.name} is in no group: say in GROUPS where it belongs"
    for imported, _ in module.imports():
        if imported.startswith("cake_core.") and imported != "cake_core.__version__":
            if (module.name, part(imported)) in UPWARD:
                continue
            other = rank(imported)
            assert other is not None, f"{imported} is in no group"
            assert other <= own, f"{module.name} imports {imported}, which is above it"


@named(CORE)
def test_core_needs_little(module):
    for imported, _ in module.imports():
        root = imported.partition(".")[0]
        if root not in sys.stdlib_module_names and root != "cake_core":
            assert part(module.name) in THIRD_PARTY.get(root, ()), f"{module.name} imports {root}"
        reached = {name for name in NETWORK if imported == name or imported.startswith(f"{name}.")}
        assert reached <= NETWORK_IN.get(module.name, set()), f"{module.name} imports {reached}"


@named(OTHERS)
def test_plugins_know_only_public_core_and_themselves(module):
    own = module.name.partition(".")[0]
    for imported, _ in module.imports():
        root, *rest = imported.split(".")
        if root.startswith("cake_"):
            assert root in {own, "cake_core"} | LIBRARIES.get(own, set()), (
                f"{module.name} imports {root}: plugins know core and nobody else"
            )
        if root == "cake_core":
            assert not any(name.startswith("_") and name != "__version__" for name in rest), f"{imported} is private"
            assert rest[:1] != ["cli"] or own in COMMANDS, f"{module.name} imports the command line"


@named([module for module in OTHERS if module.name.endswith(".hooks")])
def test_hooks_modules_are_short_and_lazy(module):
    assert len([line for line in module.file.read_text("utf-8").splitlines() if line.strip()]) <= 15
    top = {imported for imported, at_top in module.imports() if at_top}
    light = ("__future__", "collections.abc", "typing", "cake_core.hookimpl", "cake_core.hookspecs", "cake_core.model")
    light += ("cake_core.transport", "cake_core.checkpoint", "cake_core.config", "cake_core.events", "click")
    assert all(imported.startswith(light) for imported in top), f"imports before a hook is called: {top}"
