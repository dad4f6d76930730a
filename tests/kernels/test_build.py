"""The library is made by a C compiler when the wheel is built, and its absence is said plainly."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from tests.kernels.native import FOLDER, build_hook

from cake_kernels._native import load


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    return build_hook()


def test_without_a_compiler_the_build_says_what_to_do(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(hook.CompilerMissing, match=r"needs a C compiler .* cake-llama works without it"):
        hook.build(tmp_path / "library.so")


def test_a_compiler_that_fails_is_quoted(hook: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(hook.CompilerMissing, match=r"(?s)could not be compiled.*\$ false "):
        hook.build(tmp_path / "library.so")


def test_every_source_is_compiled_somewhere(hook: ModuleType) -> None:
    compiled = {name for machine in ("x86_64", "arm64") for name in hook.sources(machine, msvc=False)}
    assert compiled == {path.name for path in (FOLDER / "csrc").glob("*.c")}
    assert set(hook.sources("x86_64", msvc=True)) == set(hook.sources("x86_64", msvc=False))
    assert set(hook.sources("riscv64", msvc=False)) == {*hook.COMMON}


def test_a_missing_library_is_an_import_error(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="without its library"):
        load(tmp_path / "libcake_kernels.so")


def test_a_damaged_library_is_an_import_error(tmp_path: Path) -> None:
    path = tmp_path / "libcake_kernels.so"
    path.write_bytes(b"not a library")
    with pytest.raises(ImportError, match="reinstall cake-kernels for this machine"):
        load(path)
