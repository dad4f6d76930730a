"""schemathesis over the OpenAPI document: whatever it sends, no 5xx, and answers that are what the document says."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from cake_core.runtime import ImageRuntime, TextRuntime
from cake_server.settings import Settings
from cake_server.testing import LiveServer

pytestmark = pytest.mark.full
schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402 - comes with it
from hypothesis.errors import Unsatisfiable  # noqa: E402
from schemathesis import GenerationMode, checks  # noqa: E402

ENDLESS = "/api/v1/cluster/events"
CASES = 100
"""Most for each of the about 22 operations and kind of data; those without parameters have few."""
ENOUGH = 2_000
SHORT = 4
"""Tokens of an answer, whatever a case asks for: the document is tested, not the patience."""


@pytest.fixture(scope="module")
def servers(runtime: TextRuntime, image_runtime: ImageRuntime) -> Iterator[dict[str, str]]:
    small = Settings(max_tokens=SHORT, max_pixels=128 * 128, max_steps=8)
    with LiveServer(runtime, small) as text, LiveServer(image_runtime, small) as image:
        yield {"text": text.url, "image": image.url}


def check(case: Any, servers: dict[str, str]) -> None:
    body = case.body if isinstance(case.body, dict) else {}
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(body.get(name), int):
            body[name] = min(body[name], SHORT)
    response = case.call(base_url=servers["image" if "image" in case.path else "text"], timeout=60)
    chosen = [checks.status_code_conformance]
    if response.status_code != 501:
        chosen.append(checks.not_a_server_error)
    if not response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        chosen += [checks.content_type_conformance, checks.response_schema_conformance]
    case.validate_response(response, checks=chosen)


@pytest.mark.timeout(300)
def test_no_answer_breaks_its_promise(servers: dict[str, str]) -> None:
    """With data as the document has it, and with data that it rules out."""
    document = schemathesis.openapi.from_url(f"{servers['text']}/schema/openapi.json")
    operations = [result.ok() for result in document.get_all_operations()]
    assert len(operations) >= 20
    cases = [0]
    for operation, mode in itertools.product(operations, GenerationMode):
        if operation.path == ENDLESS:
            continue

        @settings(max_examples=CASES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def run(case: Any) -> None:
            cases[0] += 1
            check(case, servers)

        with contextlib.suppress(Unsatisfiable):  # what takes nothing cannot be given something wrong
            run()
    assert cases[0] >= ENOUGH
