"""The page in a real browser: a streamed answer, a stop, an error, a dead worker, images; and nothing from another host."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from cake_core.errors import CakeError, NodeLost, StageError
from cake_core.events import Failed, PromptDone, TokenEvent, Usage
from cake_core.links.reports import NodeStatus
from cake_core.runtime import ImageRuntime, TextRuntime

pytestmark = pytest.mark.full
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that fails its test when a script fails or a request leaves this machine."""
    context = browser.new_context(viewport={"width": 1000, "height": 700})
    opened = context.new_page()
    opened.set_default_timeout(15_000)
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda request: _check(request.url, problems))
    yield opened
    context.close()
    assert problems == []


def _check(url: str, problems: list[str]) -> None:
    if not url.startswith(("http://127.0.0.1:", "data:", "blob:")):
        problems.append(f"a request to {url}")


def ask(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.keyboard.press("Enter")


def test_an_answer_streams_and_can_be_edited_and_made_again(page: Any, start: Any, slow_runtime: TextRuntime) -> None:
    page.goto(start(slow_runtime, max_tokens=40).url)
    page.wait_for_selector("#health.ok")
    page.click("#settings-button")
    page.fill("#seed", "4")
    page.fill("#seed", "3")
    ask(page, "hello")
    page.wait_for_selector("#stop:visible")
    page.wait_for_selector("text=tokens/s")
    first = page.inner_text(".message.assistant .content")
    assert first
    page.click("text=Regenerate")
    page.wait_for_selector("#stop:visible")
    page.wait_for_selector("text=tokens/s")
    assert page.inner_text(".message.assistant .content") == first, "the seed is set, so it is the same"
    page.click("text=Edit")
    page.fill(".message textarea", "another question")
    page.click(".message button:has-text('Send')")
    page.wait_for_selector("text=tokens/s")
    assert page.inner_text(".message.user .content") == "another question"
    assert page.locator(".message").count() == 2
    assert "hello" in page.inner_text("#conversations")


def test_a_first_visit_offers_something_to_ask(page: Any, start: Any, scripted: Any) -> None:
    """And while it is answered says how fast; the ribbon under the header leads to the cluster."""

    def script() -> Iterator[Any]:
        yield PromptDone(Usage(1))
        for index in range(100):
            time.sleep(0.05)
            yield TokenEvent(65, f"word {index} ")

    runtime, engine = scripted(script=script())
    page.goto(start(runtime).url)
    page.wait_for_selector("#health.ok")
    assert "anything" in page.inner_text(".welcome h1")
    page.click(".idea >> nth=0")
    page.wait_for_selector("text=tokens a second")
    assert page.inner_text(".message.user .content") == "Why is the sky blue?"
    page.click("#stop")
    page.wait_for_selector("#send:visible")
    assert engine.cancelled.wait(10)
    assert page.locator("#ribbon span").count() == page.locator("#strip > div").count() > 0
    page.click("#ribbon")
    assert page.is_visible("#nodes")


def test_stop_ends_the_answer_on_both_sides(page: Any, start: Any, scripted: Any) -> None:
    runtime, engine = scripted(script=[PromptDone(Usage(1)), TokenEvent(65, "an answer without an end")])
    server = start(runtime)
    page.goto(server.url)
    page.wait_for_selector("#health.ok")
    ask(page, "hello")
    page.wait_for_selector("text=an answer without an end")
    page.click("#stop")
    page.wait_for_selector("#send:visible")
    assert "stopped" in page.inner_text(".message.assistant")
    assert engine.cancelled.wait(10)


def test_an_error_is_shown_and_can_be_retried(page: Any, start: Any, scripted: Any) -> None:
    script = [PromptDone(Usage(1)), TokenEvent(65, "Well"), Failed(StageError("the stage on attic failed"))]
    runtime, engine = scripted(script=script)
    page.goto(start(runtime, first_event_wait=0.0).url)
    page.wait_for_selector("#health.ok")
    ask(page, "hello")
    page.wait_for_selector(".message .error")
    assert "the stage on attic failed" in page.inner_text(".message .error")
    page.click("text=Retry")
    page.wait_for_selector(".message .error")
    page.wait_for_selector("#send:visible")
    assert len(engine.requests) == 2


def test_hostile_markdown_stays_text(page: Any, start: Any, scripted: Any) -> None:
    text = (
        "<img src=x onerror=alert(1)> **bold** `code` [bad](javascript:alert(1)) [good](https://cake.example/)\n\n"
        "![pixel](https://evil.example/x.png)\n\n```html\n<script>alert(1)</script>\n```\n- one\n- two\n\n"
        "| a | b |\n|---|---|\n| 1 | 2 |\n"
    )
    runtime, _ = scripted(text)
    page.goto(start(runtime).url)
    page.wait_for_selector("#health.ok")
    ask(page, "<b>not bold</b>")
    page.wait_for_selector("text=tokens/s")
    content = page.locator(".message.assistant .content")
    assert content.locator("img, script").count() == 0
    assert content.locator("strong").inner_text() == "bold"
    assert content.locator("li").count() == 2
    assert content.locator("td").count() == 2
    links = [link.get_attribute("href") for link in content.locator("a").all()]
    assert links == ["https://cake.example/", "https://evil.example/x.png"]
    assert "<script>alert(1)</script>" in content.inner_text()
    assert page.inner_text(".message.user .content") == "<b>not bold</b>"


class DeadWorker:
    """A cluster one of whose workers is gone."""

    def statuses(self, fresh: bool = False) -> list[NodeStatus]:
        return [NodeStatus("attic", "10.0.0.7:10128", "down", ("lm_head",), 0.0, "connection refused")]

    def missing(self) -> CakeError | None:
        return NodeLost("attic is missing: connection refused; restart it there", "attic", "10.0.0.7:10128")


def test_a_dead_worker_is_shown(page: Any, start: Any, runtime: TextRuntime) -> None:
    nodes: Any = DeadWorker()
    broken = replace(runtime, _nodes=nodes)
    page.goto(start(broken).url)
    page.wait_for_selector("#health.degraded")
    page.click("#tab-cluster")
    card = page.locator(".node.down")
    assert "attic" in card.inner_text()
    assert "connection refused" in card.inner_text()
    assert "attic is missing" in page.inner_text("#nodes > .error")


def test_a_key_is_asked_for(page: Any, start: Any, runtime: TextRuntime) -> None:
    page.goto(start(runtime, api_keys=("secret",)).url)
    page.wait_for_selector("text=key needed")
    page.fill("#api-key", "secret")
    page.keyboard.press("Tab")
    page.wait_for_selector("#health.ok")


def test_images_are_painted_and_their_seed_is_kept(page: Any, start: Any, image_runtime: ImageRuntime) -> None:
    page.goto(start(image_runtime).url)
    page.wait_for_selector("#health.ok")
    assert not page.is_visible("#tab-chat")
    page.fill("#image-prompt", "a lighthouse")
    page.fill("#image-count", "2")
    page.click("#paint")
    page.wait_for_selector("figure:nth-of-type(2) figcaption")
    page.click("figcaption button")
    assert page.input_value("#image-seed")
    page.fill("#image-size", "8000x8000")
    page.click("#paint")
    page.wait_for_selector("#image-status.error")
    assert "pixels" in page.inner_text("#image-status")


def test_it_fits_a_telephone(page: Any, start: Any, runtime: TextRuntime) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    page.goto(start(runtime).url)
    page.wait_for_selector("#health.ok")
    for tab in ("#tab-chat", "#tab-cluster"):
        page.click(tab)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
