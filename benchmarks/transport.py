"""What Cake's transports cost over the bare thing beneath them, as paired differences in one run.

    python benchmarks/transport.py                     latency at decode pace and bulk, on loopback
    python benchmarks/transport.py --rtt 20 --loss 1   through a relay in user space

Two processes. In each round every kind answers one 16 KiB request, in random order, after a pause of 3 to 7 ms, so whatever
else the machine does meets all of them. `raw` is a blocking socket with sendmsg and recv_into, `ssl` an SSLSocket.

The relay delays each way by half the round trip. For a lost segment a TCP stream stands still for one more round trip, as
after a fast retransmit, but the sender is not slowed down as congestion control would; UDP datagrams are really dropped.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from relay import relay_tcp, relay_udp

from cake_core.security import make_identity
from cake_core.transport import Address, Channel, Identity, Listener

MIB = 1024 * 1024
KINDS = ("raw", "ssl", "tcp", "tcp+tls", "quic")
BASES = {"tcp": "raw", "tcp+tls": "raw", "quic": "raw"}
BULK_BASES = {"tcp": "raw", "tcp+tls": "ssl", "quic": "ssl"}
REQUEST = struct.Struct("!QQ")  # bytes there, bytes back
WARM = 20

Ask = Callable[[bytearray, int], None]
"""`ask(body, back)` sends a body and waits for so many bytes."""


def anything(header: bytes, length: int) -> memoryview:  # noqa: ARG001 - the signature of Allocate
    return memoryview(bytearray(length))


def transport_of(kind: str) -> Any:
    if kind == "quic":
        from cake_transport_quic.transport import QuicTransport

        return QuicTransport()
    from cake_transport_tcp.transport import TcpTransport

    return TcpTransport()


def identity_of(kind: str) -> Identity | None:
    return None if kind == "tcp" else make_identity()


def read_all(sock: socket.socket, view: memoryview) -> None:
    while view.nbytes:
        count = sock.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]


def write_all(sock: socket.socket, prefix: bytes | bytearray, body: memoryview) -> None:
    if isinstance(sock, ssl.SSLSocket):
        small = body.nbytes < 65536
        sock.sendall(prefix + body if small else prefix)
        if not small:
            sock.sendall(body)
        return
    sent = sock.sendmsg([prefix, body]) - len(prefix)
    if sent < body.nbytes:
        sock.sendall(body[max(0, sent) :])


def serve(kinds: list[str]) -> None:
    """The answering process."""
    ports = {}
    for kind in kinds:
        if kind in ("raw", "ssl"):
            server = socket.create_server(("127.0.0.1", 0))
            ports[kind] = server.getsockname()[1]
            threading.Thread(target=serve_socket, args=(server, kind), daemon=True).start()
        else:
            listener = transport_of(kind).listen(Address("127.0.0.1", 0, kind.partition("+")[0]), identity_of(kind))
            ports[kind] = listener.address.port
            threading.Thread(target=serve_channel, args=(listener,), daemon=True).start()
    print(json.dumps(ports), flush=True)
    sys.stdin.read()  # until the asking process is gone


def serve_socket(server: socket.socket, kind: str) -> None:
    sock, _ = server.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if kind == "ssl":
        from cake_transport_tcp.tls import listening_context

        sock = listening_context(make_identity()).wrap_socket(sock, server_side=True)
    body, prefix = bytearray(1), bytearray(REQUEST.size)
    while True:
        read_all(sock, memoryview(prefix))
        size, back = REQUEST.unpack(prefix)
        body = body if len(body) == size else bytearray(size)
        read_all(sock, memoryview(body))
        write_all(sock, bytes(prefix), memoryview(body)[:back])


def serve_channel(listener: Listener) -> None:
    channel: Channel = listener.accept()
    memory = memoryview(bytearray(1))

    def allocate(header: bytes, length: int) -> memoryview:  # noqa: ARG001
        nonlocal memory
        # Kept, as the raw server keeps its own: fresh memory costs more than the network.
        memory = memory if memory.nbytes == length else memoryview(bytearray(length))
        return memory

    while True:
        header, body = channel.receive(allocate)
        channel.send(header, [body[: REQUEST.unpack(header)[1]]])


def asker(kind: str, port: int) -> Ask:
    if kind in ("raw", "ssl"):
        return socket_asker(kind, port)
    address = Address("127.0.0.1", port, kind.partition("+")[0])
    channel = transport_of(kind).dial(address, identity_of(kind), 10.0)

    def ask(body: bytearray, back: int) -> None:
        channel.send(REQUEST.pack(len(body), back), [body], 60.0)
        channel.receive(anything, 60.0)

    return ask


def socket_asker(kind: str, port: int) -> Ask:
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if kind == "ssl":
        from cake_transport_tcp.tls import dialling_context

        sock = dialling_context().wrap_socket(sock)

    def ask(body: bytearray, back: int) -> None:
        write_all(sock, REQUEST.pack(len(body), back), memoryview(body))
        read_all(sock, memoryview(bytearray(REQUEST.size + back)))

    return ask


def seconds_for(ask: Ask, body: bytearray, back: int) -> float:
    start = time.perf_counter()
    ask(body, back)
    return time.perf_counter() - start


def latency(asks: dict[str, Ask], rounds: int) -> None:
    body = bytearray(16384)
    times: dict[str, list[float]] = {kind: [] for kind in asks}
    for _ in range(rounds + WARM):
        for kind in random.sample(list(asks), len(asks)):
            time.sleep(random.uniform(0.003, 0.007))
            times[kind].append(1e6 * seconds_for(asks[kind], body, len(body)))
    print(f"\n16 KiB there and back at decode pace, {rounds} rounds, µs")
    print(f"{'':10}{'median':>10}{'p99':>10}{'over raw, median of pairs':>30}")
    for kind, all_values in times.items():
        values = all_values[WARM:]
        over = ""
        if BASES.get(kind) in times:
            pairs = [a - b for a, b in zip(values, times[BASES[kind]][WARM:], strict=True)]
            over = f"{statistics.median(pairs):30.0f}"
        print(f"{kind:10}{statistics.median(values):10.0f}{sorted(values)[int(0.99 * len(values))]:10.0f}{over}")


def bulk(asks: dict[str, Ask], size: int, rounds: int) -> None:
    speeds: dict[str, list[float]] = {kind: [] for kind in asks}
    for _ in range(rounds):
        for kind in random.sample(list(asks), len(asks)):
            body = bytearray(size // 16 if kind == "quic" else size)
            speeds[kind].append(len(body) / MIB / seconds_for(asks[kind], body, 1))
    print(f"\nbulk, {size // MIB} MiB one way (quic a sixteenth), {rounds} rounds, MiB/s")
    for kind, values in speeds.items():
        base = BULK_BASES.get(kind, "")
        ratio = f"   {statistics.median(values) / statistics.median(speeds[base]):.2f} of {base}" if base in speeds else ""
        print(f"{kind:10}{statistics.median(values):10.0f}{ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--bulk", type=int, default=64, metavar="MIB", help="0 for none")
    parser.add_argument("--rtt", type=float, default=0.0, metavar="MS")
    parser.add_argument("--loss", type=float, default=0.0, metavar="PERCENT")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.kinds)
        return
    command = [sys.executable, __file__, "--serve", "--kinds", *given.kinds]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            ports = json.loads(server.stdout.readline())
            if given.rtt:
                delay, loss = given.rtt / 2000, given.loss / 100
                ports = {k: (relay_udp if k == "quic" else relay_tcp)(p, delay, loss) for k, p in ports.items()}
            asks = {kind: asker(kind, port) for kind, port in ports.items()}
            latency(asks, given.rounds)
            if given.bulk:
                bulk(asks, given.bulk * MIB, 5)
        finally:
            server.kill()


if __name__ == "__main__":
    main()
