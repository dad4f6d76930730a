"""A server for clients that live in environments of their own. `CAKE_TEST_API` names one that runs already (a base URL with
its `/v1`), for instance a real model over two workers; else the toy model answers in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def base_url() -> Iterator[str]:
    if given := os.environ.get("CAKE_TEST_API"):
        yield given.rstrip("/")
        return
    from cake_core.plugins import Plugins
    from cake_core.runtime import RunSpec, open_text
    from cake_core.testing.toys import toy_checkpoint
    from cake_core.topology import Topology
    from cake_server.testing import LiveServer

    runtime = open_text(Plugins(entries=()), RunSpec(toy_checkpoint(), Topology()))
    with LiveServer(runtime) as server:
        yield f"{server.url}/v1"
    runtime.close()


@pytest.fixture(scope="session")
def model(base_url: str) -> str:
    """The name of the model that answers."""
    import json
    import urllib.request

    with urllib.request.urlopen(f"{base_url}/models", timeout=30) as response:
        name: str = json.load(response)["data"][0]["id"]
    return name
