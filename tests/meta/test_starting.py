"""What a process imports: every module alone without a warning, and `cake --help` nothing heavy."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from tests.meta.source import DISTRIBUTIONS, modules

HEAVY = {
    "torch", "numpy", "asyncio", "yaml", "litestar", "uvicorn", "msgspec", "aioquic", "qh3", "transformers", "diffusers",
    "tokenizers", "huggingface_hub", "PIL",
}  # fmt: skip

# Each module in a fork of one interpreter: without any other of ours, and without the price of starting Python and of the
# great libraries for each.
ALONE = """
import os, sys, traceback, warnings
great, *names = sys.argv[1:]
with warnings.catch_warnings(action="ignore"):
    for name in great.split():
        __import__(name)
status = 0
for name in names:
    if (child := os.fork()) == 0:
        try:
            __import__(name)
        except BaseException as error:
            if isinstance(error, ImportError) and error.name in ("cake_kernels", "triton"):
                os._exit(0)  # optional, and asked for before such a module is imported
            print(f"importing {name} alone:", file=sys.stderr)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status |= os.waitpid(child, 0)[1]
sys.exit(bool(status))
"""

GREAT = {"cake_llama": "torch", "cake_sd": "torch diffusers", "cake_emoji": "torch diffusers", "cake_server": "litestar"}
"""What a distribution depends on that takes long to import."""

HELP = """
import json, sys
sys.argv = ["cake", "--help"]
from cake_core.cli.main import main
try:
    main()
except SystemExit as error:
    assert not error.code, error.code
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def python(*arguments, **environment):
    command, environment = [sys.executable, *arguments], {**os.environ, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="imports each module in a fork")
@pytest.mark.parametrize("folder", DISTRIBUTIONS, ids=[folder.name for folder in DISTRIBUTIONS])
def test_every_module_imports_alone_without_a_warning(folder):
    if importlib.util.find_spec(folder.name) is None:
        pytest.skip(f"{folder.name} is not installed here")
    names = [module.name for module in modules(folder) if not module.name.endswith("__main__")]
    if importlib.util.find_spec("torch") is None and folder.name in ("cake_llama", "cake_sd", "cake_emoji"):
        pytest.skip("torch is not installed here")
    # Warnings of other people's packages are theirs.
    done = python("-W", "error", "-W", "ignore::DeprecationWarning:torch", "-c", ALONE, GREAT.get(folder.name, ""), *names)
    assert done.returncode == 0, done.stderr


def test_help_imports_nothing_heavy():
    done = python("-c", HELP, CAKE_PLUGINS_OFF="")
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    assert not HEAVY & set(json.loads(last))
    # The plugins did take part.
    if "server" in {entry.name for entry in entry_points(group="cake")}:
        assert "serve" in done.stdout


def test_installed_plugins_load(tmp_path):
    """What is installed here is reported without an error."""
    script = "import json; from cake_core.plugins import Plugins; p = Plugins(); p.backends; p.transports\n"
    script += "print(json.dumps({n: r.error for n, r in p.reports.items()}))"
    done = python("-c", script, CAKE_CONFIG_DIR=str(tmp_path), CAKE_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    assert {entry.name for entry in entry_points(group="cake")} <= set(reports)
    assert not {name: error for name, error in reports.items() if error}
