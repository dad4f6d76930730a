"""A live session and a newcomer with the key, while somebody without it opens connections and says nothing.

    python benchmarks/flood.py                  10,000 half-open connections from another loopback address, over TLS

Three processes: a listener behind its gate, the flooder on 127.0.0.2, and this one, which asks for 16 KiB back every 5 ms
before and during the flood and dials once more in its middle. The flooder is held to `--rate` connections a second where
that is given: on a machine with two cores its own work is the larger disturbance.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import deque

from cake_core import security
from cake_core.errors import TransportError
from cake_core.security.keys import ClusterKey
from cake_core.transport import Address, Channel
from cake_transport_tcp.transport import TcpTransport

KEY = ClusterKey(bytes(range(32)))
BODY = bytearray(16384)
OPEN_AT_ONCE = 1000
"""Half-open connections that the flooder holds itself; the gate lets go of them much sooner."""


def anything(header: bytes, length: int) -> memoryview:  # noqa: ARG001 - the signature of Allocate
    return memoryview(bytearray(length))


def serve() -> None:
    """The process under attack: echoes whatever an authenticated peer sends."""
    gate = security.listen(TcpTransport(), Address("127.0.0.1", 0), KEY, b"listener")
    print(gate.address.port, flush=True)
    while True:
        channel, _hello = gate.accept()
        threading.Thread(target=echo, args=(channel,), daemon=True).start()


def echo(channel: Channel) -> None:
    try:
        while True:
            header, body = channel.receive(anything)
            channel.send(header, [body])
    except TransportError:
        channel.abort()


def flood(port: int, count: int, rate: float) -> None:
    """`count` connections that say nothing; prints how many a second it came to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, OPEN_AT_ONCE + 64)), hard))
    held: deque[socket.socket] = deque()
    start = time.monotonic()
    for number in range(count):
        sock = socket.socket()
        sock.bind(("127.0.0.2", 0))
        sock.connect(("127.0.0.1", port))
        held.append(sock)
        if len(held) > OPEN_AT_ONCE:
            held.popleft().close()
        if rate:
            time.sleep(max(0.0, start + (number + 1) / rate - time.monotonic()))
    print(f"{count / (time.monotonic() - start):.0f}")


def dial(port: int) -> Channel:
    return security.dial(TcpTransport(), Address("127.0.0.1", port), KEY, b"dialler", 10.0)[0]


def round_trip(channel: Channel) -> float:
    """Microseconds for 16 KiB there and back, after a pause as between two tokens."""
    time.sleep(0.005)
    start = time.perf_counter()
    channel.send(b"ask", [BODY], 10.0)
    channel.receive(anything, 10.0)
    return 1e6 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument(
        "--rate", type=float, default=0.0, metavar="PER_S", help="connections a second; 0 for as fast as it goes"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--flood", type=int, metavar="PORT", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve()
    elif given.flood:
        flood(given.flood, given.count, given.rate)
    else:
        measure(given.count, given.rate)


def measure(count: int, rate: float) -> None:
    with subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            channel = dial(port)
            calm = [round_trip(channel) for _ in range(300)][20:]
            command = [sys.executable, __file__, "--flood", str(port), "--count", str(count), "--rate", str(rate)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as flooder:
                time.sleep(0.5)
                pressed = [round_trip(channel) for _ in range(50)]
                start = time.monotonic()
                dial(port).close()
                entered = time.monotonic() - start
                while flooder.poll() is None:
                    pressed.append(round_trip(channel))
                assert flooder.stdout is not None
                pace = flooder.stdout.read().strip()
        finally:
            server.kill()
    before, during = statistics.median(calm), statistics.median(pressed)
    print(f"{count} half-open connections, {pace} a second, on {os.cpu_count()} cores")
    print(f"16 KiB there and back: {before:.0f} us before, {during:.0f} us during: {during / before:.2f} x")
    print(f"a peer with the key was in after {1e3 * entered:.0f} ms")


if __name__ == "__main__":
    main()
