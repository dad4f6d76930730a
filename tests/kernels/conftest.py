"""Every test here runs once an instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

kernels = pytest.importorskip("cake_kernels", reason="cake-kernels is not built here", exc_type=ImportError)

ISAS = ["scalar", "avx2", "avx512", "avx512-bf16", "neon"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    try:
        kernels.use_isa(name)
    except kernels.KernelError:
        pytest.skip(f"no {name} here")
    yield name
    kernels.use_isa("")
