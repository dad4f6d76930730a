"""Workers that no master can dial: they dial it, and once more when it asks for further links for their weights."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.core.farm import describe, refuse
from tests.core.security_rig import KEY

from cake_core.assignment import Assignment
from cake_core.bundle import layer_files
from cake_core.cli.worker import keep_joined
from cake_core.cluster import assigner
from cake_core.errors import CakeError, NodeUnreachable, StageError, TransportError
from cake_core.hookspecs import hookimpl
from cake_core.links.connect import Connector, Keyring, dial_master, open_gate
from cake_core.links.link import Link
from cake_core.model import LoadOptions
from cake_core.plugins import Plugins
from cake_core.runtime import RunSpec, TextRuntime, open_text
from cake_core.testing.cluster import FAST
from cake_core.testing.toys import write_toy_checkpoint
from cake_core.topology import parse_topology
from cake_core.transport import Address, Channel, Transport
from cake_core.weights import transfer
from cake_core.weights.store import Store
from cake_core.weights.supply import ImageSupply, LinkSource
from cake_core.wire.protocol import Type
from cake_core.worker.tenant import MOST_INVITED, Means
from cake_core.worker.worker import BareSpec, Worker

PATIENCE = 30.0
TICKET = bytes(16)


class Stop:
    """What ends `keep_joined`."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.after = self.event.wait


class Meeting:
    """A master that listens, and workers that dial it; nobody listens anywhere else."""

    def __init__(self, folder: Path, transport: Transport) -> None:
        self.folder = folder
        self.anywhere = Address("127.0.0.1", 0, transport.scheme)

        class Hooks:
            @hookimpl
            def cake_register_transports(self) -> list[Transport]:
                return [transport]

        self.plugins = Plugins(entries=())
        self.plugins.register("memory", Hooks())
        self.keyring = Keyring(KEY.text, folder, insecure=False, announce=lambda _: None)
        self.connector = Connector(self.plugins, self.keyring, ["w"], self.anywhere)
        self._ends: list[Callable[[], object]] = [self.connector.close]

    @property
    def address(self) -> Address:
        assert self.connector.address is not None
        return self.connector.address

    def dial(self, ticket: bytes = b"", name: str = "w") -> Channel:
        return dial_master(self.plugins, self.keyring, self.address, name, 5.0, ticket)

    def worker(self) -> tuple[Worker, Callable[[], None]]:
        """A bare worker that keeps joining, always with the same cache, and what ends it."""
        worker, stop = Worker(self.plugins, BareSpec("w", Means(Store(self.folder / "cache"))), FAST), Stop()
        thread = threading.Thread(target=keep_joined, args=(worker, self.dial, self.address, stop), daemon=True)
        thread.start()

        def end() -> None:
            stop.event.set()
            worker.shutdown()
            thread.join(PATIENCE)

        self._ends.append(end)
        return worker, end

    def master(self, layers: int) -> TextRuntime:
        model = write_toy_checkpoint(self.folder / "model", layers=layers)
        topology = parse_topology({"w": {"layers": [f"model.layers.0-{layers - 1}"]}})
        ways = self.connector
        spec = RunSpec(model, topology, joined=ways.joined, joined_again=ways.joined_again, wait=PATIENCE, timing=FAST)
        runtime = open_text(self.plugins, spec)
        self._ends.append(runtime.close)
        return runtime

    def close(self) -> None:
        for end in reversed(self._ends):
            end()


@pytest.fixture
def meeting(tmp_path: Path, transport: Transport, monkeypatch: pytest.MonkeyPatch) -> Iterator[Meeting]:
    monkeypatch.setattr("click.echo", lambda *_, **__: None)  # a worker says that it joined, whenever its thread does
    made = Meeting(tmp_path, transport)
    yield made
    made.close()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every piece that a master has read out, in order."""
    found: list[tuple[str, int]] = []
    real = ImageSupply.piece

    def piece(self: ImageSupply, name: str, number: int) -> tuple[bytes, bytes]:
        found.append((name, number))
        return real(self, name, number)

    monkeypatch.setattr(ImageSupply, "piece", piece)
    return found


def test_weights_come_over_as_many_links_as_where_the_master_dials(
    meeting: Meeting, sent: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No piece comes before every link has been asked for one."""
    links, changed, real = set[int](), threading.Condition(), LinkSource.fetch

    def fetch(self: LinkSource, file: str, piece: int) -> tuple[bytes, memoryview]:
        with changed:
            links.add(id(self))
            changed.notify_all()
            assert changed.wait_for(lambda: len(links) == 1 + assigner.LENT, PATIENCE), f"only {len(links)} links"
        return real(self, file, piece)

    monkeypatch.setattr(LinkSource, "fetch", fetch)
    monkeypatch.setattr(transfer, "IN_FLIGHT", transfer.SLOTS * (1 + assigner.LENT))
    worker, _ = meeting.worker()
    meeting.master(layers=8)
    assert len(sent) == len(set(sent)), "nothing is sent twice"
    assert len(worker.holders()) == 1
    until = time.monotonic() + PATIENCE
    while len(worker._guests) > 1 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(worker._guests) == 1, "the further links end with the transfer"
    assert not meeting.connector._invited


def test_a_worker_that_ends_at_half_goes_on_where_it_was(
    meeting: Meeting, sent: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assigner, "PATIENCE", 0.0)
    half, go, counted, real = threading.Event(), threading.Event(), list[str](), LinkSource.fetch

    def fetch(self: LinkSource, file: str, piece: int) -> tuple[bytes, memoryview]:
        answer = real(self, file, piece)
        counted.append(file)
        if len(counted) >= 8 and not go.is_set():
            half.set()
            assert go.wait(PATIENCE)
        return answer

    monkeypatch.setattr(LinkSource, "fetch", fetch)
    _, end = meeting.worker()
    opening = threading.Thread(target=meeting.master, args=(12,))
    opening.start()
    assert half.wait(PATIENCE)
    ending = threading.Thread(target=end)
    ending.start()
    go.set()
    ending.join(PATIENCE)
    before = len(sent)
    worker, _ = meeting.worker()
    opening.join(PATIENCE)
    assert not opening.is_alive()
    assert worker.serving is not None
    assert len(sent) > before, "it was half of it"
    assert len(sent) - len(set(sent)) <= transfer.IN_FLIGHT


def comes(meeting: Meeting, ticket: bytes, name: str = "w") -> bool:
    """Whether the master keeps a channel that shows this ticket."""
    try:
        channel = meeting.dial(ticket, name)
        channel.receive(lambda _header, length: memoryview(bytearray(length)), 5.0)
    except CakeError:
        return False
    return True


def test_a_ticket_is_good_once_and_for_its_worker_and_while_it_is_waited_for(meeting: Meeting) -> None:
    tickets: list[bytes] = []
    channels: list[Channel] = []

    def invite(ticket: bytes) -> None:
        tickets.append(ticket)
        assert not comes(meeting, ticket, "other"), "it is another worker's"
        assert not comes(meeting, bytes(16)), "nobody made that one"
        channels.append(meeting.dial(ticket))

    channel = meeting.connector.joined_again("w", invite, PATIENCE)
    channel.send(b"here", (), 5.0)
    assert channels[0].receive(lambda _header, length: memoryview(bytearray(length)), 5.0)[0] == b"here"
    assert meeting.connector.arrived() == [], "no new worker has come"
    assert not comes(meeting, tickets[0]), "a second time"
    with pytest.raises(NodeUnreachable, match="w did not dial"):
        meeting.connector.joined_again("w", tickets.append, 0.05)
    assert not comes(meeting, tickets[1]), "too late"
    for one in (channel, *channels):
        one.abort()


def test_who_leaves_while_it_is_invited_leaves_nothing(meeting: Meeting) -> None:
    """A channel that came although nobody takes it any more is ended."""
    came: list[Channel] = []

    def invite(ticket: bytes) -> None:
        came.append(meeting.dial(ticket))
        until = time.monotonic() + PATIENCE
        while ticket in meeting.connector._invited and time.monotonic() < until:
            time.sleep(0.01)
        raise StageError("gone meanwhile")

    with pytest.raises(StageError):
        meeting.connector.joined_again("w", invite, PATIENCE)
    with pytest.raises(TransportError):
        came[0].receive(lambda _header, length: memoryview(bytearray(length)), PATIENCE)


def ask(link: Link) -> Any:
    return link.ask(Type.JOIN, {"ticket": TICKET}).result(PATIENCE)


def test_who_finds_no_master_is_told_what_to_start(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("click.echo", lambda text, **_: said.append(text))
    address, stop = meeting.address, Stop()
    meeting.connector.close()  # nobody listens there any more
    monkeypatch.setattr("cake_core.cli.worker.REDIAL", (0.01, 0.01))
    dialled: list[bytes] = []

    def dial(ticket: bytes) -> Channel:
        dialled.append(ticket)
        if len(dialled) == 3:
            stop.event.set()
        return meeting.dial(ticket)

    keep_joined(Worker(meeting.plugins, BareSpec("w", Means(Store(meeting.folder / "cache"))), FAST), dial, address, stop)
    assert len(said) == 1, "and not again at each attempt"
    assert "cannot join yet" in said[0]
    assert "start the master there with --listen" in said[0]


def test_a_worker_dials_nobody_but_for_weights_that_are_on_their_way(meeting: Meeting) -> None:
    meeting.worker()
    link = Link(meeting.connector.joined("w", PATIENCE), "w", refuse, lambda _link, _error: None, FAST)
    link.start()
    with pytest.raises(StageError, match="weights that are on their way"):
        ask(link)
    link.close()


def test_a_worker_is_invited_so_often_and_not_by_who_dialled_it(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinkSource, "fetch", lambda *_: stay.wait(PATIENCE) and (b"", memoryview(b"")))
    stay = threading.Event()
    model = write_toy_checkpoint(meeting.folder / "model")
    worker = Worker(meeting.plugins, BareSpec("w", Means(Store(meeting.folder / "cache"))), FAST)
    gate = open_gate(meeting.plugins, meeting.keyring, meeting.anywhere, "w")
    threading.Thread(target=worker.serve, args=(gate,), daemon=True).start()
    channel = Connector(meeting.plugins, meeting.keyring).dial(gate.address, 5.0)
    link = Link(channel, "w", lambda *_: None, lambda *_: None, FAST)
    link.start()
    layers = ("model.layers.0",)
    files = ImageSupply().offer(layer_files(model, describe(model), layers))
    link.ask(Type.ASSIGN, Assignment("desk", "toy", "text", (layers,), LoadOptions(), files).as_fields()).result(PATIENCE)
    for _ in range(MOST_INVITED):
        with pytest.raises(StageError, match="did not join this master"):
            ask(link)
    with pytest.raises(StageError, match="there are few of them"):
        ask(link)
    link.close()
    stay.set()
    worker.shutdown()
