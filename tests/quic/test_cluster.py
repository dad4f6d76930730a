"""A toy cluster over QUIC answers as one over TCP, and both transports serve one topology with one key."""

from __future__ import annotations

import threading

import pytest
from tests.core.security_rig import heard

from cake_core.errors import AuthenticationError
from cake_core.events import TokenEvent
from cake_core.links.connect import Connector, Keyring, open_gate
from cake_core.model import LoadOptions
from cake_core.plugins import Plugins
from cake_core.requests import SamplingParams, TextRequest
from cake_core.runtime import RunSpec, open_text
from cake_core.security.keys import parse_key
from cake_core.testing.toys import write_toy_checkpoint
from cake_core.topology import parse_topology
from cake_core.transport import Address
from cake_core.worker.worker import Worker, WorkerSpec

pytest.importorskip("qh3")
KEY = parse_key("0123456789abcdef" * 4)
LAYERS = {"w0": ["model.layers.0-1"], "w1": ["model.layers.2-3"]}


class Hooks:
    """Both transports, without installed entry points."""

    def cake_register_transports(self):
        from cake_transport_quic.transport import QuicTransport
        from cake_transport_tcp.transport import TcpTransport

        return [QuicTransport(), TcpTransport()]


@pytest.fixture
def plugins():
    from cake_core.hookspecs import hookimpl

    hooks = Hooks()
    Hooks.cake_register_transports = hookimpl(Hooks.cake_register_transports)
    plugins = Plugins(entries=())
    plugins.register("both", hooks)
    return plugins


def keyring(tmp_path, key=KEY):
    return Keyring(key.text, tmp_path, insecure=False, announce=lambda made: None)


def answer(plugins, checkpoint, tmp_path, schemes):
    """Ids of a request to a cluster with a worker on each of these transports."""
    gates = {
        name: open_gate(plugins, keyring(tmp_path), Address("127.0.0.1", 0, scheme), name)
        for name, scheme in zip(LAYERS, schemes, strict=True)
    }
    entries = {name: {"host": str(gate.address), "layers": LAYERS[name]} for name, gate in gates.items()}
    topology = parse_topology(entries, "the test's topology")
    workers, threads = [], []
    for name, gate in gates.items():
        worker = Worker(plugins, WorkerSpec(checkpoint, topology, name), dial=Connector(plugins, keyring(tmp_path)).dial)
        worker.load()
        workers.append(worker)
        threads.append(threading.Thread(target=worker.serve, args=(gate,)))
        threads[-1].start()
    connector = Connector(plugins, keyring(tmp_path))
    try:
        runtime = open_text(
            plugins, RunSpec(checkpoint, topology, LoadOptions(), dial=connector.dial, wait=20.0, route="chain")
        )
        request = TextRequest(tuple(range(20)), SamplingParams(temperature=0.0), max_tokens=24, ignore_eos=True)
        found = [event.token for event in runtime.engine.generate(request) if isinstance(event, TokenEvent)]
        runtime.close()
    finally:
        for worker in workers:
            worker.shutdown()
        for thread in threads:
            thread.join(10)
    return found


def test_the_same_text_over_quic_over_tcp_and_over_both(plugins, tmp_path):
    checkpoint = write_toy_checkpoint(tmp_path / "toy")
    over_tcp = answer(plugins, checkpoint, tmp_path, ("tcp", "tcp"))
    assert len(over_tcp) == 24
    assert answer(plugins, checkpoint, tmp_path, ("quic", "quic")) == over_tcp
    assert answer(plugins, checkpoint, tmp_path, ("quic", "tcp")) == over_tcp


def test_another_key_is_refused_over_quic_as_over_tcp(plugins, tmp_path, caplog):
    gate = open_gate(plugins, keyring(tmp_path), Address("127.0.0.1", 0, "quic"), "w0")
    connector = Connector(plugins, keyring(tmp_path, parse_key("f" * 64)))
    with pytest.raises(AuthenticationError, match="cake key join"):
        connector.dial(gate.address, 10.0)
    assert heard(caplog, "does not hold this cluster's key")
    gate.close()
