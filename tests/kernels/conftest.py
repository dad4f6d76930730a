"""Every test here runs once an instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.kernels.native import available

ISAS = ["scalar", "avx2", "avx512", "avx512-bf16", "neon"]

collect_ignore_glob = [] if available() else ["test_*.py"]


def pytest_report_header() -> list[str]:
    return [] if available() else ["cake-kernels: neither installed nor a C compiler to build it; tests/kernels is left out"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    import cake_kernels as kernels

    name: str = request.param
    try:
        kernels.use_isa(name)
    except kernels.KernelError:
        pytest.skip(f"no {name} here")
    yield name
    kernels.use_isa("")
