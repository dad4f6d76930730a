"""Compiles `csrc` into the shared library that the wheel carries. Run as a script, it builds into the source tree.

Only the C compiler of the machine that makes the wheel is needed (`CC`, else cc, gcc, clang or cl); the library is loaded
with ctypes, so one wheel serves every Python of a platform. Instruction sets beyond the platform's baseline are compiled
into files of their own and chosen at run time.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script, without hatchling
    BuildHookInterface = object

ROOT = Path(__file__).parent
LIBRARY = "cake_kernels.dll" if os.name == "nt" else "libcake_kernels.so"

COMMON = ["api.c", "pool.c", "pack.c", "decode.c", "ops_scalar.c"]
X86 = {
    "ops_avx2.c": ["-mavx2", "-mfma", "-mf16c"],
    "ops_avx512.c": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c"],
    "ops_avx512_bf16.c": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"],
}
ARM = {"ops_neon.c": ["-march=armv8.2-a+dotprod"]}
X86_MSVC = {"ops_avx2.c": ["/arch:AVX2"], "ops_avx512.c": ["/arch:AVX512"], "ops_avx512_bf16.c": ["/arch:AVX512"]}
# Errors of sqrt are not looked at, and no floating-point exception is trapped: loops can be vectorised.
FLAGS = [
    "-std=c11",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
]
MSVC_FLAGS = ["/nologo", "/std:c11", "/experimental:c11atomics", "/O2", "/W3"]


class CompilerMissing(RuntimeError):
    """No C compiler was found, or it failed."""


def find_compiler() -> list[str]:
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    for name in ("cc", "gcc", "clang", "cl"):
        if shutil.which(name):
            return [name]
    raise CompilerMissing(
        "cake-kernels needs a C compiler to be built and found none (looked for CC, cc, gcc, clang, cl). Install one, or "
        "leave cake-kernels out: cake-llama works without it."
    )


def sources(machine: str, msvc: bool) -> dict[str, list[str]]:
    """Every file to compile with the flags that it alone gets."""
    extra: dict[str, list[str]] = {}
    if machine in ("x86_64", "amd64"):
        extra = X86_MSVC if msvc else X86
    elif machine in ("aarch64", "arm64"):
        extra = {name: [] for name in ARM} if msvc or sys.platform == "darwin" else ARM
    return {name: [] for name in COMMON} | extra


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the compiler, our own files
    if result.returncode:
        raise CompilerMissing(f"cake-kernels could not be compiled:\n$ {shlex.join(command)}\n{result.stdout}{result.stderr}")


def build(target: Path, machine: str | None = None) -> None:
    """Compiles the library to `target`. Raises CompilerMissing."""
    compiler = find_compiler()
    msvc = Path(compiler[0]).stem.lower() == "cl"
    flags = MSVC_FLAGS if msvc else FLAGS
    if os.name == "nt":
        flags = [flag for flag in flags if flag != "-fPIC"]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as workers:
        objects = []
        commands = []
        for name, extra in sources((machine or platform.machine()).lower(), msvc).items():
            source, compiled = ROOT / "csrc" / name, Path(folder) / f"{name}.o"
            out = [f"/Fo{compiled}"] if msvc else ["-o", str(compiled)]
            commands.append([*compiler, *flags, *extra, "-c", str(source), *out])
            objects.append(str(compiled))
        list(workers.map(run, commands))
        linked = Path(folder) / target.name
        link = (
            [f"/Fe{linked}", "/LD"]
            if msvc
            else ["-shared", "-o", str(linked), "-lm", *([] if os.name == "nt" else ["-pthread"])]
        )
        run([*compiler, *objects, *link])
        shutil.move(linked, target)


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg, misc, unused-ignore]
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        target = ROOT / "src" / "cake_kernels" / LIBRARY
        build(target)
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["artifacts"].append(f"src/cake_kernels/{LIBRARY}")


if __name__ == "__main__":
    build(ROOT / "src" / "cake_kernels" / LIBRARY)
