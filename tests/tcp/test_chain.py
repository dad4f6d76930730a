"""A chain over real sockets: workers dial one another with the cluster's key, as the master dials them."""

from __future__ import annotations

import threading

import pytest

from cake_core.events import TokenEvent
from cake_core.hookspecs import hookimpl
from cake_core.links.connect import Connector, Keyring, open_gate
from cake_core.plugins import Plugins
from cake_core.requests import SamplingParams, TextRequest
from cake_core.runtime import RunSpec, open_text
from cake_core.security.keys import parse_key
from cake_core.testing.toys import write_toy_checkpoint
from cake_core.topology import parse_topology
from cake_core.transport import Address
from cake_core.worker.worker import Worker, WorkerSpec
from cake_transport_tcp.transport import TcpTransport

KEY = parse_key("0123456789abcdef" * 4)
LAYERS = {"w0": ["model.layers.0"], "w1": ["model.layers.1-2"], "w2": ["model.layers.3", "model.norm", "lm_head"]}


class Hooks:
    @hookimpl
    def cake_register_transports(self):
        return [TcpTransport()]


@pytest.fixture
def plugins():
    plugins = Plugins(entries=())
    plugins.register("tcp", Hooks())
    return plugins


@pytest.fixture
def keyring(tmp_path):
    return Keyring(KEY.text, tmp_path, insecure=False, announce=lambda made: None)


@pytest.fixture
def workers(plugins, keyring, tmp_path):
    """Three of them, and the topology that says where they are."""
    gates = {name: open_gate(plugins, keyring, Address("127.0.0.1", 0), name) for name in LAYERS}
    topology = parse_topology({name: {"host": str(gate.address), "layers": LAYERS[name]} for name, gate in gates.items()})
    checkpoint = write_toy_checkpoint(tmp_path / "toy")
    made, threads = [], []
    for name, gate in gates.items():
        worker = Worker(plugins, WorkerSpec(checkpoint, topology, name), dial=Connector(plugins, keyring).dial)
        worker.load()
        made.append(worker)
        threads.append(threading.Thread(target=worker.serve, args=(gate,)))
        threads[-1].start()
    yield checkpoint, topology, made
    for worker in made:
        worker.shutdown()
    for thread in threads:
        thread.join(10)


def test_the_same_text_by_either_way(plugins, keyring, workers):
    checkpoint, topology, made = workers
    request = TextRequest(tuple(range(20)), SamplingParams(temperature=0.0), max_tokens=24, ignore_eos=True)
    found = {}
    for route in ("chain", "star"):
        spec = RunSpec(checkpoint, topology, dial=Connector(plugins, keyring).dial, wait=20.0, route=route)
        runtime = open_text(plugins, spec)
        assert ("w0 -> w1 -> w2" in str(runtime.pipeline.route())) is (route == "chain")
        found[route] = [event.token for event in runtime.engine.generate(request) if isinstance(event, TokenEvent)]
        runtime.close()
    assert len(found["chain"]) == 24
    assert found["chain"] == found["star"]
    assert all(worker.sessions == 0 for worker in made)
