"""Whether cake-kernels can be used here: in a source tree its library is compiled on first use, where there is a compiler."""

from __future__ import annotations

import importlib.util
import shutil
from functools import cache
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "plugins" / "cake_kernels"


def build_hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cake_kernels_build", FOLDER / "hatch_build.py")
    if spec is None or spec.loader is None:
        raise ImportError("hatch_build.py is not where it was")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def available() -> bool:
    """False only where the library is neither installed nor can be compiled; one that fails to compile is an error."""
    hook = build_hook()
    library = FOLDER / "src" / "cake_kernels" / hook.LIBRARY
    spec = importlib.util.find_spec("cake_kernels")
    if spec is None or spec.origin is None:
        return False
    if Path(spec.origin).parent != library.parent:
        return True  # installed from a wheel
    newest = max(path.stat().st_mtime for path in (FOLDER / "csrc").iterdir())
    if library.exists() and library.stat().st_mtime >= newest:
        return True
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang", "cl")):
        return False
    hook.build(library)
    return True
